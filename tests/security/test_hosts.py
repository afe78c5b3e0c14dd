"""What a browser on this machine can be made to send: another site's page, a re-bound name, a body that is no JSON."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import aiohttp
import pytest

from kvbaton.discovery.guard import read_across
from kvbaton.discovery.names import ServerNames, split
from kvbaton.discovery.registry import Registry
from kvbaton.discovery.server import registry_app
from kvbaton.errors import ConfigError
from kvbaton.serving.router.router import Router, RouterConfig
from kvbaton.serving.router.worker import Worker
from kvbaton.serving.server.api import ApiServer
from kvbaton.serving.server.request_parsing import ApiConfig
from kvbaton.serving.testing.engine import CharacterTokenizer, ScriptedEngine, spell
from kvbaton.serving.testing.http import run, serving

JSON = {"Content-Type": "application/json"}
#: Reading and writing routes of each port.
ROUTES = {
    "serve": (("GET", "/get_server_info"), ("POST", "/v1/completions"), ("POST", "/abort_request")),
    "router": (("GET", "/get_server_info"), ("POST", "/v1/completions"), ("POST", "/abort_request")),
    "registry": (("GET", "/route"), ("PUT", "/route"), ("DELETE", "/route?instance=i")),
}
REBOUND = [
    "evil.example",
    "evil.example:{port}",
    "127.0.0.1.evil.example",
    "localhost.evil.example:{port}",
    "127.0.0.1@evil.example",
    "10.0.0.1:{port}",
    "",
]
OWN = ["127.0.0.1", "127.0.0.1:{port}", "localhost:{port}", "LOCALHOST", "[::1]:{port}"]
FOREIGN = ["https://evil.example", "http://127.0.0.1:1", "http://localhost.evil.example", "null", "http://[", ""]


@asynccontextmanager
async def port(kind: str, names: ServerNames | None = None) -> AsyncIterator[tuple[str, aiohttp.ClientSession]]:
    async with AsyncExitStack() as stack:
        if kind == "serve":
            engine = ScriptedEngine(lambda _request: spell("hi"))
            config = ApiConfig(model="m", max_positions=64)
            app = ApiServer(engine, CharacterTokenizer(), config, names=names).app
        elif kind == "router":
            workers = (Worker("prefill", "http://127.0.0.1:1", 1), Worker("decode", "http://127.0.0.1:2"))
            app = Router(RouterConfig(workers=workers, names=names or ServerNames())).app
            app.on_response_prepare.append(read_across(names or ServerNames()))
        else:
            app = registry_app(Registry(), names=names)
        url = await stack.enter_async_context(serving(app))
        yield url, await stack.enter_async_context(aiohttp.ClientSession())


async def refusal(session: aiohttp.ClientSession, method: str, url: str, headers: dict[str, str]) -> str:
    """Why the request was refused at the door; "" where it came in."""
    body = b"{}" if method in ("POST", "PUT") else None
    async with session.request(method, url, data=body, headers={**JSON, **headers}) as response:
        said = await response.text()
        return said if response.status == 401 else ""


@pytest.mark.parametrize("kind", ROUTES)
def test_a_rebound_host_is_refused_on_every_port(kind: str) -> None:
    async def test() -> None:
        async with port(kind) as (url, session):
            number = url.rpartition(":")[2]
            for method, path in ROUTES[kind]:
                for host in REBOUND:
                    headers = {"Host": host.format(port=number)}
                    assert "no name of this server" in await refusal(session, method, url + path, headers), host
                for host in OWN:
                    headers = {"Host": host.format(port=number)}
                    assert not await refusal(session, method, url + path, headers), host

    run(test())


@pytest.mark.parametrize("kind", ROUTES)
def test_another_sites_page_is_refused_on_every_port(kind: str) -> None:
    async def test() -> None:
        async with port(kind) as (url, session):
            for method, path in ROUTES[kind]:
                for origin in FOREIGN:
                    said = await refusal(session, method, url + path, {"Origin": origin})
                    assert "is another site" in said, origin
                assert not await refusal(session, method, url + path, {"Origin": url})

    run(test())


@pytest.mark.parametrize("kind", ROUTES)
def test_a_body_that_is_not_said_to_be_json_is_refused_on_every_port(kind: str) -> None:
    """These are the types that a browser sends to another site without asking it first, and none at all."""

    async def test() -> None:
        simple = [
            "text/plain",
            "application/x-www-form-urlencoded",
            "multipart/form-data",
            "text/plain; application/json",
        ]
        async with port(kind) as (url, session):
            for method, path in ROUTES[kind]:
                if method not in ("POST", "PUT"):
                    continue
                for content_type in simple:
                    headers = {"Content-Type": content_type}
                    async with session.request(method, url + path, data=b"{}", headers=headers) as response:
                        assert response.status == 415, content_type
                async with session.request(
                    method, url + path, data=b"{}", skip_auto_headers=("Content-Type",)
                ) as response:
                    assert response.status == 415
                headers = {"Content-Type": "application/json; charset=utf-8"}
                async with session.request(method, url + path, data=b"{}", headers=headers) as response:
                    # it was read: a field is missing, and a router has nobody to ask
                    assert response.status in ((400, 503) if kind == "router" else (400,))

    run(test())


@pytest.mark.parametrize("kind", ROUTES)
def test_a_name_that_the_operator_gives_is_the_servers(kind: str) -> None:
    async def test() -> None:
        names = ServerNames.of("127.0.0.1", allowed=["chat.example", "[fd00::1]:443"])
        async with port(kind, names) as (url, session):
            method, path = ROUTES[kind][0]
            for host in ("chat.example", "Chat.Example:8443", "[fd00::1]"):
                assert not await refusal(session, method, url + path, {"Host": host})
            for origin in ("https://chat.example", "http://chat.example:3000"):
                assert not await refusal(session, method, url + path, {"Origin": origin})
            assert await refusal(session, method, url + path, {"Host": "other.example"})
            assert await refusal(session, method, url + path, {"Origin": "https://other.example"})

    run(test())


@pytest.mark.parametrize("kind", ["serve", "router"])
@pytest.mark.parametrize("origins", [("http://Chat.example:3000/",), ("*",)])
def test_a_site_that_the_operator_lets_in_may_ask_and_read(kind: str, origins: tuple[str, ...]) -> None:
    asks = {
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type,x-stainless-lang",
    }

    async def test() -> None:
        async with port(kind, ServerNames.of("127.0.0.1", origins=origins)) as (url, session):
            site = {"Origin": "http://chat.example:3000"}
            async with session.options(f"{url}/v1/chat/completions", headers={**site, **asks}) as response:
                assert response.status == 204
                assert "POST" in response.headers["Access-Control-Allow-Methods"]
                assert response.headers["Access-Control-Allow-Headers"] == asks["Access-Control-Request-Headers"]
                assert response.headers["Access-Control-Allow-Origin"] == site["Origin"]
            for body in (b'{"prompt": "x", "stream": true}', b"{}"):  # an answer that streams, and an error
                async with session.post(f"{url}/v1/completions", data=body, headers={**JSON, **site}) as response:
                    assert response.headers["Access-Control-Allow-Origin"] == site["Origin"]
                    assert "X-Request-Id" in response.headers["Access-Control-Expose-Headers"]
                    assert response.headers["Vary"] == "Origin"
            for headers in ({}, {"Origin": "http://chat.example"}):
                is_let_in = "Origin" in headers and origins == ("*",)
                async with session.options(f"{url}/v1/chat/completions", headers={**headers, **asks}) as response:
                    assert response.status == (204 if is_let_in else 401 if headers else 405)
                    assert ("Access-Control-Allow-Origin" in response.headers) == is_let_in
            assert await refusal(session, "GET", f"{url}/health", {**site, "Host": "evil.example"}), "re-bound"

    run(test())


@pytest.mark.parametrize("wrong", ["chat.example", "http://", "http://a/b", "http://a b", ""])
def test_what_is_no_origin_is_refused_at_the_start(wrong: str) -> None:
    with pytest.raises(ConfigError, match="--allowed-origin"):
        ServerNames.of("127.0.0.1", origins=[wrong])


def test_beyond_loopback_names_are_checked_where_the_operator_lists_them() -> None:
    ServerNames.of("0.0.0.0").check("any.example", None)
    from kvbaton.errors import AuthenticationError

    with pytest.raises(AuthenticationError):
        ServerNames.of("0.0.0.0", allowed=["chat.example"]).check("any.example", None)
    for wrong in ("a b", "http://x", "x:0", "x:99999", ""):
        with pytest.raises(ConfigError, match="--allowed-host"):
            ServerNames.of("127.0.0.1", allowed=[wrong])


@pytest.mark.parametrize(
    ("authority", "parts"),
    [
        ("A.example:81", ("a.example", 81)),
        ("a.example", ("a.example", 80)),
        ("[::1]", ("::1", 80)),
        ("[0:0::1]:9", ("::1", 9)),
        ("localhost:9", ("127.0.0.1", 9)),
        ("a:b", ("a", 0)),
        ("", ("", 80)),
    ],
)
def test_what_a_host_header_says(authority: str, parts: tuple[str, int]) -> None:
    assert split(authority) == parts


@pytest.mark.parametrize("kind", ROUTES)
def test_no_answer_names_versions(kind: str) -> None:
    async def test() -> None:
        async with port(kind) as (url, session):
            for path in ("/health", "/nothing"):
                async with session.get(url + path) as response:
                    assert response.headers["Server"] == "kvbaton"
            for noise in (b"\xff\xfe nonsense\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n"):
                reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
                writer.write(noise)
                said = (await reader.read()).lower()
                assert b"python" not in said
                assert b"aiohttp" not in said
                writer.close()

    run(test())
