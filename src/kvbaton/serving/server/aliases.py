"""The ids that clients gave their requests (``rid``), and who may end a request by one.

Rules:

- An id is a name for its client only. Inside, every request has an id of its own that nobody chooses, so two clients
  may use one name, and neither learns of the other.
- It is scoped to the API key that came with the request (the ``Authorization`` header; which keys are good is for the
  proxy in front to say). Whoever shows the same key and the same id ends the request, and all of that name.
- Something in that must be unguessable: a key, or an id, of at least :data:`MIN_PROOF_CHARACTERS` characters. An id of
  SGLang's clients (``uuid.uuid4().hex``) is, so they need no key. A short id without a key names an answer, and is
  refused for ending one.
- An operator, who shows the shared secret, ends requests of any key.

This file must not know engines or workers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from kvbaton.errors import ConfigError

#: Shortest key, or id, that proves anything: 128 random bits in base64.
MIN_PROOF_CHARACTERS = 22


class Aliases:
    """The live requests of one server, by key and id."""

    def __init__(self) -> None:
        self._ends: dict[tuple[str, str], list[Callable[[], None]]] = {}

    @contextmanager
    def named(self, key: str | None, rid: str, end: Callable[[], None]) -> Iterator[None]:
        """For the length of the block ``end`` is what ends the request that its client calls ``rid``."""
        name = (_scope(key), rid)
        self._ends.setdefault(name, []).append(end)
        try:
            yield
        finally:
            self._ends[name].remove(end)
            if not self._ends[name]:
                del self._ends[name]

    def end(self, key: str | None, rid: str) -> None:
        """End what its own client calls ``rid``, if there is such a request.

        Raises ConfigError where neither the key nor the id proves that it is he, whether there is one or not.
        """
        if max(len(key or ""), len(rid)) < MIN_PROOF_CHARACTERS:
            raise ConfigError(
                f"rid: neither this id nor an API key proves whose request it is; one of them must have at least "
                f"{MIN_PROOF_CHARACTERS} characters that nobody guesses, as uuid.uuid4().hex, or close the connection"
            )
        self._call(self._ends.get((_scope(key), rid), ()))

    def end_for_operator(self, rid: str) -> None:
        """End what any client calls ``rid``."""
        for name, ends in list(self._ends.items()):
            if name[1] == rid:
                self._call(ends)

    def __len__(self) -> int:
        return sum(map(len, self._ends.values()))

    @staticmethod
    def _call(ends: list[Callable[[], None]] | tuple[()]) -> None:
        for end in list(ends):
            end()


def _scope(key: str | None) -> str:
    """What is kept of a key: not the key."""
    return "" if key is None else hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()
