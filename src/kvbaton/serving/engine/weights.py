"""What identifies the weights in a directory: a digest over every byte of every tensor.

Each tensor is hashed by itself and taken by name, dtype and shape, so it does not matter how a checkpoint is spread
over files. Sampling would not do: a merged adapter or a fine-tune may leave the first and last kilobytes of a file as
they were, and a cache that the wrong weights have filled gives fluent wrong answers.

Hashing is remembered by file (device, inode, size, time of the last change of content and of anything) in the user's
cache directory, so that a restart costs nothing. The layout of a safetensors file: 8 bytes, the length of the header,
little endian; the header, JSON of ``{name: {dtype, shape, data_offsets}}``; the data.
https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import hashlib
import logging
import mmap
import os
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Lock

import msgspec
from msgspec import Struct

from kvbaton.errors import ConfigError

MAX_HEADER_BYTES = 100 << 20
#: Largest piece that is hashed at a time: how often progress can be told.
PIECE_BYTES = 64 << 20
PROGRESS_SECONDS = 5.0
#: Files that are remembered, the latest.
MAX_REMEMBERED = 1_024
#: A file younger than this may change again within the resolution of its times: it is not remembered.
SETTLED_SECONDS = 2.0
_log = logging.getLogger("kvbaton.weights")


class _Tensor(Struct, frozen=True):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


class Digest(Struct, frozen=True, array_like=True):
    """One tensor. A file that is no safetensors counts as one, of dtype ``file``."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    sha256: str


def weights_digest(path: Path) -> str:
    """Hex digest of all weights in a directory. Raises ConfigError for files that are not what their name says."""
    files = weight_files(path)
    remembered = Remembered.load()
    known = {file: remembered.of(file) for file in files}
    missing = [file for file, digests in known.items() if digests is None]
    if missing:
        with Hashing(sum(file_state(file)[2] for file in missing)) as hashing:
            for file in missing:
                state = file_state(file)
                known[file] = hashing.digests(file)
                remembered.add(file, state, known[file] or ())
        remembered.save()
    found = [tensor for digests in known.values() for tensor in digests or ()]
    names = [tensor.name for tensor in found]
    if len(set(names)) != len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ConfigError(f"{path}: several files hold {', '.join(twice[:3])}; keep one checkpoint to a directory")
    return hashlib.sha256(msgspec.msgpack.encode(sorted(found, key=lambda tensor: tensor.name))).hexdigest()[:32]


def weight_files(path: Path) -> list[Path]:
    """The files that transformers loads: what the index names, or the one with the usual name, or all there are;
    safetensors before what torch has saved. Raises ConfigError for an index that cannot be read."""
    for usual, pattern in (("model.safetensors", "*.safetensors"), ("pytorch_model.bin", "*.bin")):
        index = path / f"{usual}.index.json"
        if index.is_file():
            try:
                names = msgspec.json.decode(index.read_bytes(), type=_Index).weight_map.values()
            except (OSError, msgspec.MsgspecError) as error:
                raise ConfigError(f"{index} cannot be read: {error}") from error
            return [path / name for name in sorted(set(names))]
        files = [path / usual] if (path / usual).is_file() else sorted(path.glob(pattern))
        if files:
            return files
    return []


class _Index(Struct, frozen=True):
    weight_map: dict[str, str]


