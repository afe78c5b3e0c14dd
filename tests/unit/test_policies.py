"""What ``python -m lab policies`` asks and tells; its servers are started by people."""

from __future__ import annotations

from collections import Counter

import pytest

from lab.policies.campaign import HEADINGS, Measured
from lab.policies.workload import BEGINNINGS, WORKLOADS, shared

#: Characters, and so tokens, by which a beginning is known.
KNOWN_BY = 200


@pytest.mark.parametrize("load", WORKLOADS)
def test_a_load_is_its_seed(load: str) -> None:
    make = WORKLOADS[load]
    assert make(3, 40) == make(3, 40)
    assert len(make(3, 40)) == 40
    assert {one.prompt[:KNOWN_BY] for one in make(3, 40)}.isdisjoint(one.prompt[:KNOWN_BY] for one in make(4, 40))


def test_shared_prefixes_are_shared_by_as_many_each() -> None:
    asked = shared(1, 4 * BEGINNINGS)
    assert set(Counter(one.prompt[:KNOWN_BY] for one in asked).values()) == {4}
    assert len({one.prompt for one in asked}) == len(asked)


def test_figures_are_medians_and_ratios_are_of_one_round() -> None:
    first = Measured(policy="round_robin", workload="w", rates=[1.0, 2.0, 4.0])
    other = Measured(policy="cache_aware", workload="w", rates=[2.0, 2.0, 6.0])
    for one in (first, other):
        one.hits, one.skews, one.megabytes = [0.5, 0.25, 0.0], [1.0, 1.5, 2.0], [3.0, 1.0, 2.0]
    told = dict(zip(HEADINGS, other.row(first), strict=True))
    assert (told["hit rate"], told["requests/s"], told["/ round_robin"]) == ("25%", "2.00", "1.50")
    assert (told["MB handed over"], told["skew"]) == ("2.0", "1.50")
