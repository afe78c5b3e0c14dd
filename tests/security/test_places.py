"""Tokens and places: what is overheard or lured away opens nothing else, and a living rank's place is its own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
import msgspec
import pytest
from aiohttp import web
from multidict import CIMultiDict

from kvbaton.discovery.access import ROUTER_HEADER, Door, bearer, token_of
from kvbaton.discovery.client import RegistryClient
from kvbaton.discovery.freshness import FRESH_SECONDS
from kvbaton.discovery.guard import JSON
from kvbaton.discovery.names import ServerNames, audience_of_url
from kvbaton.discovery.proof import NONCE_HEADER, TIME_HEADER, TIME_PATH, Asked
from kvbaton.discovery.registry import (
    TTL_SECONDS,
    Registration,
    Registry,
    RegistryCoordinates,
    Route,
    Sizes,
    lock_of,
)
from kvbaton.discovery.server import registry_app
from kvbaton.errors import AuthenticationError, ConfigError, LocalProtocolError, RegistryError
from kvbaton.serving.router.router import Router, RouterConfig
from kvbaton.serving.router.worker import Worker
from kvbaton.serving.server.allow import AllowList
from kvbaton.serving.server.api import ApiServer
from kvbaton.serving.server.request_parsing import ApiConfig
from kvbaton.serving.testing.engine import CharacterTokenizer, ScriptedEngine, spell
from kvbaton.serving.testing.http import run, serving

SECRET = "kX7-a-secret-that-must-stay-one-Q2w"
ROUTE = Route(instance="i1", group="g", address="tcp://127.0.0.1:41000", layout_digest="d", http_port=30000)
NEWCOMER = msgspec.structs.replace(ROUTE, instance="evil", address="tcp://127.0.0.1:666")
#: The body of ROUTE's registration.
BODY = msgspec.json.encode(Registration(route=ROUTE, lock=lock_of("key")))


def port_in(url: str) -> int:
    return int(url.rpartition(":")[2])


class Listener:
    """An attacker's: it keeps what it is sent, and answers like a registry that does not know the secret."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, str, CIMultiDict[str], bytes]] = []
        self.app = web.Application()
        self.app.router.add_route("*", "/{tail:.*}", self._answer)

    async def _answer(self, http: web.Request) -> web.Response:
        self.heard.append((http.method, http.path_qs, CIMultiDict(http.headers), await http.read()))
        topology = {"group": "g", "sizes": Sizes(), "ranks": [NEWCOMER]}
        return web.Response(body=msgspec.json.encode(topology), content_type="application/json")


async def send(url: str, method: str, path: str, headers: CIMultiDict[str], body: bytes) -> int:
    async with (
        aiohttp.ClientSession() as session,
        session.request(method, url + path, headers=headers, data=body or None) as response,
    ):
        return response.status


@asynccontextmanager
async def decode(**arguments: object) -> AsyncIterator[tuple[ScriptedEngine, str]]:
    engine = ScriptedEngine(lambda _request: spell("hi"))
    config = ApiConfig(model="m", max_positions=64, mode="decode", **arguments)  # type: ignore[arg-type]
    async with RegistryClient(secret=SECRET, attempts=1) as client:
        server = ApiServer(engine, CharacterTokenizer(), config, registry=client, secret=SECRET)
        async with serving(server.app) as url:
            yield engine, url


async def ask(url: str, registry_port: int, host: str = "127.0.0.1", **more: object) -> tuple[int, str]:
    body = {"prompt": "x", "bootstrap_room": 7, "bootstrap_host": host, "bootstrap_port": registry_port, **more}
    headers = {ROUTER_HEADER: token_of(SECRET, "router", audience_of_url(url))}
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{url}/v1/completions", json=body, headers=headers) as response,
    ):
        return response.status, await response.text()


# ---- a router's token alone


