"""Two toy engines with continuous batching, one for each side of the hand-off. Nothing in their steps waits.

Run: python examples/engine.py

A step admits what fits, computes for a bounded number of tokens, and takes what has ended. Prefill computes prompts in
chunks and submits each one while the next is computed; the last brings the aux row with the first token. Decode grants
pages when it admits a request and adds it to its batch when the room has ended. The model is a checksum of the cache:
an answer is right only if every token of the prompt arrived in its place.
"""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from kvbaton import ALWAYS_READY, KVBatonError, KVManager, KVPoll, KVReceiver, KVSender, Span, layout

LAYERS, PAGES, PAGE_SIZE, SLOTS = 2, 32, 4, 8
CHUNK_TOKENS = 8  # of one step of prefill; a multiple of the page size
VOCABULARY = 1000


@dataclass
class Request:
    room: int  # the same on both sides; the router mints it
    prompt: tuple[int, ...]
    max_tokens: int
    output: list[int] = field(default_factory=list)
    error: KVBatonError | None = None
    pages: tuple[int, ...] = ()
    slot: int = 0


class Engine:
    """What both sides share: the pools with their free units, the toy model, the manager."""

    def __init__(self, role: Literal["prefill", "decode"], wakeup: threading.Event) -> None:
        self.cache = np.zeros((LAYERS, 2, PAGES, PAGE_SIZE), np.int64)
        self.aux = np.zeros((SLOTS, 8), np.int64)
        regions = tuple(layout.Region(array.ctypes.data, array.nbytes) for array in (self.cache, self.aux))
        kv = layout.kv_pool(range(LAYERS), pages=PAGES, page_size=PAGE_SIZE, heads=1, head_bytes=8, dtype="int64")
        pools = (kv, layout.aux_pool(slots=SLOTS, slot_bytes=64, region=1))
        description = layout.CacheLayout("checksum", regions, pools)
        self.manager = KVManager.open(description, role=role, backend="memory", wakeup=wakeup, collect_finished=True)
        self.free_pages, self.free_slots = deque(range(PAGES)), deque(range(SLOTS))
        self.waiting: deque[Request] = deque()
        self.finished: list[Request] = []

    def allocate(self, request: Request, tokens: int) -> bool:
        """Take pages for ``tokens`` and an aux slot; all or nothing."""
        count = -(-tokens // PAGE_SIZE)
        if len(self.free_pages) < count or not self.free_slots:
            return False
        request.pages = tuple(self.free_pages.popleft() for _ in range(count))
        request.slot = self.free_slots.popleft()
        return True

    def finish(self, request: Request, error: KVBatonError | None = None) -> None:
        """Only for a room that has ended and is not leased: no write can touch its units any more."""
        request.error = error
        self.free_pages.extend(request.pages)
        self.free_slots.append(request.slot)
        self.finished.append(request)

    def forward(self, request: Request, tokens: Sequence[int], start: int) -> int:
        """Compute ``tokens`` at positions ``start`` on; the token that follows."""
        for position, token in enumerate(tokens, start):
            self.cache[:, :, request.pages[position // PAGE_SIZE], position % PAGE_SIZE] = token * (position + 1)
        rows = self.cache[:, :, request.pages].reshape(LAYERS * 2, -1)[:, : start + len(tokens)]
        return int(rows.sum() % VOCABULARY)


class Prefill(Engine):
    def __init__(self, wakeup: threading.Event) -> None:
        super().__init__("prefill", wakeup)
        self.sending: dict[int, tuple[Request, KVSender]] = {}
        self.computed: dict[int, int] = {}  # tokens, of rooms whose prompt is not complete

    def step(self) -> bool:
        """Whether anything was done; if not, nothing will be until a room's state changes."""
        busy = False
        while self.waiting and self.allocate(self.waiting[0], len(self.waiting[0].prompt)):
            request = self.waiting.popleft()
            self.sending[request.room] = request, self.manager.sender(request.room)
            self.computed[request.room] = 0
            busy = True
        for room in self.computed:
            request, sender = self.sending[room]
            if sender.poll() in (KVPoll.WaitingForInput, KVPoll.Transferring):  # decode has published its pages
                self.compute_chunk(request, sender)
                busy = True
                break
        for ended in self.manager.take_finished():  # failed or not; each exactly once
            self.computed.pop(ended.room, None)
            self.finish(self.sending.pop(ended.room)[0], ended.error)
            busy = True
        return busy

    def compute_chunk(self, request: Request, sender: KVSender) -> None:
        start = self.computed[request.room]
        stop = min(start + CHUNK_TOKENS, len(request.prompt))
        token = self.forward(request, request.prompt[start:stop], start)
        pages = request.pages[start // PAGE_SIZE : -(-stop // PAGE_SIZE)]
        spans = [Span("kv", start, stop, pages)]
        last = stop == len(request.prompt)
        if last:
            self.aux[request.slot, 0] = token
            spans.append(Span("aux", 0, 0, (request.slot,)))
            del self.computed[request.room]
        else:
            self.computed[request.room] = stop
        sender.submit(spans, last=last, ready=ALWAYS_READY)  # on a GPU: the query of an event recorded here


class Decode(Engine):
    def __init__(self, wakeup: threading.Event, sources: Sequence[str]) -> None:
        super().__init__("decode", wakeup)
        self.sources = sources  # addresses of the prefill ranks; KVManager.lookup asks a registry for them
        self.receiving: dict[int, tuple[Request, KVReceiver]] = {}
        self.batch: list[Request] = []

    def step(self) -> bool:
        """Whether anything was done; if not, nothing will be until a room's state changes."""
        before = len(self.waiting)
        while self.waiting and self.allocate(self.waiting[0], len(self.waiting[0].prompt) + self.waiting[0].max_tokens):
            self.receive(self.waiting.popleft())
        ended_rooms = self.manager.take_finished()
        for ended in ended_rooms:
            request, _ = self.receiving.pop(ended.room)
            if ended.error is not None:
                self.finish(request, ended.error)
            else:
                request.output.append(int(self.aux[request.slot, 0]))
                self.batch.append(request)
        busy = bool(self.batch or ended_rooms) or len(self.waiting) < before
        for request in self.batch:
            if len(request.output) < request.max_tokens:
                position = len(request.prompt) + len(request.output) - 1
                request.output.append(self.forward(request, request.output[-1:], position))
        for request in [request for request in self.batch if len(request.output) >= request.max_tokens]:
            self.batch.remove(request)
            self.finish(request)
        return busy

    def receive(self, request: Request) -> None:
        receiver = self.manager.receiver(request.room, self.sources)
        tokens = len(request.prompt)
        pages = request.pages[: -(-tokens // PAGE_SIZE)]
        spans = [Span("kv", 0, tokens, pages), Span("aux", 0, 0, (request.slot,))]
        receiver.publish(spans, token_count=tokens)
        self.receiving[request.room] = request, receiver

    def abort(self, room: int) -> None:
        """The client is gone. Its pages come back with the other ended rooms, when no write can touch them any more."""
        self.receiving[room][1].abort("the client has gone")


def expected(request: Request) -> list[int]:
    """The answer of one process."""
    cache, tokens = 0, list(request.prompt)
    for position, token in enumerate(tokens):
        cache += 2 * LAYERS * token * (position + 1)
    while len(tokens) < len(request.prompt) + request.max_tokens:
        tokens.append(cache % VOCABULARY)
        cache += 2 * LAYERS * tokens[-1] * len(tokens)
    return tokens[len(request.prompt) :]


def main(requests: int = 40) -> None:
    chance, wakeup = random.Random(7), threading.Event()
    prefill = Prefill(wakeup)
    decode = Decode(wakeup, [prefill.manager.address])
    with prefill.manager, decode.manager:
        for room in range(requests):  # a router sends each request to both sides at once
            prompt = tuple(chance.randrange(VOCABULARY) for _ in range(chance.randint(1, 40)))
            tokens = chance.randint(1, 12)
            prefill.waiting.append(Request(room, prompt, tokens))
            decode.waiting.append(Request(room, prompt, tokens))
        steps, aborted = 0, False
        while len(prefill.finished) + len(decode.finished) < 2 * requests:
            wakeup.clear()
            busy = [prefill.step(), decode.step()]
            steps += 1
            if not aborted and requests - 1 in decode.receiving:
                decode.abort(requests - 1)
                aborted = True
            if not any(busy):
                wakeup.wait()
    wrong = [r for r in decode.finished if r.error is None and r.output != expected(r)]
    failed = [r for r in decode.finished if r.error is not None]
    free = (len(prefill.free_pages), len(decode.free_pages))
    print(f"{requests} requests in {steps} steps: {len(wrong)} wrong, {len(failed)} aborted; free pages: {free}")
    for request in failed:
        print(f"room {request.room}: {request.error}")
    if wrong or free != (PAGES, PAGES) or any(r.room != requests - 1 for r in failed):
        raise SystemExit("that is not as it should be")


if __name__ == "__main__":
    main()
