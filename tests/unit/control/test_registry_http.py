"""The registry over real HTTP: routes, secrets, the client's retries, its cache and its endless registration."""

import asyncio

import aiohttp
import pytest
from aiohttp import web

from kvbaton.discovery.access import bearer, bearer_matches, is_loopback, read_secret, token_of
from kvbaton.discovery.client import CACHE_SECONDS, FIRST_PAUSE_SECONDS, RegistryClient
from kvbaton.discovery.registry import TTL_SECONDS, Registered, Registry, Route, Sizes
from kvbaton.discovery.server import MAX_ROUTE_BYTES, registry_app, start_registry
from kvbaton.errors import AuthenticationError, ConfigError, RegistryError
from kvbaton.serving.server.lifecycle import port_of, reserve
from kvbaton.serving.testing.http import run, serving

SECRET = "a secret of enough characters"
HERE = "127.0.0.1:8998"
ROUTE = Route(instance="i1", group="g", address="tcp://127.0.0.1:41000", layout_digest="d", http_port=30000)


class Sleeps:
    """Pauses that take no time and are remembered."""

    def __init__(self) -> None:
        self.taken: list[float] = []

    async def __call__(self, seconds: float) -> None:
        self.taken.append(seconds)
        await asyncio.sleep(0)


def port_in(url: str) -> int:
    return int(url.rpartition(":")[2])


def free_port() -> int:
    with reserve("127.0.0.1", 0) as bound:
        return port_of(bound)


def test_register_then_look_up():
    async def test() -> None:
        async with serving(registry_app(Registry())) as url, RegistryClient(sleep=Sleeps()) as client:
            port = port_in(url)
            await client.register("127.0.0.1", port, ROUTE)
            assert await client.sources("127.0.0.1", port, 7) == ("tcp://127.0.0.1:41000",)
            assert (await client.topology("localhost", port)).ranks == (ROUTE,)
            await client.unregister("127.0.0.1", port, "i1")
            client.invalidate("127.0.0.1", port)
            with pytest.raises(RegistryError, match="no prefill rank is registered"):
                await client.sources("127.0.0.1", port, 7)

    run(test())


def test_an_incomplete_group_is_503_and_says_what_is_missing():
    async def test() -> None:
        sleeps = Sleeps()
        async with serving(registry_app(Registry())) as url, RegistryClient(sleep=sleeps, attempts=3) as client:
            half = Route(**_fields(sizes=Sizes(tp=2)))
            await client.register("127.0.0.1", port_in(url), half)
            async with aiohttp.ClientSession() as session, session.get(f"{url}/route") as response:
                assert response.status == 503
                assert response.headers["Retry-After"] == "1"
                assert "missing dp0.pp0.cp0.tp1" in (await response.json())["error"]["message"]
            with pytest.raises(RegistryError, match=rf"127.0.0.1:{port_in(url)} answered HTTP 503.*tp1.*3 attempts"):
                await client.sources("127.0.0.1", port_in(url), 7)
            assert sleeps.taken == [FIRST_PAUSE_SECONDS, 2 * FIRST_PAUSE_SECONDS]

    run(test())


def _fields(**changes: object) -> dict[str, object]:
    fields = {name: getattr(ROUTE, name) for name in ROUTE.__struct_fields__}
    return {**fields, **changes}


def test_nobody_listening_is_an_error_that_names_host_and_port():
    async def test() -> None:
        port = free_port()
        async with RegistryClient(sleep=Sleeps(), attempts=2) as client:
            with pytest.raises(RegistryError, match=rf"127\.0\.0\.1:{port} cannot be reached.*2 attempts") as caught:
                await client.sources("127.0.0.1", port, 7)
            assert caught.value.peer == f"127.0.0.1:{port}"

    run(test())


