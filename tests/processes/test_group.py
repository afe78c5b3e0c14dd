"""A group of ranks in one ``serve``: what it is refused for, and what becomes of it when a rank dies."""

import asyncio
import os
import signal
import subprocess
import urllib.error
import urllib.request

import aiohttp
import msgspec
import psutil
import pytest
from listening import beyond_loopback, listeners
from refusals import refused
from test_serve import PATIENCE_SECONDS, post, serving

from kvbaton.serving.fleet import free_ports

QUESTION = {"prompt": "a7=3MB0;?a7=", "max_tokens": 4, "temperature": 0}


def test_sizes_that_do_not_divide_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, "--model", "recall", "--port", "0", "--tensor-parallel-size", "3")
    assert "kvbaton: --tensor-parallel-size 3 does not divide the model's" in said


def test_a_group_answers_and_ends_with_an_error_when_a_rank_is_killed() -> None:
    with serving("--model", "recall", "--port", "0", "--tensor-parallel-size", "2") as (process, url):
        with urllib.request.urlopen(post(url, **QUESTION)) as response:
            assert msgspec.json.decode(response.read())["choices"][0]["text"] == "3MB0"
        with urllib.request.urlopen(post(url, **QUESTION, n=3)) as response:  # a partial page is copied on every rank
            choices = msgspec.json.decode(response.read())["choices"]
            assert [choice["text"] for choice in choices] == ["3MB0"] * 3
        with urllib.request.urlopen(post(url, **QUESTION, echo=True, logprobs=1)) as response:
            told = msgspec.json.decode(response.read())["choices"][0]["logprobs"]
            assert "".join(told["tokens"]) == "a7=3MB0;?a7=3MB0"
            assert told["token_logprobs"][0] is None
            assert all(logprob <= 0 for logprob in told["token_logprobs"][1:])
            assert sum(told["token_logprobs"][-4:]) > -1
        (follower,) = psutil.Process(process.pid).children()
        os.kill(follower.pid, signal.SIGKILL)
        assert process.wait(PATIENCE_SECONDS) == 1


def test_data_parallel_ranks_answer_alike_and_wait_for_nobody_and_the_server_ends_when_one_is_killed() -> None:
    with serving("--model", "recall", "--port", "0", "--data-parallel-size", "2") as (process, url):
        for rank in (0, 1):
            with urllib.request.urlopen(post(url, **QUESTION, data_parallel_rank=rank)) as response:
                assert msgspec.json.decode(response.read())["choices"][0]["text"] == "3MB0"
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(post(url, **QUESTION, data_parallel_rank=2))
        assert msgspec.json.decode(refused.value.read())["error"]["param"] == "data_parallel_rank"
        second = psutil.Process(process.pid).children()[1]
        asyncio.run(a_stopped_rank_keeps_nobody_else_waiting(url, second))
        second.kill()
        assert process.wait(PATIENCE_SECONDS) == 1


async def a_stopped_rank_keeps_nobody_else_waiting(url: str, stopped: psutil.Process) -> None:
    """And it answers when it goes on. Twice what fits into its pipe was sent to it: the event loop waited for it,
    /health and the other rank as well."""
    heavy = {"prompt": [7], "max_tokens": 1, "temperature": 0, "logit_bias": {str(token): 0.5 for token in range(90)}}

    async def ask(session: aiohttp.ClientSession, body: dict[str, object], rank: int) -> int:
        async with session.post(f"{url}/v1/completions", json=body | {"data_parallel_rank": rank}) as response:
            await response.read()
            return response.status

    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60), connector=connector) as session:
        stopped.suspend()
        waiting = [asyncio.create_task(ask(session, heavy, 1)) for _ in range(200)]
        async with asyncio.timeout(10):
            for _ in range(20):
                async with session.get(f"{url}/health") as response:
                    assert response.status == 200
                assert await ask(session, QUESTION, 0) == 200
        assert not any(task.done() for task in waiting)
        stopped.resume()
        assert set(await asyncio.gather(*waiting)) == {200}


@pytest.mark.parametrize(
    ("mode", "sizes", "processes"),
    [
        ("decode", ("--pipeline-parallel-size", "2"), 1),
        ("prefill", ("--data-parallel-size", "2", "--tensor-parallel-size", "2"), 4),
    ],
)
def test_every_rank_of_half_a_pair_listens_on_loopback_and_ends_with_sigterm(
    mode: str, sizes: tuple[str, ...], processes: int
) -> None:
    """Leaders, followers and replicas, with all that they open: HTTP, registry, links, UCX, gloo."""
    half = ("--disaggregation-mode", mode, "--disaggregation-bootstrap-port", str(free_ports(1)[0]))
    with serving("--model", "recall", "--port", "0", *half, *sizes) as (process, _url):
        children = psutil.Process(process.pid).children(recursive=True)
        assert len(children) == processes
        assert sum(bool(listeners(child.pid)) for child in children) >= 1
        assert not beyond_loopback([process.pid, *(child.pid for child in children)])
        process.send_signal(signal.SIGTERM)
        try:
            assert process.wait(PATIENCE_SECONDS) == 0
        except subprocess.TimeoutExpired:
            pytest.fail(f"still there: {children}")
        assert not any(child.is_running() for child in children)
