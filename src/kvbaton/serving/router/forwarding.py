"""One request on its way: attempts with one pair after the other, and one answer to its client.

Rules:

- An attempt that fails is followed by another one with a new room and another pair, as long as there is a pair that has
  not been tried, time, and a budget that all requests share. What the client itself did wrong is not tried again.
- Whoever fails is avoided; a worker that blames its peer lets the peer be avoided. Progress wipes the slate: what
  brought the answer on may bring it on again, once it takes requests.
- After the first byte an attempt goes on where the last one broke off (:mod:`kvbaton.serving.server.journal`): what was
  passed on is never passed on again, and what came without being whole never is. Where that is impossible the stream
  ends with an ``error`` event and without ``[DONE]``.
- A stream with nothing to say for a while, be it in a queue, gets comments: its head has gone to the client then, and
  what fails afterwards fails as an event of it.

This file must not know of tokens, models, pages or probes.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import monotonic

import aiohttp
import msgspec
from aiohttp import web

from kvbaton.discovery.client import cause_of
from kvbaton.errors import AbortedError, ExpiredError, KVBatonError, PeerLostError
from kvbaton.serving.router.calls import CallFailed, Fields, Pair, PrefillDecodeCall, broken_off, lost, refused
from kvbaton.serving.router.client_fields import prompt_of
from kvbaton.serving.router.credentials import Credentials
from kvbaton.serving.router.events import Events
from kvbaton.serving.router.handing_on import Departed, HandedOnCall, Move, ask
from kvbaton.serving.router.limit import TimeLimit
from kvbaton.serving.router.passing import PassedHeaders
from kvbaton.serving.router.progress import Progress
from kvbaton.serving.router.retry_budget import RetryBudget
from kvbaton.serving.router.trail import Trail
from kvbaton.serving.router.worker import State, Worker
from kvbaton.serving.router.workers import Workers
from kvbaton.serving.server import journal
from kvbaton.serving.server.failure import body_of
from kvbaton.serving.server.metrics import RequestTimer, ServerMetrics
from kvbaton.serving.server.openai import DONE, ErrorBody, event

#: Largest answer of a worker that does not stream, and largest event of one that does.
MAX_ANSWER_BYTES = 64 << 20
SSE_TYPE = "text/event-stream"
#: A comment, which every reader of such a stream skips.
KEEP_ALIVE = b": keep-alive\n\n"
_DONE = DONE.rstrip(b"\n")
_DATA = b"data: "
_log = logging.getLogger(__name__)


class Forwarder:
    """What all requests of a router share. ``keeps_journal``: the workers can go on with each other's answers."""

    def __init__(
        self,
        workers: Workers,
        call: Callable[[str, Fields, Pair, Mapping[str, str]], PrefillDecodeCall],
        mint_room: Callable[[], int],
        metrics: ServerMetrics,
        session: aiohttp.ClientSession,
        credentials: Credentials,
        *,
        passed: PassedHeaders,
        keeps_journal: bool,
        most_requests: int,
        timeout_secs: float,
        keep_alive_secs: float,
    ) -> None:
        self.workers = workers
        self.call = call
        self.mint_room = mint_room
        self.passed = passed
        self.session = session
        self.credentials = credentials
        self.keeps_journal = keeps_journal
        self.budget = RetryBudget(most_requests)
        self.trail = Trail()
        self.timeout_secs = timeout_secs
        self.keep_alive_secs = keep_alive_secs
        self.retries = metrics.counter("kvbaton_router_retries", "Attempts of requests after their first one.")
        self.resumed = metrics.counter("kvbaton_router_resumed", "Answers that went on with another pair.")
        self.handed_on = metrics.counter(
            "kvbaton_router_handed_on",
            "Answers that went to another decode server with their cache.",
        )
        self.pauses = metrics.histogram(
            "kvbaton_router_pause_seconds", "How long an answer stood still that went on with another pair."
        )

    async def forward(
        self, http: web.Request, fields: Mapping[str, msgspec.Raw], limit: TimeLimit, timer: RequestTimer
    ) -> web.StreamResponse:
        """Answer a request. Raises CallFailed, or the KVBatonError that has ended it, before the first byte."""
        self.budget.earn()
        return await _Forwarding(self, http, fields, limit, timer).run()


@dataclass(slots=True)
class _Pause:
    """An answer stands still ``since`` then; it had ``count`` records."""

    since: float
    count: int


