"""A scenario from a seed. Worlds are small, faults aim at the moments in which something is under way."""

from __future__ import annotations

import math
import random

from kvbaton.testing.sim.scenario import (
    Clock,
    Fault,
    Group,
    LinkFault,
    MessageFault,
    Model,
    Noise,
    PrepareFault,
    RankFault,
    Request,
    Scenario,
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


def generate(seed: int) -> Scenario:
    """The scenario of a seed: the same for ever, as long as this file is the same."""
    rng = random.Random(seed)
    model = _model(rng)
    quiet = rng.random()
    tuning = _tuning(rng, quiet=quiet < 0.16)
    staged = rng.random() < 0.3
    roomy = quiet < 0.16 or rng.random() < 0.5
    sources = tuple(_group(rng, model, f"p{i}", roomy=roomy, staged=staged) for i in range(_few(rng)))
    targets = tuple(_group(rng, model, f"d{i}", roomy=roomy, staged=staged) for i in range(_few(rng)))
    if quiet >= 0.16 and rng.random() < 0.02:
        targets = (*targets[:-1], _misfit(targets[-1]))
    requests = _requests(rng, sources, targets, clean=quiet < 0.08, calm=quiet < 0.16)
    ranks = [g.rank(n) for g in (*sources, *targets) for n in range(g.size)]
    faults = () if quiet < 0.16 else _faults(rng, sources, targets, ranks)
    return Scenario(
        seed=seed, model=model, tuning=tuning, sources=sources, targets=targets, requests=requests, faults=faults
    )


def _few(rng: random.Random) -> int:
    return rng.choices((1, 2, 3), (78, 17, 5))[0]


def _model(rng: random.Random) -> Model:
    return Model(
        layers=rng.choice((1, 1, 2)),
        heads=rng.choice((1, 2, 2, 4)),
        item_bytes=rng.choice((2, 3)),
        latent=rng.random() < 0.2,
        index=rng.random() < 0.15,
        state_items=rng.choice((0, 0, 0, 0, 1, 2)),
        window=rng.choice((0, 0, 0, 0, 0, 3)),
    )


def _tuning(rng: random.Random, *, quiet: bool) -> Tuning:
    return Tuning(
        write_bytes=rng.choice((16, 32, 64, 4096)),
        write_entries=rng.choice((2, 8, 64)),
        window_bytes=rng.choice((16, 64, 4096)),
        window_entries=rng.choice((2, 16, 256)),
        tombstones=64 if quiet else rng.choice((2, 8, 64, 64)),
        rooms=64 if quiet or rng.random() < 0.97 else 2,
        staging=rng.choice(("auto", "always", "always")),
        quarantine_seconds=None if quiet or rng.random() < 0.95 else 40.0,
    )


def _group(rng: random.Random, model: Model, name: str, *, roomy: bool, staged: bool) -> Group:
    sizes = [1, 1, 1, 2, 2, 4] if model.heads > 1 or model.latent else [1, 1, 2]
    if model.state_items == 1 or model.heads == 1:
        sizes = [1, 1, 1, 2]
    tp = rng.choice(sizes)
    pp = 2 if model.layers > 1 and tp < 3 and rng.random() < 0.4 else 1
    wild = rng.random() < 0.1
    clocks = tuple(
        Clock(1.0 + rng.uniform(-1, 1) * (0.3 if wild else 0.01), rng.uniform(0.0, 1e5)) for _ in range(tp * pp)
    )
    return Group(
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


def _misfit(group: Group) -> Group:
    from msgspec.structs import replace

    return replace(group, misfit=True)


def _requests(
    rng: random.Random, sources: tuple[Group, ...], targets: tuple[Group, ...], *, clean: bool, calm: bool
) -> tuple[Request, ...]:
    count = rng.choices((1, 2, 3, 4, 5), (25, 30, 25, 13, 7))[0]
    made: list[Request] = []
    for number in range(count):
        source, target = rng.randrange(len(sources)), rng.randrange(len(targets))
        after, room, tokens, rival = None, 100 + number, rng.randint(1, 10), False
        if made and rng.random() < 0.35:
            before = rng.choice(list({r.room: r for r in made if not r.rival}.values()))
            after, room = before.number, before.room  # the room is used again, after its end
        elif made and not calm and rng.random() < 0.06:
            before = rng.choice(made)
            room, tokens, rival = before.room, before.tokens, True  # the room is used twice at once
        page, theirs = sources[source].page_size, targets[target].page_size
        common, granule = math.lcm(page, theirs), math.gcd(page, theirs)
        step = common if rng.random() < 0.7 else granule
        prefix = rng.choice((0, 0, 0, tokens // step * step, rng.randint(0, tokens // step) * step))
        abort = None if clean or rng.random() < 0.7 else rng.choice(("source", "target", "both"))
        made.append(
            Request(
                number=number,
                room=room,
                source=source,
                target=target,
                prefix=prefix,
                chunks=_chunks(rng, tokens, page),
                after=after,
                source_at=_soon(rng),
                target_at=_soon(rng),
                publish_after=_soon(rng) if calm or rng.random() < 0.95 else rng.uniform(5, 30),
                chunk_every=rng.choice((0.0, 0.001, 0.01)) if calm or rng.random() < 0.95 else rng.uniform(1, 12),
                ready_after=rng.choice((0.0, 0.0, 0.002, 0.1)) if calm or rng.random() < 0.95 else rng.uniform(1, 40),
                eager=rng.random() < 0.2,
                skip_prefix=rng.random() < 0.4,
                source_abort=_soon(rng) + 0.001 if abort in ("source", "both") else None,
                target_abort=_soon(rng) + 0.001 if abort in ("target", "both") else None,
                lone_abort=rng.random() < 0.3,
                rival=rival,
                back=targets[target].pp == 1 and rng.random() < 0.15,
                gap=0 if calm or rng.random() < 0.97 else 1,
            )
        )
    return tuple(made)


def _chunks(rng: random.Random, tokens: int, page: int) -> tuple[int, ...]:
    edges = [t for t in range(page, tokens, page) if rng.random() < 0.4]
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
    rng: random.Random, sources: tuple[Group, ...], targets: tuple[Group, ...], ranks: list[str]
) -> tuple[Fault, ...]:
    count = rng.choices((1, 2, 3, 4, 6), (30, 30, 20, 12, 8))[0]
    return tuple(_fault(rng, sources, targets, ranks) for _ in range(count))


def _fault(rng: random.Random, sources: tuple[Group, ...], targets: tuple[Group, ...], ranks: list[str]) -> Fault:
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
    source, target = rng.choice(sources), rng.choice(targets)
    ends = [source.rank(rng.randrange(source.size)), target.rank(rng.randrange(target.size))]
    rng.shuffle(ends)
    return LinkFault(
        a=ends[0],
        b=ends[1],
        both=rng.random() < 0.5,
        manner=rng.choice(("held", "lost", "broken")),
        when=_trigger(rng),
        seconds=_duration(rng),
    )