def test_a_token_that_was_lured_away_opens_no_registry() -> None:
    async def test() -> None:
        listener = Listener()
        registry = Registry(own=[ROUTE])
        names = ServerNames.of("127.0.0.1", "prefill.example")
        async with (
            serving(registry_app(registry, secret=SECRET, names=names)) as real,
            serving(listener.app) as lure,
            decode() as (engine, url),
        ):
            status, text = await ask(url, port_in(lure))
            assert (status, "does not prove" in text) == (503, True)
            assert not engine.requests, "nothing that the attacker names is dialled"
            method, path, headers, body = listener.heard[0]
            assert SECRET not in str(headers)
            for host in (
                headers["Host"],
                f"127.0.0.1:{port_in(real)}",
                f"prefill.example:{port_in(real)}",
                "127.0.0.1",
            ):
                headers["Host"] = host
                assert await send(real, method, path, headers, body) == 401, host
            assert (await ask(url, port_in(real)))[0] == 200
            assert engine.requests[0].sources == (ROUTE.address,)

    run(test())


def test_a_token_is_for_the_name_and_port_that_it_was_made_for() -> None:
    names = ServerNames.of("prefill.example", "10.0.0.9", allowed=["proxy.example:7000", "other.example"])
    here = ("10.0.0.1", 8998)
    for good in (
        "10.0.0.1:8998",
        "prefill.example:8998",
        "Prefill.Example:8998",
        "10.0.0.9:8998",
        "proxy.example:7000",
    ):
        assert names.is_audience(good, here), good
    assert names.is_audience("other.example:8998", here)
    assert ServerNames.of("::").is_audience("10.0.0.1:8998", ("::ffff:10.0.0.1", 8998))
    for bad in (
        "10.0.0.1:8999",
        "10.0.0.2:8998",
        "127.0.0.1:8998",
        "localhost:8998",
        "[::1]:8998",
        "proxy.example:8998",
        "other.example:7000",
        "evil.example:8998",
        "",
    ):
        assert not names.is_audience(bad, here), bad
    assert not ServerNames.of("127.0.0.1").is_audience("127.0.0.2:8998", ("127.0.0.1", 8998))


def test_a_registry_under_another_name_says_what_to_do() -> None:
    async def test() -> None:
        async with (
            serving(registry_app(Registry(own=[ROUTE]), secret=SECRET)) as url,
            aiohttp.ClientSession() as session,
        ):
            audience = f"localhost.localdomain:{port_in(url)}"
            headers = {"Host": audience, **bearer(SECRET, "look-up", audience)}
            async with session.get(f"{url}/route", headers=headers) as response:
                assert response.status == 401
            names = ServerNames.of("0.0.0.0", allowed=["other.example"])
        async with serving(registry_app(Registry(own=[ROUTE]), secret=SECRET, names=names)) as url:
            for host, status in (("other.example", 200), ("127.0.0.1", 200)):
                audience = f"{host}:{port_in(url)}"
                headers = CIMultiDict({"Host": audience, **bearer(SECRET, "look-up", audience)})
                assert await send(url, "GET", "/route", headers, b"") == status

    run(test())


@pytest.mark.parametrize(
    ("allow", "address", "good"),
    [
        ((), "tcp://127.0.0.1:9", True),
        (("127.0.0.1",), "tcp://127.0.0.1:9", True),
        (("127.0.0.1",), "tcp://10.0.0.7:9", False),
        (("127.0.0.1", "10.0.0.7"), "tcp://10.0.0.7:9", True),
        (("127.0.0.1", "10.0.0.7:8998"), "tcp://10.0.0.7:9", True),
        (("localhost",), "tcp://127.0.0.1:9", True),
    ],
)
def test_an_address_that_a_registry_names_is_dialled_only_if_it_is_allowed(
    allow: tuple[str, ...], address: str, good: bool
) -> None:
    async def test() -> None:
        route = msgspec.structs.replace(ROUTE, address=address)
        async with (
            serving(registry_app(Registry(own=[route]), secret=SECRET)) as real,
            decode(bootstrap_allow=AllowList.parse(allow)) as (engine, url),
        ):
            host = "localhost" if allow == ("localhost",) else "127.0.0.1"
            status, text = await ask(url, port_in(real), host)
            assert (status, bool(engine.requests)) == ((200, True) if good else (503, False)), text
            assert good or "allow-list" in text

    run(test())


