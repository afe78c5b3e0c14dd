"""A failing scenario made small: faults, requests, ranks and trimmings are taken away for as long as it still fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

from msgspec.structs import replace

from kvbaton.testing.sim.scenario import Clock, LinkFault, RankFault, Scenario, SimGroup, SimModel, SimRequest, Tuning
from kvbaton.testing.sim.world import Outcome, run

T = TypeVar("T", SimModel, Tuning, SimRequest, SimGroup)

#: Most runs that shrinking may take.
MOST_RUNS = 400


def shrink(failed: Outcome, *, runner: Callable[[Scenario], Outcome] = run, most_runs: int = MOST_RUNS) -> Outcome:
    """The smallest scenario found that fails in the same way. Greedy: one cut after the other, until none works."""
    best, runs = failed, 0
    progress = True
    while progress:
        progress = False
        for candidate in _cuts(best.scenario):
            if runs >= most_runs:
                return best
            if not _sound(candidate):
                continue
            runs += 1
            outcome = runner(candidate)
            if outcome.kind == failed.kind:
                best, progress = outcome, True
                break
    return best


def _sound(scenario: Scenario) -> bool:
    """Whether there can be such a world: every pipeline stage has a layer."""
    return all(group.pp <= scenario.model.layers for group in (*scenario.sources, *scenario.targets))


def _cuts(scenario: Scenario) -> Iterator[Scenario]:
    """Smaller scenarios, the boldest cuts first."""
    for i in range(len(scenario.requests)):
        if len(scenario.requests) > 1:
            yield _without_request(scenario, i)
    for i in range(len(scenario.faults)):
        yield replace(scenario, faults=scenario.faults[:i] + scenario.faults[i + 1 :])
    yield from _fewer_groups(scenario)
    yield from _smaller_groups(scenario)
    for model in _simpler(scenario.model, SimModel(layers=1, heads=1)):
        yield replace(scenario, model=model)
    for tuning in _simpler(scenario.tuning, Tuning(write_bytes=4096, write_entries=64, window_bytes=4096)):
        yield replace(scenario, tuning=tuning)
    for i, request in enumerate(scenario.requests):
        plain = SimRequest(number=request.number, room=request.room, chunks=(request.tokens,))
        for simpler in _simpler(request, plain, keep=("source", "target", "rival", "after", "onward")):
            yield replace(scenario, requests=(*scenario.requests[:i], simpler, *scenario.requests[i + 1 :]))
    for i, fault in enumerate(scenario.faults):
        if getattr(fault, "count", 1) > 1:
            fewer = replace(fault, count=fault.count // 2)  # type: ignore[union-attr]
            yield replace(scenario, faults=(*scenario.faults[:i], fewer, *scenario.faults[i + 1 :]))


def _without_request(scenario: Scenario, index: int) -> Scenario:
    """Without those that hand it on, either."""
    gone, without = scenario.requests[index], {scenario.requests[index].number}
    rest = []
    for request in scenario.requests:
        if request.number in without or (request.onward is not None and request.after in without):
            without.add(request.number)
            continue
        rest.append(replace(request, after=gone.after) if request.after == gone.number else request)
    return replace(scenario, requests=tuple(rest))


def _fewer_groups(scenario: Scenario) -> Iterator[Scenario]:
    for side in ("sources", "targets"):
        groups: tuple[SimGroup, ...] = getattr(scenario, side)
        field = side[:-1]
        for i in range(len(groups)):
            if len(groups) == 1 or any(getattr(request, field) == i for request in scenario.requests):
                continue
            if side == "targets" and any(request.onward is not None for request in scenario.requests):
                continue  # it counts in the same list
            requests = tuple(
                replace(r, **{field: getattr(r, field) - 1}) if getattr(r, field) > i else r for r in scenario.requests
            )
            faults = tuple(f for f in scenario.faults if not _names(f, groups[i].name))
            yield replace(scenario, **{side: groups[:i] + groups[i + 1 :], "requests": requests, "faults": faults})


def _smaller_groups(scenario: Scenario) -> Iterator[Scenario]:
    for side in ("sources", "targets"):
        groups: tuple[SimGroup, ...] = getattr(scenario, side)
        for i, group in enumerate(groups):
            smaller = [replace(group, tp=group.tp // 2)] if group.tp > 1 else []
            smaller += [replace(group, pp=1)] if group.pp > 1 else []
            smaller += [replace(group, clocks=(Clock(),))] if set(group.clocks) != {Clock()} else []
            keep = ("tp", "pp", "clocks", "pages", "slots", "misfit")
            for candidate in (*smaller, *_simpler(group, SimGroup(name=group.name), keep=keep)):
                faults = tuple(f for f in scenario.faults if not _beyond(f, candidate))
                yield replace(scenario, **{side: (*groups[:i], candidate, *groups[i + 1 :]), "faults": faults})


def _names(fault: object, group: str) -> bool:
    places: tuple[str, ...] = (fault.rank,) if isinstance(fault, RankFault) else ()
    places = (fault.a, fault.b) if isinstance(fault, LinkFault) else places
    return any(place.rpartition(".")[0] == group for place in places)


def _beyond(fault: object, group: SimGroup) -> bool:
    """Whether a fault strikes a rank that the group no longer has."""
    places: tuple[str, ...] = (fault.rank,) if isinstance(fault, RankFault) else ()
    places = (fault.a, fault.b) if isinstance(fault, LinkFault) else places
    return any(
        name == group.name and int(number) >= group.size for name, _, number in (p.rpartition(".") for p in places)
    )


def _simpler(thing: T, plain: T, keep: tuple[str, ...] = ()) -> Iterator[T]:
    for name in thing.__struct_fields__:
        if name not in keep and getattr(thing, name) != getattr(plain, name):
            yield replace(thing, **{name: getattr(plain, name)})
