"""Layers that come one by one travel as one chunk, unless hiding them is worth a post."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kvbaton.errors import LayoutError
from kvbaton.handles import ALWAYS_READY, Span
from kvbaton.layout import CacheLayout, Region, kv_pool
from kvbaton.pieces import LayerRules, Pieces
from kvbaton.plan.costs import HIDDEN_POSTS, Costs, LayersPolicy
from kvbaton.protocol.events import Chunk

POST = 1.0  # seconds: what a post costs here
WORTH = HIDDEN_POSTS * POST
POOL = kv_pool(range(4, 8), pages=4, page_size=4, heads=1, head_bytes=2, dtype="u1", region=0)
LAYOUT = CacheLayout("m", (Region(0, 1 << 10),), (POOL,))
SPANS = (Span("kv", 0, 8, (0, 1)),)


class Clock:
    """Hands layers over at given times; ``gone`` says what went, in order."""

    def __init__(self, *, moving: float, policy: LayersPolicy = "auto") -> None:
        """``moving``: seconds that the chunk of all four layers takes to move."""
        self.pieces = Pieces(LayerRules(LAYOUT, policy, Costs(post_seconds=POST)))
        self.token_seconds = moving / 8
        self.gone: list[tuple[Chunk, Callable[[], bool]]] = []

    def submit(
        self,
        layers: tuple[int, int] | None,
        at: float = 0.0,
        *,
        spans: tuple[Span, ...] = SPANS,
        last: bool = False,
        ready: Callable[[], bool] = ALWAYS_READY,
    ) -> list[tuple[tuple[int, int] | None, int]]:
        """What goes by it: layers and the token after."""
        chunk = Chunk(spans=spans, last=last, layers=layers)
        gone = self.pieces.add(chunk, ready, at, self.token_seconds)
        self.gone += gone
        return [(chunk.layers, chunk.token_stop) for chunk, _ in gone]


def test_short_prompts_go_as_one_chunk() -> None:
    clock = Clock(moving=WORTH - 0.1)
    assert [clock.submit((layer, layer + 1), at=100.0 * layer) for layer in range(4, 8)] == [[], [], [], []]
    assert clock.pieces
    assert clock.submit(None, last=True) == [(None, 8)]
    assert not clock.pieces


def test_a_room_that_nobody_has_opened_sends_nothing_ahead() -> None:
    clock = Clock(moving=0.0)
    assert clock.submit((4, 7)) == []
    assert clock.submit((7, 8), last=True) == [((4, 8), 8)]


def test_as_many_layers_go_together_as_are_worth_it() -> None:
    clock = Clock(moving=2 * WORTH)
    gone = [clock.submit((layer, layer + 1), at=100.0 * layer) for layer in range(4, 8)]
    assert gone == [[], [((4, 6), 8)], [], [((6, 8), 8)]]


def test_nothing_goes_ahead_of_what_is_computed_at_once() -> None:
    """Of two layers that are left, at the pace so far, no more can be hidden than they take."""
    clock = Clock(moving=100 * WORTH)
    assert clock.submit((4, 5), at=0.0) == [((4, 5), 8)]  # the pace is not known yet
    assert clock.submit((5, 6), at=WORTH / 2 - 0.1) == []
    assert clock.submit((6, 7), at=WORTH / 2 - 0.1 + WORTH) == [((5, 7), 8)]


def test_a_policy_asks_for_no_costs() -> None:
    assert Clock(moving=0.0, policy="always").submit((4, 5)) == [((4, 5), 8)]
    assert Clock(moving=100 * WORTH, policy="never").submit((4, 8)) == []


def test_layers_in_any_order_are_joined_where_they_touch() -> None:
    clock = Clock(moving=0.1)
    assert clock.submit((6, 8)) == []
    assert clock.submit((5, 6)) == []
    assert clock.submit((4, 5), last=True) == [((4, 8), 8)]
    clock = Clock(moving=0.1)
    assert clock.submit((6, 7)) == []
    assert clock.submit((4, 5)) == [((6, 7), 8)]


def test_what_is_held_goes_before_a_chunk_of_other_tokens() -> None:
    clock = Clock(moving=0.1)
    assert clock.submit((4, 8)) == []
    assert clock.submit((4, 8), spans=(Span("kv", 8, 16, (2, 3)),), last=True) == [((4, 8), 8), ((4, 8), 16)]


def test_joined_layers_wait_for_the_data_of_all() -> None:
    clock, there = Clock(moving=0.1), {4: False, 5: True, 6: False}
    for layer in there:
        clock.submit((layer, layer + 1), ready=lambda layer=layer: there[layer])
    clock.submit(None, last=True)
    ((_, ready),) = clock.gone
    for layer in (4, 6):
        assert not ready()
        there[layer] = True
    assert ready()


@pytest.mark.parametrize("layers", [(0, 4), (8, 9), (5, 5), (6, 5)])
def test_layers_of_another_rank_are_refused(layers: tuple[int, int]) -> None:
    with pytest.raises(LayoutError, match=r"layers: \[\d, \d\) has no layer of this rank, which has layers 4 to 7"):
        Clock(moving=0.0).submit(layers)
