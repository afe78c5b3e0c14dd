"""schemathesis against the documents that servers serve: ``python tests/fuzz/api_fuzz.py --seconds 30``.

The servers answer from a scripted engine, over real HTTP on loopback; the router has two of them behind it, decode may
ask one registry. Prints what
schemathesis says, and a JSON summary; the exit code is 1 if an answer was not what the document says.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from aiohttp import web

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [path for path in (str(ROOT / "src"), str(ROOT / "tests")) if path not in sys.path]

from kvbaton.discovery.client import RegistryClient  # noqa: E402
from kvbaton.discovery.registry import Registry, Route  # noqa: E402 - found only now
from kvbaton.discovery.server import registry_app  # noqa: E402
from kvbaton.serving.router.router import Router, RouterConfig  # noqa: E402
from kvbaton.serving.router.worker import Worker  # noqa: E402
from kvbaton.serving.server.allow import AllowList  # noqa: E402
from kvbaton.serving.server.api import ApiServer  # noqa: E402
from kvbaton.serving.server.lifecycle import listen, port_of, reserve  # noqa: E402
from kvbaton.serving.server.request_parsing import ApiConfig, Mode  # noqa: E402
from kvbaton.serving.testing.engine import CharacterTokenizer, ScriptedEngine, spell_all  # noqa: E402

KINDS = ("null", "prefill", "decode", "router")
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "unsupported_method",
)
# /health and /ready answer 503 by design; what a client can make a server do is judged on the other routes
PATIENCE_SECONDS = 120


@contextmanager
def servers() -> Iterator[dict[str, str]]:
    """One server of each kind in a thread of their own, and their URLs."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    runners: list[web.AppRunner] = []

    async def start(make: Callable[[], web.Application]) -> str:
        bound = reserve("127.0.0.1", 0)
        runners.append(await listen(make(), bound))
        return f"http://127.0.0.1:{port_of(bound)}"

    async def stop() -> None:
        for runner in reversed(runners):
            await runner.cleanup()

    def run(make: Callable[[], web.Application]) -> str:
        return asyncio.run_coroutine_threadsafe(start(make), loop).result(PATIENCE_SECONDS)

    def api(mode: Mode, allow: tuple[str, ...] = ()) -> web.Application:
        config = ApiConfig(model="m", max_positions=4096, mode=mode, bootstrap_allow=AllowList.parse(allow))
        engine = ScriptedEngine(lambda request: spell_all("hi", request.sampling.choices))
        client = RegistryClient(attempts=1) if mode == "decode" else None
        app = ApiServer(engine, CharacterTokenizer(), config, registry=client).app
        if client is not None:
            app.on_cleanup.append(lambda _app: client.close())
        return app

    def registry() -> web.Application:
        route = Route(instance="i", group="g", address="tcp://127.0.0.1:41000", layout_digest="", http_port=1)
        table = Registry()
        table.register(route, 0.0)
        return registry_app(table, clock=lambda: 0.0)

    try:
        urls = {"null": run(lambda: api("null")), "prefill": run(lambda: api("prefill"))}
        allowed = run(registry).removeprefix("http://")
        urls["decode"] = run(lambda: api("decode", (allowed,)))
        registry_port = int(allowed.rpartition(":")[2])
        workers = (Worker("prefill", urls["prefill"], registry_port), Worker("decode", urls["decode"]))
        urls["router"] = run(lambda: Router(RouterConfig(workers=workers)).app)
        yield urls
    finally:
        asyncio.run_coroutine_threadsafe(stop(), loop).result(PATIENCE_SECONDS)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def fuzz(kind: str, url: str, *, examples: int, seconds: int | None = None, seed: int = 1) -> dict[str, object]:
    """One run of schemathesis."""
    budget = ["--max-time", str(seconds)] if seconds else []
    command = [
        *(sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json"),
        *("--checks", ",".join(CHECKS), "--phases", "examples,coverage,fuzzing", "--seed", str(seed)),
        *("--max-examples", str(examples), "--suppress-health-check", "all", "--no-color", *budget),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=(seconds or 0) + PATIENCE_SECONDS
    )
    said = done.stdout + done.stderr
    cases = re.search(r"(\d[\d,]*) generated", said)
    return {
        "server": kind,
        "cases": int(cases[1].replace(",", "")) if cases else 0,
        "broken": done.returncode != 0,
        "said": said,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=30, help="for each kind of server")
    parser.add_argument("--examples", type=int, default=200, help="for each operation")
    options = parser.parse_args()
    with servers() as urls:
        results = [fuzz(kind, urls[kind], examples=options.examples, seconds=options.seconds) for kind in KINDS]
    for result in results:
        said = str(result.pop("said"))
        print(said if result["broken"] else said[-1500:], file=sys.stderr)
    print(json.dumps({"servers": results}, indent=1))
    return 1 if any(result["broken"] for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
