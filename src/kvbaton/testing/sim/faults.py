"""The faults of a scenario, aimed at the moments in which something is under way."""

from __future__ import annotations

import math
import random

from kvbaton.testing.sim.scenario import (
    Fault,
    LinkFault,
    MessageFault,
    Noise,
    PrepareFault,
    RankFault,
    SimGroup,
    Trigger,
    WriteFault,
)

MESSAGES = (
    "hello",
    "verdict",
    "open",
    "opened",
    "done",
    "close",
    "failed",
    "abort",
    "drained",
    "query",
    "forgotten",
    "stranger",
    "goodbye",
    "ping",
    "pong",
)
#: Messages that say something about a transfer: what most faults aim at.
OUTCOMES = ("open", "opened", "done", "close", "failed", "abort", "drained", "query", "forgotten")
WRITE_FAULTS = (
    "raises",
    "raises_and_lands",
    "breaks",
    "breaks_and_lands",
    "never_settles",
    "lands_never_settles",
    "late",
    "late",
    "scatter",
)


def draw_faults(
    rng: random.Random, sources: tuple[SimGroup, ...], targets: tuple[SimGroup, ...], theme: str
) -> tuple[Fault, ...]:
    ranks = [g.rank(n) for g in (*sources, *targets) for n in range(g.size)]
    made: list[Fault] = []
    if theme == "storm" and rng.random() < 0.05:  # an engine that is shut down while its last words get lost
        made.append(RankFault(kind="close", rank=rng.choice(ranks), when=_trigger(rng)))
        made.append(MessageFault(kind="drop", message=rng.choice(("abort", "failed")), count=40))
    if theme in ("reuse", "amnesia", "policy"):
        for _ in range(rng.randint(1, 4)):
            made.append(_lingering(rng, theme))
    if theme == "stalls" and rng.random() < 0.3:
        return _last_words(rng, sources, targets)
    if theme == "stalls":
        for _ in range(rng.randint(1, 2)):
            when = _trigger(rng)
            made.append(RankFault(kind="pause", rank=rng.choice(ranks), when=when, seconds=rng.uniform(4.0, 45.0)))
        made.append(WriteFault(kind=rng.choice(("never_settles", "late")), count=3, seconds=rng.uniform(5.0, 40.0)))
    if theme == "policy" and rng.random() < 0.5:
        made += _late_welcome(rng)
    if theme == "amnesia" and rng.random() < 0.5:
        made += _late_confession(rng)
    elif theme in ("amnesia", "policy"):
        made.append(_cut(rng, sources, targets, rng.uniform(1.0, 40.0)))
    most = {"reuse": 1, "rivals": 1, "stalls": 1, "both": 2, "amnesia": 2, "policy": 2}.get(theme, 6)
    count = min(most, rng.choices((1, 2, 3, 4, 6), (30, 30, 20, 12, 8))[0])
    if theme != "rivals" or rng.random() < 0.3:
        made += [_fault(rng, sources, targets, ranks) for _ in range(count)]
    return tuple(made)


def closed_while_written(rng: random.Random, targets: tuple[SimGroup, ...]) -> tuple[Fault, ...]:
    """An engine that makes its manager anew while a source that is only slow still writes."""
    if rng.random() > 0.08:
        return ()
    target = rng.choice(targets)
    when = Trigger(event="post", nth=rng.choice((1, 1, 2, 3)), delay=rng.uniform(0.0, 0.01))
    return (
        WriteFault(kind="late", count=9, seconds=rng.uniform(0.1, 20.0)),
        RankFault(kind="close", rank=target.rank(rng.randrange(target.size)), when=when),
    )


def leaves_early(rng: random.Random, leaving: SimGroup) -> RankFault:
    """A server that has not the patience, or not the life, to hand on what it has."""
    soon = rng.uniform(0.0, rng.choice((0.0, 0.002, 0.002, 0.02)))
    return RankFault(
        kind=rng.choice(("close", "close", "kill", "restart", "pause")),
        rank=leaving.rank(rng.randrange(leaving.size)),
        when=Trigger(event="departure", nth=rng.randint(1, 2), delay=soon),
        seconds=_duration(rng, 5.0),
    )


def _late_welcome(rng: random.Random) -> list[Fault]:
    """A source that goes on with what its target gave up, let go by policy and forgot: it never heard of the end."""
    return [
        MessageFault(kind="double", message="opened", count=3, seconds=rng.uniform(0.6, 10.0)),
        MessageFault(kind="drop", message="abort", count=40),
    ]


def _last_words(rng: random.Random, sources: tuple[SimGroup, ...], targets: tuple[SimGroup, ...]) -> tuple[Fault, ...]:
    """A source tells of a failure by force and is never heard of again; its target stands still before it acts."""
    source, target = rng.choice(sources), rng.choice(targets)
    nth = rng.choice((1, 1, 2))
    told = [Trigger(event="failed", nth=nth, delay=rng.uniform(0.0006, most)) for most in (0.01, 0.4)]
    lost, slow = source.rank(rng.randrange(source.size)), target.rank(rng.randrange(target.size))
    return (
        WriteFault(kind="breaks", count=3),
        RankFault(kind="vanish", rank=lost, when=told[0]),
        RankFault(kind="pause", rank=slow, when=told[1], seconds=rng.uniform(8.0, 30.0)),
    )