def test_a_silent_registry_runs_into_the_timeout():
    async def test() -> None:
        gone = asyncio.Event()

        async def swallow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read()
            writer.close()
            await writer.wait_closed()
            gone.set()

        server = await asyncio.start_server(swallow, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with server:
            async with RegistryClient(sleep=Sleeps(), attempts=1, timeout_seconds=0.05) as client:
                with pytest.raises(RegistryError, match=r"did not answer within 0\.05 s"):
                    await client.sources("127.0.0.1", port, 7)
            await gone.wait()

    run(test())


def test_a_registry_that_does_not_answer_costs_everybody_who_asks_the_same_moment():
    """They used to wait one after the other, each for all attempts: only success was shared."""

    async def test() -> None:
        asked = 0

        async def hang(_request: web.Request) -> web.Response:
            nonlocal asked
            asked += 1
            await asyncio.Event().wait()
            raise AssertionError("unreachable")

        app = web.Application()
        app.router.add_get("/route", hang)
        async with serving(app) as url, RegistryClient(attempts=100, lookup_seconds=0.2) as client:
            looking = [client.topology("127.0.0.1", port_in(url)) for _ in range(8)]
            began = asyncio.get_running_loop().time()
            outcomes = await asyncio.gather(*looking, return_exceptions=True)
            assert asyncio.get_running_loop().time() - began < 8 * 0.2
            assert asked == 1
            assert len({id(outcome) for outcome in outcomes}) == 8
            for outcome in outcomes:
                assert isinstance(outcome, RegistryError)
                assert f"127.0.0.1:{port_in(url)} did not answer within 0.2 s" in outcome.message
            with pytest.raises(RegistryError):  # the next one asks anew
                await client.topology("127.0.0.1", port_in(url))
            assert asked == 2

    run(test())


def test_every_route_but_health_needs_the_secret():
    async def test() -> None:
        async with serving(registry_app(Registry(), secret=SECRET)) as url, aiohttp.ClientSession() as session:
            for headers, status in [
                ({}, 401),
                ({"Authorization": "Bearer wrong"}, 401),
                ({"Authorization": f"Basic {SECRET}"}, 401),
                ({"Authorization": f"Bearer {SECRET}"}, 503),
            ]:
                async with session.get(f"{url}/route", headers=headers) as response:
                    assert response.status == status, headers
            async with session.get(f"{url}/health") as response:
                assert response.status == 200

            port = port_in(url)
            async with RegistryClient(secret=SECRET) as client:
                await client.register("127.0.0.1", port, ROUTE)
                assert await client.sources("127.0.0.1", port, 7) == (ROUTE.address,)
            sleeps = Sleeps()
            async with RegistryClient(secret="another secret altogether", sleep=sleeps) as client:
                with pytest.raises(AuthenticationError, match="not this deployment's"):
                    await client.register("127.0.0.1", port, ROUTE)
            assert not sleeps.taken  # a retry would not help

    run(test())


def test_garbage_is_400_and_too_much_of_it_413():
    async def test() -> None:
        async with serving(registry_app(Registry())) as url, aiohttp.ClientSession() as session:
            for body, status in [
                (b"", 400),
                (b"nonsense", 400),
                (b"\xff\xfe", 400),
                (b"x" * (MAX_ROUTE_BYTES + 1), 413),
            ]:
                async with session.put(
                    f"{url}/route", data=body, headers={"Content-Type": "application/json"}
                ) as response:
                    assert response.status == status
                    assert (await response.json())["error"]["message"]
            async with session.delete(f"{url}/route") as response:
                assert response.status == 400
            async with session.post(f"{url}/route") as response:
                assert response.status == 405

    run(test())


def test_a_restarted_rank_waits_until_its_place_is_free():
    async def test() -> None:
        now = 0.0
        app = registry_app(Registry(), clock=lambda: now)
        async with serving(app) as url, RegistryClient(sleep=Sleeps(), attempts=1) as client:
            port, newer = port_in(url), Route(**_fields(instance="i2"))
            await client.register("127.0.0.1", port, ROUTE)
            with pytest.raises(RegistryError, match="is held by instance i1"):
                await client.register("127.0.0.1", port, newer)
            registered = asyncio.Event()
            trying = asyncio.create_task(
                client.register_forever("127.0.0.1", port, newer, registered=lambda _: registered.set())
            )
            await asyncio.sleep(0.05)
            assert not registered.is_set()
            now = TTL_SECONDS
            await asyncio.wait_for(registered.wait(), 5)
            trying.cancel()
            assert (await client.topology("127.0.0.1", port)).ranks == (newer,)

    run(test())


def test_registering_forever_survives_a_registry_that_restarts():
    async def test() -> None:
        port, answers = free_port(), asyncio.Queue()
        async with RegistryClient(sleep=Sleeps(), attempts=1) as client:
            task = asyncio.create_task(
                client.register_forever("127.0.0.1", port, ROUTE, registered=answers.put_nowait)  # nobody there yet
            )
            for _ in range(2):
                registry = Registry()
                async with serving(registry_app(registry), port=port):
                    while not answers.empty():
                        answers.get_nowait()
                    assert isinstance(await answers.get(), Registered)
                    assert len(registry) == 1
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    run(test())


def test_lookups_are_cached_for_a_moment_and_forgotten_on_demand():
    async def test() -> None:
        registry, now = Registry(), [0.0]
        app = registry_app(registry, clock=lambda: 0.0)
        async with serving(app) as url, RegistryClient(clock=lambda: now[0]) as client:
            port = port_in(url)
            await client.register("127.0.0.1", port, ROUTE)
            first = await client.topology("127.0.0.1", port)
            await client.unregister("127.0.0.1", port, "i1")
            registry.register(Route(**_fields(instance="i2", address="tcp://127.0.0.1:42000")), 0.0)
            assert await client.topology("127.0.0.1", port) is first
            now[0] = CACHE_SECONDS
            assert (await client.sources("127.0.0.1", port, 7)) == ("tcp://127.0.0.1:42000",)
            client.invalidate("127.0.0.1", port)
            assert not client._cache

    run(test())


def test_nothing_is_remembered_of_lookups_that_failed():
    async def test() -> None:
        async with RegistryClient(attempts=1, sleep=Sleeps()) as client:
            for port in (free_port(), free_port()):
                with pytest.raises(RegistryError):
                    await client.topology("127.0.0.1", port)
            assert not client._lookups
            assert not client._cache

    run(test())


@pytest.mark.parametrize(("host", "port"), [("a/b", 1), ("a b", 1), ("", 1), ("x", 0), ("x", 70000), ("x?y", 1)])
def test_what_is_no_address_is_refused_before_anything_is_sent(host: str, port: int):
    async def test() -> None:
        async with RegistryClient() as client:
            with pytest.raises(ConfigError, match="no address of a registry"):
                await client.sources(host, port, 7)

    run(test())


def test_a_redirect_is_not_followed():
    async def test() -> None:
        from aiohttp import web

        app = web.Application()

        async def elsewhere(_request: web.Request) -> web.Response:
            raise web.HTTPFound("http://127.0.0.1:1/secret")

        app.router.add_get("/route", elsewhere)
        async with serving(app) as url, RegistryClient(attempts=1) as client:
            with pytest.raises(RegistryError, match="answered HTTP 302, but not as a kvbaton registry"):
                await client.sources("127.0.0.1", port_in(url), 7)

    run(test())


def test_an_open_bind_needs_a_secret_and_a_used_port_is_named():
    async def test() -> None:
        app = registry_app(Registry())
        with pytest.raises(ConfigError, match=r"0\.0\.0\.0, which others can reach, without a shared secret"):
            await start_registry(app, host="0.0.0.0", port=0)
        async with serving(registry_app(Registry())) as url:
            with pytest.raises(ConfigError, match=rf"cannot listen at 127\.0\.0\.1:{port_in(url)}"):
                await start_registry(app, host="127.0.0.1", port=port_in(url))
        runner = await start_registry(registry_app(Registry()), host="127.0.0.1", port=0)
        await runner.cleanup()

    run(test())


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "[::1]", "localhost"])
def test_loopback(host: str):
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.com", "localhost.evil.com", ""])
def test_not_loopback(host: str):
    assert not is_loopback(host)


