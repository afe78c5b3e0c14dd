"""The claims of the pair, on real processes over real NIXL: equal answers, survivors, nothing left leased."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from typing import Any

import aiohttp
import pytest

from kvbaton.protocol.settings import Settings
from kvbaton.serving.demo.show import (
    JSON,
    DemoAnswer,
    Question,
    ask,
    ask_all,
    concurrent_questions,
    edge_questions,
    stream,
)
from kvbaton.serving.evaluation.recall import make_prompts
from kvbaton.serving.fleet import Fleet, Server

HEARTBEAT_WINDOW = Settings().silence_seconds + Settings().heartbeat_interval
LONG = Question(title="long", prompt=make_prompts(1, seed=3, pairs=(200, 200))[0].prompt, max_tokens=8)


async def answers_equal(fleet: Fleet, questions: list[Question]) -> None:
    assert fleet.reference is not None
    answers = await ask_all(fleet.http, fleet.router.url, questions)
    references = await ask_all(fleet.http, fleet.reference.url, questions)
    for question, answer, reference in zip(questions, answers, references, strict=True):
        assert not answer.error, f"{question.title}: {answer.error}"
        assert answer.tokens == reference.tokens, question
        assert answer.bytes > 0, "the answer did not come by way of a hand-off"


def test_equal_to_the_single_process_at_every_edge(fleet: Fleet, runner: asyncio.Runner) -> None:
    questions = [*edge_questions(), Question(title="longest", prompt=LONG.prompt, max_tokens=5)]
    runner.run(answers_equal(fleet, questions))
    runner.run(fleet.all_returned())


def test_the_facts_name_the_staging_memory(fleet: Fleet, runner: asyncio.Runner) -> None:
    for server in (*fleet.prefills, *fleet.decodes):
        facts = runner.run(fleet.info(server))["handoff"]["staging"]
        assert facts == {"policy": "auto", "slot_bytes": 4 << 20, "slots": 16, "slots_free": 16}


def test_streaming_gives_the_same_text(fleet: Fleet, runner: asyncio.Runner) -> None:
    async def scenario() -> None:
        in_pieces = 0
        for question in concurrent_questions(8):
            pieces = [piece async for piece in stream(fleet.http, fleet.router.url, question)]
            whole = await ask(fleet.http, fleet.router.url, question)
            assert "".join(pieces) == whole.text
            in_pieces += len(pieces) > 1
        assert in_pieces  # a busy machine may join the few tokens of one answer, not of all

    runner.run(scenario())


def test_clients_that_hang_up_at_random_harm_nobody(fleet: Fleet, runner: asyncio.Runner) -> None:
    """64 requests at concurrency 32; 30 % of the clients disconnect; the rest is right, and every page comes back."""
    rng = random.Random(7)
    questions = concurrent_questions(64)
    impatient = {i for i in range(64) if rng.random() < 0.3}

    async def scenario() -> dict[int, DemoAnswer]:
        slots = asyncio.Semaphore(32)
        answers: dict[int, DemoAnswer] = {}

        async def one(number: int) -> None:
            async with slots:
                if number not in impatient:
                    answers[number] = await ask(fleet.http, fleet.router.url, questions[number])
                    return
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(rng.expovariate(1 / 0.3)):
                        await ask(fleet.http, fleet.router.url, questions[number])

        await asyncio.gather(*(one(number) for number in range(64)))
        await fleet.all_returned()
        return answers

    answers = runner.run(scenario())
    assert fleet.reference is not None
    kept = sorted(answers)
    references = runner.run(ask_all(fleet.http, fleet.reference.url, [questions[i] for i in kept]))
    for number, reference in zip(kept, references, strict=True):
        assert answers[number].tokens == reference.tokens, (number, answers[number])
    assert len(kept) == 64 - len(impatient)


async def choices_of(fleet: Fleet, url: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """What a request with several choices was answered; streamed pieces put together again."""
    async with fleet.http.post(f"{url}/v1/completions", json=body) as response:
        assert response.status == 200, await response.text()
        if not body.get("stream"):
            answer = await response.json()
            assert answer["usage"]["completion_tokens"] == sum(len(c["token_ids"]) for c in answer["choices"])
            assert [choice["index"] for choice in answer["choices"]] == list(range(body["n"]))
            return list(answer["choices"])
        lines = [line async for line in response.content if line.startswith(b"data: ")]
    assert lines.pop() == b"data: [DONE]\n"
    choices: list[dict[str, Any]] = [{"text": "", "token_ids": []} for _ in range(body["n"])]
    for line in lines:
        (piece,) = json.loads(line[len(b"data: ") :])["choices"]
        choices[piece["index"]]["text"] += piece["text"]
        choices[piece["index"]]["token_ids"] += piece["token_ids"]
    return choices


@pytest.mark.parametrize("how", [{"temperature": 0}, {"temperature": 2.0, "seed": 11}])
def test_four_choices_with_logprobs_equal_the_single_process(fleet: Fleet, runner: asyncio.Runner, how: dict) -> None:
    """Prompts that fill their last page, and that do not; the first token's alternatives came through the aux row."""
    prompt = make_prompts(1, seed=5)[0].prompt

    async def scenario() -> None:
        assert fleet.reference is not None
        for text in (prompt[:1], prompt[-64:], prompt[-75:]):
            body = {
                "prompt": text,
                "n": 4,
                "logprobs": 5,
                "max_tokens": 12,
                "return_token_ids": True,
                "ignore_eos": True,
                **how,
            }
            ours = await choices_of(fleet, fleet.router.url, body)
            theirs = await choices_of(fleet, fleet.reference.url, body)
            for mine, other in zip(ours, theirs, strict=True):
                assert mine["token_ids"] == other["token_ids"]
                for token, (one, two) in enumerate(
                    zip(mine["logprobs"]["top_logprobs"], other["logprobs"]["top_logprobs"], strict=True)
                ):
                    assert 5 <= len(one) <= 6
                    assert one == pytest.approx(two, abs=1e-3), token
                assert mine["logprobs"]["token_logprobs"] == pytest.approx(
                    other["logprobs"]["token_logprobs"], abs=1e-3
                )
            single = await choices_of(fleet, fleet.router.url, {**body, "n": 1})
            assert single[0]["token_ids"] == ours[0]["token_ids"]
            distinct = {tuple(choice["token_ids"]) for choice in ours}
            assert (len(distinct) == 1) == (how["temperature"] == 0)
            streamed = await choices_of(fleet, fleet.router.url, {**body, "stream": True})
            assert [c["text"] for c in streamed] == [c["text"] for c in ours]
            assert [c["token_ids"] for c in streamed] == [c["token_ids"] for c in ours]
        await fleet.all_returned()

    runner.run(scenario())


