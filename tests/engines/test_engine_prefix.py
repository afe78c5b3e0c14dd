"""The prefix cache: what a tree of pages finds, keeps and gives up; and a decode side that shares them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from engine_kit import LoadedModels, call, generate, make_prompt
from hypothesis import given
from hypothesis import strategies as st
from test_engine_handoff import CONFIG, Pair, pair

from kvbaton.serving.engine.allocator import Allocator
from kvbaton.serving.engine.model import LoadedModel
from kvbaton.serving.engine.prefix import Prefix, PrefixCache
from kvbaton.serving.engine.request import Request, Sampling
from kvbaton.serving.engine.scheduler import SchedulerConfig

PAGE = 4


def test_only_whole_pages_match() -> None:
    tree = PrefixCache(PAGE)
    first = tree.match(range(10))
    assert first.pages == ()
    tree.extend(first, range(10), (5, 6, 7))
    assert first.pages == (5, 6)
    assert tree.match(range(9)).pages == (5, 6)
    assert tree.match(range(7)).pages == (5,)
    assert tree.match((0, 1, 2)).pages == ()
    assert tree.match((0, 1, 2, 3, 9, 9, 9, 9)).pages == (5,)


def test_a_page_that_is_known_stays_with_who_brought_it_first() -> None:
    tree = PrefixCache(PAGE)
    one, two = tree.match(range(8)), tree.match(range(8))
    tree.extend(one, range(8), (1, 2))
    tree.extend(two, range(8), (3, 4))
    assert (one.pages, two.pages) == ((1, 2), ())


def test_leaves_nobody_uses_go_first_and_oldest_first() -> None:
    tree = PrefixCache(PAGE)
    requests = []
    for number in range(3):
        request = tree.match((number,) * PAGE)
        tree.extend(request, (number,) * 2 * PAGE, (2 * number, 2 * number + 1))
        requests.append(request)
    assert tree.evict(9) == []
    for number in (1, 0):
        tree.release(requests[number])
    assert tree.evictable == 4
    assert tree.evict(3) == [3, 2, 1]
    assert tree.evict(9) == [0]
    assert (len(tree), tree.evictable) == (2, 0)


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 20)), max_size=40), st.integers(0, 99))
def test_no_page_is_lost_or_given_twice(script: list[tuple[int, int]], seed: int) -> None:
    """Random requests over a small alphabet: the pool's pages are always in the tree, with a request, or free."""
    rng, tree, pool = random.Random(seed), PrefixCache(PAGE), Allocator(12, "page")
    live: list[tuple[Prefix, tuple[int, ...], list[int]]] = []
    for action, size in script:
        if action and live:
            prefix, pages, tokens = live.pop(rng.randrange(len(live)))
            tree.extend(prefix, tokens, pages)
            kept = set(prefix.pages)
            pool.free([page for page in pages if page not in kept])
            tree.release(prefix)
            continue
        tokens = [rng.randrange(2) for _ in range(size)]
        prefix = tree.match(tokens)
        need = -(-size // PAGE) - len(prefix.nodes)
        if pool.available < need:
            pool.free(tree.evict(need - pool.available))
        if pool.available < need:
            tree.release(prefix)
            continue
        live.append((prefix, (*prefix.pages, *(pool.allocate(need) or ())), tokens))
        own = [page for prefix, pages, _ in live for page in pages[len(prefix.nodes) :]]
        assert len(set(own)) == len(own)
        assert pool.used == len(own) + len(tree)
    for prefix, pages, _ in live:
        pool.free(pages[len(prefix.nodes) :])
        tree.release(prefix)
    assert tree.evictable == len(tree) == pool.used
    pool.free(tree.evict(99))
    assert pool.used == len(tree) == 0


@contextmanager
def sharing(model: LoadedModel, **target: int) -> Iterator[Pair]:
    with pair(model, target={"chunk_tokens": 1, **target}, decode_config=SchedulerConfig(prefix_cache=True)) as both:
        yield both


def ask(both: Pair, room: int, prompt: tuple[int, ...], count: int = 8) -> int:
    """Ask, compare with the reference, and return the bytes that moved."""
    request = Request(
        request_id=f"r{room}",
        prompt_tokens=prompt,
        sampling=Sampling(max_tokens=count, temperature=0.0, ignore_eos=True),
        room=room,
        sources=(both.source.address,),
    )
    _, answer = both.ask(request)
    assert answer.wait().tokens == generate(both.model, prompt, count)
    handoff = answer.outputs[0].handoff
    assert handoff is not None
    return handoff.bytes


@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize("family", ["llama", "deepseek_v32", "gpt_oss", "qwen3_next"])
def test_a_hit_moves_only_what_follows(family: str, page_size: int, loaded_models: LoadedModels) -> None:
    model = loaded_models[family]
    prompt, other = make_prompt(128), make_prompt(64, 1)
    with sharing(model, page_size=page_size) as both:
        whole = ask(both, 1, prompt)
        half = ask(both, 2, prompt[:64] + other)
        nothing = ask(both, 3, prompt)
        grown = ask(both, 4, (*prompt, *generate(model, prompt, 8), *other[:8]))
        assert whole - half == 64 * model.geometry.token_bytes
        assert whole - nothing == 128 * model.geometry.token_bytes
        assert grown <= nothing + max(page_size, 24) * model.geometry.token_bytes
        both.assert_nothing_held()
        stats = both.decode.stats()
        assert stats.prefix_lookups == 4
        assert stats.prefix_hit_tokens == 64 + 128 + 128
        assert both.decode.stats().pages_free == both.pages


def free_leaves(tree: PrefixCache) -> dict[int, int]:
    """Last use by page, of everything that may be evicted, by walking the whole tree."""
    waiting, found = list(tree._root.children.values()), {}
    while waiting:
        node = waiting.pop()
        waiting += node.children.values()
        if not node.children and not node.locks:
            found[node.page] = node.used
    return found


@given(st.lists(st.tuples(st.sampled_from(["use", "use", "release", "evict"]), st.integers(0, 1 << 20)), max_size=120))
def test_what_is_evicted_is_always_a_leaf_that_was_used_least_recently(steps: list[tuple[str, int]]) -> None:
    tree, held, pages = PrefixCache(1), list[Prefix](), iter(range(10_000))
    for what, number in steps:
        if what == "use":
            tokens = random.Random(number).choices(range(3), k=1 + number % 5)
            prefix = tree.match(tokens)
            tree.extend(prefix, tokens, [next(pages) for _ in tokens])
            held.append(prefix)
        elif what == "release" and held:
            tree.release(held.pop(number % len(held)))
        elif what == "evict":
            leaves = free_leaves(tree)
            evicted = tree.evict(1)
            assert bool(evicted) == bool(leaves)
            assert [leaves[page] for page in evicted] == [min(leaves.values(), default=0)] * len(evicted)
    for prefix in held:
        tree.release(prefix)
    tree.evict(10_000)
    assert (len(tree), tree.evictable) == (0, 0)


def test_a_full_pool_evicts_what_nobody_uses(model: LoadedModel) -> None:
    with sharing(model, pages=14) as both:
        for room in range(12):
            ask(both, room + 1, make_prompt(100, room % 5), 20)
        callers = []
        for room in range(100, 108):
            request = both.request(room, 90, 10)
            callers.append((request, both.ask(request)))
        for request, (_, answer) in callers:
            assert answer.wait().tokens == generate(model, request.prompt_tokens, 10)
        both.assert_nothing_held()


def test_an_aborted_hand_off_leaves_nothing_in_the_tree(model: LoadedModel) -> None:
    with sharing(model) as both:
        request = both.request(1, 100, 4)
        orphan = call(both.decode, request)
        both.decode.abort("r1")
        assert orphan.wait().last.final
        both.assert_nothing_held()
        assert both.decode.stats().pages_free == both.pages
        both.ask(both.request(2, 100, 4))[1].wait()
        assert CONFIG.prefix_cache is False
