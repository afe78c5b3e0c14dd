"""Every target byte is written exactly once, with the right value, for every pool kind and topology.

``KVBATON_PROPERTY_CASES`` says how many cases all tests of this file run together (``make properties``: 10,000).
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from groups import Cut, Group, Model, Prompt, Reference, make_group
from hypothesis import given, settings
from hypothesis import strategies as st
from property_cases import COUNTED, share

from kvbaton.layout import Axis, CacheLayout, Shard, StateTensor, gated_delta_net, mamba2
from kvbaton.plan.pair import make_plan, overlap
from kvbaton.plan.runs import Runs, merge
from kvbaton.plan.verify import check_bounds, check_disjoint

SIZES = (1, 2, 4, 8, 16)
TP = (1, 2, 3, 4, 6, 8)
MAX_RANKS = 8


@pytest.mark.parametrize("heads", SIZES)
def test_every_item_is_written_exactly_once(heads: int) -> None:
    for sources in SIZES:
        for targets in SIZES:
            for target_rank in range(targets):
                target = Axis(heads, targets, target_rank)
                written = sorted(i for p in range(sources) for i in overlap(Axis(heads, sources, p), target))
                wanted = list(range(target.first, target.first + target.width))
                assert written == wanted, (sources, targets, target_rank)


# ---- strategies ------------------------------------------------------------------------------------------------------


def fits(items: int, *tps: int) -> bool:
    return all(items % tp == 0 or tp % items == 0 for tp in tps)


def heads_for(tps: tuple[int, int]) -> st.SearchStrategy[int]:
    return st.sampled_from([heads for heads in (1, 2, 3, 4, 6, 8, 12, 24) if fits(heads, *tps)])


@st.composite
def general_tensor(draw: st.DrawFn, tps: tuple[int, int], name: str) -> StateTensor:
    """A state tensor of any shape, sharded anywhere: outer rows, inner remainder, several shards."""
    before = draw(st.lists(st.integers(1, 3), max_size=2))
    after = draw(st.lists(st.integers(1, 4), max_size=2))
    element = draw(st.sampled_from((1, 2, 4)))
    if draw(st.integers(0, 4)) == 0:
        return StateTensor(name=name, shape=(*before, 2, *after), element_bytes=element, dtype="x")
    shards = []
    for i in range(draw(st.integers(1, 3))):
        items = draw(heads_for(tps))
        shards.append(Shard(f"s{i}", items * draw(st.integers(1, 2)), items))
    shape = (*before, sum(shard.size for shard in shards), *after)
    return StateTensor(name=name, shape=shape, element_bytes=element, dtype="x", axis=len(before), shards=tuple(shards))


@st.composite
def state_tensors(draw: st.DrawFn, tps: tuple[int, int]) -> tuple[StateTensor, ...]:
    family = draw(st.sampled_from(("gdn", "mamba2", "any")), label="family")
    if family == "any":
        return tuple(draw(general_tensor(tps, f"t{i}")) for i in range(draw(st.integers(1, 2))))
    sizes = {"conv_width": draw(st.integers(1, 4)), "element_bytes": draw(st.sampled_from((1, 2))), "dtype": "x"}
    heads, groups = draw(heads_for(tps), label="state heads"), draw(heads_for(tps), label="groups")
    if family == "gdn":
        return gated_delta_net(key_heads=groups, value_heads=heads, key_dim=2, value_dim=3, recurrent_bytes=2, **sizes)
    return mamba2(heads=heads, head_dim=2, groups=groups, state_size=3, state_bytes=2, **sizes)


@st.composite
def cuts(draw: st.DrawFn, tp: int, layers: int) -> Cut:
    return Cut(
        tp=tp,
        pp=draw(st.integers(1, max(1, min(layers, 3, MAX_RANKS // tp))), label="pp"),
        page_size=draw(st.sampled_from((1, 2, 4, 6, 8, 16)), label="page_size"),
        swa_page_size=draw(st.sampled_from((1, 2, 4, 8)), label="swa_page_size"),
        order=draw(st.sampled_from(("HND", "NHD")), label="order"),
        fusion=draw(st.sampled_from(("none", "page", "item")), label="fusion"),
        latent_fusion=draw(st.sampled_from(("none", "item")), label="latent_fusion"),
        slots=draw(st.integers(1, 3), label="slots"),
    )


@st.composite
def cases(draw: st.DrawFn, kinds: tuple[str, ...] = ("kv", "swa", "mla", "state")) -> tuple[Model, Cut, Cut, Prompt]:
    tps = (draw(st.sampled_from(TP), label="source tp"), draw(st.sampled_from(TP), label="target tp"))
    layers = tuple(draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=4), label="layers"))
    source, target = draw(cuts(tps[0], len(layers))), draw(cuts(tps[1], len(layers)))
    common = math.gcd(source.page_size, target.page_size)
    pooled = st.sampled_from([tokens for tokens in (1, 2, 4, 16) if common % tokens == 0])
    model = Model(
        layers=layers,
        heads=draw(heads_for(tps), label="heads"),
        head_bytes=draw(st.sampled_from((1, 2, 8)), label="head_bytes"),
        scale_bytes=draw(st.sampled_from((0, 0, 1, 4)), label="scale_bytes"),
        scale_tokens=draw(pooled, label="scale_tokens"),
        swa_heads=draw(heads_for(tps), label="swa_heads"),
        window=draw(st.integers(1, 24), label="window"),
        index_bytes=draw(st.sampled_from((0, 4)), label="index_bytes"),
        index_scale_bytes=draw(st.sampled_from((0, 2)), label="index_scale_bytes"),
        index_tokens=draw(pooled, label="index_tokens"),
        tensors=draw(state_tensors(tps)) if "state" in layers else (),
    )
    tokens = draw(st.integers(1, 40), label="tokens")
    page = math.lcm(target.page_size, target.swa_page_size)
    prefix = draw(st.one_of(st.just(tokens), st.integers(0, tokens // page).map(lambda n: n * page)), label="prefix")
    return model, source, target, Prompt(tokens=tokens, prefix=prefix, seed=draw(st.integers(0, 2**32), label="seed"))


# ---- the plan does the work, the reference judges ------------------------------------------------------------------


def hand_over(source: Group, target: Group, reference: Reference) -> dict[str, int]:
    """Write what the plan says, and return the granularity of each pool in tokens."""
    blocks: dict[str, int] = {}
    for layout in target.layouts:
        runs = _runs(source, layout, reference, blocks)
        check_disjoint(runs)
        for run in runs:
            _copy(source, target, run)
    return blocks


def _runs(source: Group, target: CacheLayout, reference: Reference, blocks: dict[str, int]) -> list[Runs]:
    plan = make_plan(source.layouts, target)
    runs = []
    for layout, pair in zip(source.layouts, plan.pairs, strict=True):
        check_bounds(pair, layout, target)
        for part in pair.parts:
            pool = part.id.pool
            blocks[pool] = part.block_rows if part.paged else 1
            span = reference.ranges.get(pool, range(0))
            # a source keeps whole pages of its own: the first one is the page of the first token it was asked for
            kept = span.start // part.source.unit_rows if part.paged else 0
            entries = part.entries(
                part.blocks(span.start, span.stop),
                reference.source_units[pool][kept:],
                kept,
                reference.target_units[pool],
                span.start // part.target.unit_rows if part.paged else 0,
            )
            run = merge(part.source.table, entries[0], part.target.table, entries[1])
            assert run.bytes == part.bytes(span.start, span.stop)
            runs.append(run)
    return runs or [Runs(source=np.zeros(0, np.int64), target=np.zeros(0, np.int64), length=np.zeros(0, np.int64))]


def _copy(source: Group, target: Group, runs: Runs) -> None:
    for length in np.unique(runs.length):
        chosen = runs.length == length
        inside = np.arange(length)
        from_bytes = (runs.source[chosen] - source.base)[:, None] + inside
        to_bytes = (runs.target[chosen] - target.base)[:, None] + inside
        target.memory[to_bytes] = source.memory[from_bytes]


def expect_equal(model: Model, source_cut: Cut, target_cut: Cut, prompt: Prompt) -> None:
    source = make_group(model, source_cut, target=False, tokens=prompt.tokens)
    target = make_group(model, target_cut, target=True, tokens=prompt.tokens)
    reference = Reference(source, target, prompt)
    reference.fill(source)
    blocks = hand_over(source, target, reference)
    assert reference.differences(target, blocks) == []
    COUNTED["cases"] += 1
    COUNTED.update({pool.name for layout in target.layouts for pool in layout.pools})


@given(case=cases())
@settings(max_examples=share(0.5), deadline=None)
def test_every_kind_of_pool_equals_a_numpy_reshard(case: tuple[Model, Cut, Cut, Prompt]) -> None:
    expect_equal(*case)


@given(case=cases(kinds=("kv",)))
@settings(max_examples=share(0.15), deadline=None)
def test_dense_models(case: tuple[Model, Cut, Cut, Prompt]) -> None:
    expect_equal(*case)


@given(case=cases(kinds=("kv", "swa")))
@settings(max_examples=share(0.1), deadline=None)
def test_sliding_windows(case: tuple[Model, Cut, Cut, Prompt]) -> None:
    expect_equal(*case)


@given(case=cases(kinds=("mla",)))
@settings(max_examples=share(0.1), deadline=None)
def test_latents_and_index_keys(case: tuple[Model, Cut, Cut, Prompt]) -> None:
    expect_equal(*case)


@given(case=cases(kinds=("kv", "state")))
@settings(max_examples=share(0.15), deadline=None)
def test_hybrid_models(case: tuple[Model, Cut, Cut, Prompt]) -> None:
    expect_equal(*case)