class _Forwarding:
    def __init__(
        self,
        shared: Forwarder,
        http: web.Request,
        fields: Mapping[str, msgspec.Raw],
        limit: TimeLimit,
        timer: RequestTimer,
    ) -> None:
        self._shared = shared
        self._http = http
        self._fields = dict(fields)
        self._prompt = prompt_of(fields)
        self._limit = limit
        self._timer = timer
        self._progress = Progress() if shared.keeps_journal else None
        self._pause: _Pause | None = None
        self._move: Move | None = None  # once the decode server that answers was asked to hand on
        self._tried: set[tuple[Worker, Worker]] = set()
        self._blames: Counter[Worker] = Counter()
        self._unsent = bytearray()
        self._out: web.StreamResponse | None = None  # once a byte has gone to the client
        self._is_streamed = fields.get("stream") == msgspec.Raw(b"true")
        self._has_begun = False  # once a byte of the answer has
        self._written_at = monotonic()
        self._writing = asyncio.Lock()
        self._answer: web.StreamResponse | None = None  # the answer, when it has gone whole or needs only be returned

    async def run(self) -> web.StreamResponse:
        """Answer, and keep a stream that has nothing to say alive for proxies."""
        if not self._is_streamed:
            return await self._run()
        keeping = asyncio.create_task(self._keep_alive())
        try:
            return await self._run()
        finally:
            keeping.cancel()
            await asyncio.gather(keeping, return_exceptions=True)

    async def _keep_alive(self) -> None:
        quiet = self._shared.keep_alive_secs
        while True:
            await asyncio.sleep(self._written_at + quiet - monotonic())
            async with self._writing:
                if monotonic() - self._written_at >= quiet:
                    await self._write(KEEP_ALIVE, {"Content-Type": SSE_TYPE, "Cache-Control": "no-cache"})

    async def _run(self) -> web.StreamResponse:
        shared = self._shared
        try:
            async with self._limit.running():
                pair = Pair(*await shared.workers.find_pair(self._prompt), shared.mint_room())
                departed: Departed | None = None
                while True:
                    try:
                        return await self._attempt(pair, departed)
                    except CallFailed as failure:
                        pair, departed = await self._another(pair, failure), None
                    except Departed as leaving:
                        pair, departed = self._follow(pair, leaving), leaving
        except TimeoutError:
            if self._answer is not None:  # only prefill's end was still waited for
                return self._answer
            error = self._out_of_time()
            if self._out is None:
                raise error from None
            return await self._break_off(self._out, body_of(error), error.code)
        except CallFailed as failure:
            if self._out is None:
                raise
            return await self._break_off(self._out, failure.body, failure.detail.code)
        except KVBatonError as error:
            if self._out is None:
                raise
            return await self._break_off(self._out, body_of(error), error.code)

    # attempts

    async def _attempt(self, pair: Pair, departed: Departed | None) -> web.StreamResponse:
        """One pair's part of the answer. Raises CallFailed; Departed where another one is to follow it."""
        self._move = None
        try:
            async with self._call(pair, departed) as call, pair.decode.leg():
                response = await call.answer()
                try:
                    self._answer = await self._pass_on(response, pair)
                except Departed:
                    call.release()
                    raise
                if self._timer.outcome == "ok" and departed is None:
                    self._shared.workers.succeeded((pair.prefill, pair.decode))
                await call.settle()
                return self._answer
        except PeerLostError as error:
            if self._answer is not None:
                return self._answer
            raise lost(pair.decode, error, pair.room) from None

    def _call(self, pair: Pair, departed: Departed | None) -> PrefillDecodeCall:
        shared, progress = self._shared, self._progress
        if progress is not None:
            self._fields[journal.JOURNAL_FIELD] = progress.field(departed.move.sources if departed is not None else ())
        path, passed = self._http.path, shared.passed.of_client(self._http)
        if departed is None:
            return shared.call(path, self._fields, pair, passed)

        def headers(worker: Worker) -> Mapping[str, str]:
            return {**passed, **shared.credentials(worker)}

        return HandedOnCall(shared.session, path, self._fields, pair, headers, rest=departed.rest)

    async def _ask_to_hand_on(self, pair: Pair, sources: tuple[str, ...]) -> None:
        """The server that answers is to stop: let another one have the answer, if there is one."""
        shared = self._shared
        pair.decode.become(State.DRAINING, "it is stopping, and hands on what it has")
        others = [worker for worker in shared.workers.usable("decode") if worker is not pair.decode]
        if self._move is not None or not others:
            return
        to = min(others, key=lambda worker: worker.legs)
        move = Move(Pair(pair.decode, to, shared.mint_room()), sources)
        if await ask(shared.session, pair.decode, pair.room, move.pair.room, shared.credentials(pair.decode)):
            self._move = move

    def _follow(self, pair: Pair, departed: Departed) -> Pair:
        """Go where the answer goes."""
        shared, other = self._shared, departed.move.pair
        count = self._progress.count if self._progress is not None else 0
        self._pause = _Pause(monotonic(), count)
        shared.handed_on.inc()
        where = f"from {other.prefill} to {other.decode}"
        shared.trail.add(pair.room, f"the answer is handed on {where} after {count} pieces, as room {other.room}")
        shared.trail.add(other.room, f"the answer was handed on {where} after {count} pieces, from room {pair.room}")
        return other

    async def _another(self, pair: Pair, failure: CallFailed) -> Pair:
        """The pair to try after a failure. Raises the failure where there is none."""
        shared, progress = self._shared, self._progress
        if self._is_ahead():
            self._tried.clear()
            self._blames.clear()
        else:
            self._tried.add((pair.prefill, pair.decode))
        self._blames[failure.culprit] += 1
        if failure.is_suspicious:
            shared.workers.suspect(failure.culprit, failure.detail.code, str(failure))
        elif failure.status >= 500:
            shared.workers.failed(failure.culprit, failure.detail.code, str(failure))
        begun = progress.count if progress is not None else 0
        if not failure.again or (self._has_begun and not (progress is not None and progress.can_go_on)):
            raise failure
        found = await self._untried()
        if found is None:
            raise failure
        if not shared.budget.spend():
            _log.warning("the retry budget is used up: a request is not tried again after %s", failure)
            raise failure
        prefill, decode = found
        other = Pair(prefill, decode, shared.mint_room())
        shared.retries.inc()
        if begun:
            self._pause = self._pause or _Pause(monotonic(), begun)
            shared.resumed.inc()
            _log.info("an answer goes on after %d pieces with %s and %s: %s", begun, prefill, decode, failure)
        how = f"goes on after {begun} pieces" if begun else "is tried again"
        shared.trail.add(pair.room, f"the request {how} as room {other.room} ({prefill}, {decode}): {failure}")
        shared.trail.add(other.room, f"the request {how} after room {pair.room} ({pair.prefill}, {pair.decode})")
        failure.__traceback__ = None  # its leg holds it, and its frames the body, until the collector comes
        return other

    def _is_ahead(self) -> bool:
        """Whether something new has come since the last attempt began."""
        progress, pause = self._progress, self._pause
        return progress is not None and progress.count > (pause.count if pause is not None else 0)

    async def _untried(self) -> tuple[Worker, Worker] | None:
        """Of the pairs that were not tried, and of those with the least blame, the one whose turn it is."""
        workers, blames = self._shared.workers, self._blames
        pairs = [pair for pair in await workers.known_pairs() if pair not in self._tried]
        if not pairs:
            return None
        least = min(blames[prefill] + blames[decode] for prefill, decode in pairs)
        return workers.choose(self._prompt, [pair for pair in pairs if blames[pair[0]] + blames[pair[1]] == least])

    def _out_of_time(self) -> KVBatonError:
        if self._limit.aborted:
            return AbortedError("aborted through /abort_request")
        return ExpiredError(f"no complete answer within {self._shared.timeout_secs:g} s")

    # answering

    async def _pass_on(self, response: aiohttp.ClientResponse, pair: Pair) -> web.StreamResponse:
        """All of decode's answer. Raises CallFailed where it breaks off."""
        kind = response.headers.get("Content-Type", "")
        headers = {
            **self._shared.passed.of_worker(response.headers),
            "Content-Type": kind,
            "X-KVBaton-Room": str(pair.room),
            "X-KVBaton-Prefill": pair.prefill.url,
            "X-KVBaton-Decode": pair.decode.url,
        }
        if kind.startswith(SSE_TYPE):
            self._timer.first_token()  # decode sends the head of a stream together with it
            headers["Cache-Control"] = "no-cache"
            return await self._stream(response, pair, headers)
        if self._out is not None:
            raise broken_off(pair.decode, f"it answers a stream with {kind!r}", pair.room)
        if kind.startswith(journal.RECORDS_TYPE):
            headers["Content-Type"] = "application/json"
            body = await self._records(response, pair)
        else:
            body = await self._body(response, pair)
        self._timer.outcome = "ok"
        return web.Response(body=body, headers=headers)

    async def _stream(
        self, response: aiohttp.ClientResponse, pair: Pair, headers: Mapping[str, str]
    ) -> web.StreamResponse:
        events, is_done, has_failed = Events(), False, False
        while piece := await _piece(response, pair):
            try:
                for one in events.feed(piece):
                    data = await self._take(one, response, pair)
                    if data is None:
                        continue
                    is_done = data == _DONE
                    has_failed = has_failed or data.startswith(b'data: {"error"')
                    self._unsent += data + b"\n\n"
            finally:
                await self._flush(headers)
            _check(events, pair)
        if self._out is None or not (is_done or has_failed):
            raise broken_off(pair.decode, "the stream ended before the answer", pair.room)
        async with self._writing:
            self._written_at = math.inf
            await self._out.write_eof()
        self._timer.outcome = "ok" if is_done else "stream_error"
        return self._out

    async def _flush(self, headers: Mapping[str, str]) -> None:
        """What was taken goes to the client, also where the attempt ends in the midst of it."""
        if not self._unsent:
            return
        async with self._writing:
            piece, self._unsent = bytes(self._unsent), bytearray()
            self._has_begun = True
            await self._write(piece, headers)

    async def _write(self, piece: bytes, headers: Mapping[str, str]) -> None:
        if self._out is None:
            out = web.StreamResponse(headers=headers)
            await out.prepare(self._http)
            self._out = out
        self._written_at = monotonic()
        await self._out.write(piece)

    async def _records(self, response: aiohttp.ClientResponse, pair: Pair) -> bytes:
        """The whole answer behind its records."""
        events, body, is_done = Events(), b"", False
        while piece := await _piece(response, pair):
            for one in events.feed(piece):
                data = await self._take(one, response, pair)
                is_done = data == _DONE
                if data and not is_done:
                    body = data.removeprefix(_DATA)
            _check(events, pair)
        if not is_done:
            raise broken_off(pair.decode, "its records ended before the answer", pair.room)
        return body

    async def _body(self, response: aiohttp.ClientResponse, pair: Pair) -> bytes:
        body = bytearray()
        while piece := await _piece(response, pair):
            body += piece
            if len(body) > MAX_ANSWER_BYTES:
                raise broken_off(pair.decode, f"it answers more than {MAX_ANSWER_BYTES} bytes", pair.room)
        return bytes(body)

    async def _take(self, one: bytes, response: aiohttp.ClientResponse, pair: Pair) -> bytes | None:
        """An event without its record, which is kept; None for what is not for the client. Raises CallFailed for an
        error that decode tells of, Departed where it tells no more."""
        if self._progress is None or not one.startswith(b":"):
            return one
        line, _, data = one.partition(b"\n")
        try:
            said = journal.notice_of(line[1:])
        except msgspec.MsgspecError as error:
            raise broken_off(pair.decode, f"its record cannot be read ({error})", pair.room) from None
        if said is not None and said.status:
            raise refused(pair.decode, pair, said.status, data.removeprefix(_DATA))
        if said is not None and said.departed and self._move is not None:
            raise Departed(self._move, response)
        if said is not None:
            await self._ask_to_hand_on(pair, said.leaving)
            return None
        self._progress.add(line[1:])
        if self._pause is not None:
            self._shared.pauses.observe(monotonic() - self._pause.since)
            self._pause = None
        return data

    async def _break_off(self, out: web.StreamResponse, body: ErrorBody, outcome: str) -> web.StreamResponse:
        """End with an error a stream that has begun."""
        await self._flush({})
        self._timer.outcome = outcome
        async with self._writing:
            self._written_at = math.inf
            await out.write(event(body))
            await out.write_eof()
        return out


async def _piece(response: aiohttp.ClientResponse, pair: Pair) -> bytes:
    """The next bytes of decode's answer, empty at its end. Raises CallFailed."""
    try:
        piece: bytes = await response.content.readany()
    except (aiohttp.ClientError, OSError) as error:
        raise broken_off(pair.decode, cause_of(error), pair.room) from None
    pair.decode.heard()
    return piece


def _check(events: Events, pair: Pair) -> None:
    if events.held_bytes > MAX_ANSWER_BYTES:
        raise broken_off(pair.decode, f"it answers more than {MAX_ANSWER_BYTES} bytes", pair.room)
