"""A stand-in for SGLang: ranks with numpy memory described as its ``KVArgs``, and a scheduler's calls in its order.

The cache of a token is a number that only its layer, tensor, head, place and prompt give.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import numpy as np

from kvbaton import ALWAYS_READY, Coordinates, KVManager, KVPoll, Settings, Sizes, new_instance
from kvbaton.engines.sglang.memory import Rank, cache_of
from kvbaton.engines.sglang.receiving import Receiving
from kvbaton.engines.sglang.sending import Sending
from kvbaton.runtime.staging_memory import STAGING_SLOT_BYTES

PAGE, PAGES, SLOTS, LAYERS, HEADS, SIZE, WINDOW = 4, 64, 8, 3, 4, 2, 8
GROUPS = (4, 4, 8)  #: blocks along the sharded dimension of a convolution, over all ranks
QUICK = Settings(bootstrap_timeout=3.0, retry_seconds=0.05)


@dataclass(eq=False)
class StandIn:
    """One rank. ``kinds``: what it has beside its cache, of ``swa``, ``dsa``, ``mamba``; ``aux``: sizes of rows."""

    prefill: bool = True
    latent: bool = False
    kinds: tuple[str, ...] = ()
    aux: tuple[int, ...] = (64, 128, 64)
    tp: tuple[int, int] = (1, 0)
    pp: tuple[int, int] = (1, 0)
    group: str = field(default_factory=new_instance)
    model: str = "stand-in"
    staging: int = 0

    def __post_init__(self) -> None:
        size, rank = self.tp
        stages, stage = self.pp
        self.layers = [layer for layer in range(LAYERS) if layer * stages // LAYERS == stage]
        self.heads = 1 if self.latent else max(1, HEADS // size)
        self.first_head = 0 if self.latent else rank // max(1, size // HEADS) * self.heads
        tensors = len(self.layers) * (1 if self.latent else 2)
        shape = (PAGES, PAGE, self.heads, SIZE)
        self.kv = [np.full(shape, -1.0, np.float32) for _ in range(tensors)]
        self.swa = [np.full(shape, -1.0, np.float32) for _ in range(tensors)]
        self.index = [np.full((PAGES, PAGE * 3), -1.0, np.float32) for _ in self.layers]
        self.conv = [np.full((SLOTS, sum(GROUPS) // size, 3), -1.0, np.float32) for _ in self.layers]
        self.heads_state = [
            np.full((SLOTS, HEADS // size if size <= HEADS else 1, 5), -1.0, np.float32) for _ in self.layers
        ]
        self.rows = [np.zeros((SLOTS, width), np.uint8) for width in self.aux]
        self.args = self._args()
        self.cache = cache_of(
            self.args,
            Rank(
                heads=HEADS,
                latent=self.latent,
                tp_size=size,
                tp_rank=rank,
                pp_size=stages,
                pp_rank=stage,
                model=self.model,
                prefill=self.prefill,
            ),
        )
        settings = QUICK
        if self.staging:
            settings = replace(QUICK, staging="always")
        self.manager = KVManager.open(
            self.cache.layout,
            role="prefill" if self.prefill else "decode",
            backend="memory",
            settings=settings,
            group=self.group,
            sizes=Sizes(tp=size, pp=stages),
            coordinates=Coordinates(tp=rank, pp=stage),
            staging_bytes=self.staging * STAGING_SLOT_BYTES["DRAM"],
        )

    def _args(self) -> Any:
        def of(arrays: Sequence[Any]) -> tuple[list[int], list[int], list[int]]:
            return [a.ctypes.data for a in arrays], [a.nbytes for a in arrays], [a[0].nbytes for a in arrays]

        args = SimpleNamespace(
            page_size=PAGE,
            kv_cache_dtype_str="float32",
            kv_layer_ids=[],
            num_draft_entries=0,
            prefill_start_layer=self.layers[0],
            swa_kv_cache_layout="nhd",
            mla_compression_ratios=None,
            state_types=[],
            state_data_ptrs=[],
            state_data_lens=[],
            state_item_lens=[],
            state_layer_ids=[],
            state_dim_per_tensor=[],
            state_slice_outer_counts=[],
            state_conv_shard_groups=[],
        )
        args.kv_data_ptrs, args.kv_data_lens, args.kv_item_lens = of(self.kv)
        args.aux_data_ptrs, args.aux_data_lens, args.aux_item_lens = of(self.rows)
        count = len(self.layers)
        for kind in self.kinds:
            arrays = {"swa": self.swa, "dsa": self.index, "mamba": [*self.conv, *self.heads_state]}[kind]
            args.state_types.append(kind)
            for name, values in zip(("ptrs", "lens"), of(arrays), strict=False):
                getattr(args, f"state_data_{name}").append(values)
            args.state_item_lens.append(of(arrays)[2])
            args.state_layer_ids.append(self.layers * 2 if kind == "mamba" else [])
            dims = [array.shape[1] for array in arrays] if kind == "mamba" else []
            args.state_dim_per_tensor.append(dims)
            args.state_slice_outer_counts.append([1] * len(arrays) if kind == "mamba" else [])
            args.state_conv_shard_groups.append([list(GROUPS)] * count + [None] * count if kind == "mamba" else [])
        return args

    def close(self) -> None:
        self.manager.close()

    def compute(self, prompt: int, tokens: range, pages: Sequence[int]) -> None:
        """The cache of these tokens; ``pages``: of the whole prompt."""
        for at in tokens:
            self._token(self.kv, at, pages)[:] = self._value(prompt, at)
            self._token(self.swa, at, pages)[:] = self._value(prompt, at) + 0.5
            for layer, array in zip(self.layers, self.index, strict=True):
                array[pages[at // PAGE]].reshape(PAGE, 3)[at % PAGE] = prompt * 1000 + at + layer / 8

    def finish(self, prompt: int, slot: int, row: int) -> None:
        """The states after the last token, and the aux row."""
        if "mamba" in self.kinds:
            for layer, conv, heads in zip(self.layers, self.conv, self.heads_state, strict=True):
                conv[slot] = self._conv(prompt, layer)
                heads[slot] = self._heads(prompt, layer)
        for i, array in enumerate(self.rows):
            array[row] = (prompt + i) % 250 + 1

    def wrong(self, prompt: int, tokens: range, pages: Sequence[int], slot: int, row: int) -> list[str]:
        """What is not as the prefill of ``prompt`` left it."""
        found = []
        for at in tokens:
            if not (self._token(self.kv, at, pages) == self._value(prompt, at)).all():
                found.append(f"token {at}")
            if "dsa" in self.kinds:
                for layer, array in zip(self.layers, self.index, strict=True):
                    if not (
                        array[pages[at // PAGE]].reshape(PAGE, 3)[at % PAGE] == prompt * 1000 + at + layer / 8
                    ).all():
                        found.append(f"index of {at}")
        if "swa" in self.kinds:
            for at in range(max(tokens.start, tokens.stop - WINDOW), tokens.stop):
                if not (self._token(self.swa, at, pages) == self._value(prompt, at) + 0.5).all():
                    found.append(f"window token {at}")
        if "mamba" in self.kinds:
            for layer, conv, heads in zip(self.layers, self.conv, self.heads_state, strict=True):
                if not (
                    (conv[slot] == self._conv(prompt, layer)).all()
                    and (heads[slot] == self._heads(prompt, layer)).all()
                ):
                    found.append(f"state of layer {layer}")
        found += [f"aux {i}" for i, array in enumerate(self.rows) if not (array[row] == (prompt + i) % 250 + 1).all()]
        return found

    def states(self, stop: int, prefix: int, pages: Sequence[int], slot: int) -> list[Any]:
        """What SGLang lists with the last chunk, and with what decode publishes."""
        first = max(prefix, stop - WINDOW) // PAGE
        listed = {
            "swa": np.array(pages[first:], np.int32),
            "dsa": np.array(pages[prefix // PAGE :], np.int32),
            "mamba": [np.array(slot)],
        }
        return [listed[kind] for kind in self.kinds]

    def _token(self, arrays: Sequence[Any], at: int, pages: Sequence[int]) -> Any:
        return _Tokens([array[pages[at // PAGE], at % PAGE] for array in arrays])

    def _value(self, prompt: int, at: int) -> Any:
        """[tensors, heads here, size]"""
        tensors = (
            [(layer, 0) for layer in self.layers]
            if self.latent
            else [(layer, tensor) for tensor in range(2) for layer in self.layers]
        )
        heads = np.arange(self.first_head, self.first_head + self.heads)
        return np.array(
            [
                [[prompt * 1000 + at + layer / 8 + tensor / 64 + head / 1024] * SIZE for head in heads]
                for layer, tensor in tensors
            ],
            np.float32,
        )

    def _conv(self, prompt: int, layer: int) -> Any:
        size, rank = self.tp
        whole = np.arange(sum(GROUPS) * 3, dtype=np.float32).reshape(sum(GROUPS), 3) + prompt * 100 + layer / 8
        starts = np.cumsum([0, *GROUPS[:-1]])
        return np.concatenate(
            [
                whole[start + rank * width // size : start + (rank + 1) * width // size]
                for start, width in zip(starts, GROUPS, strict=True)
            ]
        )

    def _heads(self, prompt: int, layer: int) -> Any:
        size, rank = self.tp
        whole = np.arange(HEADS * 5, dtype=np.float32).reshape(HEADS, 5) - prompt * 100 - layer / 8
        return whole[rank * HEADS // size : (rank + 1) * HEADS // size]


class _Tokens:
    """One token of every tensor."""

    def __init__(self, views: list[Any]) -> None:
        self.views = views

    def __setitem__(self, _: Any, values: Any) -> None:
        for view, value in zip(self.views, values, strict=True):
            view[:] = value

    def __eq__(self, other: Any) -> Any:
        return np.array([(view == value).all() for view, value in zip(self.views, other, strict=True)])

    __hash__ = None  # type: ignore[assignment]


def group(count: int, **more: Any) -> list[StandIn]:
    """The ranks of one server with this tensor-parallel size."""
    name = new_instance()
    return [StandIn(tp=(count, rank), group=name, **more) for rank in range(count)]


def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.001)


def agreed(polls: Sequence[KVPoll]) -> KVPoll:
    """What SGLang's ranks agree on."""
    return min(polls)


