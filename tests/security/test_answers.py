"""What a worker that has gone wrong may answer: the router keeps no more of it than its bounds say."""

from __future__ import annotations

import tracemalloc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
from aiohttp import web

from kvbaton.serving.router.router import MAX_TOLD_BYTES, Router, RouterConfig
from kvbaton.serving.router.worker import Worker
from kvbaton.serving.testing.http import run, serving

PIECE = b" " * (1 << 16)
#: Of an answer that goes on.
LONG_BYTES = 64 << 20


async def endless(http: web.Request) -> web.StreamResponse:
    """JSON that begins with a great deal of white space."""
    await http.read()
    response = web.StreamResponse(headers={"Content-Type": "application/json"})
    await response.prepare(http)
    for _ in range(LONG_BYTES // len(PIECE)):
        await response.write(PIECE)
    await response.write(b"{}")
    return response


async def short(http: web.Request) -> web.Response:
    await http.read()
    return web.json_response({"data": [{"id": "m"}]})


@asynccontextmanager
async def router() -> AsyncIterator[str]:
    """Over a prefill server that answers everything at length, and a decode server that does not."""
    wrong, good = web.Application(), web.Application()
    wrong.router.add_get("/ready", short)
    wrong.router.add_route("*", "/{tail:.*}", endless)
    good.router.add_route("*", "/{tail:.*}", short)
    async with serving(wrong) as one, serving(good) as other:
        workers = (Worker("prefill", one, 1), Worker("decode", other))
        made = Router(RouterConfig(workers=workers, health_check_interval_secs=60.0))
        async with serving(made.app) as url:
            await made.workers.probe_all()
            yield url


def test_a_workers_answer_to_a_question_is_bounded() -> None:
    async def test() -> None:
        async with router() as url, aiohttp.ClientSession() as session:
            async with session.get(f"{url}/get_server_info") as response:
                told = await response.json()
            assert f"more than {MAX_TOLD_BYTES} bytes" in told["prefill"][0]["info"]["error"]
            assert "data" in told["decode"][0]["info"]

    run(test())


def test_what_prefill_answers_is_not_kept() -> None:
    async def test() -> None:
        async with router() as url, aiohttp.ClientSession() as session:
            tracemalloc.start()
            try:
                async with session.post(f"{url}/v1/completions", json={"prompt": "x"}) as response:
                    assert response.status == 200
                assert tracemalloc.get_traced_memory()[1] < LONG_BYTES // 4
            finally:
                tracemalloc.stop()

    run(test())
