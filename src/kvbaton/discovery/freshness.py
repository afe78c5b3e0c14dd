"""Which signed messages are new: each one repeats the time that this process has told, and counts once.

A code over a message's content (:mod:`kvbaton.discovery.access`) says who made it, not when: what was overheard could
be sent again for ever. So a sender asks for the time first and signs it with the rest. A message is refused when it
names another process's time (that of a registry before its restart), one that is too long ago, or when it has come
before. What was held back on its way, instead of overheard, still counts until its time has passed.

The time is this process's own, so clocks of different hosts need not agree.

This file must not know HTTP, secrets or what the messages say.
"""

from __future__ import annotations

import secrets
import time
from collections import OrderedDict
from collections.abc import Callable

from kvbaton.errors import OverloadedError, RegistryError

#: How long a message counts after the time that it names.
FRESH_SECONDS = 10.0
#: Most messages that are remembered, each until its time has passed.
MAX_REMEMBERED = 1 << 16
MAX_TIME_CHARACTERS = 64


class Freshness:
    """See the module.

    Args:
        clock: seconds on any clock that only goes forward.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._epoch = secrets.token_hex(8)
        self._remembered: OrderedDict[str, float] = OrderedDict()

    def now(self) -> str:
        """The time as a message is to repeat it."""
        return f"{self._epoch}.{int(self._clock() * 1e6)}"

    def take(self, told: str, code: str) -> None:
        """Let a message count. ``told``: the time it names, as its sender has signed it; ``code``: what no other has.

        Raises RegistryError for one that is not new, OverloadedError where too many have come.
        """
        now, at = self._clock(), self._seconds(told)
        while self._remembered and next(iter(self._remembered.values())) <= now:
            self._remembered.popitem(last=False)
        if at is None or not now - FRESH_SECONDS < at <= now:
            raise RegistryError(
                f"the message does not name this registry's time of the last {FRESH_SECONDS:g} s: ask for it, and send "
                f"a new one"
            )
        if code in self._remembered:
            raise RegistryError("the message has come before; each one counts once")
        if len(self._remembered) >= MAX_REMEMBERED:
            raise OverloadedError(f"{MAX_REMEMBERED} messages have come within {FRESH_SECONDS:g} s; try again later")
        self._remembered[code] = now + FRESH_SECONDS

    def _seconds(self, told: str) -> float | None:
        """The time that a message names on our clock; None for no time of ours."""
        epoch, _, text = told.partition(".")
        if epoch != self._epoch or len(told) > MAX_TIME_CHARACTERS or not (text.isascii() and text.isdecimal()):
            return None
        return int(text) / 1e6