@dataclass(eq=False)
class HandOff:
    """One request between two servers, in SGLang's steps."""

    sources: list[StandIn]
    targets: list[StandIn]
    room: int
    length: int
    prefix: int = 0
    chunk: int = 8
    source_pages: list[int] = field(default_factory=list)
    target_pages: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        chance = np.random.default_rng(self.room)
        count = math.ceil(self.length / PAGE)
        self.source_pages = self.source_pages or [int(p) for p in chance.permutation(PAGES)[:count]]
        self.target_pages = self.target_pages or [int(p) for p in chance.permutation(PAGES)[:count]]
        self.slot, self.row = int(chance.integers(SLOTS)), int(chance.integers(SLOTS))
        self.senders = [Sending(side.manager, self.room, side.cache) for side in self.sources]
        self.receivers = [Receiving(side.manager, self.room, side.cache) for side in self.targets]

    def polls(self) -> tuple[KVPoll, KVPoll]:
        return agreed([s.poll() for s in self.senders]), agreed([r.poll() for r in self.receivers])

    def meet(self) -> None:
        addresses = [side.manager.address for side in self.sources]
        for receiver in self.receivers:
            receiver.begin(addresses)
        until(lambda: self.polls()[1] in (KVPoll.WaitingForInput, KVPoll.Failed))

    def publish(self) -> None:
        for side, receiver in zip(self.targets, self.receivers, strict=True):
            if self.prefix:  # decode's prefix cache
                side.compute(self.room, range(self.prefix), self.target_pages)
            pages = np.array(self.target_pages[self.prefix // PAGE :], np.int32)
            receiver.publish(
                pages, self.row, side.states(self.length, self.prefix, self.target_pages, self.slot), self.prefix
            )

    def begin(self) -> None:
        until(lambda: self.polls()[0] in (KVPoll.WaitingForInput, KVPoll.Failed))
        for sender in self.senders:
            sender.begin(math.ceil((self.length - sender.prefix) / PAGE), self.row)

    def send(self, *, stop: int | None = None) -> None:
        """Compute and send chunks up to token ``stop``; without, all."""
        sent = self.senders[0].prefix
        for start in range(0, self.length, self.chunk):
            end = min(start + self.chunk, self.length)
            if stop is not None and end > stop:
                return
            last = end == self.length
            for side, sender in zip(self.sources, self.senders, strict=True):
                side.compute(self.room, range(start, end), self.source_pages)
                if last:
                    side.finish(self.room, self.slot, self.row)
                upto = end if last else end // PAGE * PAGE
                pages = np.array(self.source_pages[sent // PAGE : math.ceil(upto / PAGE)], np.int32)
                if len(pages) or last:
                    states = side.states(self.length, sender.prefix, self.source_pages, self.slot) if last else None
                    sender.send(pages, states, ALWAYS_READY)
            sent = max(sent, end // PAGE * PAGE)

    def settle(self) -> tuple[KVPoll, KVPoll]:
        """What both sides end with."""
        ended = (KVPoll.Failed, KVPoll.Success)
        until(lambda: all(poll in ended for poll in self.polls()))
        return self.polls()

    def run(self) -> tuple[KVPoll, KVPoll]:
        self.meet()
        self.publish()
        self.begin()
        self.send()
        return self.settle()

    def wrong(self) -> list[str]:
        tokens = range(self.length)
        return [
            w for side in self.targets for w in side.wrong(self.room, tokens, self.target_pages, self.slot, self.row)
        ]
