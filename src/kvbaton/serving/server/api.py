"""The API server: OpenAI routes over one engine, for every mode (null, prefill, decode).

Rules:

- Nothing of a streamed answer leaves before the engine's first output, so that whatever fails until then has its own
  HTTP status. What fails later is an ``error`` event, and the stream ends without ``[DONE]``.
- A client that goes away aborts its request in the engine; so does every other way out of a handler.

This file must not know of models, pools, schedulers' insides or the transport.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TypeVar

from aiohttp import web

from kvbaton.discovery.client import RegistryClient
from kvbaton.discovery.guard import guard, read_across
from kvbaton.discovery.json_response import json_response
from kvbaton.discovery.names import ServerNames
from kvbaton.errors import (
    AuthenticationError,
    KVBatonError,
)
from kvbaton.manager import TraceEvent
from kvbaton.plan.layout_file import RankLayout
from kvbaton.serving.engine.request import HandedOnError, Output
from kvbaton.serving.server import journal, openapi
from kvbaton.serving.server.admission import AdmissionLimit
from kvbaton.serving.server.aliases import Aliases
from kvbaton.serving.server.api_keys import ApiKeys, require_key
from kvbaton.serving.server.bodies import MAX_BODY_BYTES, Bodies
from kvbaton.serving.server.callers import Callers
from kvbaton.serving.server.engine import Engine, OutputStream, Tokenizer
from kvbaton.serving.server.failure import body_of, errors, status_of
from kvbaton.serving.server.failure_log import FailureLog
from kvbaton.serving.server.fields import FieldRule
from kvbaton.serving.server.metrics import HandoffMetrics, RequestTimer, ServerMetrics
from kvbaton.serving.server.openai import DONE, AbortRequest, ChatRequest, CompletionRequest, event
from kvbaton.serving.server.operators import key_of_client
from kvbaton.serving.server.parsing import parse
from kvbaton.serving.server.request_ids import request_id_of, tell_request_id
from kvbaton.serving.server.request_parsing import Accepted, AnyRequest, ApiConfig, Formatter, RequestParser
from kvbaton.serving.server.routing import PAIR_PATH, ROLE_HEADER, HandOver, port_of
from kvbaton.serving.server.running import Running
from kvbaton.serving.server.sglang import GenerateRequest
from kvbaton.serving.server.status import StatusRoutes
from kvbaton.serving.server.token_metrics import TokenClock, TokenMetrics
from kvbaton.serving.server.tokenizing import DetokenizeRequest, TokenizeRequest, Tokenizing

Asked = TypeVar("Asked", TokenizeRequest, DetokenizeRequest)
SSE_HEADERS = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache"}
RECORDS_HEADERS = {"Content-Type": journal.RECORDS_TYPE}


class ApiServer:
    """Handlers around one engine. Build it inside the event loop that will run :attr:`app`.

    Args:
        readiness: says in one line what keeps the server from taking requests; empty when nothing does.
        info: extra facts for ``/get_server_info``, read at every call.
        timeline: a room's story on this side; may block for a moment. None where there are no rooms.
        layouts: the memory of every rank of this group, for ``/layout``.
        sources: of each data-parallel rank, the control addresses of the ranks from which another decode server can
            take answers over; none where none can.
        instance: what peers call this process.
        secret: what ``/story`` asks for, and a router that names rooms here; None: this machine only.
        names: the hosts under which this server is asked; None: loopback's.
        keys: of which a client shows one; None: it needs none.
        registry: needed in decode mode, to find the prefill group that a request names.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer | None,
        config: ApiConfig,
        *,
        registry: RegistryClient | None = None,
        readiness: Callable[[], str] = lambda: "",
        info: Callable[[], Mapping[str, object]] = dict,
        timeline: Callable[[int], Sequence[TraceEvent]] | None = None,
        layouts: Sequence[RankLayout] = (),
        sources: Sequence[Sequence[str]] = (),
        instance: str = "",
        secret: str | None = None,
        names: ServerNames | None = None,
        keys: ApiKeys | None = None,
    ) -> None:
        self._engine = engine
        self._parser = RequestParser(tokenizer, config, registry)
        self._tokenizing = Tokenizing(self._parser, tokenizer, config)
        self._config = config
        self._callers = Callers(mode=config.mode, secret=secret, names=names if names is not None else ServerNames())
        self.admission = AdmissionLimit(config.max_requests)
        self._aliases = Aliases()
        self._bodies = Bodies()
        self.metrics = ServerMetrics()
        self._running = Running(sources)
        self._rule = FieldRule(strict=config.strict_fields, count=self.metrics.unknown_field)
        self._handoffs = HandoffMetrics(self.metrics.registry)
        status = StatusRoutes(
            engine,
            config,
            self._callers,
            self.admission,
            self.metrics,
            check_model=self._parser.check_model,
            readiness=readiness,
            info=info,
            timeline=timeline,
            layouts=layouts,
            instance=instance,
        )
        self._tokens = TokenMetrics(self.metrics.registry, config.model)
        self._failures = FailureLog()
        self.app = self._routes(status, keys if keys is not None else ApiKeys())

    def _routes(self, status: StatusRoutes, keys: ApiKeys) -> web.Application:
        app = web.Application(
            middlewares=[
                web.middleware(errors),
                web.middleware(guard(self._callers.names)),
                web.middleware(require_key(keys, self._callers.needs_no_key)),
            ],
            client_max_size=MAX_BODY_BYTES,
        )
        app.router.add_post("/v1/completions", self._completions)
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_post("/generate", self._generate)
        app.router.add_post("/tokenize", self._tokenize)
        app.router.add_post("/detokenize", self._detokenize)
        app.router.add_post("/abort_request", self._abort)
        app.router.add_get(PAIR_PATH, self._pair)
        app.router.add_post("/hand_over", self._hand_over)
        app.router.add_post("/drain", self._drain)
        status.add_to(app)
        app.on_response_prepare.append(tell_request_id)
        app.on_response_prepare.append(read_across(self._callers.names))
        app.on_cleanup.append(self._close)
        return app

    async def _close(self, _app: web.Application) -> None:
        self._parser.close()
        self._failures.close()

    # answering

    async def _completions(self, http: web.Request) -> web.StreamResponse:
        return await self._answer(http, CompletionRequest)

    async def _chat(self, http: web.Request) -> web.StreamResponse:
        return await self._answer(http, ChatRequest)

    async def _generate(self, http: web.Request) -> web.StreamResponse:
        return await self._answer(http, GenerateRequest)

    async def _answer(self, http: web.Request, kind: type[AnyRequest]) -> web.StreamResponse:
        with self.metrics.timed(http.path) as timer:
            try:
                self._callers.require_router(http)  # before a byte of the body
                self._callers.require_role(http.headers.get(ROLE_HEADER, self._config.mode))
                async with self._bodies.read(http) as body:
                    request: AnyRequest = parse(body, kind, self._rule)
                with self.admission.entered():  # for requests that are here, not for those that still come
                    accepted = await self._parser.accept(request)
                    return await self._run(http, accepted, timer)
            except KVBatonError as error:
                timer.outcome = error.code
                self._failures.note(error, request_id_of(http))
                raise
            except web.HTTPException:
                timer.outcome = "http"
                raise

    async def _run(self, http: web.Request, accepted: Accepted, timer: RequestTimer) -> web.StreamResponse:
        try:
            clock = TokenClock(self._tokens, accepted.requests)
            with self._aliased(http, accepted), OutputStream(self._engine, accepted.requests, clock.heard) as outputs:
                outputs.submit()
                accepted.recall()
                self._handoffs.recomputed.inc(accepted.recomputed)
                first = await outputs.next() if accepted.requests else None
                timer.first_token()
                if accepted.stream or self._keeps_records(accepted):
                    return await self._stream(http, accepted, outputs, first, timer)
                return await self._whole(accepted, outputs, first, timer)
        except KVBatonError as error:
            self._parser.learn(error, accepted)
            raise

    def _aliased(self, http: web.Request, accepted: Accepted) -> AbstractContextManager[None]:
        """Let its client end the request by the id that it gave it."""

        def end() -> None:
            for request in accepted.requests.values():
                self._engine.abort(request.request_id, "aborted through /abort_request")

        return self._aliases.named(key_of_client(http), accepted.rid, end)

    async def _pair(self, http: web.Request) -> web.Response:
        """Whether this decode server would find a prefill group: what its router asks before it counts the pair."""
        self._callers.require_router(http)
        host, port = http.query.get("bootstrap_host", ""), port_of(http.query.get("bootstrap_port", ""))
        topology = await self._parser.prefill_group(host, port)
        return json_response({"instances": [route.instance for route in topology.ranks]})

    def _keeps_records(self, accepted: Accepted) -> bool:
        """Whether the router is to be able to go on elsewhere; prefill's answer is nothing to go on with."""
        return accepted.journal is not None and self._config.mode == "decode"

    async def _whole(
        self, accepted: Accepted, outputs: OutputStream, output: Output | None, timer: RequestTimer
    ) -> web.Response:
        while output is not None:
            accepted.answers.collect(output)
            output = None if output.final else await outputs.next()
        self._count_handoff(accepted.answers)
        timer.outcome = "ok"
        return json_response(accepted.answers.whole())

    async def _stream(
        self, http: web.Request, accepted: Accepted, outputs: OutputStream, output: Output | None, timer: RequestTimer
    ) -> web.StreamResponse:
        """A stream, or records and the whole answer behind them."""
        records = self._keeps_records(accepted)
        may_leave = records and bool(self._running.sources)
        response = web.StreamResponse(headers=SSE_HEADERS if accepted.stream else RECORDS_HEADERS)
        await response.prepare(http)
        try:
            with self._running.named(accepted):
                while output is not None:
                    await response.write((journal.record(output) if records else b"") + _piece(accepted, output))
                    if may_leave and self.admission.is_shut:
                        may_leave = False
                        sources = self._running.sources[output.rank]
                        await response.write(journal.notice(journal.Notice(leaving=sources)) + b"\n")
                    output = None if output.final else await outputs.next()
                    if output is not None and output.departing:
                        await response.write(journal.notice(journal.Notice(departed=True)) + b"\n")
                        output = await outputs.next()  # raises
        except HandedOnError as error:
            self._handoffs.handed_on.inc()
            timer.outcome = error.code
        except KVBatonError as error:  # too late for a status
            self._parser.learn(error, accepted)
            timer.outcome = error.code
            self._failures.note(error, request_id_of(http))
            head = journal.notice(journal.Notice(status=status_of(error))) if records else b""
            await response.write(head + event(body_of(error)))
        else:
            self._count_handoff(accepted.answers)
            timer.outcome = "ok"
            last = accepted.answers.usage_event() if accepted.stream else accepted.answers.whole()
            await response.write((event(last) if last else b"") + DONE)
        await response.write_eof()
        return response

    def _count_handoff(self, answers: Formatter) -> None:
        if answers.handoff is not None:
            self._handoffs.observe(answers.handoff)

    async def _tokenize(self, http: web.Request) -> web.Response:
        return await self._converted(http, TokenizeRequest, self._tokenizing.tokenize)

    async def _detokenize(self, http: web.Request) -> web.Response:
        return await self._converted(http, DetokenizeRequest, self._tokenizing.detokenize)

    async def _converted(
        self, http: web.Request, kind: type[Asked], convert: Callable[[Asked], Awaitable[object]]
    ) -> web.Response:
        """Text to tokens, or back: work like an answer's, for the same people and within the same bound."""
        self._callers.require_router(http)
        async with self._bodies.read(http) as body:
            request = parse(body, kind, self._rule)
            with self.admission.entered():
                return json_response(await convert(request))

    async def _hand_over(self, http: web.Request) -> web.Response:
        """The router has found a server for what is left of a request."""
        self._callers.require_router(http)
        async with self._bodies.read(http) as body:
            order = parse(body, HandOver)
        self._engine.hand_on(self._running.of(order.room), order.to)
        return json_response(order)

    async def _drain(self, http: web.Request) -> web.Response:
        """End admission, as SIGTERM does, and go on running."""
        self._callers.require_operator(http, what="draining")
        self.admission.shut()
        return json_response(openapi.Drained(draining=True, requests=self.admission.in_flight))

    async def _abort(self, http: web.Request) -> web.Response:
        if self._config.mode != "null" and not self._callers.is_router(http):
            raise AuthenticationError("requests are aborted at the router, or with this deployment's shared secret")
        async with self._bodies.read(http) as body:
            request = parse(body, AbortRequest)
        if self._callers.needs_no_key(http):
            self._aliases.end_for_operator(request.rid)
        else:
            self._aliases.end(key_of_client(http), request.rid)
        return json_response({"rid": request.rid})


def _piece(accepted: Accepted, output: Output) -> bytes:
    """What one output adds to a stream; nothing but the end of its record to a whole answer."""
    if accepted.stream:
        return event(accepted.answers.event(output))
    accepted.answers.collect(output)
    return b"\n"