class Hashing:
    """Hashes on all cores, and tells how far it is. A context manager."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._done = 0
        self._lock = Lock()
        self._told_at = time.monotonic()
        self._pool = ThreadPoolExecutor(os.cpu_count() or 1, "kvbaton-hash")

    def __enter__(self) -> Hashing:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def digests(self, file: Path) -> tuple[Digest, ...]:
        """Of every tensor in a file."""
        size = file.stat().st_size
        if not size:
            raise ConfigError(f"{file} is empty; fetch the checkpoint again")
        with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            if file.suffix != ".safetensors":
                return (Digest(file.name, "file", (size,), self._hash(data, 0, size)),)
            base, tensors = _header(file, data)
            hashes = self._pool.map(
                lambda tensor: self._hash(data, base + tensor.data_offsets[0], base + tensor.data_offsets[1]),
                tensors.values(),
            )
            return tuple(
                Digest(name, tensor.dtype, tensor.shape, sha256)
                for (name, tensor), sha256 in zip(tensors.items(), hashes, strict=True)
            )

    def _hash(self, data: mmap.mmap, start: int, stop: int) -> str:
        digest = hashlib.sha256()
        with memoryview(data) as whole:
            for at in range(start, stop, PIECE_BYTES):
                with whole[at : min(at + PIECE_BYTES, stop)] as piece:
                    digest.update(piece)
                    self._tell(len(piece))
        return digest.hexdigest()

    def _tell(self, count: int) -> None:
        with self._lock:
            self._done += count
            now = time.monotonic()
            if now - self._told_at < PROGRESS_SECONDS:
                return
            self._told_at = now
            done = self._done
        _log.info("identifying the weights: %.1f of %.1f GB", done / 1e9, self._total / 1e9)


def _header(file: Path, data: mmap.mmap) -> tuple[int, dict[str, _Tensor]]:
    """Where the data of a safetensors file begins, and its tensors. Raises ConfigError."""
    length = int.from_bytes(data[:8], "little")
    base = 8 + length
    try:
        if len(data) < 8 or length > MAX_HEADER_BYTES or base > len(data):
            raise ConfigError("its header is longer than it may be")
        fields = msgspec.json.decode(data[8:base], type=dict[str, msgspec.Raw])
        fields.pop("__metadata__", None)
        tensors = {name: msgspec.json.decode(raw, type=_Tensor) for name, raw in fields.items()}
        for name, tensor in tensors.items():
            start, stop = tensor.data_offsets
            if not 0 <= start <= stop <= len(data) - base:
                raise ConfigError(f"tensor {name} lies outside of it")
    except (msgspec.MsgspecError, UnicodeDecodeError, ConfigError) as error:
        raise ConfigError(f"{file} is no safetensors file: {error}; fetch the checkpoint again") from error
    return base, tensors


class _Entry(Struct, frozen=True, array_like=True):
    """What was hashed: ``state`` as :func:`file_state` gives it."""

    path: str
    state: tuple[int, ...]
    digests: tuple[Digest, ...]


class Remembered:
    """What was hashed before, by file."""

    def __init__(self, entries: Iterable[_Entry] = ()) -> None:
        self._entries = {entry.path: entry for entry in entries}

    @staticmethod
    def file() -> Path:
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        return Path(base).expanduser() / "kvbaton" / "weights.msgpack"

    @classmethod
    def load(cls) -> Remembered:
        """Nothing, where it cannot be read."""
        try:
            return cls(msgspec.msgpack.decode(cls.file().read_bytes(), type=list[_Entry]))
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
            return cls()

    def of(self, file: Path) -> tuple[Digest, ...] | None:
        entry = self._entries.get(str(file.resolve()))
        return entry.digests if entry is not None and entry.state == file_state(file) else None

    def add(self, file: Path, state: tuple[int, ...], digests: tuple[Digest, ...]) -> None:
        """``state``: of the file before it was hashed."""
        path = str(file.resolve())
        self._entries.pop(path, None)
        self._entries[path] = _Entry(path, state, digests)

    def save(self) -> None:
        """Replace the file as a whole; of files that may just be changing nothing is written down."""
        young = time.time_ns() - round(SETTLED_SECONDS * 1e9)
        kept = [entry for entry in self._entries.values() if max(entry.state[-2:]) < young][-MAX_REMEMBERED:]
        target = self.file()
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=target.parent)
            try:
                with os.fdopen(handle, "wb") as stream:
                    stream.write(msgspec.msgpack.encode(kept))
                Path(name).replace(target)
            except OSError:
                with suppress(OSError):
                    Path(name).unlink()
                raise
        except OSError as error:
            _log.info("what identifies the weights cannot be remembered: %s", error)


def file_state(file: Path) -> tuple[int, ...]:
    """What changes when a file does. Raises ConfigError where it is missing."""
    try:
        stat = file.stat()
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}; fetch the checkpoint again") from error
    return (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
