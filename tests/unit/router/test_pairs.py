"""A router between servers that cannot work together: it says so before a request does."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import aiohttp
import pytest

from kvbaton.errors import PeerLostError
from kvbaton.layout import CacheLayout, Region, kv_pool, pool_bytes
from kvbaton.plan import identity
from kvbaton.plan.layout_file import RankLayout
from kvbaton.serving.router.router import Router, RouterConfig
from kvbaton.serving.router.worker import State, Worker
from kvbaton.serving.server.api import ApiServer
from kvbaton.serving.server.request_parsing import ApiConfig
from kvbaton.serving.testing.engine import CharacterTokenizer, ScriptedEngine, spell
from kvbaton.serving.testing.http import run, serving
from kvbaton.serving.testing.registry import one_rank

SECRET = "a secret of enough characters"
MODEL = {"weights": "w", "chat_template": "c"}


def memory(group: str, **changes: object) -> RankLayout:
    model = identity.encode({**MODEL, **{name: changes.pop(name) for name in MODEL if name in changes}})
    settings = {"pages": 8, "page_size": 16, "heads": 4, "head_bytes": 64, "dtype": "float32", **changes}
    pool = kv_pool(range(2), **settings)  # type: ignore[arg-type]
    return RankLayout(layout=CacheLayout(model, (Region(1 << 40, pool_bytes(pool)),), (pool,)), group=group)


class Deployment:
    """One prefill server with its registry, decode servers, a router."""

    def __init__(self) -> None:
        self.closing = AsyncExitStack()
        self.bootstrap_port = 0
        self.workers: list[Worker] = []
        self.router: Router
        self.url = ""
        self.session: aiohttp.ClientSession

    async def add(
        self, mode: str, number: int = 0, *, given_as: str = "", secret: str | None = None, **changes
    ) -> None:
        name = f"{mode}{number}"
        client, port = await self.closing.enter_async_context(one_rank(name, secret))
        if mode == "prefill":
            self.bootstrap_port = port
        server = ApiServer(
            ScriptedEngine(lambda _request: spell("hello")),
            CharacterTokenizer(),
            ApiConfig(model=changes.pop("model", "m"), max_positions=changes.pop("max_positions", 100), mode=mode),
            registry=client if mode == "decode" else None,
            layouts=[memory(name, **changes)],
            instance=name,
            secret=secret,
        )
        url = await self.closing.enter_async_context(serving(server.app))
        self.workers.append(Worker(given_as or mode, url))

    async def start(self, **config: object) -> None:
        for worker in self.workers:
            worker.bootstrap_port = self.bootstrap_port
        self.router = Router(RouterConfig(workers=tuple(self.workers), health_check_interval_secs=60.0, **config))
        self.url = await self.closing.enter_async_context(serving(self.router.app))
        self.session = await self.closing.enter_async_context(aiohttp.ClientSession())
        await self.router.workers.probe_all()

    async def ready(self) -> str:
        async with self.session.get(f"{self.url}/ready") as response:
            body = await response.json()
            assert (response.status == 200) == body["ready"]
            return body["reason"]

    async def ask(self) -> tuple[int, dict]:
        async with self.session.post(f"{self.url}/v1/completions", json={"prompt": "x"}) as response:
            return response.status, await response.json()


@asynccontextmanager
async def deployment() -> AsyncIterator[Deployment]:
    one = Deployment()
    async with one.closing:
        yield one


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "bfloat16"}, "dtype"),
        ({"weights": "others"}, "weights"),
        ({"chat_template": "another"}, "chat_template"),
        ({"max_positions": 99}, "max_model_len: prefill has 100, decode 99"),
    ],
)
def test_servers_that_do_not_fit_are_told_before_a_request_is_sent_there(changes, message, caplog) -> None:
    async def test() -> None:
        async with deployment() as one:
            await one.add("prefill")
            await one.add("decode", **changes)
            await one.start()
            reason = await one.ready()
            assert message in reason
            assert f"prefill {one.workers[0].url} and decode {one.workers[1].url} cannot hand over" in reason
            status, body = await one.ask()
            assert status == 503
            assert message in body["error"]["message"]
            for _ in range(3):
                await one.router.workers.probe_all()
            warnings = [record for record in caplog.records if record.levelno >= logging.WARNING]
            assert ["cannot hand over" in record.message for record in warnings] == [True]

    run(test())


def test_one_pair_that_fits_is_enough_and_takes_every_request() -> None:
    async def test() -> None:
        async with deployment() as one:
            await one.add("prefill")
            await one.add("decode", 0, dtype="bfloat16")
            await one.add("decode", 1)
            await one.start()
            assert await one.ready() == ""
            for _ in range(4):
                assert (await one.ask())[0] == 200
            assert [worker.url for worker in one.router.workers.usable("decode")] == [w.url for w in one.workers[1:]]

    run(test())


def test_a_registry_that_decode_does_not_find_is_told_and_found_again() -> None:
    async def test() -> None:
        async with deployment() as one:
            await one.add("prefill")
            await one.add("decode")
            right, one.bootstrap_port = one.bootstrap_port, 9
            await one.start()
            assert "bootstrap registry at 127.0.0.1:9 cannot be reached" in await one.ready()
            one.workers[0].bootstrap_port = right
            one.workers[0].instance = ""  # as a restart with the right port
            await one.router.workers.probe_all()
            one.router.workers._pairs._verdicts.clear()
            await one.router.workers.probe_all()
            assert await one.ready() == ""

    run(test())


@pytest.mark.parametrize(
    ("secrets", "message"),
    [
        ((SECRET, SECRET, None), "it does not take this router's secret"),
        ((SECRET, SECRET, "another secret of enough characters"), "it does not take this router's secret"),
        ((SECRET, None, SECRET), "does not let us in"),
        ((None, SECRET, SECRET), "does not prove that it knows"),
        ((SECRET, SECRET, SECRET), ""),
    ],
)
def test_a_secret_that_is_missing_or_wrong_keeps_the_router_from_being_ready(secrets, message) -> None:
    async def test() -> None:
        async with deployment() as one:
            await one.add("prefill", secret=secrets[0])
            await one.add("decode", secret=secrets[1])
            await one.start(secret=secrets[2])
            reason = await one.ready()
            assert bool(reason) == bool(message)
            troubles = [reason, *(worker.trouble for worker in one.workers)]
            assert any(message in trouble for trouble in troubles), troubles
            assert (await one.ask())[0] == (503 if message else 200)

    run(test())


def test_swapped_roles_are_told_and_used_for_nothing() -> None:
    async def test() -> None:
        async with deployment() as one:
            await one.add("prefill", given_as="decode")
            await one.add("decode", given_as="prefill")
            await one.start()
            assert [worker.state for worker in one.workers] == [State.UNFIT] * 2
            assert "it is a prefill server; name it with --prefill" in one.workers[0].trouble
            assert (await one.ask())[0] == 503

    run(test())


def test_what_a_process_was_asked_is_lost_when_another_one_has_its_address() -> None:
    async def test() -> None:
        async with deployment() as one:
            await one.add("prefill")
            await one.add("decode")
            await one.start()
            worker = one.workers[1]
            worker.instance = "the one before"  # as before a restart between two probes
            with pytest.raises(PeerLostError, match="another process is at its address"):
                async with worker.leg():
                    await one.router.workers.probe_all()
            await one.router.workers.probe_all()
            assert worker.usable

    run(test())


def test_a_decode_server_with_another_name_for_the_model_is_left_out_also_where_it_is_named_first() -> None:
    """A request that names the model is refused by none of those that are asked."""

    async def test() -> None:
        async with deployment() as one:
            await one.add("prefill", model="/anywhere/m")
            await one.add("decode", 0, model="other")
            await one.add("decode", 1)
            await one.add("decode", 2)
            await one.start()
            await one.router.workers.probe_all()
            other = one.workers[1]
            assert other.state is State.UNFIT
            assert "it serves the model 'other', and other decode servers here 'm'" in other.trouble
            for _ in range(4):
                asked = {"prompt": "x", "model": "m"}
                async with one.session.post(f"{one.url}/v1/completions", json=asked) as response:
                    assert response.status == 200

    run(test())
