"""Answers that go on with another pair: router and API servers over an engine whose next token is a function of what it
has seen, and connections that are cut at any byte."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import random
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from urllib.parse import urlsplit

import aiohttp
import pytest

from kvbaton.discovery.client import RegistryClient
from kvbaton.discovery.registry import Registry, Route
from kvbaton.discovery.server import registry_app
from kvbaton.errors import InternalError, KVBatonError, OverloadedError, PeerLostError
from kvbaton.serving.engine.request import HandedOnError, Output, Request
from kvbaton.serving.engine.seed import seed_of, seed_of_choice
from kvbaton.serving.router.events import Events
from kvbaton.serving.router.progress import Progress
from kvbaton.serving.router.router import Router, RouterConfig
from kvbaton.serving.router.worker import State, Worker
from kvbaton.serving.server.api import ApiServer
from kvbaton.serving.server.journal import MAX_JOURNAL_BYTES
from kvbaton.serving.server.request_parsing import ApiConfig
from kvbaton.serving.testing.engine import CharacterTokenizer, ScriptedEngine
from kvbaton.serving.testing.http import run, serving

LETTERS = "abcdefghijklmnopqrstuvwxyzäöü"


def answers_of(request: Request) -> Iterable[Output]:
    """Each answer's next letter follows from its seed and all that was said before; every seventh kind of letter ends
    it early."""
    sampling = request.sampling
    said = {choice: list(request.prompt_tokens) for choice in range(sampling.choices)}
    count = dict.fromkeys(said, request.answered)
    cached = 5
    while said:
        for choice in list(said):
            seed = seed_of_choice(seed_of(request), choice)
            digest = hashlib.sha256(f"{seed} {said[choice]}".encode()).digest()
            letter = LETTERS[digest[0] % len(LETTERS)]
            said[choice].append(ord(letter))
            count[choice] += 1
            reason = "stop" if digest[1] % 7 == 0 else "length" if count[choice] == sampling.max_tokens else None
            if reason:
                del said[choice]
            yield Output(
                index=choice,
                tokens=(ord(letter),),
                text=letter,
                logprobs=(-digest[2] / 16,) if sampling.logprobs else (),
                top_logprobs=(((ord("x"), -digest[3] / 16),),) if sampling.top_logprobs else (),
                finish_reason=reason,
                unfinished=len(said) if reason else 0,
                cached_tokens=cached,
            )
            cached = 0


class Cutter:
    """A port in front of a server. It closes a connection without a word once so many bytes have come back through it;
    ``cuts`` are those limits, one for each connection that is asked for an answer, in order; then it lets all pass."""

    def __init__(self, url: str) -> None:
        self._to = urlsplit(url)
        self.cuts: list[int] = []
        self.done = 0
        self._connections: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def open(self) -> AsyncIterator[str]:
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        async with server:
            yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            server.close()
            for connection in self._connections:
                connection.cancel()
            await asyncio.gather(*self._connections, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = asyncio.current_task()
        assert connection is not None
        self._connections.add(connection)
        try:
            await self._serve(reader, writer)
        finally:
            self._connections.discard(connection)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream, downstream = await asyncio.open_connection(self._to.hostname, self._to.port)
        limit: list[int] = []

        async def ask() -> None:
            while piece := await reader.read(1 << 16):
                if piece.startswith(b"POST /v1") or piece.startswith(b"POST /generate"):
                    limit[:] = [self.cuts.pop(0)] if self.cuts else []
                downstream.write(piece)
            downstream.transport.abort()  # the router has gone, as from a server that it has given up

        asking = asyncio.create_task(ask())
        try:
            while piece := await upstream.read(1 << 16):
                if limit:
                    piece = piece[: limit[0]]
                    limit[0] -= len(piece)
                writer.write(piece)
                if limit and not limit[0]:
                    self.done += 1
                    for _ in range(20):  # turns of the loop: the router takes what has come, as from a slow server
                        await asyncio.sleep(0)
                    break
        finally:
            asking.cancel()
            downstream.transport.abort()
            writer.close()
            await asyncio.gather(asking, return_exceptions=True)


@dataclass
class Deployment:
    url: str
    session: aiohttp.ClientSession
    router: Router
    cutters: list[Cutter]
    engines: dict[str, list[ScriptedEngine]] = field(default_factory=dict)

    async def ask(self, path: str, body: dict) -> object:
        async with self.session.post(self.url + path, json=body) as response:
            text = await response.text()
            assert response.status == 200, text
        return of_stream(text) if body.get("stream") else comparable(json.loads(text))

    async def story(self, room: int | None) -> dict:
        async with self.session.get(f"{self.url}/story/{room}") as response:
            return await response.json()

    async def metric(self, line: str) -> float:
        async with self.session.get(f"{self.url}/metrics") as response:
            lines = (await response.text()).splitlines()
        return next(float(one.rpartition(" ")[2]) for one in lines if one.startswith(line + " "))


def address_of(decode: int, rank: int) -> str:
    """Where a data-parallel rank of a decode server is dialled."""
    return f"tcp://127.0.0.1:{42000 + 1000 * rank + decode}"


@asynccontextmanager
async def deployment(prefills: int = 1, decodes: int = 2, **router: object) -> AsyncIterator[Deployment]:
    async with AsyncExitStack() as stack:
        registry = Registry()
        route = Route(instance="i", group="g", address="tcp://127.0.0.1:41000", layout_digest="", http_port=1)
        registry.register(route, 0.0)
        bootstrap = await stack.enter_async_context(serving(registry_app(registry, clock=lambda: 0.0)))
        engines: dict[str, list[ScriptedEngine]] = {"prefill": [], "decode": []}
        workers, cutters = [], []
        for role, count in (("prefill", prefills), ("decode", decodes)):
            for number in range(count):
                engine = ScriptedEngine(answers_of)
                config = ApiConfig(model="m", max_positions=4096, mode=role)
                lookup = await stack.enter_async_context(RegistryClient()) if role == "decode" else None
                sources = [(address_of(number, rank),) for rank in range(2)] if role == "decode" else ()
                server = ApiServer(engine, CharacterTokenizer(), config, registry=lookup, sources=sources)
                url = await stack.enter_async_context(serving(server.app))
                if role == "decode":
                    cutters.append(Cutter(url))
                    url = await stack.enter_async_context(cutters[-1].open())
                workers.append(Worker(role, url, urlsplit(bootstrap).port))
                engines[role].append(engine)
        config = RouterConfig(workers=tuple(workers), **router)
        front = Router(config)
        url = await stack.enter_async_context(serving(front.app))
        session = await stack.enter_async_context(aiohttp.ClientSession())
        await front.workers.probe_all()
        yield Deployment(url, session, front, cutters, engines)


SEED = {"sampling_seed": 3}
REQUESTS: list[tuple[str, dict]] = [
    ("/v1/completions", {"prompt": "hello", "max_tokens": 30, "seed": 1}),
    ("/v1/completions", {"prompt": ["one", "two"], "n": 3, "max_tokens": 12, "seed": 4, "logprobs": 1}),
    ("/v1/completions", {"prompt": "x", "best_of": 3, "n": 2, "max_tokens": 9, "seed": 5, "return_token_ids": True}),
    ("/v1/completions", {"prompt": "e", "echo": True, "n": 2, "max_tokens": 9, "seed": 5}),
    (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": "q"}], "n": 2, "max_tokens": 20, "seed": 7, "logprobs": True},
    ),
    ("/generate", {"text": "go", "sampling_params": {"max_new_tokens": 25, **SEED}, "return_logprob": True}),
    ("/generate", {"text": ["a", "b"], "sampling_params": {"n": 2, "max_new_tokens": 9, **SEED}}),
]
USAGE = {"include_usage": True}


def comparable(answer: object) -> object:
    """Without what is another's in every answer: ids, times, what the hand-off took."""
    if isinstance(answer, list):
        return [comparable(one) for one in answer]
    if isinstance(answer, dict):
        skipped = ("id", "created", "handoff", "e2e_latency")
        return {name: comparable(value) for name, value in answer.items() if name not in skipped}
    return answer