def test_bearer_tokens():
    for shown in (SECRET, token_of(SECRET, "look-up", HERE)):
        assert bearer_matches(f"Bearer {shown}", SECRET, "look-up", HERE)
        assert bearer_matches(f"bearer {shown}", SECRET, "look-up", HERE)
    for header in (None, "", "Bearer", f"Bearer {SECRET}x", SECRET, "Bearer \udcff"):
        assert not bearer_matches(header, SECRET, "look-up", HERE)
    assert not bearer_matches(f"Bearer {token_of(SECRET, 'router', HERE)}", SECRET, "look-up", HERE)


def test_the_secret_itself_never_travels():
    assert SECRET not in str(bearer(SECRET, "look-up", HERE))
    assert len({token_of(SECRET, door, HERE) for door in ("look-up", "register", "router", "story")}) == 4
    assert bearer(None, "look-up", HERE) == {}


def test_without_a_secret_a_rebound_name_gets_no_answer():
    """A page in a browser on this machine, whose name was re-bound to 127.0.0.1, is of another origin's making."""

    async def test() -> None:
        async with serving(registry_app(Registry())) as url, aiohttp.ClientSession() as session:
            for host, status in [
                ("evil.example", 401),
                ("evil.example:8998", 401),
                ("127.0.0.1.evil.example", 401),
                ("localhost.evil.example:1", 401),
                ("127.0.0.1", 503),
                ("localhost:8998", 503),
                ("[::1]:8998", 503),
            ]:
                async with session.get(f"{url}/route", headers={"Host": host}) as response:
                    assert response.status == status, host
            async with session.put(f"{url}/route", headers={"Host": "evil.example"}, json={}) as response:
                assert response.status == 401

    run(test())


def test_secret_files(tmp_path):
    path = tmp_path / "secret"
    with pytest.raises(ConfigError, match="cannot read"):
        read_secret(path)
    path.write_text("short\n")
    path.chmod(0o600)
    with pytest.raises(ConfigError, match="16 to 1024"):
        read_secret(path)
    path.write_text(f"  {SECRET}\n")
    assert read_secret(path) == SECRET