def _late_confession(rng: random.Random) -> list[Fault]:
    """A target that hears of a failure by force when the source has forgotten it and says so."""
    return [
        WriteFault(kind=rng.choice(("never_settles", "raises")), count=5, seconds=50.0),
        MessageFault(kind="delay", message="failed", count=40, until="forgotten"),
        MessageFault(kind="delay", message="forgotten", count=9, seconds=rng.uniform(0.01, 0.5)),
    ]


def _lingering(rng: random.Random, theme: str) -> MessageFault:
    """A message that comes (again) when its room is perhaps in use for the next time."""
    if theme == "reuse" and rng.random() < 0.5:
        return MessageFault(
            kind=rng.choice(("double", "delay")),
            message=rng.choice(OUTCOMES),
            nth=rng.choice((1, 1, 2)),
            count=rng.choice((1, 3)),
            seconds=rng.uniform(0.0, 0.003),
            until=rng.choice(("open", "opened", "hello")),
        )
    kinds = (
        OUTCOMES if theme == "reuse" else ("query", "query", "opened", "failed", "abort", "done", "close", "drained")
    )
    return MessageFault(
        kind=rng.choice(("double", "double", "delay") if theme == "reuse" else ("double", "delay", "drop")),
        message=rng.choice(kinds),
        nth=rng.choice((1, 1, 2, 3)),
        count=rng.choice((1, 3, 40)),
        seconds=math.exp(rng.uniform(math.log(0.001), math.log(0.6 if theme == "reuse" else 20.0))),
    )


def _fault(rng: random.Random, sources: tuple[SimGroup, ...], targets: tuple[SimGroup, ...], ranks: list[str]) -> Fault:
    kind = rng.choices(("message", "noise", "write", "rank", "link", "prepare"), (30, 8, 24, 22, 14, 2))[0]
    if kind == "message":
        return MessageFault(
            kind=rng.choice(("drop", "double", "delay")),
            message=rng.choice(OUTCOMES if rng.random() < 0.8 else MESSAGES),
            nth=rng.choice((1, 1, 2, 3, rng.randint(1, 8))),
            count=rng.choice((1, 1, 2, 4, 40)),
            seconds=_duration(rng, 40.0),
        )
    if kind == "noise":
        return Noise(
            at=rng.choice((0.0, rng.uniform(0, 1.0))),
            seconds=_duration(rng),
            drop=rng.choice((0.0, 0.1, 0.4)),
            double=rng.choice((0.0, 0.1, 0.4)),
            delay=rng.choice((0.0, 0.1, 0.4)),
            delay_seconds=_duration(rng, 20.0),
        )
    if kind == "write":
        return WriteFault(
            kind=rng.choice(WRITE_FAULTS),  # type: ignore[arg-type]
            nth=rng.choice((1, 1, 2, 3, rng.randint(1, 10))),
            count=rng.choice((1, 1, 1, 2, 5)),
            seconds=_duration(rng, 50.0),
        )
    if kind == "rank":
        return RankFault(
            kind=rng.choice(
                ("pause", "pause", "kill", "kill", "restart", "restart", "restart", "vanish", "close", "slow_reader")
            ),
            rank=rng.choice(ranks),
            when=_trigger(rng),
            seconds=rng.choice((0.0, _duration(rng, 5.0), _duration(rng))),
        )
    if kind == "prepare":
        return PrepareFault(nth=rng.randint(1, 4))
    return _cut(rng, sources, targets, _duration(rng))


def _cut(rng: random.Random, sources: tuple[SimGroup, ...], targets: tuple[SimGroup, ...], seconds: float) -> LinkFault:
    source, target = rng.choice(sources), rng.choice(targets)
    ends = [source.rank(rng.randrange(source.size)), target.rank(rng.randrange(target.size))]
    rng.shuffle(ends)
    return LinkFault(
        a=ends[0],
        b=ends[1],
        both=rng.random() < 0.5,
        manner=rng.choice(("held", "lost", "broken")),
        when=_trigger(rng),
        seconds=seconds,
    )


def _trigger(rng: random.Random) -> Trigger:
    if rng.random() < 0.25:
        return Trigger(at=rng.choice((rng.uniform(0, 0.05), rng.uniform(0, 1.0))))
    event = rng.choice((*OUTCOMES, "hello", "verdict", "post", "post", "post"))
    delay = rng.choice((0.0, rng.uniform(0, 0.001), rng.uniform(0, 0.01), rng.uniform(0, 6.0)))
    return Trigger(event=event, nth=rng.choice((1, 1, 2, 3, rng.randint(1, 8))), delay=delay)


def _duration(rng: random.Random, longest: float = 60.0) -> float:
    return float(math.exp(rng.uniform(math.log(0.01), math.log(longest))))
