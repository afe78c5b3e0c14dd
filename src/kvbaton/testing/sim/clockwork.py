"""The virtual time of a run: what happens when, in one order; named random streams; named occurrences."""

from __future__ import annotations

import heapq
import random
from collections import Counter
from collections.abc import Callable

from kvbaton.testing.sim.scenario import Trigger
from kvbaton.testing.sim.violation import Violation

Action = Callable[[], None]


class Clockwork:
    """See the module. ``trace`` is None, or takes a line for everything that happens."""

    def __init__(self, seed: int, *, tracing: bool) -> None:
        self.now = 0.0
        self.steps = 0
        self.trace: list[str] | None = [] if tracing else None
        self.faults: Counter[str] = Counter()
        self._seed = seed
        self._heap: list[tuple[float, int, Action]] = []
        self._serial = 0
        self._streams: dict[str, random.Random] = {}
        self._seen: Counter[str] = Counter()
        self._triggered: dict[tuple[str, int], list[tuple[float, Action]]] = {}

    def stream(self, name: str) -> random.Random:
        """The random numbers of one thing: the same for a seed, whatever else happens."""
        found = self._streams.get(name)
        if found is None:
            found = self._streams[name] = random.Random(f"{self._seed}/{name}")
        return found

    def at(self, when: float, action: Action) -> None:
        self._serial += 1
        heapq.heappush(self._heap, (max(when, self.now), self._serial, action))

    def after(self, seconds: float, action: Action) -> None:
        self.at(self.now + seconds, action)

    def when(self, trigger: Trigger, action: Action) -> None:
        """Let ``action`` happen as the trigger says; never, if its event does not come about."""
        if not trigger.event:
            self.at(trigger.at, action)
        else:
            self._triggered.setdefault((trigger.event, trigger.nth), []).append((trigger.delay, action))

    def end_triggers(self) -> None:
        """Nothing waits for an event any more."""
        self._triggered.clear()

    def happened(self, event: str) -> int:
        """Something with a name happened; returns how often it has by now."""
        self._seen[event] += 1
        count = self._seen[event]
        for delay, action in self._triggered.pop((event, count), ()):
            self.after(delay, action)
        return count

    def step(self) -> bool:
        """Do what is next. False if nothing is left."""
        if not self._heap:
            return False
        self.now, _, action = heapq.heappop(self._heap)
        self.steps += 1
        action()
        return True

    @property
    def next(self) -> float | None:
        return self._heap[0][0] if self._heap else None

    def tell(self, who: str, text: str) -> None:
        if self.trace is not None:
            self.trace.append(f"{self.now:11.6f} {who:<10} {text}")

    def fault(self, name: str, who: str, text: str = "") -> None:
        """A fault took effect."""
        self.faults[name] += 1
        self.tell(who, f"*** {name}{': ' + text if text else ''}")

    def violated(self, kind: str, text: str) -> Violation:
        self.tell("judge", f"!!! {kind}: {text}")
        return Violation(kind, text)
