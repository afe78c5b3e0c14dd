"""The requests of a scenario: when each side begins, what it moves in which chunks, what becomes of it on the way."""

from __future__ import annotations

import math
import random
from itertools import pairwise

from msgspec.structs import replace

from kvbaton.testing.sim.faults import leaves_early
from kvbaton.testing.sim.scenario import Begun, Scenario, SimGroup, SimRequest, SimStep

#: Of a prompt, and of a prompt with an answer that is handed on.
MOST_TOKENS = 10


def draw_requests(
    rng: random.Random, sources: tuple[SimGroup, ...], targets: tuple[SimGroup, ...], theme: str
) -> tuple[SimRequest, ...]:
    count = rng.choices((1, 2, 3, 4, 5), (25, 30, 25, 13, 7))[0]
    made: list[SimRequest] = []
    for number in range(max(count, {"reuse": 2, "rivals": 2, "both": 3}.get(theme, 1))):
        made.append(_request(rng, sources, targets, theme, made, number))
    return tuple(made)


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
    after, room, tokens, rival, twin = None, 100 + number, rng.randint(1, MOST_TOKENS), False, None
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


def draw_steps(rng: random.Random, request: SimRequest, layers: int) -> tuple[SimStep, ...]:
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


def some_fences_raise(rng: random.Random, requests: tuple[SimRequest, ...], theme: str) -> tuple[SimRequest, ...]:
    """An accelerator that fails while a chunk is computed."""
    if theme == "clean" or rng.random() > 0.08:
        return requests
    at = rng.randrange(len(requests))
    if requests[at].rival:
        return requests
    raising = replace(requests[at], ready_raises=rng.randint(1, len(requests[at].chunks)))
    return (*requests[:at], raising, *requests[at + 1 :])


def some_are_declined(rng: random.Random, requests: tuple[SimRequest, ...], theme: str) -> tuple[SimRequest, ...]:
    """Decode has all of a prompt already, or its client is gone before it has looked at it."""
    if theme in ("clean", "rivals"):
        return requests
    return tuple(replace(request, declines=True) if rng.random() < 0.05 else request for request in requests)


def some_are_preempted(rng: random.Random, requests: tuple[SimRequest, ...], theme: str) -> tuple[SimRequest, ...]:
    """Prefill is short of pages: it takes back those of a request, which waits for others and is computed again."""
    if theme in ("clean", "gaps"):
        return requests
    return tuple(replace(request, preempt=_soon(rng)) if rng.random() < 0.12 else request for request in requests)


def some_lengths_are_unknown(rng: random.Random, scenario: Scenario) -> Scenario:
    """Decode counts in pages, and prefill alone knows how many tokens there are."""
    requests = tuple(
        replace(request, spare=rng.randint(0, 4))
        if rng.random() < 0.1 and not (request.steps or request.gap or request.rival)
        else request
        for request in scenario.requests
    )
    return replace(scenario, requests=requests)


def some_are_queued(rng: random.Random, scenario: Scenario) -> Scenario:
    """Decode has no memory for a request yet, for longer than its sources would wait for somebody who says nothing."""
    requests = tuple(
        replace(request, publish_after=rng.uniform(21, 70)) if rng.random() < 0.03 and not request.declines else request
        for request in scenario.requests
    )
    return replace(scenario, requests=requests)


def some_are_begun_first(rng: random.Random, scenario: Scenario) -> Scenario:
    """Decode is asked once prefill has answered; but that was one rank's word, or an earlier life's."""
    kept = {request.after for request in scenario.requests if request.onward is not None}

    def begun(request: SimRequest) -> SimRequest:
        plain = request.onward is None and request.number not in kept and not (request.rival or request.declines)
        if not plain or rng.random() > 0.12:
            return request
        chosen: Begun = rng.choice(("there", "there", "late", "lost"))
        if chosen == "late":
            return replace(request, begun=chosen, source_at=request.target_at + rng.uniform(0.0, 0.05))
        return replace(request, begun=chosen, target_at=request.source_at + rng.uniform(0.002, 0.05))

    return replace(scenario, requests=tuple(map(begun, scenario.requests)))


def some_are_handed_on(rng: random.Random, scenario: Scenario) -> Scenario:
    """A decode server stops: what it was sent goes on to another one with the answer so far, in a room of its own, as
    soon as it is there or a little later, and perhaps from there to a third; some of it comes to nothing."""
    made, faults = list(scenario.requests), list(scenario.faults)
    fought_over = {request.room for request in made if request.rival}
    for before in made:
        holder = before.target if before.onward is None else before.onward
        others = [number for number in range(len(scenario.targets)) if number != holder]
        plain = not (before.back or before.declines or before.room in fought_over)
        if not (others and plain and scenario.targets[holder].pp == 1 and rng.random() < 0.3):
            continue
        spoilt = bool(scenario.faults) and rng.random() < 0.2
        number, onward = len(made), rng.choice(others)
        tokens = min(before.tokens + rng.choice((0, 1, 1, 3)), MOST_TOKENS)
        pages = scenario.targets[holder].page_size, scenario.targets[onward].page_size
        step = math.lcm(*pages) if rng.random() < 0.7 else math.gcd(*pages)
        made.append(
            SimRequest(
                number=50 + number,
                room=500 + number,
                source=before.source,
                target=holder,
                onward=onward,
                after=before.number,
                chunks=(tokens,),
                prefix=rng.choice((0, 0, rng.randint(0, tokens // step) * step)),
                skip_prefix=True,
                ready_after=rng.choice((0.0, 0.0, 0.002, 0.1)),
                target_at=rng.choice((0.0, 0.001, 0.1)),
                publish_after=rng.choice((0.0, 0.0, 0.01)),
                source_abort=_soon(rng) if spoilt and rng.random() < 0.5 else None,
                target_abort=_soon(rng) if spoilt and rng.random() < 0.5 else None,
            )
        )
        if scenario.faults and rng.random() < 0.3:
            faults.append(leaves_early(rng, scenario.targets[holder]))
    return replace(scenario, requests=tuple(made), faults=tuple(faults))


def _soon(rng: random.Random) -> float:
    """Most often within the milliseconds in which a hand-off happens."""
    return rng.choice((0.0, rng.uniform(0, 0.005), rng.uniform(0, 0.03), rng.uniform(0, 0.3)))
