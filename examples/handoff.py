"""Two processes, each with a paged pool: prefill computes the KV cache of a prompt, decode receives it.

Run: python examples/handoff.py [nixl | memory | MODULE:CLASS]
"""

import multiprocessing
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection

import numpy as np
from numpy.typing import NDArray

from kvbaton import ALWAYS_READY, KVManager, KVPoll, Span, layout

ROOM, TOKENS = 7, 40  # the id of the request, and its prompt: two and a half pages of 16 tokens


def make_pool() -> tuple[NDArray[np.float32], layout.CacheLayout]:
    """A pool of 4 layers shaped [layers, K and V, pages, heads, page size, head dim], and its description."""
    cache = np.zeros((4, 2, 64, 2, 16, 32), np.float32)
    pool = layout.kv_pool(range(4), pages=64, page_size=16, heads=2, head_bytes=32 * 4, dtype="float32")
    return cache, layout.CacheLayout("my-model", (layout.Region(cache.ctypes.data, cache.nbytes),), (pool,))


def wait_until(manager: KVManager, condition: Callable[[], bool]) -> None:
    """An engine would go on with other requests. Every room ends, at the latest by its deadline."""
    while not condition():
        manager.wakeup.wait()  # set when the state of a room changes
        manager.wakeup.clear()


def prefill(pipe: Connection, backend: str) -> None:
    cache, description = make_pool()
    pages = (4, 6, 2)  # those of the prompt, in its order
    cache[:, :, pages] = np.random.default_rng().random(cache[:, :, pages].shape)  # stands for the forward pass
    with KVManager.open(description, role="prefill", backend=backend) as manager:
        pipe.send((manager.address, cache[:, :, pages]))
        sender = manager.sender(ROOM)
        wait_until(manager, lambda: sender.poll() is not KVPoll.Bootstrapping)  # decode has published its pages
        sender.submit([Span("kv", 0, TOKENS, pages)], last=True, ready=ALWAYS_READY)
        wait_until(manager, lambda: sender.released)  # from here on the pages may be freed


if __name__ == "__main__":
    backend = sys.argv[1] if len(sys.argv) > 1 else "nixl"
    pipe, theirs = multiprocessing.Pipe()
    multiprocessing.get_context("spawn").Process(target=prefill, args=(theirs, backend)).start()
    theirs.close()
    cache, description = make_pool()
    pages = (5, 3, 1)
    with KVManager.open(description, role="decode", backend=backend) as manager:
        address, expected = pipe.recv()
        receiver = manager.receiver(ROOM, [address])
        receiver.publish([Span("kv", 0, TOKENS, pages)], token_count=TOKENS)
        wait_until(manager, lambda: receiver.released)
        print(receiver.poll().name, receiver.error or f"{receiver.bytes:,} bytes, {backend}")
    sys.exit(0 if np.array_equal(cache[:, :, pages], expected) else "the pages differ")
