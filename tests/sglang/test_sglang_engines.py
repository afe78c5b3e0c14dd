"""The transfer backend in a stand-in of SGLang: what arrives, and what is freed when."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from sglang_stand_in import PAGE, HandOff, StandIn, group, until

from kvbaton import ALWAYS_READY, KVPoll
from kvbaton.engines.sglang.receiving import Receiving
from kvbaton.engines.sglang.sending import Sending
from kvbaton.errors import ConfigError

DONE = (KVPoll.Success, KVPoll.Success)
FAILED = (KVPoll.Failed, KVPoll.Failed)
Pair = Callable[..., tuple[list[StandIn], list[StandIn]]]


@pytest.fixture
def pair() -> Iterator[Pair]:
    made: list[StandIn] = []

    def make(sources: int = 1, targets: int = 1, **more: Any) -> tuple[list[StandIn], list[StandIn]]:
        sides = group(sources, **more), group(targets, prefill=False, **more)
        made.extend([*sides[0], *sides[1]])
        return sides

    yield make
    for side in made:
        side.close()


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 9, 16, 23, 40])
def test_lengths_around_pages_and_chunks(pair: Pair, length: int) -> None:
    hand_off = HandOff(*pair(), room=7, length=length)
    assert hand_off.run() == DONE
    assert not hand_off.wrong()


@pytest.mark.parametrize("sizes", [(2, 1), (1, 2), (2, 2), (4, 1), (1, 4), (8, 2), (2, 8)])
def test_unequal_tensor_parallel_sizes(pair: Pair, sizes: tuple[int, int]) -> None:
    """Up to more ranks than KV heads: replicated heads are written once, from a writer that is known by name."""
    hand_off = HandOff(*pair(*sizes), room=8, length=21)
    assert hand_off.run() == DONE
    assert not hand_off.wrong()


@pytest.mark.parametrize("sizes", [(1, 1), (2, 1), (1, 2)])
@pytest.mark.parametrize("kinds", [("swa",), ("mamba",), ("dsa",), ("swa", "mamba"), ("mamba", "dsa")])
def test_state_components(pair: Pair, kinds: tuple[str, ...], sizes: tuple[int, int]) -> None:
    hand_off = HandOff(*pair(*sizes, kinds=kinds), room=9, length=21)
    assert hand_off.run() == DONE
    assert not hand_off.wrong()


@pytest.mark.parametrize("sizes", [(1, 1), (2, 1), (1, 2)])
def test_latents(pair: Pair, sizes: tuple[int, int]) -> None:
    hand_off = HandOff(*pair(*sizes, latent=True, kinds=("dsa",)), room=10, length=21)
    assert hand_off.run() == DONE
    assert not hand_off.wrong()


@pytest.mark.parametrize("sizes", [(4, 1), (2, 1), (1, 4)])
def test_small_pieces_travel_through_staging(pair: Pair, sizes: tuple[int, int]) -> None:
    sources, targets = pair(*sizes, staging=2, kinds=("mamba",))
    hand_off = HandOff(sources, targets, room=25, length=21)
    assert hand_off.run() == DONE
    assert not hand_off.wrong()
    assert any(side.manager.counters().get("writes_staged", 0) for side in sources), sources[0].manager.counters()


@pytest.mark.parametrize("prefix", [4, 8, 20, 24])
def test_decode_holds_a_prefix(pair: Pair, prefix: int) -> None:
    """Up to the whole prompt: then nothing but the aux row is sent."""
    hand_off = HandOff(*pair(kinds=("swa", "dsa")), room=11, length=24, prefix=prefix)
    assert hand_off.run() == DONE
    assert hand_off.senders[0].prefix == prefix
    assert not hand_off.wrong()


def test_a_dense_model_waits_for_no_state(pair: Pair) -> None:
    """SGLang 25698: the list of states is empty, not missing."""
    (source,), (target,) = pair()
    assert source.states(8, 0, [0, 1], 0) == []
    assert HandOff([source], [target], room=12, length=8).run() == DONE


@pytest.mark.parametrize("count", [1, 10, 14])
def test_any_number_of_aux_buffers(pair: Pair, count: int) -> None:
    hand_off = HandOff(*pair(aux=(64,) * count), room=13, length=9)
    assert hand_off.run() == DONE
    assert not hand_off.wrong()


def test_two_sides_with_other_aux_buffers_are_told(pair: Pair) -> None:
    """SGLang logs it and sends the first ones."""
    sources, _ = pair(aux=(64, 64))
    _, targets = pair(aux=(64, 64, 64))
    hand_off = HandOff(sources, targets, room=14, length=9)
    hand_off.meet()
    error = hand_off.receivers[0].error
    assert error is not None
    assert error.code == "incompatible"
    assert "aux" in str(error)


def test_pipeline_stages_on_prefill(pair: Pair) -> None:
    """Three stages, one decode rank; the aux row comes from the last stage alone."""
    name = "three stages"
    sources = [StandIn(pp=(3, stage), group=name) for stage in range(3)]
    _, targets = pair()
    hand_off = HandOff(sources, targets, room=15, length=13)
    try:
        assert hand_off.run() == DONE
        assert not hand_off.wrong()
    finally:
        for source in sources:
            source.close()


def test_decode_knows_that_prefill_is_there_before_it_allocates(pair: Pair) -> None:
    sources, targets = pair()
    hand_off = HandOff(sources, targets, room=16, length=9)
    assert hand_off.receivers[0].poll() is KVPoll.Bootstrapping
    hand_off.meet()
    assert hand_off.receivers[0].poll() is KVPoll.WaitingForInput
    assert hand_off.senders[0].poll() is KVPoll.Bootstrapping


def test_an_abort_on_decode_frees_on_proof(pair: Pair) -> None:
    hand_off = HandOff(*pair(), room=17, length=40)
    hand_off.meet()
    hand_off.publish()
    hand_off.begin()
    hand_off.send(stop=16)
    receiver = hand_off.receivers[0]
    receiver.give_up("the client is gone")
    assert receiver.poll() is KVPoll.Failed
    until(lambda: receiver.drained)
    until(lambda: hand_off.senders[0].poll() is KVPoll.Failed)
    error = hand_off.senders[0].error
    assert error is not None
    assert error.code == "aborted"


def test_an_abort_on_prefill_is_heard_before_it_returns(pair: Pair) -> None:
    hand_off = HandOff(*pair(), room=18, length=40)
    hand_off.meet()
    hand_off.publish()
    hand_off.begin()
    hand_off.send(stop=16)
    hand_off.senders[0].give_up("the client is gone")
    assert hand_off.settle() == FAILED
    until(lambda: hand_off.receivers[0].drained)


def test_a_room_that_is_live_is_refused_and_left_alone(pair: Pair) -> None:
    """SGLang 40125: the second request fails by name, the first one goes on."""
    sources, targets = pair()
    first = HandOff(sources, targets, room=19, length=21)
    first.meet()
    again = Sending(sources[0].manager, 19, sources[0].cache)
    assert again.poll() is KVPoll.Failed
    assert "live already" in str(again.error)
    twice = Receiving(targets[0].manager, 19, targets[0].cache)
    twice.begin([sources[0].manager.address])
    assert twice.poll() is KVPoll.Failed
    assert twice.drained
    first.publish()
    first.begin()
    first.send()
    assert first.settle() == DONE
    assert not first.wrong()


@pytest.mark.parametrize("room", [-1, 1 << 63])
def test_what_is_no_room_is_refused(pair: Pair, room: int) -> None:
    (source,), (target,) = pair()
    assert Sending(source.manager, room, source.cache).poll() is KVPoll.Failed
    receiving = Receiving(target.manager, room, target.cache)
    receiving.begin([source.manager.address])
    assert receiving.poll() is KVPoll.Failed
    assert receiving.drained


def test_a_shortened_prompt_is_no_success(pair: Pair) -> None:
    """SGLang 30233: prefill has replaced an over-long prompt by one token and sends that."""
    hand_off = HandOff(*pair(), room=20, length=40)
    hand_off.meet()
    hand_off.publish()
    hand_off.begin()
    hand_off.senders[0].send(np.array(hand_off.source_pages[:1], np.int32), [], ALWAYS_READY)
    assert hand_off.settle() == FAILED


def test_another_model_is_refused_on_both_sides_by_name(pair: Pair) -> None:
    sources, _ = pair()
    _, targets = pair(model="another one")
    hand_off = HandOff(sources, targets, room=21, length=9)
    hand_off.meet()
    assert hand_off.polls()[1] is KVPoll.Failed
    assert "another one" in str(hand_off.receivers[0].error)


def test_a_lost_prefill_fails_what_is_open_and_is_told(pair: Pair) -> None:
    (source,), (target,) = pair()
    hand_off = HandOff([source], [target], room=22, length=40)
    hand_off.meet()
    hand_off.publish()
    source.close()
    until(lambda: hand_off.receivers[0].poll() is KVPoll.Failed)
    until(lambda: hand_off.receivers[0].drained)
    until(lambda: bool(target.manager.take_lost_peers()))


@pytest.mark.parametrize("kind", ["swa_ring", "dsa_tail", "c128_state"])
def test_an_unknown_component_ends_the_start_by_name(pair: Pair, kind: str) -> None:
    """SGLang 18939: it is sent by nobody and waited for."""
    from kvbaton.engines.sglang.memory import Rank, cache_of

    (source,), _ = pair(kinds=("swa",))
    source.args.state_types = [kind]
    with pytest.raises(ConfigError, match=kind):
        cache_of(source.args, Rank(heads=4))


def test_a_draft_model_has_the_pages_of_the_target(pair: Pair) -> None:
    from kvbaton.engines.sglang.memory import Rank, cache_of

    (source,), _ = pair()
    source.args.num_draft_entries = 2  # K and V of the last layer, say
    cache = cache_of(source.args, Rank(heads=4))
    assert [(pool.name, len(pool.planes)) for pool in cache.layout.pools] == [("kv", 4), ("draft", 2), ("aux", 3)]
    assert [(span.pool, len(span.units)) for span in cache.spans(np.arange(3), 8)] == [("kv", 3), ("draft", 3)]
    cache.layout.validate()


def test_states_that_nobody_tells_apart_need_equal_sizes(pair: Pair) -> None:
    """SGLang 23746: a slice of a convolution of unknown blocks would be wrong bytes."""
    from kvbaton.engines.sglang.memory import Rank, cache_of
    from kvbaton.plan.compatibility import differences

    (source,), _ = pair(kinds=("mamba",))
    source.args.state_conv_shard_groups = [[]]
    whole = cache_of(source.args, Rank(heads=4)).layout
    (half, _), _ = pair(2, kinds=("mamba",))
    half.args.state_conv_shard_groups = [[]]
    cut = cache_of(half.args, Rank(heads=4, tp_size=2, prefill=False)).layout
    assert any("mamba" in difference.field for difference in differences(whole, cut))
    assert not differences(whole, whole)


def test_pages_are_free_only_when_nothing_reads_them(pair: Pair) -> None:
    """A chunk that is not ready keeps its pages."""
    sources, targets = pair()
    hand_off = HandOff(sources, targets, room=23, length=2 * PAGE)
    hand_off.meet()
    hand_off.publish()
    hand_off.begin()
    ready = False
    sources[0].compute(23, range(8), hand_off.source_pages)
    sources[0].finish(23, hand_off.slot, hand_off.row)
    sender = hand_off.senders[0]
    sender.send(np.array(hand_off.source_pages, np.int32), [], lambda: ready)
    assert sender.poll() is KVPoll.Transferring
    ready = True
    assert hand_off.settle() == DONE
    assert sender.bytes > 0
    assert sender.seconds is not None
    assert not hand_off.wrong()
