"""``/story/{room}`` on a server and on the router, who may ask, and what ``kvbaton story`` prints."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager

import aiohttp
import pytest

from kvbaton.cli.main import main
from kvbaton.manager import TraceEvent
from kvbaton.serving.router.router import Router, RouterConfig
from kvbaton.serving.router.worker import Worker
from kvbaton.serving.server.api import ApiServer
from kvbaton.serving.server.request_parsing import ApiConfig
from kvbaton.serving.testing.engine import CharacterTokenizer, ScriptedEngine, spell
from kvbaton.serving.testing.http import run, serving

ROOM = 77
SECRET = "a-secret-of-many-characters"
TOLD = {
    "prefill": [
        TraceEvent(3.0, "sender opened"),
        TraceEvent(1.0, "chunk to token 16 submitted"),
        TraceEvent(0.0, "now Waiting"),
    ],
    "decode": [TraceEvent(2.0, "receiver opened")],
}


@asynccontextmanager
async def server(mode, *, secret: str | None = None):
    api = ApiServer(
        ScriptedEngine(lambda _request: spell("x")),
        CharacterTokenizer(),
        ApiConfig(model="m", max_positions=64, mode=mode),
        timeline=None if mode == "null" else lambda room: TOLD[mode] if room == ROOM else [],
        instance=f"instance-of-{mode}",
        secret=secret,
    )
    async with serving(api.app) as url:
        yield url


@asynccontextmanager
async def pair(*, secret: str | None = None, router_secret: str | None = None):
    async with server("prefill", secret=secret) as prefill, server("decode", secret=secret) as decode:
        workers = (Worker("prefill", prefill), Worker("decode", decode))
        router = Router(RouterConfig(workers=workers, secret=router_secret))
        async with serving(router.app) as url:
            yield prefill, decode, url


async def get(url: str, status: int, secret: str = "", room: object = ROOM) -> dict:
    headers = {"Authorization": f"Bearer {secret}"} if secret else {}
    async with aiohttp.ClientSession() as http, http.get(f"{url}/story/{room}", headers=headers) as response:
        body = await response.json()
        assert response.status == status, body
        return body


def test_a_server_tells_its_side() -> None:
    async def test() -> None:
        async with server("prefill") as url:
            body = await get(url, 200)
            assert body["room"] == ROOM
            (side,) = body["sides"]
            assert (side["role"], side["instance"]) == ("prefill", "instance-of-prefill")
            assert [line["text"] for line in side["lines"]] == [moment.text for moment in TOLD["prefill"]]

    run(test())


def test_an_unknown_room_is_404_and_what_is_no_room_400() -> None:
    async def test() -> None:
        for mode in ("null", "decode"):
            async with server(mode) as url:
                await get(url, 404, room=12)
                for room in ("-1", "x", str(1 << 63), "9" * 40, "%D9%A3"):
                    assert (await get(url, 400, room=room))["error"]["code"] == "config"

    run(test())


def test_the_router_merges_both_sides() -> None:
    async def test() -> None:
        async with pair() as (prefill, decode, url):
            sides = (await get(url, 200))["sides"]
            assert {(side["role"], side["url"]) for side in sides} == {("prefill", prefill), ("decode", decode)}
            assert (await get(url, 404, room=12))["sides"] == []

    run(test())


def test_a_worker_that_is_gone_is_named() -> None:
    async def test() -> None:
        async with server("prefill") as prefill:
            workers = (Worker("prefill", prefill), Worker("decode", "http://127.0.0.1:9"))
            async with serving(Router(RouterConfig(workers=workers)).app) as url:
                sides = (await get(url, 200))["sides"]
                (gone,) = [side for side in sides if side["role"] == "decode"]
                assert gone["url"] == "http://127.0.0.1:9"
                assert "Connect call failed" in gone["error"]

    run(test())


def test_with_a_secret_a_story_needs_it() -> None:
    async def test() -> None:
        async with pair(secret=SECRET, router_secret=SECRET) as (prefill, _, url):
            for place in (prefill, url):
                assert (await get(place, 401))["error"]["code"] == "authentication"
                await get(place, 401, secret="another-secret-of-characters")
                await get(place, 200, secret=SECRET)
        async with pair(secret=SECRET) as (_, _, url):
            sides = (await get(url, 404))["sides"]
            assert all("secret" in side["error"] for side in sides), "workers refuse a router that has no secret"

    run(test())


def test_without_a_secret_only_this_machine_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvbaton.serving.server.operators.is_loopback", lambda _host: False)

    async def test() -> None:
        async with server("decode") as url:
            assert "--secret-file" in (await get(url, 401))["error"]["message"]

    run(test())


def story_command(*arguments: str) -> int:
    return main(["story", str(ROOM), *arguments], {})


def test_the_command_prints_both_sides_in_order(capsys: pytest.CaptureFixture[str], tmp_path) -> None:
    (tmp_path / "secret").write_text(SECRET)
    (tmp_path / "secret").chmod(0o600)
    secret = ("--secret-file", str(tmp_path / "secret"))

    async def test() -> None:
        async with pair(secret=SECRET, router_secret=SECRET) as (prefill, decode, url):
            for urls in (("--url", url), ("--url", prefill, "--url", decode)):
                assert await asyncio.to_thread(story_command, *urls, *secret) == 0
                out = capsys.readouterr().out
                texts = ["sender opened", "receiver opened", "chunk to token 16 submitted", "now    prefill  Waiting"]
                assert [out.index(text) for text in texts] == sorted(out.index(text) for text in texts)
            assert await asyncio.to_thread(story_command, "--url", url, "--json", *secret) == 0
            assert len(json.loads(capsys.readouterr().out)["sides"]) == 2
            assert await asyncio.to_thread(story_command, "--url", url) == 1
            assert "hint: pass --secret-file" in capsys.readouterr().err

    run(test())


def test_the_command_says_what_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    assert story_command() == 2
    assert story_command("--url", "nonsense") == 2
    assert story_command("--url", "http://127.0.0.1:9") == 1
    assert "kvbaton: http://127.0.0.1:9 does not answer" in capsys.readouterr().err

    async def test() -> None:
        async with server("decode") as url:
            assert await asyncio.to_thread(main, ["story", "5", "--url", url], {}) == 1
            assert "nobody has heard of this room" in capsys.readouterr().out

    run(test())