@pytest.mark.parametrize(
    ("allow", "host", "source", "param"),
    [
        ((), "127.0.0.1", "tcp://127.0.0.1:9", ""),
        ((), "10.0.0.7", "tcp://127.0.0.1:9", "bootstrap_host"),
        (("127.0.0.1",), "10.0.0.7", "tcp://10.0.0.7:9", "bootstrap_host"),
        (("127.0.0.1",), "127.0.0.1", "tcp://10.0.0.7:9", "kvbaton_journal"),
        (("127.0.0.1", "10.0.0.7"), "127.0.0.1", "tcp://10.0.0.7:9", ""),
        (("127.0.0.1",), "127.0.0.1", "ipc:///tmp/x", "kvbaton_journal"),
    ],
)
def test_who_hands_an_answer_over_is_dialled_only_if_he_is_allowed(
    allow: tuple[str, ...], host: str, source: str, param: str
) -> None:
    async def test() -> None:
        journal = {"id": "x", "created": 1, "seed": 1, "sources": [source]}
        async with decode(bootstrap_allow=AllowList.parse(allow)) as (engine, url):
            status, text = await ask(url, 8998, host, kvbaton_journal=journal)
            assert (status, bool(engine.requests)) == ((400, False) if param else (200, True)), text
            assert not param or msgspec.json.decode(text)["error"]["param"] == param

    run(test())


# ---- a registry's token alone


def test_register_and_look_up_are_separate_doors() -> None:
    async def test() -> None:
        async with serving(registry_app(Registry(own=[ROUTE]), secret=SECRET)) as url:
            audience = f"127.0.0.1:{port_in(url)}"
            body = msgspec.json.encode(NEWCOMER)
            for headers in (
                bearer(SECRET, "look-up", audience),
                bearer(SECRET, "register", audience),  # without the code over the content
                {"Authorization": f"Bearer {SECRET}"},
            ):
                made = CIMultiDict({**headers, "Content-Type": "application/json"})
                assert await send(url, "PUT", "/route", made, body) == 401
                assert await send(url, "DELETE", "/route?instance=i1", made, b"") == 401
            for door in ("register", "router", "story"):
                shown = CIMultiDict(bearer(SECRET, door, audience))  # type: ignore[arg-type]
                assert await send(url, "GET", "/route", shown, b"") == 401
            assert await send(url, "GET", "/route", CIMultiDict(bearer(SECRET, "look-up", audience)), b"") == 200

    run(test())


async def time_of(url: str) -> str:
    """The registry's time, as one who may look up gets it."""
    audience = f"127.0.0.1:{port_in(url)}"
    async with (
        aiohttp.ClientSession() as session,
        session.get(url + TIME_PATH, headers=bearer(SECRET, "look-up", audience)) as response,
    ):
        told: str = (await response.json())["time"]
        return told


def registration(
    url: str, told: str, *, nonce: str = "n", method: str = "PUT", path: str = "/route"
) -> CIMultiDict[str]:
    """The headers of a rank's message to the registry at ``url``, as somebody overhears them."""
    audience = f"127.0.0.1:{port_in(url)}"
    body = BODY if method == "PUT" else b""
    asked = Asked(secret=SECRET, audience=audience, method=method, path=path, nonce=nonce)
    return CIMultiDict({**asked.headers(told, body), "Content-Type": JSON})


