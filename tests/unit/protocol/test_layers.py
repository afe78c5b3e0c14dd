"""Chunks by layers through real cores: every kind of cache, any order, one manifest and one Done as ever."""

from __future__ import annotations

import random

import pytest
from groups import Cut, Model
from kinds import DENSE, EVERYTHING, GQA, Request

from kvbaton.protocol.effects import KVPoll
from kvbaton.protocol.events import Chunk, ChunkSubmitted, SenderOpened
from kvbaton.protocol.messages import Done, Grant
from kvbaton.testing.rank import Rank
from unit.protocol.test_kinds_of_cache import ROOM, Play


def here(rank: Rank) -> list[int]:
    return sorted({plane.layer for pool in rank.layout.pools for plane in pool.planes} - {-1})


def submit(play: Play, rank: Rank, number: int, layers: tuple[int, int] | None, *, last: bool = False) -> None:
    """Layers of a chunk, or all of it. Aux is among the spans of the last tokens: it goes with the last chunk alone."""
    spans = play.request.chunk(rank.layout, number)
    if layers is None and not last:
        spans = tuple(span for span in spans if rank.layout.pool(span.pool).paged)
    rank.do(ChunkSubmitted(play.room, Chunk(spans=spans, last=last, layers=layers)))


def by_layers(play: Play, seed: int) -> None:
    """Each rank hands over its layers in an order of its own: of each layer in the order of the chunks."""
    rng = random.Random(seed)
    for rank in play.sources:
        due = dict.fromkeys(here(rank), 0)
        while left := [layer for layer, number in due.items() if number < len(play.request.chunks)]:
            layer = rng.choice(left)
            submit(play, rank, due[layer], (layer, layer + 1))
            due[layer] += 1
            if rng.random() < 0.2:
                submit(play, rank, min(due.values(), default=0) % len(play.request.chunks), None)
                due = {each: max(number, min(due.values()) + 1) for each, number in due.items()}
        submit(play, rank, len(play.request.chunks) - 1, None, last=True)
    play.world.run()


CUTS = {
    "1→1": (Cut(), Cut()),
    "2→1": (Cut(tp=2, order="NHD"), Cut(order="NHD")),
    "1→2": (Cut(), Cut(tp=2)),
    "stages": (Cut(pp=2), Cut(pp=1, tp=2)),
    "pages": (Cut(page_size=8, swa_page_size=4), Cut(page_size=4, swa_page_size=8)),
    "fused": (Cut(fusion="item"), Cut(fusion="item")),
}


@pytest.mark.parametrize("model", [DENSE, GQA, EVERYTHING], ids=["dense", "gqa", "everything"])
@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
def test_layers_arrive_in_any_order(model: Model, cuts: tuple[Cut, Cut]) -> None:
    for seed in range(3):
        play = Play(Request(model, *cuts, tokens=37, chunks=(16, 32)))
        play.open()
        by_layers(play, seed)
        play.expect_success()
        posted = sum(rank.status("source", ROOM).bytes for rank in play.sources)
        assert posted == sum(rank.status("target", ROOM).bytes for rank in play.targets)
        for done in (message for *_, message in play.world.trace if isinstance(message, Done)):
            assert sum(part.bytes for part in done.parts) > 0
            assert done.token_count == 37


def test_layers_wait_for_a_target_that_opens_late() -> None:
    play = Play(Request(DENSE, Cut(), Cut(), chunks=(16,)))
    play.sources[0].do(SenderOpened(play.room))
    by_layers(play, 1)
    assert play.sources[0].status("source", ROOM).poll is KVPoll.Bootstrapping
    play.open()
    play.expect_success()


def failed(play: Play) -> str:
    play.world.run()
    status = play.sources[0].status("source", ROOM)
    assert status.poll is KVPoll.Failed
    return str(status.error)


def test_tokens_that_are_missing_in_one_layer_are_named() -> None:
    play = Play(Request(DENSE, Cut(), Cut(), chunks=(16,)))
    play.open()
    submit(play, play.sources[0], 0, (1, 2))
    submit(play, play.sources[0], 1, None, last=True)
    assert "pool 'kv': chunk starts at token 16 but 0 of layer 0 is next" in failed(play)


def test_a_last_chunk_that_leaves_layers_out_is_named() -> None:
    play = Play(Request(DENSE, Cut(), Cut()))
    play.open()
    submit(play, play.sources[0], 0, (1, 2), last=True)
    assert "these parts are not complete: kv layers 0..1" in failed(play)


@pytest.mark.parametrize(
    ("layers", "told"), [(None, "chunk to token 16"), ((3, 4), "chunk to token 16 of layers 3..3")]
)
def test_a_state_that_is_not_final_is_refused(layers: tuple[int, int] | None, told: str) -> None:
    play = Play(Request(EVERYTHING, Cut(), Cut(), chunks=(16,)))
    play.open()
    source = play.sources[0]
    slot = Grant("state", 0, 0, (int(play.request.reference.source_units["state"][0]),))
    spans = (*play.request.chunk(source.layout, 0), slot)
    source.do(ChunkSubmitted(play.room, Chunk(spans=spans, last=False, layers=layers)))
    assert f"pool 'state': a slot was submitted with the {told}; submit it with the last chunk" in failed(play)
