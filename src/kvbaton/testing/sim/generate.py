"""A scenario from a seed: what a world is about, its model, its groups of ranks. Worlds are small."""

from __future__ import annotations

import random

from msgspec.structs import replace

from kvbaton.testing.sim.faults import closed_while_written, draw_faults
from kvbaton.testing.sim.requests import (
    draw_requests,
    draw_steps,
    some_are_begun_first,
    some_are_declined,
    some_are_handed_on,
    some_are_preempted,
    some_are_queued,
    some_fences_raise,
    some_lengths_are_unknown,
)
from kvbaton.testing.sim.scenario import Clock, Scenario, SimGroup, SimModel, Tuning

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
    """The scenario of a seed: the same for ever, as long as this file and those of requests and faults are the same."""
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
    requests = some_fences_raise(random.Random(f"fences of {seed}"), draw_requests(rng, sources, targets, theme), theme)
    requests = some_are_declined(random.Random(f"declined of {seed}"), requests, theme)
    requests = some_are_preempted(random.Random(f"preempted of {seed}"), requests, theme)
    faults = () if quiet else draw_faults(rng, sources, targets, theme)
    if theme == "storm":
        faults = (*faults, *closed_while_written(random.Random(f"closing of {seed}"), targets))
    scenario = Scenario(
        seed=seed, model=model, tuning=tuning, sources=sources, targets=targets, requests=requests, faults=faults
    )
    by_layers = random.Random(f"layered {seed}")
    scenario = _by_layers(by_layers, scenario) if by_layers.random() < 0.3 else scenario
    scenario = _slots_are_small(random.Random(f"slots of {seed}"), scenario) if staged else scenario
    scenario = some_lengths_are_unknown(random.Random(f"spare of {seed}"), scenario)
    scenario = some_are_handed_on(random.Random(f"onward of {seed}"), scenario)
    scenario = some_are_queued(random.Random(f"queued of {seed}"), scenario)
    return some_are_begun_first(random.Random(f"begun of {seed}"), scenario)


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
            request
            if request.gap or rng.random() < 0.2
            else replace(request, steps=draw_steps(rng, request, model.layers))
            for request in scenario.requests
        ),
    )


def _slots_are_small(rng: random.Random, scenario: Scenario) -> Scenario:
    """Of some worlds: a staging slot holds one block of the largest part, so that a prompt takes several, and often
    more than are free."""
    if rng.random() < 0.5:
        return scenario
    model = scenario.model
    page = max(group.page_size for group in (*scenario.sources, *scenario.targets))
    largest = max(2 * page * model.heads * model.item_bytes, 12 * model.state_items, 6) * model.layers

    def small(group: SimGroup) -> SimGroup:
        return replace(group, staging_slot_bytes=largest, staging_slots=rng.choice((1, 2, 3, 8)))

    return replace(scenario, sources=tuple(map(small, scenario.sources)), targets=tuple(map(small, scenario.targets)))


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
