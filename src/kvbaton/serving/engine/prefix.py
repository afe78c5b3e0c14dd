"""The decode side's prefix cache: a tree over pages of tokens, so that a prompt seen before moves only its suffix.

A node is one whole page: its tokens, given all before them, and where they lie. Rules: only pages that are complete and
that no write can touch any more come in, so nothing leased is ever shared. A page in use by a request is locked and so
are all before it; the others are given back to the pool when it runs full, least recently used first and never before
what follows them.

This file must not know of pools, models or peers.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field


@dataclass(eq=False, slots=True)
class Node:
    """One page. ``locks`` counts the requests that use it."""

    tokens: tuple[int, ...]
    page: int
    parent: Node | None
    used: int = 0
    locks: int = 0
    children: dict[tuple[int, ...], Node] = field(default_factory=dict)


@dataclass(eq=False, slots=True)
class Prefix:
    """What one request holds of the tree: the nodes of its first pages, locked."""

    nodes: list[Node] = field(default_factory=list)

    @property
    def pages(self) -> tuple[int, ...]:
        return tuple(node.page for node in self.nodes)


class PrefixCache:
    """The tree. Used by one thread; ``evictable`` may be read from any."""

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self._root = Node((), -1, None)
        self._clock = itertools.count(1)
        self._size = 0
        #: Leaves that nobody used when they came in, by last use; what has changed since is passed over.
        self._leaves: list[tuple[int, int, Node]] = []
        self._serial = itertools.count()
        #: Pages in the tree that nobody uses.
        self.evictable = 0
        #: Requests that were admitted by way of it, and their tokens that were found here, since the start.
        self.lookups = 0
        self.hit_tokens = 0

    def match(self, tokens: Sequence[int]) -> Prefix:
        """The longest run of whole pages at the start of ``tokens`` that is known; locked until it is released."""
        prefix, node = Prefix(), self._root
        for key in self._keys(tokens, 0):
            found = node.children.get(key)
            if found is None:
                break
            prefix.nodes.append(found)
            node = found
        for node in prefix.nodes:
            self._lock(node)
        return prefix

    def extend(self, prefix: Prefix, tokens: Sequence[int], pages: Sequence[int]) -> None:
        """Take over the whole pages of ``tokens`` that follow ``prefix``; ``pages[i]`` holds page i.

        Stops where the tree has the same tokens already from somebody else: those pages stay the request's own.
        """
        node = prefix.nodes[-1] if prefix.nodes else self._root
        for number, key in enumerate(self._keys(tokens, len(prefix.nodes)), start=len(prefix.nodes)):
            if key in node.children:
                return
            fresh = Node(key, pages[number], node)
            node.children[key] = fresh
            self._size += 1
            self.evictable += 1
            self._lock(fresh)
            prefix.nodes.append(fresh)
            node = fresh

    def release(self, prefix: Prefix) -> None:
        """Unlock it. Its pages stay in the tree until they are evicted."""
        now = next(self._clock)
        for node in prefix.nodes:
            node.used = now
            node.locks -= 1
            self.evictable += node.locks == 0
            self._note_leaf(node)
        prefix.nodes.clear()

    def evict(self, count: int) -> list[int]:
        """At most ``count`` pages, taken out of the tree: leaves that nobody uses, least recently used first. What it
        costs depends on the pages that it takes, not on those that are there."""
        pages: list[int] = []
        while self._leaves and len(pages) < count:
            used, _, node = heapq.heappop(self._leaves)
            parent = node.parent
            if parent is None or node.used != used or not _free_leaf(node):
                continue
            del parent.children[node.tokens]
            node.parent = None
            self._size -= 1
            self.evictable -= 1
            pages.append(node.page)
            self._note_leaf(parent)
        return pages

    def _note_leaf(self, node: Node) -> None:
        """A node that may be evicted from now on, if it is a leaf that nobody uses."""
        if node.parent is None or not _free_leaf(node):
            return
        heapq.heappush(self._leaves, (node.used, next(self._serial), node))
        if len(self._leaves) > 2 * self._size + 64:  # most are out of date
            self._leaves = [entry for entry in self._leaves if entry[0] == entry[2].used and _free_leaf(entry[2])]
            heapq.heapify(self._leaves)

    def __len__(self) -> int:
        return self._size

    def _keys(self, tokens: Sequence[int], first: int) -> Iterator[tuple[int, ...]]:
        size = self._page_size
        for number in range(first, len(tokens) // size):
            yield tuple(tokens[number * size : (number + 1) * size])

    def _lock(self, node: Node) -> None:
        self.evictable -= node.locks == 0
        node.locks += 1

    def __repr__(self) -> str:
        return f"PrefixCache({len(self)} pages, {self.evictable} of them evictable, {self.hit_tokens} tokens hit)"


def _free_leaf(node: Node) -> bool:
    return not node.locks and not node.children
