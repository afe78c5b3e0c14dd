"""How far the answer to one request has come, in the words of the decode servers that gave it.

This file must not know HTTP, tokens or workers.
"""

from __future__ import annotations

import secrets
import time
import uuid

import msgspec
from msgspec import Raw

from kvbaton.serving.server.journal import MAX_JOURNAL_BYTES, Journal, encoded


class Progress:
    """The records of what has been passed on, as they came, and what no attempt may differ in: see
    :mod:`kvbaton.serving.server.journal`. Beyond :data:`MAX_JOURNAL_BYTES` they are given up."""

    def __init__(self) -> None:
        self._head = Journal(id=uuid.uuid4().hex, created=int(time.time()), seed=secrets.randbits(63))
        self._records: list[bytes] = []
        self._bytes = 0
        self.count = 0

    @property
    def can_go_on(self) -> bool:
        """Whether another pair can take the request over from here."""
        return self._bytes <= MAX_JOURNAL_BYTES

    def add(self, record: bytes) -> None:
        self.count += 1
        self._bytes += len(record) + 1
        if self.can_go_on:
            self._records.append(record)
        else:
            self._records.clear()

    def field(self, sources: tuple[str, ...] = ()) -> Raw:
        """The value of ``kvbaton_journal`` for the next attempt; ``sources``: the ranks that hand the answer on."""
        return encoded(msgspec.structs.replace(self._head, sources=sources), self._records)

    def __repr__(self) -> str:
        return f"<Progress {self.count} records, {self._bytes} bytes>"