def test_an_overheard_registration_is_good_for_nothing_else() -> None:
    """Neither with other content, nor as a withdrawal, nor at another registry."""

    async def test() -> None:
        registry, other = Registry(), Registry()
        async with (
            serving(registry_app(registry, secret=SECRET)) as real,
            serving(registry_app(other, secret=SECRET)) as second,
        ):
            overheard = registration(real, await time_of(real))
            whole = msgspec.json.decode(BODY)
            changed = {"http_port": 1, "coordinates": {"tp": 1}, "sizes": {"tp": 2}, "load_balance": "round_robin"}
            for name in ROUTE.__struct_fields__:
                route = {**whole["route"], name: changed.get(name, "tcp://127.0.0.1:666")}
                assert (
                    await send(real, "PUT", "/route", overheard, msgspec.json.encode({**whole, "route": route})) == 401
                )
            body = msgspec.json.encode({**whole, "lock": lock_of("mine")})
            assert await send(real, "PUT", "/route", overheard, body) == 401
            for header in (TIME_HEADER, NONCE_HEADER):
                changed_headers = CIMultiDict({**overheard, header: await time_of(real)})
                assert await send(real, "PUT", "/route", changed_headers, BODY) == 401, header
            assert await send(real, "DELETE", "/route?instance=i1", overheard, b"") == 401
            assert await send(real, "PUT", "/route?more=1", overheard, BODY) == 401
            for host in (f"127.0.0.1:{port_in(real)}", f"127.0.0.1:{port_in(second)}"):
                overheard["Host"] = host
                assert await send(second, "PUT", "/route", overheard, BODY) == 401, host
            del overheard["Host"]
            assert await send(real, "PUT", "/route", overheard, BODY) == 200
            assert (len(registry), len(other)) == (1, 0)

    run(test())


def test_a_registration_counts_once() -> None:
    """One that was overheard keeps nothing of a rank that has ended."""

    async def test() -> None:
        now = 0.0
        registry = Registry()
        async with serving(registry_app(registry, secret=SECRET, clock=lambda: now)) as url:
            overheard = registration(url, await time_of(url))
            assert await send(url, "PUT", "/route", overheard, BODY) == 200
            for later in (FRESH_SECONDS / 2, FRESH_SECONDS, TTL_SECONDS - 1.0):
                now = later
                assert await send(url, "PUT", "/route", overheard, BODY) == 503
            with pytest.raises(RegistryError, match="no prefill rank is registered"):
                registry.lookup(TTL_SECONDS)

            again = registration(url, await time_of(url), nonce="another")
            assert await send(url, "PUT", "/route", again, BODY) == 200
            path = "/route?instance=i1&key=key"
            withdrawal = registration(url, await time_of(url), method="DELETE", path=path)
            assert await send(url, "DELETE", path, withdrawal, b"") == 200
            for headers, method, where, body in ((again, "PUT", "/route", BODY), (withdrawal, "DELETE", path, b"")):
                assert await send(url, method, where, headers, body) == 503
            assert len(registry) == 0, "nobody brings back a rank that has withdrawn"

    run(test())


def test_a_registration_names_the_time_of_the_registry_it_is_for() -> None:
    """Nothing that was made for a registry before its restart, too long ago or ahead of time counts."""

    async def test() -> None:
        now = 100.0
        registry = Registry()
        async with (
            serving(registry_app(Registry(), secret=SECRET)) as before,
            serving(registry_app(registry, secret=SECRET, clock=lambda: now)) as url,
        ):
            told = await time_of(url)
            epoch, _, at = told.partition(".")
            ahead = f"{epoch}.{int(at) + 1_000_000}"
            for wrong in ("", "x", epoch, f"{epoch}.", f"{epoch}.-1", f"{epoch}.1e9", ahead, await time_of(before)):
                assert await send(url, "PUT", "/route", registration(url, wrong), BODY) == 503, wrong
            now += FRESH_SECONDS
            assert await send(url, "PUT", "/route", registration(url, told), BODY) == 503
            assert len(registry) == 0
            assert await send(url, "PUT", "/route", registration(url, await time_of(url)), BODY) == 200

    run(test())


def test_who_lures_a_registration_away_gets_none() -> None:
    async def test() -> None:
        listener = Listener()
        async with serving(listener.app) as lure, RegistryClient(secret=SECRET, attempts=1) as client:
            with pytest.raises(RegistryError, match="does not prove"):
                await client.register("127.0.0.1", port_in(lure), ROUTE)
        assert [(method, body) for method, _, _, body in listener.heard] == [("GET", b"")]

    run(test())


