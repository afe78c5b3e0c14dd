"""The router: one address in front of prefill and decode servers.

Rules:

- Workers take turns. How a request fares with them is :mod:`kvbaton.serving.router.forwarding`'s business.
- Topology is ours: ``bootstrap_*`` in a client's request is dropped.
- A client that goes away, or ends its request by the id that it gave it, ends both calls.

This file must not know of tokens, models or pages.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Literal

import aiohttp
import msgspec
from aiohttp import web

from kvbaton import __version__
from kvbaton.discovery.access import ROUTER_HEADER, bearer, token_of
from kvbaton.discovery.client import cause_of
from kvbaton.discovery.guard import guard, read_across
from kvbaton.discovery.json_response import json_response
from kvbaton.discovery.names import ServerNames
from kvbaton.engines.vllm import params
from kvbaton.errors import ConfigError, KVBatonError, PeerLostError, UnknownModelError
from kvbaton.serving.router.bounded import bounded
from kvbaton.serving.router.breaker import BreakerSettings
from kvbaton.serving.router.calls import (
    CallFailed,
    Fields,
    Pair,
    PrefillDecodeCall,
    mint_room,
)
from kvbaton.serving.router.client_fields import client_fields
from kvbaton.serving.router.credentials import Credentials, no_credentials
from kvbaton.serving.router.forwarding import MAX_ANSWER_BYTES, Forwarder
from kvbaton.serving.router.limit import TimeLimit
from kvbaton.serving.router.own_limits import affordable_requests
from kvbaton.serving.router.passing import PassedHeaders
from kvbaton.serving.router.policies import policy_of
from kvbaton.serving.router.policies.base import Policy
from kvbaton.serving.router.policies.cache_aware import CacheAwareSettings
from kvbaton.serving.router.vllm_call import KnownSources, VllmCall
from kvbaton.serving.router.worker import ROLES, Role, Worker
from kvbaton.serving.router.worker_file import WorkerFile
from kvbaton.serving.router.worker_routes import WorkerRoutes
from kvbaton.serving.router.workers import HealthChecks, Workers, check_roles
from kvbaton.serving.server import openapi, story
from kvbaton.serving.server.admission import AdmissionLimit
from kvbaton.serving.server.aliases import Aliases
from kvbaton.serving.server.api_keys import ApiKeys, require_key
from kvbaton.serving.server.bodies import MAX_BODY_BYTES, MAX_ROUTED_BODY_BYTES, Bodies
from kvbaton.serving.server.failure import errors
from kvbaton.serving.server.fields import FieldRule
from kvbaton.serving.server.metrics import CONTENT_TYPE, Gauge, ServerMetrics
from kvbaton.serving.server.openai import AbortRequest
from kvbaton.serving.server.operators import is_operator, key_of_client, require_operator
from kvbaton.serving.server.parsing import parse
from kvbaton.serving.server.request_ids import tell_request_id
from kvbaton.serving.server.request_parsing import MAX_NAME_CHARACTERS
from kvbaton.serving.server.shared import SharedReads

#: Bytes of a worker's stream that are buffered before its socket is no longer read.
READ_BUFFER_BYTES = 256 << 10
#: Largest answer to a question for the merged routes.
MAX_TOLD_BYTES = 4 << 20
CONNECT_TIMEOUT_SECONDS = 5.0
#: For so long the addresses of a worker that is given by name are taken for true.
RESOLVED_SECONDS = 10
#: Limit of one question to one worker for the merged routes.
ASK_TIMEOUT_SECONDS = 3.0

_log = logging.getLogger(__name__)

#: What the workers are: our servers, vLLM's with our connector, or SGLang's with our transfer backend.
Engine = Literal["kvbaton", "vllm", "sglang"]
#: The route by which each says that it takes requests; SGLang's own /health computes a token each time.
HEALTH_ROUTES: dict[Engine, str] = {"kvbaton": "/ready", "vllm": "/health", "sglang": "/model_info"}


@dataclass(frozen=True, kw_only=True, slots=True)
class RouterConfig:
    """Settings of one router; ``workers`` as :func:`kvbaton.serving.router.workers.parse_worker` makes them."""

    workers: tuple[Worker, ...]
    engine: Engine = "kvbaton"
    policy: str = "round_robin"
    prefill_policy: str = ""
    decode_policy: str = ""
    cache_threshold: float = 0.3
    balance_abs_threshold: int = 64
    balance_rel_threshold: float = 1.5
    request_timeout_secs: float = 1800.0
    sse_keep_alive_secs: float = 15.0
    health_check_interval_secs: float = 1.0
    health_check_timeout_secs: float = 2.0
    health_failure_threshold: int = 2
    health_check_endpoint: str = ""
    cb_failure_threshold: int = 10
    cb_timeout_duration_secs: float = 10.0
    cb_window_duration_secs: float = 120.0
    disable_circuit_breaker: bool = False
    workers_file: Path | None = None
    ca_cert_path: Path | None = None
    forward_header: tuple[str, ...] = ()
    max_concurrent_requests: int = 1024
    strict_fields: bool = False
    secret: str | None = field(default=None, repr=False)
    names: ServerNames = field(default_factory=ServerNames)
    keys: ApiKeys = field(default_factory=ApiKeys)

    def __post_init__(self) -> None:
        check_roles(self.workers, may_be_none=self.workers_file is not None)

    def policies(self) -> dict[Role, Policy]:
        """One for each role, new. Raises ConfigError."""
        settings = CacheAwareSettings(
            cache_threshold=self.cache_threshold,
            balance_abs_threshold=self.balance_abs_threshold,
            balance_rel_threshold=self.balance_rel_threshold,
        )
        return {
            "prefill": policy_of(self.prefill_policy or self.policy, settings),
            "decode": policy_of(self.decode_policy or self.policy, settings),
        }

    @property
    def breakers(self) -> BreakerSettings:
        return BreakerSettings(
            failure_threshold=0 if self.disable_circuit_breaker else self.cb_failure_threshold,
            timeout_secs=self.cb_timeout_duration_secs,
            window_secs=self.cb_window_duration_secs,
        )

    @property
    def health_checks(self) -> HealthChecks:
        return HealthChecks(
            endpoint=self.health_check_endpoint or HEALTH_ROUTES[self.engine],
            interval_secs=self.health_check_interval_secs,
            timeout_secs=self.health_check_timeout_secs,
            failure_threshold=self.health_failure_threshold,
        )


def _trusting(ca_cert_path: Path | None) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=ca_cert_path)
    except OSError as error:  # ssl.SSLError is one
        raise ConfigError(f"--ca-cert-path {ca_cert_path} has no certificates: {error.strerror or error}") from None


class Router:
    """Handlers over a set of workers. Build it inside the event loop that will run :attr:`app`. Raises ConfigError."""

    def __init__(self, config: RouterConfig) -> None:
        self._config = config
        tls = _trusting(config.ca_cert_path)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=2 * config.max_concurrent_requests, ssl=tls, ttl_dns_cache=RESOLVED_SECONDS
            ),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_SECONDS),
            read_bufsize=READ_BUFFER_BYTES,
            trust_env=False,
            auto_decompress=False,
        )
        #: Probes and merged routes, a few for each worker at a time: no flood of requests keeps them waiting. Each has
        #: a connection of its own: a name that stands for another address by now is probed there.
        self._asking = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, ssl=tls, ttl_dns_cache=RESOLVED_SECONDS, force_close=True),
            trust_env=False,
            auto_decompress=False,
        )
        self._reads = SharedReads()
        self.workers = Workers(
            config.workers,
            self._asking,
            config.health_checks,
            policies=config.policies(),
            breakers=config.breakers,
            as_router=self._credentials,
            as_operator=self._operators,
        )
        most = min(config.max_concurrent_requests, affordable_requests())
        if most < config.max_concurrent_requests:
            _log.warning(
                "%d requests at a time: the limit of open files allows no more (--max-concurrent-requests %d)",
                most,
                config.max_concurrent_requests,
            )
        self.admission = AdmissionLimit(most)
        self._aliases = Aliases()
        self._known = KnownSources()
        self._bodies = Bodies(most_bytes=MAX_ROUTED_BODY_BYTES)
        self.metrics = ServerMetrics()
        self.metrics.gauges(self._gauges)
        self._rule = FieldRule(strict=config.strict_fields, count=self.metrics.unknown_field)
        self._forwarder = Forwarder(
            self.workers,
            self._call,
            params.mint_room if config.engine == "vllm" else mint_room,
            self.metrics,
            self._session,
            self._credentials,
            passed=PassedHeaders(config.forward_header),
            keeps_journal=config.engine == "kvbaton",
            most_requests=config.max_concurrent_requests,
            timeout_secs=config.request_timeout_secs,
            keep_alive_secs=config.sse_keep_alive_secs,
        )
        self.app = self._routes()

    def _routes(self) -> web.Application:
        app = web.Application(
            middlewares=[
                web.middleware(errors),
                web.middleware(guard(self._config.names)),
                web.middleware(require_key(self._config.keys, self._is_operator)),
            ],
            client_max_size=MAX_BODY_BYTES,
        )
        app.router.add_post("/v1/completions", self._route)
        app.router.add_post("/v1/chat/completions", self._route)
        app.router.add_post("/abort_request", self._abort)
        app.router.add_post("/generate", self._route)
        app.router.add_post("/tokenize", self._pass_on)
        app.router.add_post("/detokenize", self._pass_on)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/v1/models/{model:.+}", self._model)
        app.router.add_get("/get_model_info", self._model_info)
        app.router.add_get("/model_info", self._model_info)
        app.router.add_get("/health", self._health)
        app.router.add_get("/ready", self._ready)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/get_server_info", self._server_info)
        app.router.add_get("/server_info", self._server_info)
        app.router.add_get(story.PATH, self._story)
        app.router.add_get(openapi.PATH, self._openapi)
        WorkerRoutes(self.workers, self._bodies, self._require_operator).add_to(app)
        app.on_response_prepare.append(tell_request_id)
        app.on_response_prepare.append(read_across(self._config.names))
        app.cleanup_ctx.append(self._running)
        return app

    def _is_operator(self, http: web.Request) -> bool:
        return is_operator(http, self._config.secret, self._config.names)

    def _require_operator(self, http: web.Request) -> None:
        require_operator(http, self._config.secret, self._config.names, what="the list of workers")

    def _credentials(self, worker: Worker) -> Mapping[str, str]:
        """What shows a worker, and nobody else, that this is its router."""
        secret = self._config.secret
        return {} if secret is None else {ROUTER_HEADER: token_of(secret, "router", worker.audience)}

    def _operators(self, worker: Worker) -> Mapping[str, str]:
        """What shows a worker that an operator asks."""
        return bearer(self._config.secret, "story", worker.audience)

    async def _running(self, _app: web.Application) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(self.workers.probe_forever())]
        if self._config.workers_file is not None:
            tasks.append(asyncio.create_task(WorkerFile(self._config.workers_file, self.workers).watch_forever()))
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self.close()

    async def close(self) -> None:
        """Close the connections to workers; the end of :attr:`app` does it. Idempotent."""
        await self._session.close()
        await self._asking.close()

    # routing

    async def _route(self, http: web.Request) -> web.StreamResponse:
        with self.metrics.timed(http.path) as timer:
            try:
                async with self._bodies.read(http) as body:
                    fields, rid = client_fields(body, self._rule)
                    limit = TimeLimit(self._config.request_timeout_secs)
                    with (
                        self.admission.entered(),  # for requests that are here, not for those that still come
                        self._aliases.named(key_of_client(http), rid, limit.abort),
                    ):
                        return await self._forwarder.forward(http, fields, limit, timer)
            except CallFailed as failure:
                timer.outcome = failure.detail.code
                failure.__traceback__ = None  # its leg holds it, and its frames the body, until the collector comes
                return json_response(failure.body, status=failure.status, headers=failure.headers)
            except KVBatonError as error:
                timer.outcome = error.code
                raise
            except web.HTTPException:
                timer.outcome = "http"
                raise

    def _call(self, path: str, fields: Fields, pair: Pair, passed: Mapping[str, str]) -> PrefillDecodeCall:
        def headers(worker: Worker) -> Mapping[str, str]:
            return {**passed, **self._credentials(worker)}

        if self._config.engine == "vllm":
            return VllmCall(self._session, path, fields, pair, headers, known=self._known)
        return PrefillDecodeCall(self._session, path, fields, pair, headers)

    # operating

    async def _ask_all(
        self, workers: list[Worker], path: str, credentials: Credentials = no_credentials
    ) -> list[tuple[Worker, object]]:
        """Each worker's JSON answer to a GET; a dict with ``error`` for one that gives none."""

        async def ask(worker: Worker) -> tuple[Worker, object]:
            timeout = aiohttp.ClientTimeout(total=ASK_TIMEOUT_SECONDS)
            try:
                async with self._asking.get(
                    worker.url + path, timeout=timeout, allow_redirects=False, headers=credentials(worker)
                ) as response:
                    return worker, msgspec.json.decode(await bounded(response, MAX_TOLD_BYTES))
            except (aiohttp.ClientError, OSError) as error:
                return worker, {"error": f"it does not answer ({cause_of(error)})"}
            except (msgspec.MsgspecError, UnicodeDecodeError) as error:
                return worker, {"error": f"it answers no JSON: {error}"}

        return await asyncio.gather(*(ask(worker) for worker in workers))

    async def _pass_on(self, http: web.Request) -> web.Response:
        """To any decode server: what needs no pair."""
        async with self._bodies.read(http) as body:
            with self.admission.entered():
                return await self._passed_on(http.path, body)

    async def _passed_on(self, path: str, body: bytes) -> web.Response:
        worker = await self.workers.find("decode")
        timeout = aiohttp.ClientTimeout(total=ASK_TIMEOUT_SECONDS)
        headers = {"Content-Type": "application/json", **self._credentials(worker)}
        try:
            async with self._session.post(
                worker.url + path, data=BytesIO(body), headers=headers, timeout=timeout, allow_redirects=False
            ) as response:
                answer = await bounded(response, MAX_ANSWER_BYTES)
        except (aiohttp.ClientError, OSError) as error:
            raise PeerLostError(f"{worker} does not answer ({cause_of(error)})") from None
        return web.Response(status=response.status, body=answer, content_type="application/json")

    async def _model_info(self, http: web.Request) -> web.Response:
        worker = await self.workers.find("decode")
        ((_, told),) = await self._reads.get(f"{http.path} {worker.url}", lambda: self._ask_all([worker], http.path))
        if not isinstance(told, dict) or "error" in told:
            raise PeerLostError(f"{worker} does not answer")
        return json_response(told)

    async def _model(self, http: web.Request) -> web.Response:
        asked = http.match_info["model"]
        models = await self._cards()
        if asked not in models:
            raise UnknownModelError(f"model: {asked[:MAX_NAME_CHARACTERS]!r} is not served here")
        return json_response(models[asked])

    async def _models(self, _http: web.Request) -> web.Response:
        return json_response({"object": "list", "data": list((await self._cards()).values())})

    async def _cards(self) -> dict[str, object]:
        models: dict[str, object] = {}
        listings = await self._reads.get("models", lambda: self._ask_all(self.workers.usable("decode"), "/v1/models"))
        for _, listing in listings:
            cards = listing.get("data") if isinstance(listing, dict) else None
            for card in cards if isinstance(cards, list) else ():
                if isinstance(card, dict):
                    models.setdefault(str(card.get("id")), card)
        return models

    async def _server_info(self, _http: web.Request) -> web.Response:
        answers = await self._reads.get("info", lambda: self._ask_all(list(self.workers.all), "/get_server_info"))
        body: dict[str, object] = {
            "role": "router",
            "version": __version__,
            "policy": {
                "prefill": self._config.prefill_policy or self._config.policy,
                "decode": self._config.decode_policy or self._config.policy,
            },
            "ready": not self._not_ready(),
            "requests": self.admission.in_flight,
        }
        for role in ROLES:
            body[role] = [
                {"url": worker.url, "trouble": worker.trouble, "info": info}
                for worker, info in answers
                if worker.role == role
            ]
        return json_response(body)

    async def _story(self, http: web.Request) -> web.Response:
        """Both sides of a room: every worker is asked, those that know it answer."""
        room = story.room_of(http, self._config.secret, self._config.names)
        sides = [side] if (side := self._forwarder.trail.side(room)).lines else []
        for worker, answer in await self._ask_all(list(self.workers.all), f"/story/{room}", self._operators):
            try:
                told = msgspec.convert(answer, story.RoomStory).sides
            except msgspec.ValidationError:
                error = answer.get("error") if isinstance(answer, dict) else None
                message = error.get("message") if isinstance(error, dict) else error
                told = (story.Side(role=worker.role, error=str(message or "it answers with something else")),)
            sides += [msgspec.structs.replace(side, url=worker.url) for side in told if side.lines or side.error]
        return story.response(room, sides)

    async def _openapi(self, _http: web.Request) -> web.Response:
        return web.Response(
            body=openapi.encoded("router", strict=self._config.strict_fields), content_type="application/json"
        )

    async def _abort(self, http: web.Request) -> web.Response:
        async with self._bodies.read(http) as asked:
            rid = parse(asked, AbortRequest).rid
        if self._is_operator(http):
            self._aliases.end_for_operator(rid)
        else:
            self._aliases.end(key_of_client(http), rid)
        return json_response({"rid": rid})

    def _not_ready(self) -> str:
        if self.admission.is_shut:
            return "the router is stopping"
        return self.workers.not_ready()

    async def _health(self, _http: web.Request) -> web.Response:
        return json_response({"status": "ok"})

    async def _ready(self, _http: web.Request) -> web.Response:
        reason = self._not_ready()
        return json_response({"ready": not reason, "reason": reason}, status=503 if reason else 200)

    async def _metrics(self, _http: web.Request) -> web.Response:
        return web.Response(body=self.metrics.exposition(), headers={"Content-Type": CONTENT_TYPE})

    def _gauges(self) -> list[Gauge]:
        text = "Whether a worker takes requests (1) or is out (0)."
        text_open = "Whether a worker fails every request, and gets fewer (1)."
        circuits = [
            Gauge(
                "kvbaton_router_worker_circuit_open",
                text_open,
                float(w.breaker.is_open),
                {"role": w.role, "worker": w.url},
            )
            for w in self.workers.all
        ]
        usable = [
            Gauge("kvbaton_router_worker_usable", text, float(w.usable), {"role": w.role, "worker": w.url})
            for w in self.workers.all
        ]
        return [
            *usable,
            *circuits,
            Gauge("kvbaton_router_running_requests", "Requests being answered.", self.admission.in_flight),
        ]
