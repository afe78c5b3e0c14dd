"""Who may drain a server, and who may have it hand answers on."""

from __future__ import annotations

import aiohttp
import pytest

from kvbaton.discovery.access import ROUTER_HEADER, token_of
from kvbaton.discovery.names import audience_of_url
from kvbaton.serving.server.api import ApiServer
from kvbaton.serving.server.request_parsing import ApiConfig
from kvbaton.serving.testing.engine import CharacterTokenizer, ScriptedEngine, spell
from kvbaton.serving.testing.http import run, serving

SECRET = "kX7-a-secret-that-must-stay-one-Q2w"


@pytest.mark.parametrize("secret", [None, SECRET])
def test_operators_drain_and_the_router_has_answers_handed_on(secret: str | None) -> None:
    async def test() -> None:
        engine = ScriptedEngine(lambda _request: spell("hi"))
        config = ApiConfig(model="m", max_positions=64, mode="decode")
        server = ApiServer(engine, CharacterTokenizer(), config, secret=secret, sources=("tcp://127.0.0.1:1",))
        async with serving(server.app) as url, aiohttp.ClientSession() as session:
            router = {} if secret is None else {ROUTER_HEADER: token_of(secret, "router", audience_of_url(url))}
            operator = {} if secret is None else {"Authorization": f"Bearer {secret}"}
            stranger = {"Authorization": "Bearer nobody", ROUTER_HEADER: "nobody"}
            order = {"room": 7, "to": 8}

            async def post(path: str, body: object, headers: dict[str, str]) -> int:
                async with session.post(url + path, json=body, headers=headers) as response:
                    return response.status

            refused = 401 if secret else 409
            assert await post("/hand_over", order, stranger) == refused
            assert await post("/hand_over", order, router) == 409  # no such answer is being given
            assert await post("/hand_over", {"room": 0, "to": 8}, router) == 400
            assert not engine.handed_on
            if secret is not None:
                assert await post("/drain", {}, stranger) == 401
                assert await post("/drain", {}, router) == 401
            assert not server.admission.is_shut
            assert await post("/drain", {}, operator) == 200
            async with session.get(url + "/ready") as response:
                assert (response.status, (await response.json())["draining"]) == (503, True)

    run(test())
