"""What a server says of itself: its life and readiness, its models, metrics, memory, and the story of a room.

- ``/health`` says that the process lives and never runs the model (it turns 503 when the engine's thread has died);
- ``/ready`` says that it takes requests, and if not, why.

This file must not know of requests and their answers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from time import time

from aiohttp import web

from kvbaton import __version__
from kvbaton.discovery.json_response import json_response
from kvbaton.errors import ConfigError
from kvbaton.manager import TraceEvent
from kvbaton.plan.layout_file import RankLayout, encode
from kvbaton.protocol.messages import PROTOCOL_VERSION
from kvbaton.serving.server import openapi, story
from kvbaton.serving.server.admission import AdmissionLimit
from kvbaton.serving.server.callers import Callers
from kvbaton.serving.server.engine import Engine
from kvbaton.serving.server.metrics import CONTENT_TYPE, Gauge, ServerMetrics
from kvbaton.serving.server.request_parsing import ApiConfig
from kvbaton.serving.server.shared import SharedReads


class StatusRoutes:
    """Handlers that read; for the arguments see :class:`~kvbaton.serving.server.api.ApiServer`."""

    def __init__(
        self,
        engine: Engine,
        config: ApiConfig,
        callers: Callers,
        admission: AdmissionLimit,
        metrics: ServerMetrics,
        *,
        check_model: Callable[[str], None],
        readiness: Callable[[], str],
        info: Callable[[], Mapping[str, object]],
        timeline: Callable[[int], Sequence[TraceEvent]] | None,
        layouts: Sequence[RankLayout],
        instance: str,
    ) -> None:
        self._engine = engine
        self._config = config
        self._callers = callers
        self._admission = admission
        self._metrics = metrics
        self._check_model = check_model
        self._readiness = readiness
        self._info = info
        self._timeline = timeline
        self._layouts = layouts
        self._instance = instance
        #: An engine may wait for its processes, on a thread.
        self._reads = SharedReads()
        metrics.gauges(lambda: _engine_gauges(engine))

    def add_to(self, app: web.Application) -> None:
        app.router.add_get("/health", self._health)
        app.router.add_get("/ready", self._ready)
        app.router.add_get("/metrics", self._exposition)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/v1/models/{model:.+}", self._model)
        app.router.add_get("/get_model_info", self._model_info)
        app.router.add_get("/model_info", self._model_info)
        app.router.add_get("/get_server_info", self._server_info)
        app.router.add_get("/server_info", self._server_info)
        app.router.add_get(story.PATH, self._story)
        app.router.add_get(openapi.LAYOUT_PATH, self._layout)
        app.router.add_get(openapi.PATH, self._openapi)

    def _not_ready(self) -> str:
        if self._engine.failure is not None:
            return self._engine.failure.message
        return "the server is stopping" if self._admission.is_shut else self._readiness()

    async def _health(self, _http: web.Request) -> web.Response:
        failure = self._engine.failure
        if failure is not None:
            return json_response({"status": "failed", "reason": failure.message}, status=503)
        return json_response({"status": "ok"})

    async def _ready(self, http: web.Request) -> web.Response:
        """Also what a router must know of a server before it sends it anything."""
        reason = self._not_ready()
        body = {
            "ready": not reason,
            "reason": reason,
            "draining": self._admission.is_shut,
            "mode": self._config.mode,
            "instance": self._instance,
            "protocol": PROTOCOL_VERSION,
            "model": self._config.model,
            "max_model_len": self._config.max_positions,
            "admits": self._callers.is_router(http),
        }
        return json_response(body, status=503 if reason else 200)

    async def _exposition(self, _http: web.Request) -> web.Response:
        body = await self._reads.get("metrics", lambda: asyncio.to_thread(self._metrics.exposition))
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
            "requests": self._admission.in_flight,
        }
        return json_response(body | await self._reads.get("info", lambda: asyncio.to_thread(self._insides)))

    def _insides(self) -> dict[str, object]:
        return {"stats": self._engine.stats(), **self._info()}

    async def _story(self, http: web.Request) -> web.Response:
        room = story.room_of(http, self._callers.secret, self._callers.names)
        events = await asyncio.to_thread(self._timeline, room) if self._timeline is not None else ()
        lines = tuple(story.StoryLine(event.seconds_ago, event.text) for event in events)
        return story.response(room, [story.Side(role=self._config.mode, instance=self._instance, lines=lines)])

    async def _layout(self, http: web.Request) -> web.Response:
        self._callers.require_operator(http, what="the layout of its memory")
        if not self._layouts:
            raise ConfigError("this server hands nothing over: start it with --disaggregation-mode prefill or decode")
        return web.Response(body=encode(self._layouts), content_type="application/json")

    async def _openapi(self, _http: web.Request) -> web.Response:
        return web.Response(
            body=openapi.encoded(self._config.mode, strict=self._config.strict_fields), content_type="application/json"
        )

    async def _models(self, _http: web.Request) -> web.Response:
        return json_response({"object": "list", "data": [self._card()]})

    async def _model(self, http: web.Request) -> web.Response:
        self._check_model(http.match_info["model"])
        return json_response(self._card())

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
        return json_response({**body, "max_model_len": self._config.max_positions, "weight_version": "default"})


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
