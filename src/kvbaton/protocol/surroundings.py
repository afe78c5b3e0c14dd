"""What sessions, transfers and rooms stand on: the time of this event, the effects so far, timers, story, counters.

One object per core. It is how every part speaks to the world; none of them keeps effects or time of its own.
"""

from __future__ import annotations

import itertools
from collections import Counter

from kvbaton.control.base import LinkId
from kvbaton.protocol.allowance import Allowance
from kvbaton.protocol.effects import Effect, Send
from kvbaton.protocol.messages import AnyMessage, encode
from kvbaton.protocol.room import SourceRoom, TargetRoom
from kvbaton.protocol.session import Identity, Session
from kvbaton.protocol.settings import Settings
from kvbaton.protocol.story import Story
from kvbaton.protocol.timers import Timers
from kvbaton.protocol.transfer import Transfer

Timed = Transfer | Session | SourceRoom | TargetRoom


class Surroundings:
    """See the module."""

    def __init__(self, identity: Identity, settings: Settings) -> None:
        self.identity = identity
        self.settings = settings
        self.now = 0.0
        self.counters: Counter[str] = Counter()
        self.timers: Timers[Timed] = Timers()
        self.story = Story()
        self.unasked = Allowance()
        self.serial = itertools.count(1)
        self._effects: list[Effect] = []

    @property
    def instance(self) -> str:
        return self.identity.instance

    def emit(self, effect: Effect) -> None:
        self._effects.append(effect)

    def send_on(self, link: LinkId, message: AnyMessage) -> None:
        self._effects.append(Send(link, encode(message)))

    def take_effects(self) -> list[Effect]:
        effects, self._effects = self._effects, []
        return effects

    def tell(self, room: int, text: str) -> None:
        self.story.tell(room, self.now, text)