def of_stream(text: str) -> object:
    """What its answers are, put together: outputs that come at once may be one event."""
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines[-1] == "[DONE]", text
    events = [json.loads(line) for line in lines[:-1]]
    assert len({event["id"] for event in events if "id" in event}) <= 1
    assert len({event["created"] for event in events if "created" in event}) <= 1
    if "text" in events[0]:
        return last_of_each(events)
    return [joined(events), [event["usage"] for event in events if not event["choices"]]]


def joined(events: list[dict]) -> dict[int, dict]:
    found: dict[int, dict] = {}
    for event in events:
        for choice in event["choices"]:
            one = found.setdefault(choice["index"], {"text": "", "ids": [], "logprobs": [], "roles": 0, "end": None})
            delta = choice.get("delta", {})
            one["text"] += choice.get("text", "") + delta.get("content", "")
            one["roles"] += "role" in delta
            one["ids"] += choice.get("token_ids", [])
            assert one["end"] is None, "an event came behind the last one"
            one["end"] = choice["finish_reason"]
            for name, values in (choice.get("logprobs") or {}).items():
                one["logprobs"] += [(name, value) for value in values or ()]
    for one in found.values():
        one["logprobs"].sort(key=lambda pair: pair[0])
    return found


def last_of_each(events: list[dict]) -> list[object]:
    return sorted((comparable(event) for event in {event.get("index"): event for event in events}.values()), key=str)


