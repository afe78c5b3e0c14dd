"""A scenario from a seed. Worlds are small, faults aim at the moments in which something is under way."""

from __future__ import annotations

import math
import random
from itertools import pairwise

from msgspec.structs import replace

from kvbaton.testing.sim.scenario import (
    Clock,
    Fault,
    LinkFault,
    MessageFault,
    Noise,
    PrepareFault,
    RankFault,
    Scenario,
    SimGroup,
    SimModel,
    SimRequest,
    SimStep,
    Trigger,
    Tuning,
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


#: What a world is about, and how many of a hundred are: nothing but work; work and aborts; one room used again and
#: again while its messages linger; one room used twice at once; ranks that stall; ranks that send and receive; ranks
#: that remember almost nothing; quarantines that end by policy; engines that forget a chunk; anything.
THEMES = {
    "clean": 6,
    "calm": 10,
    "reuse": 12,
    "rivals": 4,
    "stalls": 8,
    "both": 8,
    "amnesia": 4,
    "policy": 4,
    "gaps": 2,
    "storm": 42,
}


def generate(seed: int) -> Scenario:
    """The scenario of a seed: the same for ever, as long as this file is the same."""
    rng = random.Random(seed)
    theme = rng.choices(tuple(THEMES), tuple(THEMES.values()))[0]
    quiet = theme in ("clean", "calm")
    model = _model(rng)
    tuning = _tuning(rng, theme)
    roomy = quiet or rng.random() < 0.6
    staged = theme == "both" or rng.random() < 0.25
    sources = tuple(_group(rng, model, f"p{i}", roomy=roomy, staged=staged) for i in range(_few(rng)))
    several = 1 + (theme == "rivals")
    targets = tuple(_group(rng, model, f"d{i}", roomy=roomy, staged=staged) for i in range(max(several, _few(rng))))
    if theme == "storm" and rng.random() < 0.03:
        targets = (*targets[:-1], replace(targets[-1], misfit=True))
    requests = _some_fences_raise(random.Random(f"fences of {seed}"), _requests(rng, sources, targets, theme), theme)
    requests = _some_are_declined(random.Random(f"declined of {seed}"), requests, theme)
    requests = _some_are_preempted(random.Random(f"preempted of {seed}"), requests, theme)
    faults = () if quiet else _faults(rng, sources, targets, theme)
    if theme == "storm":
        faults = (*faults, *_closed_while_written(random.Random(f"closing of {seed}"), targets))
    scenario = Scenario(
        seed=seed, model=model, tuning=tuning, sources=sources, targets=targets, requests=requests, faults=faults
    )
    by_layers = random.Random(f"layered {seed}")
    scenario = _by_layers(by_layers, scenario) if by_layers.random() < 0.3 else scenario
    scenario = _some_lengths_are_unknown(random.Random(f"spare of {seed}"), scenario)
    return _some_are_handed_on(random.Random(f"onward of {seed}"), scenario)


def _some_are_handed_on(rng: random.Random, scenario: Scenario) -> Scenario:
    """A decode server stops: what it was sent goes on to another one, in a room of its own, as soon as it is there or a
    little later; some of it comes to nothing."""
    made = list(scenario.requests)
    for before in scenario.requests:
        others = [number for number in range(len(scenario.targets)) if number != before.target]
        plain = not (before.back or before.rival or before.declines)
        if not (others and plain and scenario.targets[before.target].pp == 1 and rng.random() < 0.3):
            continue
        spoilt = bool(scenario.faults) and rng.random() < 0.2
        made.append(
            SimRequest(
                number=50 + before.number,
                room=500 + before.number,
                source=before.source,
                target=before.target,
                onward=rng.choice(others),
                after=before.number,
                chunks=(before.tokens,),
                target_at=rng.choice((0.0, 0.001, 0.1)),
                publish_after=rng.choice((0.0, 0.0, 0.01)),
                target_abort=_soon(rng) if spoilt else None,
            )
        )
    return replace(scenario, requests=tuple(made))


def _some_lengths_are_unknown(rng: random.Random, scenario: Scenario) -> Scenario:
    """Decode counts in pages, and prefill alone knows how many tokens there are."""
    requests = tuple(
        replace(request, spare=rng.randint(0, 4))
        if rng.random() < 0.1 and not (request.steps or request.gap or request.rival)
        else request
        for request in scenario.requests
    )
    return replace(scenario, requests=requests)


def _by_layers(rng: random.Random, scenario: Scenario) -> Scenario:
    """Engines that hand over layers as they compute them, in an order of their own; some of them have pages in which
    all layers are neighbours."""
    model = replace(scenario.model, layers=rng.randint(2, 4))
    stacks = rng.random() < 0.3

    def stacked(group: SimGroup) -> SimGroup:
        return replace(group, order="stacked") if stacks and rng.random() < 0.8 else group

    return replace(
        scenario,
        model=model,
        tuning=replace(scenario.tuning, post_seconds=rng.choice((0.0, 0.0, 0.0, 1e-6, 1.5e-4))),
        sources=tuple(map(stacked, scenario.sources)),
        targets=tuple(map(stacked, scenario.targets)),
        requests=tuple(
            request if request.gap or rng.random() < 0.2 else replace(request, steps=_steps(rng, request, model.layers))
            for request in scenario.requests
        ),
    )


def _steps(rng: random.Random, request: SimRequest, layers: int) -> tuple[SimStep, ...]:
    """All layers of all chunks: each layer in the order of the chunks, otherwise as it comes; whole chunks and layers
    that come again in between. The last step leaves nothing out."""
    cuts = sorted({0, layers, *(rng.randrange(1, layers) for _ in range(rng.randint(1, 3)))})
    due = dict.fromkeys(pairwise(cuts), 0)
    forwards = rng.random() < 0.5  # as engines compute: chunk by chunk, layer by layer
    made: list[SimStep] = []
    while left := [band for band, chunk in due.items() if chunk < len(request.chunks)]:
        band = min(left, key=lambda each: (due[each], each)) if forwards else rng.choice(left)
        if rng.random() < 0.15:
            made.append(SimStep(min(due.values())))
            due = {each: max(chunk, made[-1].chunk + 1) for each, chunk in due.items()}
            continue
        made.append(SimStep(due[band], *band))
        due[band] += 1
        if rng.random() < 0.1:
            made.append(made[-1])
    if rng.random() < 0.5:
        made.append(SimStep(len(request.chunks) - 1))
    elif made[-1].chunk != len(request.chunks) - 1:
        made.append(SimStep(len(request.chunks) - 1, *rng.choice(list(due))))
    return tuple(made)


def _some_are_declined(rng: random.Random, requests: tuple[SimRequest, ...], theme: str) -> tuple[SimRequest, ...]:
    """Decode has all of a prompt already, or its client is gone before it has looked at it."""
    if theme in ("clean", "rivals"):
        return requests
    return tuple(replace(request, declines=True) if rng.random() < 0.05 else request for request in requests)


def _some_are_preempted(rng: random.Random, requests: tuple[SimRequest, ...], theme: str) -> tuple[SimRequest, ...]:
    """Prefill is short of pages: it takes back those of a request, which waits for others and is computed again."""
    if theme in ("clean", "gaps"):
        return requests
    return tuple(replace(request, preempt=_soon(rng)) if rng.random() < 0.12 else request for request in requests)


def _few(rng: random.Random) -> int:
    return rng.choices((1, 2, 3), (78, 17, 5))[0]


def _model(rng: random.Random) -> SimModel:
    return SimModel(
        layers=rng.choice((1, 1, 2)),
        heads=rng.choice((1, 2, 2, 4)),
        item_bytes=rng.choice((2, 3)),
        latent=rng.random() < 0.2,
        index=rng.random() < 0.15,
        state_items=rng.choice((0, 0, 0, 0, 1, 2)),
        window=rng.choice((0, 0, 0, 0, 0, 3)),
    )


def _tuning(rng: random.Random, theme: str) -> Tuning:
    quiet = theme in ("clean", "calm")
    forgets = theme == "amnesia" or (theme == "policy" and rng.random() < 0.5)
    return Tuning(
        write_bytes=rng.choice((16, 32, 64, 4096)),
        write_entries=rng.choice((2, 8, 64)),
        window_bytes=rng.choice((16, 64, 4096)),
        window_entries=rng.choice((2, 16, 256)),
        tombstones=1 if forgets else 64 if quiet else rng.choice((2, 8, 64, 64)),
        rooms=64 if quiet or rng.random() < 0.97 else 2,
        staging=rng.choice(("auto", "always", "always")),
        quarantine_seconds=rng.choice((0.5, 6.0)) if theme == "policy" else None,
    )


def _group(rng: random.Random, model: SimModel, name: str, *, roomy: bool, staged: bool) -> SimGroup:
    sizes = [1, 1, 1, 2, 2, 4] if model.heads > 1 or model.latent else [1, 1, 2]
    if model.state_items == 1 or model.heads == 1:
        sizes = [1, 1, 1, 2]
    tp = rng.choice(sizes)
    pp = 2 if model.layers > 1 and tp < 3 and rng.random() < 0.4 else 1
    wild = rng.random() < 0.1
    clocks = tuple(
        Clock(1.0 + rng.uniform(-1, 1) * (0.3 if wild else 0.01), rng.uniform(0.0, 1e5)) for _ in range(tp * pp)
    )
    return SimGroup(
        name=name,
        tp=tp,
        pp=pp,
        page_size=rng.choice((1, 2, 2, 4)),
        order=rng.choice(("HND", "NHD", "fused")),
        pages=60 if roomy else rng.choice((10, 12, 16)),  # of 5 requests of at most 10 pages
        slots=6 if roomy else rng.choice((1, 2, 3)),
        clocks=clocks,
        staging_slots=rng.choice((1, 2, 8)) if staged else 0,
        lazy=rng.choice((0.0, 0.0, 0.002, 0.05, 1.0)),
        must_progress=rng.random() < 0.35,
        fence_breaks_others=rng.random() < 0.2,
    )


def _requests(
    rng: random.Random, sources: tuple[SimGroup, ...], targets: tuple[SimGroup, ...], theme: str
) -> tuple[SimRequest, ...]:
    count = rng.choices((1, 2, 3, 4, 5), (25, 30, 25, 13, 7))[0]
    made: list[SimRequest] = []
    for number in range(max(count, {"reuse": 2, "rivals": 2, "both": 3}.get(theme, 1))):
        made.append(_request(rng, sources, targets, theme, made, number))
    return tuple(made)


def _some_fences_raise(rng: random.Random, requests: tuple[SimRequest, ...], theme: str) -> tuple[SimRequest, ...]:
    """An accelerator that fails while a chunk is computed."""
    if theme == "clean" or rng.random() > 0.08:
        return requests
    at = rng.randrange(len(requests))
    if requests[at].rival:
        return requests
    raising = replace(requests[at], ready_raises=rng.randint(1, len(requests[at].chunks)))
    return (*requests[:at], raising, *requests[at + 1 :])


def _request(
    rng: random.Random,
    sources: tuple[SimGroup, ...],
    targets: tuple[SimGroup, ...],
    theme: str,
    made: list[SimRequest],
    number: int,
) -> SimRequest:
    calm = theme in ("clean", "calm")
    source, target = rng.randrange(len(sources)), rng.randrange(len(targets))
    back = targets[target].pp == 1 and rng.random() < (0.5 if theme == "both" else 0.12)
    after, room, tokens, rival, twin = None, 100 + number, rng.randint(1, 10), False, None
    chance = {"reuse": 0.9, "rivals": 0.0, "amnesia": 0.0}.get(theme, 0.25)
    if made and rng.random() < chance:  # the room is used again, after its end
        before = rng.choice(list({r.room: r for r in made if not r.rival}.values()))
        after, room = before.number, before.room
        if theme == "reuse":
            source, target, back = before.source, before.target, before.back
            twin = before if rng.random() < 0.7 else None  # the same prompt again: only ids tell the two apart
    elif made and rng.random() < (0.7 if theme == "rivals" else 0.02 * (theme == "storm")):  # the room is in use
        before = rng.choice(made)
        room, tokens, source, back, rival = before.room, before.tokens, before.source, False, True
        target = (before.target + 1) % len(targets)
    page, theirs = sources[source].page_size, targets[target].page_size
    step = math.lcm(page, theirs) if rng.random() < 0.7 else math.gcd(page, theirs)
    prefix = rng.choice((0, 0, 0, tokens // step * step, rng.randint(0, tokens // step) * step))
    odds = {"clean": 0.0, "calm": 0.7}.get(theme, 0.3)
    abort = rng.choice(("source", "target", "both")) if rng.random() < odds else None
    wait = rng.uniform(4.0, 20.0) if theme == "stalls" and rng.random() < 0.5 else 0.001
    slow = not calm and rng.random() < (0.4 if theme == "stalls" else 0.12)
    paces = (0.001, 0.1, 0.3) if theme == "reuse" else (0.0, 0.001, 0.01)
    slowness = rng.choice(("publish", "chunk", "ready")) if slow else ""
    chunks = _chunks(rng, tokens, theirs if back else page, 0.9 if theme == "gaps" else 0.4)
    return SimRequest(
        number=number,
        room=room,
        source=source,
        target=target,
        prefix=twin.prefix if twin is not None else prefix,
        chunks=twin.chunks if twin is not None else chunks,
        after=after,
        source_at=_soon(rng),
        target_at=_soon(rng),
        publish_after=rng.uniform(5, 30) if slowness == "publish" else _soon(rng),
        chunk_every=rng.uniform(1, 12) if slowness == "chunk" else rng.choice(paces),
        ready_after=rng.uniform(1, 40) if slowness == "ready" else rng.choice((0.0, 0.0, 0.002, 0.1)),
        eager=rng.random() < (0.7 if theme == "gaps" else 0.2),
        skip_prefix=rng.random() < 0.4,
        source_abort=_soon(rng) + wait if abort in ("source", "both") else None,
        target_abort=_soon(rng) + wait if abort in ("target", "both") else None,
        lone_abort=rng.random() < 0.3,
        rival=rival,
        back=back,
        gap=rng.choice((0, 1, 2)) if theme == "gaps" else 0,
    )


def _chunks(rng: random.Random, tokens: int, page: int, odds: float) -> tuple[int, ...]:
    edges = [t for t in range(page, tokens, page) if rng.random() < odds]
    return (*edges, tokens)


def _soon(rng: random.Random) -> float:
    """Most often within the milliseconds in which a hand-off happens."""
    return rng.choice((0.0, rng.uniform(0, 0.005), rng.uniform(0, 0.03), rng.uniform(0, 0.3)))


def _duration(rng: random.Random, longest: float = 60.0) -> float:
    return float(math.exp(rng.uniform(math.log(0.01), math.log(longest))))


def _trigger(rng: random.Random) -> Trigger:
    if rng.random() < 0.25:
        return Trigger(at=rng.choice((rng.uniform(0, 0.05), rng.uniform(0, 1.0))))
    event = rng.choice((*OUTCOMES, "hello", "verdict", "post", "post", "post"))
    delay = rng.choice((0.0, rng.uniform(0, 0.001), rng.uniform(0, 0.01), rng.uniform(0, 6.0)))
    return Trigger(event=event, nth=rng.choice((1, 1, 2, 3, rng.randint(1, 8))), delay=delay)


def _faults(
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


def _closed_while_written(rng: random.Random, targets: tuple[SimGroup, ...]) -> tuple[Fault, ...]:
    """An engine that makes its manager anew while a source that is only slow still writes."""
    if rng.random() > 0.08:
        return ()
    target = rng.choice(targets)
    when = Trigger(event="post", nth=rng.choice((1, 1, 2, 3)), delay=rng.uniform(0.0, 0.01))
    return (
        WriteFault(kind="late", count=9, seconds=rng.uniform(0.1, 20.0)),
        RankFault(kind="close", rank=target.rank(rng.randrange(target.size)), when=when),
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
