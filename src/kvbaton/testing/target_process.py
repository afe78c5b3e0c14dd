"""A target of writes in a process of its own, for conformance tests of transports.

``python -m kvbaton.testing.target_process TRANSPORT INSTANCE BYTES`` registers one buffer, prints a JSON line with its
metadata and address, then polls its transport and obeys lines on stdin: ``digest``, ``count VALUE``, ``close``
(the transport, not the process). It ends with its stdin. :class:`TargetProcess` is the other side of that.
"""

from __future__ import annotations

import hashlib
import json
import select
import signal
import subprocess
import sys
from types import TracebackType
from typing import Any, Self

import numpy as np

from kvbaton.layout import Region
from kvbaton.transports import make_transport

_PROGRESS_SECONDS = 0.001


class TargetProcess:
    """A running target: ``metadata``, ``address`` and ``size`` of its buffer, which is all zeros at first."""

    def __init__(self, transport: str, instance: str, size: int) -> None:
        command = [sys.executable, "-m", "kvbaton.testing.target_process", transport, instance, str(size)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.instance = instance
        self.size = size
        hello = self._answer()
        self.metadata = bytes.fromhex(hello["metadata"])
        self.address = int(hello["address"])

    def _answer(self) -> Any:
        if self._process.stdout is None:
            raise RuntimeError("the target process has no stdout")
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"target process ended with code {self._process.wait()}")
        return json.loads(line)

    def ask(self, command: str) -> Any:
        """Send a command, return the answer."""
        if self._process.stdin is None:
            raise RuntimeError("the target process has no stdin")
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()
        return self._answer()

    def stop(self) -> None:
        """SIGSTOP: it lives, but does nothing."""
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """SIGCONT."""
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self._process.kill()
        self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()


def digest(memory: np.ndarray[Any, np.dtype[np.uint8]]) -> str:
    """What the ``digest`` command answers for a buffer with these bytes."""
    return hashlib.blake2b(memory.tobytes(), digest_size=16).hexdigest()


def _obey(line: str, memory: np.ndarray[Any, np.dtype[np.uint8]]) -> Any:
    command, _, argument = line.strip().partition(" ")
    if command == "digest":
        return digest(memory)
    if command == "count":
        return int((memory == int(argument)).sum())
    raise ValueError(f"unknown command {line!r}")


def main(name: str, instance: str, size: int) -> None:
    """Be the target until stdin ends."""
    memory = np.zeros(size, dtype=np.uint8)
    transport = make_transport(name, instance)
    transport.register([Region(memory.ctypes.data, memory.nbytes)])
    print(json.dumps({"metadata": transport.metadata().hex(), "address": memory.ctypes.data}), flush=True)
    is_open = True
    while True:
        if is_open:
            transport.progress()
        if not select.select([sys.stdin], [], [], _PROGRESS_SECONDS)[0]:
            continue
        line = sys.stdin.readline()
        if not line:
            break
        if line.strip() == "close":
            transport.close()
            is_open = False
        print(json.dumps("closed" if line.strip() == "close" else _obey(line, memory)), flush=True)
    transport.close()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
