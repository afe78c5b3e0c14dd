"""The API server: OpenAI routes over one engine, for every mode (null, prefill, decode).

Rules:

- Nothing of a streamed answer leaves before the engine's first output, so that whatever fails until then has its own
  HTTP status. What fails later is an ``error`` event, and the stream ends without ``[DONE]``.
- A client that goes away aborts its request in the engine; so does every other way out of a handler.
- ``/health`` says that the process lives and never runs the model (it turns 503 when the engine's thread has died);
  ``/ready`` says that it takes requests, and if not, why.

This file must not know of models, pools, schedulers' insides or the transport.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from time import time

import msgspec
from aiohttp import web

from kvbaton import __version__
from kvbaton.discovery.access import ROUTER_HEADER, token_matches
from kvbaton.discovery.client import RegistryClient
from kvbaton.discovery.guard import guard
from kvbaton.discovery.names import ServerNames
from kvbaton.errors import (
    AuthenticationError,
    ConfigError,
    DisconnectedError,
    IncompatibleError,
    KVBatonError,
    PeerLostError,
    RegistryError,
    TransferFailedError,
)
from kvbaton.manager import TraceEvent
from kvbaton.plan.layout_file import RankLayout, encode
from kvbaton.serving.engine.request import Output
from kvbaton.serving.server import openapi, story
from kvbaton.serving.server.admission import AdmissionLimit
from kvbaton.serving.server.aliases import Aliases
from kvbaton.serving.server.api_keys import ApiKeys, require_key
from kvbaton.serving.server.bodies import MAX_BODY_BYTES, Bodies
from kvbaton.serving.server.engine import Engine, OutputStream, Tokenizer
from kvbaton.serving.server.failure import body_of, errors
from kvbaton.serving.server.fields import FieldRule
from kvbaton.serving.server.metrics import CONTENT_TYPE, Gauge, HandoffMetrics, RequestTimer, ServerMetrics
from kvbaton.serving.server.openai import DONE, AbortRequest, ChatRequest, CompletionRequest, event
from kvbaton.serving.server.operators import is_operator, key_of_client, require_operator
from kvbaton.serving.server.parsing import parse
from kvbaton.serving.server.request_parsing import Accepted, AnyRequest, ApiConfig, Formatter, RequestParser
from kvbaton.serving.server.sglang import GenerateRequest
from kvbaton.serving.server.tokenizing import DetokenizeRequest, TokenizeRequest, Tokenizing

#: What may mean that a cached lookup no longer holds.
_PEER_TROUBLE = (PeerLostError, DisconnectedError, TransferFailedError, RegistryError, IncompatibleError)
SSE_HEADERS = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache"}


class ApiServer:
    """Handlers around one engine. Build it inside the event loop that will run :attr:`app`.

    Args:
        readiness: says in one line what keeps the server from taking requests; empty when nothing does.
        info: extra facts for ``/get_server_info``, read at every call.
        timeline: a room's story on this side; may block for a moment. None where there are no rooms.
        layouts: the memory of every rank of this group, for ``/layout``.
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
        instance: str = "",
        secret: str | None = None,
        names: ServerNames | None = None,
        keys: ApiKeys | None = None,
    ) -> None:
        self._engine = engine
        self._parser = RequestParser(tokenizer, config, registry)
        self._tokenizing = Tokenizing(self._parser, tokenizer, config)
        self._config = config
        self._registry = registry
        self._readiness = readiness
        self._info = info
        self._timeline = timeline
        self._layouts = layouts
        self._instance = instance
        self._secret = secret
        self._keys = keys if keys is not None else ApiKeys()
        self._names = names if names is not None else ServerNames()
        self.admission = AdmissionLimit(config.max_requests)
        self._aliases = Aliases()
        self._bodies = Bodies()
        self.metrics = ServerMetrics()
        self.metrics.gauges(lambda: _engine_gauges(engine))
        self._rule = FieldRule(strict=config.strict_fields, count=self.metrics.unknown_field)
        self._handoffs = HandoffMetrics(self.metrics.registry)
        self.app = self._routes()

    def _routes(self) -> web.Application:
        app = web.Application(
            middlewares=[
                web.middleware(errors),
                web.middleware(guard(self._names)),
                web.middleware(require_key(self._keys, self._needs_no_key)),
            ],
            client_max_size=MAX_BODY_BYTES,
        )
        app.router.add_post("/v1/completions", self._completions)
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_post("/generate", self._generate)
        app.router.add_post("/tokenize", self._tokenize)
        app.router.add_post("/detokenize", self._detokenize)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/v1/models/{model:.+}", self._model)
        app.router.add_get("/get_model_info", self._model_info)
        app.router.add_get("/model_info", self._model_info)
        app.router.add_get("/health", self._health)
        app.router.add_get("/ready", self._ready)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/get_server_info", self._server_info)
        app.router.add_get("/server_info", self._server_info)
        app.router.add_post("/abort_request", self._abort)
        app.router.add_get(story.PATH, self._story)
        app.router.add_get(openapi.LAYOUT_PATH, self._layout)
        app.router.add_get(openapi.PATH, self._openapi)
        app.on_cleanup.append(self._close)
        return app

    async def _close(self, _app: web.Application) -> None:
        self._parser.close()

    def _needs_no_key(self, http: web.Request) -> bool:
        """The deployment's router, and its operators."""
        return self._secret is not None and (self._from_router(http) or is_operator(http, self._secret))

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
                self._require_router(http)  # before a byte of the body
                async with self._bodies.read(http) as body:
                    request: AnyRequest = parse(body, kind, self._rule)
                with self.admission.entered():  # for requests that are here, not for those that still come
                    accepted = await self._parser.accept(request)
                    return await self._run(http, accepted, timer)
            except KVBatonError as error:
                timer.outcome = error.code
                raise
            except web.HTTPException:
                timer.outcome = "http"
                raise

    async def _run(self, http: web.Request, accepted: Accepted, timer: RequestTimer) -> web.StreamResponse:
        try:
            with self._aliased(http, accepted), OutputStream(self._engine, accepted.requests) as outputs:
                outputs.submit()
                first = await outputs.next()
                timer.first_token()
                if accepted.stream:
                    return await self._stream(http, accepted, outputs, first, timer)
                return await self._whole(accepted, outputs, first, timer)
        except KVBatonError as error:
            self._learn(error, accepted)
            raise

    def _aliased(self, http: web.Request, accepted: Accepted) -> AbstractContextManager[None]:
        """Let its client end the request by the id that it gave it."""

        def end() -> None:
            for request in accepted.requests:
                self._engine.abort(request.request_id, "aborted through /abort_request")

        return self._aliases.named(key_of_client(http), accepted.rid, end)

    def _require_router(self, http: web.Request) -> None:
        """Half a pair computes for its router only. Raises AuthenticationError."""
        if self._config.mode != "null" and not self._from_router(http):
            raise AuthenticationError(
                "only this deployment's router may name rooms and registries here; send requests through the router",
                hint="start the router with the same --secret-file as the servers",
            )

    def _from_router(self, http: web.Request) -> bool:
        """Whether the sender may name rooms: it knows the secret, or there is none (and we are on loopback)."""
        return self._secret is None or token_matches(http.headers.get(ROUTER_HEADER), self._secret, "router")

    async def _whole(
        self, accepted: Accepted, outputs: OutputStream, output: Output, timer: RequestTimer
    ) -> web.Response:
        accepted.answers.collect(output)
        while not output.final:
            output = await outputs.next()
            accepted.answers.collect(output)
        self._count_handoff(accepted.answers)
        timer.outcome = "ok"
        return _json(accepted.answers.whole())

    async def _stream(
        self, http: web.Request, accepted: Accepted, outputs: OutputStream, output: Output, timer: RequestTimer
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers=SSE_HEADERS)
        await response.prepare(http)
        try:
            await response.write(event(accepted.answers.event(output)))
            while not output.final:
                output = await outputs.next()
                await response.write(event(accepted.answers.event(output)))
        except KVBatonError as error:  # too late for a status
            self._learn(error, accepted)
            timer.outcome = error.code
            await response.write(event(body_of(error)))
        else:
            self._count_handoff(accepted.answers)
            timer.outcome = "ok"
            usage = accepted.answers.usage_event()
            await response.write((event(usage) if usage else b"") + DONE)
        await response.write_eof()
        return response

    def _count_handoff(self, answers: Formatter) -> None:
        if answers.handoff is not None:
            self._handoffs.observe(answers.handoff)

    def _learn(self, error: KVBatonError, accepted: Accepted) -> None:
        """What a failure says about more than its request."""
        if self._registry is not None and accepted.registry is not None and isinstance(error, _PEER_TROUBLE):
            self._registry.invalidate(*accepted.registry)

    async def _tokenize(self, http: web.Request) -> web.Response:
        async with self._bodies.read(http) as body:
            request = parse(body, TokenizeRequest, self._rule)
            return _json(await self._tokenizing.tokenize(request))

    async def _detokenize(self, http: web.Request) -> web.Response:
        async with self._bodies.read(http) as body:
            request = parse(body, DetokenizeRequest, self._rule)
            return _json(await self._tokenizing.detokenize(request))

    # operating

    def _not_ready(self) -> str:
        if self._engine.failure is not None:
            return self._engine.failure.message
        return "the server is stopping" if self.admission.is_shut else self._readiness()

    async def _models(self, _http: web.Request) -> web.Response:
        return _json({"object": "list", "data": [self._card()]})

    async def _model(self, http: web.Request) -> web.Response:
        self._parser.check_model(http.match_info["model"])
        return _json(self._card())

    def _card(self) -> dict[str, object]:
        return {
            "id": self._config.model,
            "object": "model",
            "created": int(time()),
            "owned_by": "kvbaton",
            "max_model_len": self._config.max_positions,
        }

    async def _model_info(self, _http: web.Request) -> web.Response:
        """As SGLang's, of which its router reads the model's name."""
        name = self._config.model
        body = {"model_path": name, "tokenizer_path": name, "served_model_name": name, "is_generation": True}
        return _json({**body, "max_model_len": self._config.max_positions, "weight_version": "default"})

    async def _health(self, _http: web.Request) -> web.Response:
        failure = self._engine.failure
        if failure is not None:
            return _json({"status": "failed", "reason": failure.message}, status=503)
        return _json({"status": "ok"})

    async def _ready(self, _http: web.Request) -> web.Response:
        reason = self._not_ready()
        return _json({"ready": not reason, "reason": reason}, status=503 if reason else 200)

    async def _metrics(self, _http: web.Request) -> web.Response:
        body = await asyncio.to_thread(self.metrics.exposition)  # an engine may wait for its processes
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE})

    async def _server_info(self, _http: web.Request) -> web.Response:
        body = {
            "model": self._config.model,
            "model_path": self._config.model,
            "served_model_name": self._config.model,
            "version": __version__,
            "disaggregation_mode": self._config.mode,
            "max_model_len": self._config.max_positions,
            "ready": not self._not_ready(),
            "requests": self.admission.in_flight,
        }
        return _json(body | await asyncio.to_thread(lambda: {"stats": self._engine.stats(), **self._info()}))

    async def _story(self, http: web.Request) -> web.Response:
        room = story.room_of(http, self._secret)
        moments = await asyncio.to_thread(self._timeline, room) if self._timeline is not None else ()
        lines = tuple(story.StoryLine(moment.seconds_ago, moment.text) for moment in moments)
        return story.response(room, [story.Side(role=self._config.mode, instance=self._instance, lines=lines)])

    async def _layout(self, http: web.Request) -> web.Response:
        require_operator(http, self._secret, what="the layout of its memory")
        if not self._layouts:
            raise ConfigError("this server hands nothing over: start it with --disaggregation-mode prefill or decode")
        return web.Response(body=encode(self._layouts), content_type="application/json")

    async def _openapi(self, _http: web.Request) -> web.Response:
        return web.Response(
            body=openapi.encoded(self._config.mode, strict=self._config.strict_fields), content_type="application/json"
        )

    async def _abort(self, http: web.Request) -> web.Response:
        if self._config.mode != "null" and not self._from_router(http):
            raise AuthenticationError("requests are aborted at the router, or with this deployment's shared secret")
        async with self._bodies.read(http) as body:
            request = parse(body, AbortRequest)
        if is_operator(http, self._secret) or (self._secret is not None and self._from_router(http)):
            self._aliases.end_for_operator(request.rid)
        else:
            self._aliases.end(key_of_client(http), request.rid)
        return _json({"rid": request.rid})


def _engine_gauges(engine: Engine) -> list[Gauge]:
    stats = engine.stats()
    gauges = [
        Gauge("kvbaton_pages_free", "Pages of the pool that nobody holds.", stats.pages_free),
        Gauge("kvbaton_pages_used", "Pages of the pool that a request holds.", stats.pages_used),
        Gauge("kvbaton_pages_leased", "Used pages that a peer may still touch.", stats.pages_leased),
        Gauge("kvbaton_aux_slots_used", "Aux slots in use.", stats.slots_used),
        Gauge("kvbaton_running_requests", "Requests in the running batch.", stats.running),
        Gauge("kvbaton_prefix_cache_lookups", "Requests admitted by way of it.", stats.prefix_lookups, grows=True),
        Gauge("kvbaton_prefix_cache_hit_tokens", "Tokens found in it.", stats.prefix_hit_tokens, grows=True),
    ]
    for queue, length in stats.queues.items():
        gauges.append(Gauge("kvbaton_queued_requests", "Requests by queue.", length, {"queue": queue}))
    return gauges


def _json(body: object, *, status: int = 200) -> web.Response:
    return web.Response(status=status, body=msgspec.json.encode(body), content_type="application/json")