def test_a_client_that_leaves_four_choices_leaves_nothing(fleet: Fleet, runner: asyncio.Runner) -> None:
    async def scenario() -> None:
        body = {"prompt": LONG.prompt[-100:], "n": 4, "max_tokens": 400, "ignore_eos": True, "stream": True}
        for pieces in (1, 5, 9):
            async with fleet.http.post(f"{fleet.router.url}/v1/completions", json=body) as response:
                for _ in range(pieces):
                    await response.content.readuntil(b"\n\n")
                response.close()
        await fleet.all_returned()

    runner.run(scenario())


async def transferring(fleet: Fleet) -> None:
    """Wait until the decode rank holds a transfer that has not ended, and prefill computes for it."""
    deadline = time.monotonic() + 30
    while True:
        decode, prefill = await fleet.info(fleet.decodes[0]), await fleet.info(fleet.prefills[0])
        if decode["stats"]["queues"]["transfer"] and prefill["stats"]["running"]:
            return
        assert time.monotonic() < deadline, (decode, prefill)


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_killed_server_is_named_and_replaced(fleet: Fleet, runner: asyncio.Runner, role: str) -> None:
    """SIGKILL in the middle of a transfer: a typed error in time, the survivor serves on, the successor too."""
    victim: Server = fleet.prefills[0] if role == "prefill" else fleet.decodes[0]

    async def scenario() -> None:
        asking = asyncio.create_task(ask(fleet.http, fleet.router.url, LONG))
        await transferring(fleet)
        started = time.monotonic()
        await victim.kill()
        answer = await asyncio.wait_for(asking, HEARTBEAT_WINDOW)
        assert answer.error.startswith("HTTP 503"), answer
        assert victim.url in answer.error or f"the {role} rank" in answer.error, answer
        assert time.monotonic() - started < HEARTBEAT_WINDOW
        survivor = fleet.decodes[0] if role == "prefill" else fleet.prefills[0]
        assert survivor.running
        await fleet.all_returned(2 * HEARTBEAT_WINDOW)
        await victim.start()
        await fleet.ready(victim)
        await fleet.ready(fleet.router)
        await answers_equal(fleet, concurrent_questions(4))

    runner.run(scenario())


def test_a_stopped_server_ends_with_zero(fleet: Fleet, runner: asyncio.Runner) -> None:
    async def scenario() -> None:
        victim = fleet.prefills[0]
        asking = asyncio.create_task(ask(fleet.http, fleet.router.url, LONG))
        await transferring(fleet)
        assert await victim.stop() == 0
        answer = await asking
        assert not answer.error, f"SIGTERM drains, a running request must finish: {answer.error}"
        await victim.start()
        await fleet.ready(victim)
        await fleet.ready(fleet.router)
        await answers_equal(fleet, concurrent_questions(2))

    runner.run(scenario())


def test_bad_requests_are_refused_and_the_servers_go_on(fleet: Fleet, runner: asyncio.Runner) -> None:
    async def scenario() -> None:
        for body, complaint in (
            ({"prompt": "", "max_tokens": 4}, "prompt"),
            ({"prompt": "a" * 5000, "max_tokens": 4}, "5000"),
            ({"prompt": "a", "max_tokens": 4, "temperature": -1}, "temperature"),
            ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
            ({"prompt": 7}, "prompt"),
        ):
            async with fleet.http.post(f"{fleet.router.url}/v1/completions", json=body) as response:
                text = await response.text()
                assert response.status == 400, (body, text)
                assert complaint in text
        with contextlib.suppress(aiohttp.ClientError):
            async with fleet.http.post(
                f"{fleet.router.url}/v1/completions", data=b"\x00" * 100, headers=JSON
            ) as response:
                assert response.status == 400
        await answers_equal(fleet, concurrent_questions(1))
        await fleet.all_returned()

    runner.run(scenario())
