"""A network cut for tensor parallelism computes what the whole one does; a group's polls are one poll."""

from __future__ import annotations

import copy
import itertools
import multiprocessing
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from engine_kit import LoadedModels, make_prompt

from kvbaton.errors import ConfigError, InternalError, PeerLostError
from kvbaton.manager import KVPoll, Span
from kvbaton.serving.engine.orders import RankOrder, RankReport, RankStatus, SubmitChunk
from kvbaton.serving.engine.pipe import Pipe
from kvbaton.serving.engine.polls import combine
from kvbaton.serving.engine.shard import RankShard
from kvbaton.serving.engine.sharding import check_fits, shard_network
from lab.conformance.families import FAMILIES


class Meeting:
    """Sums over threads in place of processes."""

    def __init__(self, ranks: int) -> None:
        self._parts: list[Any] = [None] * ranks
        self._barrier = threading.Barrier(ranks, timeout=30)

    def adder(self, rank: int) -> Callable[[Any], None]:
        def add_up(tensor: Any) -> None:
            self._parts[rank] = tensor.clone()
            self._barrier.wait()
            tensor.copy_(sum(self._parts))
            self._barrier.wait()

        return add_up


@pytest.mark.parametrize(
    ("family", "ranks"), [*((family, 2) for family in sorted(FAMILIES)), ("llama", 4), ("qwen3", 4)]
)
def test_a_cut_network_computes_the_same(family: str, ranks: int, loaded_models: LoadedModels) -> None:
    whole = loaded_models[family]
    tokens = torch.tensor([make_prompt(40)])
    with torch.inference_mode():
        expected = whole.network(input_ids=tokens, use_cache=False).logits
    meeting = Meeting(ranks)
    networks = []
    for rank in range(ranks):
        network = copy.deepcopy(whole.network)
        shard_network(network, RankShard(tp_size=ranks, tp_rank=rank), meeting.adder(rank))
        networks.append(network)

    def compute(network: Any) -> Any:
        with torch.inference_mode():
            return network(input_ids=tokens, use_cache=False).logits

    with ThreadPoolExecutor(ranks) as pool:
        for logits in pool.map(compute, networks):
            torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
    weights = [sum(p.numel() for p in network.parameters()) for network in (whole.network, networks[0])]
    assert weights[1] < weights[0]


def test_what_does_not_divide_is_refused_by_name(loaded_models: LoadedModels) -> None:
    model = loaded_models["llama"]
    check_fits(model.network, model.geometry, RankShard(tp_size=8))
    with pytest.raises(ConfigError, match="--tensor-parallel-size 3 does not divide the model's 8 attention heads"):
        check_fits(model.network, model.geometry, RankShard(tp_size=3))
    with pytest.raises(ConfigError, match="--tensor-parallel-size 16 does not divide"):
        check_fits(model.network, model.geometry, RankShard(tp_size=16))
    with pytest.raises(ConfigError, match="pipeline-parallel size 5 is more than the model's 4 layers"):
        check_fits(model.network, model.geometry, RankShard(pp_size=5))


def test_stages_share_the_layers() -> None:
    assert [RankShard(pp_size=3, pp_rank=rank).layers(8) for rank in range(3)] == [range(3), range(3, 6), range(6, 8)]
    assert [shard.rank for shard in RankShard(tp_size=2, pp_size=2).all()] == [0, 1, 2, 3]
    with pytest.raises(ConfigError):
        RankShard(tp_size=2, tp_rank=2)


@pytest.mark.parametrize("polls", list(itertools.product(KVPoll, repeat=3)))
def test_a_group_is_as_far_as_its_slowest_rank(polls: tuple[KVPoll, ...]) -> None:
    combined = combine(polls)
    assert (combined is KVPoll.Failed) == (KVPoll.Failed in polls)
    assert (combined is KVPoll.Success) == (set(polls) == {KVPoll.Success})
    assert combined in polls
    assert combined == combine(reversed(polls))


def test_orders_and_errors_go_there_and_back() -> None:
    here, there = multiprocessing.Pipe()
    follower: Pipe[RankOrder] = Pipe(here, "the leader", RankOrder)
    leader: Pipe[RankReport] = Pipe(there, "rank 1", RankReport, kill=lambda: None)
    order = SubmitChunk(7, (Span("kv", 0, 20, (3, 1)), Span("aux", 0, 0, (2,))), True, (("aux", 2, b"row"),))
    leader.send(order)
    assert follower.recv() == order
    error = PeerLostError("gone", peer="rank 1", hint="wait").in_room(5, "Transferring")
    follower.send(RankStatus(7, KVPoll.Failed, True, error=error))
    back = leader.recv()
    assert isinstance(back, RankStatus)
    assert (back.side, back.poll, back.leased, str(back.error)) == (7, KVPoll.Failed, True, str(error))
    assert (type(back.error), back.error and back.error.hint) == (PeerLostError, "wait")
    follower.close()
    assert leader.waits(0)
    assert leader.recv() is None
    with pytest.raises(InternalError, match=r"^rank 1 is gone"):
        leader.send(order)
    leader.close()
