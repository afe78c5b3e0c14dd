"""What UCX says about the way it moves bytes: its protocol tables, captured and parsed.

UCX prints, with ``UCX_PROTO_INFO=y``, a table for each operation when it first picks a protocol for it on a
connection. It prints to one log file per process, opened when the library is loaded. Here that file is
anonymous memory, so that nothing is left on disk even after SIGKILL.

Rules:
- A user who set one of the variables below reads UCX's log himself: then nothing is captured.
- The variables are in the environment only while an agent is created; children never inherit them.
- Captured warnings are passed on to :mod:`logging`, never swallowed.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_logger = logging.getLogger(__name__)

#: UCX cuts the names of agents in its log to this many characters.
NAME_CHARACTERS = 31
_OURS = ("UCX_PROTO_INFO", "UCX_LOG_FILE")
_USERS = (*_OURS, "UCX_LOG_LEVEL")
_PREFIX = re.compile(r"^\[[\d.]+\] \[[^\]]*\]\s*")
_TITLE = re.compile(r"^\| (?P<agent>.+) (?P<scope>\S+) cfg#\d+ +\|$")
_OPERATION = re.compile(r"^\| (?P<operation>remote memory write by .*?) +\|$")
_RANGE = re.compile(r"^\| +\d+(?:\.\.\w+)? +\|[^|]*\| *(?P<way>[^|]*?) *\|$")
_COMPLAINT = re.compile(r"\bUCX\s+(?P<level>WARN|ERROR|FATAL)\s+(?P<text>.*)$")


@dataclass(frozen=True, slots=True)
class Chosen:
    """How one agent writes over one kind of connection: ``ways`` by rising size, ``at`` a position in the log."""

    agent: str
    scope: str
    ways: tuple[str, ...]
    at: int


class UcxLog:
    """The UCX log of this process. ``active`` is false where it can't be, or must not be, captured."""

    def __init__(self) -> None:
        self.active = not any(name in os.environ for name in _USERS) and not _ucx_is_loaded()
        self._file = os.memfd_create("kvbaton-ucx-log") if self.active else -1
        self._passed_on = 0

    def close(self) -> None:
        """Of no use any more: UCX was not loaded. Idempotent."""
        if self._file >= 0:
            os.close(self._file)
        self.active, self._file = False, -1

    @contextlib.contextmanager
    def capturing(self) -> Iterator[None]:
        """Have the variables in the environment while an agent is created."""
        mine = self.active and not any(name in os.environ for name in _USERS)
        if mine:
            # By our pid, not "self": a child that inherits this by a race must not open its own descriptor.
            os.environ.update(UCX_PROTO_INFO="y", UCX_LOG_FILE=f"/proc/{os.getpid()}/fd/{self._file}")
        try:
            yield
        finally:
            for name in _OURS if mine else ():
                os.environ.pop(name, None)

    def position(self) -> int:
        """Bytes logged so far."""
        if not self.active:
            return 0
        ctypes.CDLL(None).fflush(None)  # UCX's stream is block buffered, and only it knows where it is
        return os.fstat(self._file).st_size

    def chosen(self, agent: str) -> list[Chosen]:
        """How ``agent`` writes, one item per table printed so far, oldest first."""
        return [table for table in _tables(self._read(0)) if table.agent == agent[:NAME_CHARACTERS]]

    def pass_on(self) -> None:
        """Give warnings that came since the last call to :mod:`logging`."""
        text = self._read(self._passed_on)
        whole = text.rfind(b"\n") + 1
        self._passed_on += whole
        for line in text[:whole].decode(errors="replace").splitlines():
            if found := _COMPLAINT.search(line):
                level = logging.WARNING if found["level"] == "WARN" else logging.ERROR
                _logger.log(level, "UCX: %s", found["text"])

    def _read(self, start: int) -> bytes:
        size = self.position()
        return os.pread(self._file, size - start, start) if size > start else b""


def _ucx_is_loaded() -> bool:
    """Whether UCX opened its log already, elsewhere."""
    return "/libucs" in Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")


def _tables(log: bytes) -> Iterator[Chosen]:
    """The tables of remote writes in a log."""
    title: re.Match[str] | None = None
    writing = False
    ways: list[str] = []
    at = start = 0
    for raw in log.splitlines(keepends=True):
        line = _PREFIX.sub("", raw.decode(errors="replace").rstrip())
        if match := _TITLE.match(line):
            if title is not None and ways:
                yield Chosen(title["agent"], title["scope"], tuple(dict.fromkeys(ways)), start)
            title, writing, ways, start = match, False, [], at
        elif _OPERATION.match(line):
            writing = True
        elif writing and (match := _RANGE.match(line)):
            ways.append(match["way"])
        at += len(raw)
    if title is not None and ways:
        yield Chosen(title["agent"], title["scope"], tuple(dict.fromkeys(ways)), start)
