"""The address spaces that a process of this host can write: its own, and those of others by way of the kernel.

Whoever can be written is recognised by a random word in its memory. Addresses and lengths are in bytes.
"""

from __future__ import annotations

import ctypes
import errno
import os
import weakref
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from kvbaton.errors import TransportError

#: Most pieces the kernel takes in one call (IOV_MAX).
PIECES_PER_CALL = 1024
#: Length of the word that whoever can be written is recognised by.
NONCE_BYTES = 16

Vector = NDArray[np.int64]
#: What of this process can be written, by its word.
OPEN_HERE: weakref.WeakValueDictionary[bytes, object] = weakref.WeakValueDictionary()

_libc = ctypes.CDLL(None, use_errno=True)
_libc.process_vm_readv.restype = ctypes.c_ssize_t
_libc.process_vm_writev.restype = ctypes.c_ssize_t


def coalesce(source: Vector, target: Vector, length: Vector) -> tuple[Vector, Vector, Vector]:
    """Merge neighbours that are adjacent on both sides; addresses and lengths in bytes, order kept."""
    joined = (source[1:] == source[:-1] + length[:-1]) & (target[1:] == target[:-1] + length[:-1])
    first = np.flatnonzero(np.concatenate(([True], ~joined)))
    return source[first], target[first], np.add.reduceat(length, first)


class AddressSpace(Protocol):
    """One that can be written. ``how``: the way bytes go there, for people."""

    how: str

    def alive(self) -> bool:
        """Whether it is still there. Raises TransportError where the kernel does not let us look."""

    def write(self, source: Vector, target: Vector, length: Vector) -> None:
        """Copy pieces from our memory into it. Raises OSError."""


class SameProcess:
    """Ours."""

    def __init__(self, nonce: bytes) -> None:
        self.how = "memmove (same process)"
        self._nonce = nonce

    def alive(self) -> bool:
        return self._nonce in OPEN_HERE

    def write(self, source: Vector, target: Vector, length: Vector) -> None:
        for piece in zip(target.tolist(), source.tolist(), length.tolist(), strict=True):
            ctypes.memmove(*piece)


class OtherProcess:
    """That of another process, whose word is at ``cell``."""

    def __init__(self, pid: int, cell: int, nonce: bytes) -> None:
        self.how = f"process_vm_writev to pid {pid}"
        self._pid = pid
        self._cell = cell
        self._nonce = nonce

    def alive(self) -> bool:
        seen = ctypes.create_string_buffer(NONCE_BYTES)
        here = np.array([[ctypes.addressof(seen), NONCE_BYTES]], dtype=np.int64)
        there = np.array([[self._cell, NONCE_BYTES]], dtype=np.int64)
        try:
            return self._call(_libc.process_vm_readv, here, there) == NONCE_BYTES and seen.raw == self._nonce
        except OSError as error:
            if error.errno in (errno.ESRCH, errno.EFAULT):
                return False
            raise TransportError(f"the kernel does not let us reach pid {self._pid}: {error.strerror}") from error

    def write(self, source: Vector, target: Vector, length: Vector) -> None:
        here, there = np.stack([source, length], axis=1), np.stack([target, length], axis=1)
        at = 0
        while at < len(here):
            until = at + PIECES_PER_CALL
            wrote = self._call(_libc.process_vm_writev, here[at:until], there[at:until])
            ends = np.cumsum(here[at:until, 1])
            whole = int(np.searchsorted(ends, wrote, side="right"))
            partly = wrote - (int(ends[whole - 1]) if whole else 0)
            at += whole
            if partly:  # the kernel stops at 2 GiB, or where memory is missing; the next call tells which
                for side in (here, there):
                    side[at] += (partly, -partly)

    def _call(self, function: ctypes._NamedFuncPointer, here: Vector, there: Vector) -> int:
        done = int(
            function(
                ctypes.c_int(self._pid),
                ctypes.c_void_p(here.ctypes.data),
                ctypes.c_ulong(len(here)),
                ctypes.c_void_p(there.ctypes.data),
                ctypes.c_ulong(len(there)),
                ctypes.c_ulong(0),
            )
        )
        if done < 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        return done