@pytest.mark.parametrize("secret", [None, SECRET])
def test_only_who_registered_a_rank_withdraws_or_refreshes_it(secret: str | None) -> None:
    async def test() -> None:
        now = 0.0
        registry = Registry()
        async with (
            serving(registry_app(registry, secret=secret, clock=lambda: now)) as url,
            RegistryClient(secret=secret, attempts=1) as rank,
            RegistryClient(secret=secret, attempts=1) as other,
        ):
            here = ("127.0.0.1", port_in(url))
            strange = msgspec.structs.replace(ROUTE, instance="i%/?#&=+;'\"\\~")
            for route in (ROUTE, strange):
                await rank.register(*here, route)
                await other.unregister(*here, route.instance)
                with pytest.raises(RegistryError, match="is held by instance"):
                    await other.register(*here, route)
                assert registry.lookup(now).ranks == (route,)
                await rank.unregister(*here, route.instance)
                assert len(registry) == 0

    run(test())


def test_an_answer_is_proven_and_cannot_be_repeated() -> None:
    """A listener that has a true answer of the registry, to another question, is not believed."""

    async def test() -> None:
        async with (
            serving(registry_app(Registry(own=[ROUTE]), secret=SECRET)) as real,
            aiohttp.ClientSession() as session,
        ):
            audience = f"127.0.0.1:{port_in(real)}"
            headers = {**bearer(SECRET, "look-up", audience), "X-KVBaton-Nonce": "one"}
            async with session.get(f"{real}/route", headers=headers) as response:
                proof, payload = response.headers["X-KVBaton-MAC"], await response.read()
            async with session.get(f"{real}/route", headers={**headers, "X-KVBaton-Nonce": "two"}) as response:
                assert response.headers["X-KVBaton-MAC"] != proof

            async def repeat(_http: web.Request) -> web.Response:
                return web.Response(body=payload, headers={"X-KVBaton-MAC": proof}, content_type="application/json")

            app = web.Application()
            app.router.add_get("/route", repeat)
            async with serving(app) as lure, RegistryClient(secret=SECRET, attempts=1) as client:
                with pytest.raises(RegistryError, match="does not prove"):
                    await client.topology("127.0.0.1", port_in(lure))

    run(test())


# ---- a living rank's place


@pytest.mark.parametrize("secret", [None, SECRET])
def test_nobody_takes_the_place_of_a_rank_of_the_servers_own_process(secret: str | None) -> None:
    async def test() -> None:
        registry = Registry(own=[ROUTE])
        async with serving(registry_app(registry, secret=secret)) as url, RegistryClient(secret=secret) as client:
            here = ("127.0.0.1", port_in(url))
            with pytest.raises(LocalProtocolError, match="a rank of the process"):
                await client.register(*here, NEWCOMER)
            with pytest.raises(LocalProtocolError, match="a rank of the process"):  # its instance, another address
                await client.register(*here, msgspec.structs.replace(NEWCOMER, instance="i1"))
            for other in (
                msgspec.structs.replace(NEWCOMER, group="newer"),
                msgspec.structs.replace(NEWCOMER, group="i1 elsewhere".replace(" ", "-"), instance="i1"),
            ):
                await client.register(*here, other)
            await client.unregister(*here, "i1")
            with pytest.raises(LocalProtocolError, match="a rank of the process"):  # as it is, but with another's key
                await client.register(*here, ROUTE)
            assert (await client.topology(*here)).ranks == (ROUTE,)

    run(test())


def test_own_ranks_stay_however_long_it_takes() -> None:
    registry = Registry(own=[ROUTE])
    registry.register(msgspec.structs.replace(NEWCOMER, group="newer"), 0.0)
    assert registry.lookup(1e12).ranks == (ROUTE,)
    assert len(registry) == 1


def test_a_group_of_which_some_ranks_are_here_waits_for_the_others() -> None:
    first = msgspec.structs.replace(ROUTE, sizes=Sizes(tp=2))
    second = msgspec.structs.replace(first, instance="i2", coordinates=RegistryCoordinates(tp=1))
    registry = Registry(own=[first])
    registry.register(msgspec.structs.replace(NEWCOMER, group="newer"), 0.0)
    with pytest.raises(RegistryError, match="missing"):
        registry.lookup(0.0)
    registry.register(second, 0.0)
    assert registry.lookup(0.0).ranks == (first, second)


