"""A deployment with a secret, on every interface: it works, strangers are kept out, and the secret is in nothing that
anybody can read."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import pytest

from kvbaton.control.curve import CurveKeys
from kvbaton.discovery.access import ROUTER_HEADER, Door, token_of
from kvbaton.discovery.client import RegistryClient
from kvbaton.discovery.names import audience_of_url
from kvbaton.discovery.registry import Route
from kvbaton.errors import LocalProtocolError
from kvbaton.serving.demo.show import ask, concurrent_questions
from kvbaton.serving.fleet import Fleet

SECRET = "kX7-a-secret-that-must-stay-one-Q2w"


@pytest.fixture(scope="module")
def guarded(runner: asyncio.Runner, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Fleet, Path]]:
    directory: Path = tmp_path_factory.mktemp("guarded")
    secret = directory / "secret"
    secret.write_text(SECRET + "\n")
    secret.chmod(0o600)
    with_secret = ("--secret-file", str(secret), "--log-level", "debug")
    fleet = Fleet(
        directory,
        model="recall",
        extra=(*with_secret, "--host", "0.0.0.0"),
        prefill_extra=[("--disaggregation-control-advertise", "tcp://127.0.0.1:0")],
        router_extra=with_secret,
    )
    runner.run(fleet.__aenter__())
    try:
        runner.run(fleet.all_ready())
        yield fleet, directory
    finally:
        runner.run(fleet.__aexit__(None, None, None))


def words(registry: str, workers: Sequence[str]) -> dict[str, bytes]:
    """Everything that would let somebody in."""
    doors: list[tuple[Door, str]] = [("look-up", registry), ("register", registry)]
    doors += [(door, worker) for worker in workers for door in ("router", "story")]
    keys = CurveKeys.derive(SECRET)
    return {
        "the secret": SECRET.encode(),
        **{f"the token of the {door} of {where}": token_of(SECRET, door, where).encode() for door, where in doors},
        "the server's key": keys.server_secret,
        "the client's key": keys.client_secret,
        "the server's public key": keys.server_public,
    }


def test_a_guarded_pair_serves_keeps_strangers_out_and_tells_nobody(
    guarded: tuple[Fleet, Path], runner: asyncio.Runner
) -> None:
    fleet, directory = guarded

    async def scenario() -> dict[str, bytes]:
        seen: dict[str, bytes] = {}

        async def fetch(method: str, url: str, status: int, **options: object) -> bytes:
            async with fleet.http.request(method, url, **options) as response:
                body = await response.read()
                seen[f"{method} {url} {len(seen)}"] = body + str(response.headers).encode()
                assert response.status == status, (method, url, body)
                return body

        for question in concurrent_questions(3):
            answer = await ask(fleet.http, fleet.router.url, question)
            assert not answer.error, answer
            assert answer.bytes > 0
        decode, prefill, registry = fleet.decodes[0], fleet.prefills[0], f"http://127.0.0.1:{fleet.registry_ports[0]}"
        room = {
            "prompt": "a",
            "bootstrap_room": 7,
            "bootstrap_host": "127.0.0.1",
            "bootstrap_port": fleet.registry_ports[0],
        }
        for headers in (
            {},
            {ROUTER_HEADER: "wrong"},
            {ROUTER_HEADER: token_of(SECRET, "story", audience_of_url(decode.url))},
        ):
            await fetch("POST", f"{decode.url}/v1/completions", 401, json=room, headers=headers)
            await fetch("POST", f"{prefill.url}/v1/completions", 401, json=room, headers=headers)
        await fetch("POST", f"{decode.url}/abort_request", 401, json={"rid": "x"})
        for headers in ({}, {"Authorization": "Bearer wrong"}):
            await fetch("GET", f"{registry}/route", 401, headers=headers)
            await fetch("PUT", f"{registry}/route", 401, headers=headers, json={"instance": "evil"})
            await fetch("DELETE", f"{registry}/route?instance=x", 401, headers=headers)
        route = await fetch("GET", f"{registry}/route", 200, headers={"Authorization": f"Bearer {SECRET}"})
        (rank,) = msgspec.json.decode(route)["ranks"]
        assert rank["address"].startswith("tcp://127.0.0.1:")
        async with RegistryClient(secret=SECRET) as client:
            usurper = msgspec.convert({**rank, "instance": "usurper", "address": "tcp://127.0.0.1:9"}, Route)
            with pytest.raises(LocalProtocolError, match="a rank of the process"):
                await client.register("127.0.0.1", fleet.registry_ports[0], usurper)
        assert not (await ask(fleet.http, fleet.router.url, concurrent_questions(1)[0])).error
        assert prefill.running
        for server in (prefill, decode, fleet.router):
            for path in ("/metrics", "/get_server_info", "/v1/models", "/ready", "/openapi.json"):
                await fetch("GET", server.url + path, 200)
            await fetch("GET", f"{server.url}/story/7", 401)
            await fetch("GET", f"{server.url}/story/7", 404, headers={"Authorization": f"Bearer {SECRET}"})
            await fetch("GET", f"{server.url}/nothing", 404)
            assert server.process is not None
            for file in ("cmdline", "environ"):
                seen[f"{file} of {server.name}"] = Path(f"/proc/{server.process.pid}/{file}").read_bytes()
        handoff = (await fleet.info(decode))["handoff"]
        assert (handoff["rank"], handoff["quarantined_rooms"]) == (0, 0)
        assert b"kvbaton_rooms_quarantined 0.0" in await fetch("GET", f"{decode.url}/metrics", 200)
        await fleet.all_returned()
        return seen

    seen = runner.run(scenario())
    for log in directory.glob("*.log"):
        seen[log.name] = log.read_bytes()
        assert b"DEBUG" in seen[log.name] or log.name == "router.log"
    for where, text in seen.items():
        workers = [audience_of_url(server.url) for server in (*fleet.prefills, *fleet.decodes)]
        for what, word in words(f"127.0.0.1:{fleet.registry_ports[0]}", workers).items():
            assert word not in text, f"{what} is in {where}"
