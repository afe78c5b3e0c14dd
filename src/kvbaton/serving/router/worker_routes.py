"""Workers at run time: ``GET /workers``, ``POST /workers``, ``DELETE /workers/{id}``, for operators.

Names and shapes are those of sglang-router where it has them: ``url``, ``worker_type``, ``bootstrap_port``,
``is_healthy``, ``load``; what is accepted is answered 202 before it has happened. A worker that is added gets requests
once a probe has succeeded; one that is taken out gets no more, and what it was asked goes on.

This file must not know of requests for tokens.
"""

from __future__ import annotations

from collections.abc import Callable

from aiohttp import web

from kvbaton.discovery.json_response import json_response
from kvbaton.serving.router.worker import ROLES, Worker
from kvbaton.serving.router.workers import Workers, parse_worker
from kvbaton.serving.server.bodies import Bodies
from kvbaton.serving.server.openapi import WORKERS_PATH, AddWorker
from kvbaton.serving.server.parsing import parse


class WorkerRoutes:
    """``require``: raises AuthenticationError unless an operator asks."""

    def __init__(self, workers: Workers, bodies: Bodies, require: Callable[[web.Request], None]) -> None:
        self._workers = workers
        self._bodies = bodies
        self._require = require

    def add_to(self, app: web.Application) -> None:
        app.router.add_get(WORKERS_PATH, self._list)
        app.router.add_post(WORKERS_PATH, self._add)
        app.router.add_delete(WORKERS_PATH + "/{id}", self._remove)

    async def _list(self, http: web.Request) -> web.Response:
        self._require(http)
        workers = self._workers.all
        counts = {f"{role}_count": sum(worker.role == role for worker in workers) for role in ROLES}
        return json_response({"workers": [_told(one) for one in workers], "total": len(workers), "stats": counts})

    async def _add(self, http: web.Request) -> web.Response:
        self._require(http)
        async with self._bodies.read(http) as body:
            asked = parse(body, AddWorker)
        port = [] if asked.bootstrap_port is None else [str(asked.bootstrap_port)]
        worker = parse_worker(asked.worker_type, [asked.url, *port])
        self._workers.add(worker)
        told = {"status": "accepted", "worker_id": worker.id, "url": worker.url}
        return json_response({**told, "location": f"{WORKERS_PATH}/{worker.id}"}, status=202)

    async def _remove(self, http: web.Request) -> web.Response:
        self._require(http)
        worker = next((worker for worker in self._workers.all if worker.id == http.match_info["id"]), None)
        if worker is None:
            raise web.HTTPNotFound
        self._workers.remove(worker)
        return json_response({"status": "accepted", "worker_id": worker.id, "url": worker.url}, status=202)


def _told(worker: Worker) -> dict[str, object]:
    return {
        "id": worker.id,
        "url": worker.url,
        "worker_type": worker.role,
        "bootstrap_port": worker.bootstrap_port if worker.role == "prefill" else None,
        "is_healthy": worker.usable,
        "state": worker.state.value,
        "trouble": worker.trouble,
        "circuit_open": worker.breaker.is_open,
        "load": worker.legs,
    }