def test_own_ranks_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError):
        Registry(own=[msgspec.structs.replace(ROUTE, coordinates=RegistryCoordinates(tp=5))])


def test_a_wrong_secret_is_still_told_apart() -> None:
    async def test() -> None:
        async with serving(registry_app(Registry(own=[ROUTE]), secret=SECRET)) as url:
            async with RegistryClient(secret="another secret, just as long", attempts=1) as client:
                with pytest.raises(AuthenticationError, match="not this deployment's"):
                    await client.topology("127.0.0.1", port_in(url))
            await asyncio.sleep(0)

    run(test())


# ---- a worker's token alone


@pytest.mark.parametrize("door", ["router", "story"])
def test_a_workers_token_opens_no_other_worker(door: Door) -> None:
    """Whoever listens at the port of a worker that is gone gets tokens; they are for that port."""

    async def status(url: str, host: str, token: str) -> int:
        path, header = ("/abort_request", ROUTER_HEADER) if door == "router" else ("/layout", "Authorization")
        headers = {"Host": host, header: token if door == "router" else f"Bearer {token}", "Content-Type": JSON}
        body = msgspec.json.encode({"rid": "0123456789abcdef0123456789abcdef"}) if door == "router" else b""
        return await send(url, "POST" if door == "router" else "GET", path, CIMultiDict(headers), body)

    async def test() -> None:
        good = 200 if door == "router" else 400  # this one has no layout to show
        async with decode() as (_, gone), decode() as (_, url):
            theirs, ours = audience_of_url(gone), audience_of_url(url)
            for host in (theirs, ours):
                assert await status(url, host, token_of(SECRET, door, theirs)) == 401, host
            assert await status(url, ours, token_of(SECRET, door, ours)) == good
            assert await status(url, theirs, SECRET) == good, "who has the secret itself needs no name"

    run(test())


def test_a_router_shows_each_worker_a_token_for_it_alone() -> None:
    async def test() -> None:
        one, two = Listener(), Listener()
        async with serving(one.app) as prefill, serving(two.app) as decoding:
            config = RouterConfig(workers=(Worker("prefill", prefill, 8998), Worker("decode", decoding)), secret=SECRET)
            router = Router(config)
            async with serving(router.app) as url, aiohttp.ClientSession() as session:
                await router.workers.probe_all()
                operator = {"Authorization": f"Bearer {SECRET}"}
                async with (
                    session.post(f"{url}/v1/completions", json={"prompt": "x"}) as answer,
                    session.get(f"{url}/story/7", headers=operator) as story,
                ):
                    assert (answer.status, story.status) == (200, 404)
            for listener, place in ((one, prefill), (two, decoding)):
                shown = [headers for _, path, headers, _ in listener.heard if path != "/ready"]
                routed = {headers[ROUTER_HEADER] for headers in shown if ROUTER_HEADER in headers}
                asked = {headers["Authorization"] for headers in shown if "Authorization" in headers}
                assert routed == {token_of(SECRET, "router", audience_of_url(place))}
                assert asked == {f"Bearer {token_of(SECRET, 'story', audience_of_url(place))}"}

    run(test())


def test_a_probe_by_address_needs_no_allowed_name() -> None:
    """A list of names makes a server beyond loopback check them; probes ask by its address."""
    names = ServerNames.of("0.0.0.0", allowed=["decode.example"])
    for host in ("decode.example:30000", "10.0.0.7:30000", "127.0.0.1"):
        names.check(host, None, here="10.0.0.7")
    for host in ("10.0.0.8:30000", "evil.example", ""):
        with pytest.raises(AuthenticationError, match="is no name of this server"):
            names.check(host, None, here="10.0.0.7")
    with pytest.raises(AuthenticationError, match="is another site"):
        names.check("10.0.0.7:30000", "http://evil.example", here="10.0.0.7")
