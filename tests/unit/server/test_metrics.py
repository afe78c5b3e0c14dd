"""What dashboards read, by promtool's rules; ids that come back; what fails requests, in the log."""

from __future__ import annotations

import asyncio
import logging
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families
from test_api import api

from kvbaton.errors import ConfigError, PeerLostError
from kvbaton.serving.engine.handoffs import Handoffs, StagingUse
from kvbaton.serving.engine.request import Handoff, Output, Request
from kvbaton.serving.router.router import Router, RouterConfig
from kvbaton.serving.router.worker import Worker
from kvbaton.serving.server import failure_log
from kvbaton.serving.server.failure_log import FailureLog
from kvbaton.serving.server.metrics import HandoffMetrics, ServerMetrics
from kvbaton.serving.server.replica import gauges_of
from kvbaton.serving.server.request_parsing import ApiConfig
from kvbaton.serving.testing.engine import spell, spell_all
from kvbaton.serving.testing.http import run, serving

#: As promtool: other units than base ones, and abbreviations of any.
UNITS = "milliseconds|microseconds|minutes|hours|days|kilobytes|megabytes|gigabytes|bits|percent|celcius"
SHORT = "s|ms|us|ns|sec|min|b|kb|mb|gb|tb|m|h|d"


def lint(text: str) -> list[str]:
    """What ``promtool check metrics`` would find."""
    found = []
    for family in text_string_to_metric_families(text):
        said = [
            (not family.documentation, "no help text"),
            (family.type not in ("counter", "gauge", "histogram"), f"type {family.type}"),
            (":" in family.name or re.search("[A-Z]", family.name), "characters"),
            (re.search(f"_({UNITS})(_|$)", family.name), "not a base unit"),
            (re.search(f"_({SHORT})(_|$)", family.name), "an abbreviated unit"),
            (re.search("_(counter|gauge|histogram|summary)(_|$)", family.name), "a type in its name"),
        ]
        for sample in family.samples:
            ends = sample.name.endswith
            said += [
                ((family.type == "counter") != ends("_total") and not ends("_created"), "counters, and only they"),
                (family.type != "histogram" and ends(("_bucket", "_count", "_sum")), "reserved for histograms"),
                (family.type != "histogram" and "le" in sample.labels, "reserved for histograms"),
            ]
        found += [f"{family.name}: {what}" for is_so, what in said if is_so]
    return found


def check(text: str) -> None:
    assert not lint(text)
    promtool = shutil.which("promtool")
    if promtool is not None:
        done = subprocess.run([promtool, "check", "metrics"], input=text, text=True, capture_output=True, check=False)
        assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_the_rules_find_what_they_are_for() -> None:
    bad = "# HELP a_ms x\n# TYPE a_ms gauge\na_ms 1\n# TYPE b gauge\nb_total 1\n# HELP c_sum x\n# TYPE c_sum gauge\n"
    bad += "c_sum 2\n"
    assert [line.partition(":")[0] for line in lint(bad)] == ["a_ms", "b", "b_total", "b_total", "b_total", "c_sum"]


@pytest.mark.parametrize("mode", ["null", "prefill", "decode"])
def test_a_servers_metrics_are_clean(mode: str) -> None:
    async def test() -> None:
        async with api(config=ApiConfig(model="m", max_positions=99, mode=mode)) as client:  # type: ignore[arg-type]
            await client.post(prompt="abc", status=200 if mode == "null" else 400, surprise=1)
            check(await client.metrics())

    run(test())


def test_a_routers_metrics_are_clean() -> None:
    async def test() -> None:
        workers = (Worker("prefill", "http://127.0.0.1:1"), Worker("decode", "http://127.0.0.1:2"))
        async with serving(Router(RouterConfig(workers=workers)).app) as url, aiohttp.ClientSession() as session:
            async with session.get(f"{url}/metrics") as response:
                text = await response.text()
            check(text)
            assert "kvbaton_build_info{" in text
            assert "process_resident_memory_bytes " in text

    run(test())


def test_what_half_a_pair_tells_of_its_handoffs_is_clean() -> None:
    metrics = ServerMetrics()
    HandoffMetrics(metrics.registry).observe(Handoff(bytes=5, seconds=0.5, exposed_seconds=0.25))
    use = StagingUse(policy="auto", slot_bytes=1, slots=2, slots_free=1)
    fields = {"evidence": "", "address": "", "group": "", "layout_digest": "", "rank": 0, "counters": {}}
    rooms = {"live_rooms": 3, "leased_rooms": 2, "quarantined_rooms": 1}
    metrics.gauges(lambda: gauges_of(Handoffs(**fields, **rooms, staging=use)))  # type: ignore[arg-type]
    check(metrics.exposition().decode())