@pytest.mark.parametrize("streamed", [False, True])
def test_whatever_is_cut_the_answer_is_the_same(streamed: bool) -> None:
    """Two of three decodes are cut, within a head, an event, a record, or between them."""
    rng = random.Random(11)

    async def scenario() -> None:
        async with deployment(decodes=3) as both:
            for path, fields in REQUESTS:
                body = {**fields, "stream": streamed}
                if streamed and "best_of" in body:
                    continue
                if streamed and path != "/generate":
                    body["stream_options"] = USAGE
                expected = await both.ask(path, body)
                for _ in range(5):
                    whole = rng.choice(both.cutters)
                    for cutter in both.cutters:
                        cutter.cuts = [] if cutter is whole else [rng.randrange(1, 1500)]
                    assert await both.ask(path, body) == expected, (path, fields)
            assert sum(cutter.done for cutter in both.cutters) > 10
            assert await both.metric("kvbaton_router_resumed_total") > 5
            assert not both.router.admission.in_flight
            for engine in both.engines["decode"]:
                await engine.until(lambda engine=engine: not engine.live)

    run(scenario())


async def halt(both: Deployment, path: str, body: dict, pieces: int, end: Callable[[Worker, ScriptedEngine], None]):
    """Ask; the decode that is asked first gives so many pieces and no more. Then ``end`` it, and return the answer."""
    decodes = [worker for worker in both.router.workers.all if worker.role == "decode"]
    for engine in both.engines["decode"]:
        engine.script = lambda request: itertools.islice(answers_of(request), pieces)
    before = {worker: worker.signs_of_life for worker in decodes}
    asking = asyncio.create_task(both.ask(path, body))
    while not any(engine.requests for engine in both.engines["decode"]):
        await asyncio.sleep(0)
    first = next(place for place, engine in enumerate(both.engines["decode"]) if engine.requests)
    for engine in both.engines["decode"]:
        engine.script = answers_of
    while decodes[first].signs_of_life < before[decodes[first]] + 2:  # its head, and something that it has said
        await asyncio.sleep(0)
    end(decodes[first], both.engines["decode"][first])
    return await asking


def silence(worker: Worker, _engine: ScriptedEngine) -> None:
    worker.become(State.SILENT, "it does not answer")


def break_down(error: KVBatonError) -> Callable[[Worker, ScriptedEngine], None]:
    def end(_worker: Worker, engine: ScriptedEngine) -> None:
        engine.end_all(error)

    return end


ENDS = {
    "silent": silence,
    "died": break_down(InternalError("the engine's scheduler died")),
    "its peer": break_down(PeerLostError("the prefill rank went away")),
    "stopping": break_down(OverloadedError("the engine that had this request is stopping")),
}


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("end", ENDS)
def test_a_stream_whose_decode_is_at_a_loss_goes_on_and_says_so(end: str, streamed: bool) -> None:
    async def scenario() -> None:
        body = {"prompt": "a long one", "max_tokens": 25, "ignore_eos": True, "seed": 2, "n": 2, "stream": streamed}
        async with deployment(prefills=2) as both:
            expected = await both.ask("/v1/completions", body)
            for engine in both.engines["decode"]:
                engine.requests.clear()
            assert await halt(both, "/v1/completions", body, 7, ENDS[end]) == expected
            assert await both.metric("kvbaton_router_resumed_total") == 1
            assert await both.metric("kvbaton_router_pause_seconds_count") == 1
            requests = [request for engine in both.engines["decode"] for request in engine.requests]
            assert 1 <= sum(request.answered for request in requests) <= 7
            stories = [await both.story(request.room) for request in requests if not request.answered]
            assert "pieces as room" in stories[0]["sides"][0]["lines"][0]["text"]

    run(scenario())


