"""A killed decode under load, with a second one beside it: no client notices more than a pause."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path

from kvbaton.serving.fleet import Fleet, Server, free_ports
from lab.failover.load import ask, expectations


def beside(server: Server, directory: Path, *more: str) -> Server:
    """Another server like that one, at a port of its own."""
    (port,) = free_ports(1)
    arguments = [str(port) if one == str(server.port) else one for one in server.arguments]
    name = f"{server.name}-beside"
    return dataclasses.replace(
        server, name=name, arguments=(*arguments, *more), port=port, log=directory / f"{name}.log", process=None
    )


def test_a_decode_killed_under_load_costs_no_answer(fleet: Fleet, runner: asyncio.Runner, tmp_path: Path) -> None:
    victim = beside(fleet.decodes[0], tmp_path)
    router = beside(fleet.router, tmp_path, "--decode", victim.url)

    async def scenario() -> None:
        assert fleet.reference is not None
        try:
            await victim.start()
            await fleet.ready(victim)
            await router.start()
            await fleet.ready(router)
            expected = await expectations(fleet.http, fleet.reference.url, max_tokens=40, count=12)
            asking = [
                asyncio.create_task(ask(fleet.http, router.url, one, stream=number % 2 == 0))
                for number, one in enumerate(expected)
            ]
            while not (await fleet.info(victim))["stats"]["running"]:
                assert not all(task.done() for task in asking)
            await victim.kill()
            for outcome in await asyncio.gather(*asking):
                assert not outcome.error
            async with fleet.http.get(f"{router.url}/metrics") as response:
                lines = (await response.text()).splitlines()
            (retries,) = (line for line in lines if line.startswith("kvbaton_router_retries_total "))
            assert float(retries.split()[1]) > 0
            await fleet.all_returned()
        finally:
            for server in (router, victim):
                await server.kill()

    runner.run(scenario())