def counted(text: str, name: str) -> dict[str, float]:
    """By rank."""
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {sample.labels["rank"]: sample.value for sample in samples if sample.name == name}


def test_tokens_are_counted_by_model_and_rank() -> None:
    def script(request: Request) -> list[Output]:
        rank = len(request.prompt_tokens) - 2
        first, *others = spell_all("four", request.sampling.choices)
        return [replace(each, rank=rank) for each in (replace(first, queued_seconds=2.0), *others)]

    async def test() -> None:
        async with api(script) as client:
            assert counted(await client.metrics(), "kvbaton_prompt_tokens_total") == {"0": 0.0}, "from the start"
            await client.post(prompt=["ab", "abc"], n=2)
            await client.events(prompt="ab")
            text = await client.metrics()
            assert 'model="m"' in text
            assert counted(text, "kvbaton_prompt_tokens_total") == {"0": 4.0, "1": 3.0}
            assert counted(text, "kvbaton_generation_tokens_total") == {"0": 12.0, "1": 8.0}
            assert counted(text, "kvbaton_queue_seconds_sum") == {"0": 4.0, "1": 2.0}
            # how many came in one look is chance, so the steps are bounded only
            assert counted(text, "kvbaton_inter_token_seconds_count")["0"] <= 9
            assert counted(text, "kvbaton_time_per_output_token_seconds_count")["0"] <= 3

    run(test())


def test_steps_are_told_one_by_one() -> None:
    async def test() -> None:
        async with api(lambda _request: []) as client:
            asked = asyncio.create_task(client.post(prompt="ab"))
            await client.engine.until(lambda: bool(client.engine.live))
            (request_id,) = client.engine.live
            for output in spell("abcd"):
                client.engine.emit(request_id, output)
                await asyncio.sleep(0)  # the loop looks at it
                await asyncio.sleep(0)
            await asked
            text = await client.metrics()
            assert counted(text, "kvbaton_inter_token_seconds_count") == {"0": 3.0}
            assert counted(text, "kvbaton_time_per_output_token_seconds_count") == {"0": 1.0}

    run(test())


def test_a_request_id_comes_back() -> None:
    async def test() -> None:
        async with api() as client:

            async def told(given: str | None, **body: object) -> str:
                headers = {} if given is None else {"X-Request-Id": given}
                async with client.session.post(f"{client.url}/v1/completions", json=body, headers=headers) as response:
                    await response.read()
                    return response.headers["X-Request-Id"]

            assert await told("mine", prompt="a") == "mine"
            assert await told("mine", prompt="a", stream=True) == "mine"
            assert await told("mine", prompt="a", n=99) == "mine", "with an error, too"
            names = {await told(None, prompt="a"), await told("x" * 129, prompt="a"), await told("a b", prompt="a")}
            assert len(names) == 3
            assert all(re.fullmatch("[0-9a-f]{32}", name) for name in names)

    run(test())


def test_what_fails_requests_is_one_counted_line(caplog: pytest.LogCaptureFixture) -> None:
    error = PeerLostError("prefill is gone", room=7)

    async def test() -> None:
        async with api(lambda _request: [Output(error=error.again())]) as client:
            for _ in range(3):
                await client.post(prompt="a", status=503)
            await client.post(prompt="a", status=400, n=99)
            (line,) = records(caplog)
            assert line.getMessage().startswith("1 request failed with peer_lost: prefill is gone [room 7] [request ")
        assert records(caplog)[-1].getMessage().startswith("2 more requests failed with peer_lost, the last: prefill")

    run(test())


def records(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [record for record in caplog.records if record.name == failure_log.__name__]


def test_failures_that_go_on_are_a_line_each_time(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(failure_log, "SECONDS", 0.0)

    async def turns(done: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not done():
                await asyncio.sleep(0)

    async def test() -> None:
        failures = FailureLog()
        for burst in range(1, 3):
            for _ in range(burst + 1):
                failures.note(PeerLostError("gone"), "r")
            await turns(lambda: repr(failures) == "FailureLog()")
        failures.note(ConfigError("n: no"), "r")
        failures.close()
        said = [record.getMessage().partition(" failed")[0] for record in records(caplog)]
        assert said == ["1 request", "1 more requests", "1 request", "2 more requests"]

    run(test())
