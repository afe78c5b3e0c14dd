"""What the parts of one core share: the time of this event, effects so far, timers, trace, counters, serial numbers.

One object per core. It is how sessions, transfers and rooms speak to the world and find each other; none of them keeps
effects or time of its own.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING

from kvbaton.control.base import LinkId
from kvbaton.protocol.allowance import Allowance
from kvbaton.protocol.effects import Effect, Send
from kvbaton.protocol.events import WriteId
from kvbaton.protocol.messages import AnyMessage, Role, encode
from kvbaton.protocol.settings import Settings
from kvbaton.protocol.timers import Timers
from kvbaton.protocol.trace import Trace

if TYPE_CHECKING:
    from kvbaton.protocol.session import Identity, Session
    from kvbaton.protocol.transfer import Transfer

_TIMERS = ("deadline", "retry", "heartbeat", "forget")

#: About how many messages a second all transfers with one peer repeat together, and how often they ask it. A peer that
#: is slow is made slower by what it is told again: thousands of rooms that wait for its word would otherwise fill its
#: inbox, and its word, and its pings, come behind all of that.
REPEATS_PER_SECOND = 500


class Context:
    """See the module.

    ``session_link``, ``session_changed``, ``session_needed`` and ``queued`` are set by whoever keeps the sessions and
    the rooms: the link of a peer's session, what follows a session's new state, whether a room or a lease depends on
    one, and the rooms that our engine will have from its peer once it has memory for them.
    """

    def __init__(self, identity: Identity, settings: Settings) -> None:
        self.identity = identity
        self.settings = settings
        self.now = 0.0
        self.counters: Counter[str] = Counter()
        self.timers: Timers[Hashable] = Timers()
        self.trace = Trace()
        self.unasked = Allowance()
        self.writes: dict[WriteId, Transfer] = {}  #: asked for and not settled
        self.session_link: Callable[[str, Role], LinkId | None] = lambda _peer, _role: None
        self.session_changed: Callable[[Session], None] = lambda _session: None
        self.session_needed: Callable[[Session], bool] = lambda _session: False
        self.queued: Callable[[Session], tuple[int, ...]] = lambda _session: ()
        self._repeating: dict[str, set[object]] = {}  # transfers that repeat a message until it is answered, by peer
        self._asking: dict[str, set[object]] = {}  # and those that ask how theirs fares
        self._serial = itertools.count(1)
        self._effects: list[Effect] = []

    @property
    def instance(self) -> str:
        return self.identity.instance

    def mint(self) -> int:
        """A number that grows."""
        return next(self._serial)

    def mint_write(self, transfer: Transfer) -> WriteId:
        write = WriteId(self.mint())
        self.writes[write] = transfer
        return write

    def emit(self, effect: Effect) -> None:
        self._effects.append(effect)

    def send_on(self, link: LinkId, message: AnyMessage) -> None:
        self._effects.append(Send(link, encode(message)))

    def send(self, transfer: Transfer, message: AnyMessage) -> None:
        """To a transfer's peer, if there is a session with it."""
        link = self.session_link(transfer.peer, transfer.role)
        if link is not None:
            self.send_on(link, message)

    def take_effects(self) -> list[Effect]:
        effects, self._effects = self._effects, []
        return effects

    def set_timer(self, owner: Session | Transfer, name: str, when: float) -> None:
        self.timers.set(owner, name, when)

    def repeat_later(self, transfer: Transfer, now: float, pause: float) -> None:
        """A transfer's last message is due again after ``pause`` seconds, later where many wait for the same peer."""
        self._in_turn(self._repeating, transfer, now, pause)

    def ask_later(self, transfer: Transfer, now: float, pause: float) -> None:
        """It asks after ``pause`` seconds, later where many do. Who only asks holds up none that has to be heard."""
        self._in_turn(self._asking, transfer, now, pause)

    def _in_turn(self, of_peers: dict[str, set[object]], transfer: Transfer, now: float, pause: float) -> None:
        waiting = of_peers.setdefault(transfer.peer, set())
        waiting.add(transfer)
        self.set_timer(transfer, "retry", now + max(pause, len(waiting) / REPEATS_PER_SECOND))

    @property
    def repeating(self) -> int:
        """Transfers that repeat a message until it is answered, or ask."""
        return sum(map(len, (*self._repeating.values(), *self._asking.values())))

    def cancel_timers(self, owner: Session | Transfer) -> None:
        """All of a session's, or of a transfer's."""
        self.timers.cancel(owner, *_TIMERS)
        for of_peers in (self._repeating, self._asking):
            waiting = of_peers.get(owner.peer)
            if waiting is not None:
                waiting.discard(owner)
                if not waiting:
                    del of_peers[owner.peer]

    def record(self, room: int, text: str) -> None:
        """Something happened to a room."""
        self.trace.record(room, self.now, text)