@pytest.mark.parametrize(("streamed", "rank"), [(False, 0), (True, 0), (True, 1)])
def test_a_server_that_drains_hands_on_and_nothing_is_computed_again(streamed: bool, rank: int) -> None:
    async def scenario() -> None:
        body = {"prompt": "a long one", "max_tokens": 25, "ignore_eos": True, "seed": 2, "n": 2, "stream": streamed}
        async with deployment() as both:
            expected = await both.ask("/v1/completions", body)
            for engine in both.engines["decode"]:
                engine.requests.clear()
            moves = asyncio.Queue[tuple[Worker, ScriptedEngine]]()
            asking = asyncio.create_task(
                halt(both, "/v1/completions", body, 7, lambda worker, engine: moves.put_nowait((worker, engine)))
            )
            worker, old = await moves.get()
            new = next(engine for engine in both.engines["decode"] if engine is not old)
            async with both.session.post(worker.url + "/drain", json={}) as response:
                assert (await response.json())["draining"]
            (request,) = old.requests
            old.emit(request.request_id, replace(list(answers_of(request))[7], rank=rank))
            await old.until(lambda: bool(old.handed_on))
            await new.until(lambda: len(new.requests) == 2)
            ((room, names),) = old.handed_on.items()
            assert names == (request.request_id,)
            assert [(one.room, one.sources) for one in new.requests] == [
                (room + number, (address_of(both.engines["decode"].index(old), rank),)) for number in range(2)
            ]
            assert sum(one.answered for one in new.requests) == 8
            old.emit(request.request_id, Output(error=HandedOnError("it goes on elsewhere")))
            assert await asking == expected
            assert await both.metric("kvbaton_router_handed_on_total") == 1
            assert await both.metric("kvbaton_router_resumed_total") == 0
            story = await both.story(request.room)
            assert "is handed on from" in story["sides"][0]["lines"][0]["text"]

    run(scenario())


def test_a_move_that_fails_is_made_good_by_computing_again() -> None:
    async def scenario() -> None:
        body = {"prompt": "a long one", "max_tokens": 25, "ignore_eos": True, "seed": 2, "n": 2, "stream": True}
        async with deployment() as both:
            expected = await both.ask("/v1/completions", body)
            for engine in both.engines["decode"]:
                engine.requests.clear()
            moves = asyncio.Queue[tuple[Worker, ScriptedEngine]]()
            asking = asyncio.create_task(
                halt(both, "/v1/completions", body, 7, lambda worker, engine: moves.put_nowait((worker, engine)))
            )
            worker, old = await moves.get()
            new = next(engine for engine in both.engines["decode"] if engine is not old)
            new.script = lambda _request: ()
            async with both.session.post(worker.url + "/drain", json={}):
                pass
            (request,) = old.requests
            old.emit(request.request_id, list(answers_of(request))[7])
            await new.until(lambda: len(new.requests) == 2)
            new.script = answers_of
            old.emit(request.request_id, Output(error=PeerLostError("the other decode rank went away")))
            assert await asking == expected
            assert await both.metric("kvbaton_router_resumed_total") == 1

    run(scenario())


def test_what_no_pair_can_go_on_with_is_an_error_event() -> None:
    async def scenario() -> None:
        body = {"prompt": "a long one", "max_tokens": 25, "seed": 2, "n": 2, "stream": True}
        async with deployment(decodes=1) as both:
            both.engines["decode"][0].script = lambda request: itertools.islice(answers_of(request), 3)
            async with both.session.post(both.url + "/v1/completions", json=body) as response:
                await response.content.readuntil(b"\n\n")
                both.engines["decode"][0].refusal = InternalError("out of order")
                both.engines["decode"][0].end_all(InternalError("it died"))
                rest = await response.text()
            assert rest.rstrip().splitlines()[-1].startswith('data: {"error":')
            assert "out of order" in rest
            assert "[DONE]" not in rest

    run(scenario())


def test_a_journal_has_a_bound() -> None:
    progress = Progress()
    progress.add(b"[0,[1],'a']")
    assert progress.can_go_on
    progress.add(b"x" * MAX_JOURNAL_BYTES)
    assert not progress.can_go_on
    assert progress.count == 2
    assert len(progress.field()) < 200


@pytest.mark.parametrize("pieces", [1, 2, 3, 7, 64])
def test_events_are_cut_the_same_however_they_come(pieces: int) -> None:
    stream = b":[0]\ndata: a\n\n\n\ndata: b\n\n:[1]\n\ndata: c"
    events = Events()
    found = [one for at in range(0, len(stream), pieces) for one in events.feed(stream[at : at + pieces])]
    assert found == [b":[0]\ndata: a", b"", b"data: b", b":[1]"]
    assert events.held_bytes == len(b"data: c")


@pytest.mark.parametrize(
    "records",
    [
        [[6, [97], "a"]],  # no such answer
        [[-1, [97], "a"]],
        "x",
    ],
)
def test_a_journal_of_something_else_is_refused(records: object) -> None:
    async def scenario() -> None:
        body = {"prompt": "x", "n": 2, "max_tokens": 9, "bootstrap_room": 5, "bootstrap_host": "127.0.0.1"}
        async with deployment() as both:
            decode = next(worker for worker in both.router.workers.all if worker.role == "decode")
            journal = {"id": "x", "created": 1, "seed": 1, "records": records}
            body["bootstrap_port"] = decode.bootstrap_port
            async with both.session.post(
                decode.url + "/v1/completions", json={**body, "kvbaton_journal": journal}
            ) as r:
                assert r.status == 400
                assert (await r.json())["error"]["param"] == "kvbaton_journal"

    run(scenario())
