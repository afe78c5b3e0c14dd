"""Clients of others in front of one prefill and one decode server: every answer is that of a single process.

Rules: SGLang's two routers stand in front of the same pair as ours; each is asked completions, chats and ``/generate``,
whole and streamed, and recall questions. Scripts with the openai SDK, LangChain and LiteLLM run against the single
process, our router, and (the SDK's) SGLang's, and what they print must be equal; so must every number and text that
lm-eval and the benchmarks of vLLM and SGLang are given.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from kvbaton.errors import ExpiredError
from kvbaton.serving.evaluation.recall import make_prompts
from kvbaton.serving.fleet import Fleet, free_ports
from kvbaton.serving.models import builtin
from lab.clients import benchmarks, evaluation
from lab.clients.benchmarks import Benchmark
from lab.clients.environment import LANGCHAIN_OPENAI, LITELLM, LM_EVAL, OPENAI, SGLANG_ROUTER
from lab.clients.lm_eval import LmEval
from lab.clients.promtool import checked
from lab.clients.row import PARTS, PROGRAM_SECONDS, Row
from lab.programs import output, stop

MODEL = "recall"
READY_SECONDS = 300.0
ANSWER_SECONDS = 120.0
#: Recall questions that wait for their answers at once.
AT_ONCE = 16
SCRIPT = Path(__file__).with_name("openai_script.py")
CHAINS_SCRIPT = Path(__file__).with_name("chains_script.py")
SDK_CLIENT, CHAINS_CLIENT = f"openai {OPENAI}", f"langchain-openai {LANGCHAIN_OPENAI}, litellm {LITELLM}"
PROMPT = "g6=V6QT; s9=GZTT;?s9="
OTHER = "a1=QX7B; b2=MM30;?a1="
#: What the script asks and SGLang's Rust router answers by itself, otherwise than its workers do.
ROUTERS_OWN = (
    *("models", "model", "prompts as token ids"),
    *("refused: model", "refused: too long", "refused: grammar"),
)
#: It takes one text for ``/generate``.
ROUTER_REFUSES = tuple(
    f"generate, texts{more}{stream}" for more in ("", ", logprobs of each") for stream in ("", ", stream")
)


@asynccontextmanager
async def sglang_router(python: Path, fleet: Fleet, logs: Path, *more: str) -> AsyncIterator[str]:
    """SGLang's router in front of the fleet's servers, and its URL."""
    port, metrics = free_ports(2)
    prefill = ("--prefill", fleet.prefills[0].url, str(fleet.registry_ports[0]))
    command = [
        *(str(python), "-m", "sglang_router.launch_router", "--pd-disaggregation", "--host", "127.0.0.1"),
        *("--port", str(port), "--prometheus-port", str(metrics), *prefill, "--decode", fleet.decodes[0].url, *more),
    ]
    with (logs / f"sglang-router{'-'.join(more)}.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(*command, stdout=log, stderr=log)
        url = f"http://127.0.0.1:{port}"
        try:
            await _answers(fleet.http, url)
            yield url
        finally:
            await stop(process)


async def _answers(http: aiohttp.ClientSession, url: str) -> None:
    until = time.monotonic() + READY_SECONDS
    while time.monotonic() < until:
        try:
            await post(http, url, "/v1/completions", {"model": MODEL, "prompt": PROMPT, "max_tokens": 1})
        except (aiohttp.ClientError, TimeoutError):
            await asyncio.sleep(1.0)
        else:
            return
    raise ExpiredError(f"{url} has not answered within {READY_SECONDS:g} s")


async def post(http: aiohttp.ClientSession, url: str, path: str, body: dict[str, Any]) -> Any:
    """The answer, or the events of one. Raises aiohttp.ClientError, TimeoutError."""
    timeout = aiohttp.ClientTimeout(total=ANSWER_SECONDS)
    async with http.post(url + path, json=body, timeout=timeout) as response:
        payload = await response.text()
        if response.status != 200:
            raise aiohttp.ClientError(f"{response.status}: {payload[:300]}")
        if not body.get("stream"):
            return json.loads(payload)
        events = [line[6:] for line in payload.splitlines() if line.startswith("data: ")]
        return [json.loads(event) for event in events if event != "[DONE]"]


def _bodies() -> dict[str, tuple[str, dict[str, Any]]]:
    greedy: dict[str, Any] = {"model": MODEL, "max_tokens": 6, "temperature": 0}
    sampled = {**greedy, "temperature": 1.0, "seed": 5, "top_k": 20}
    chat = {**greedy, "messages": [{"role": "user", "content": PROMPT}]}
    params = {"max_new_tokens": 6, "temperature": 0}
    logprobs = {"return_logprob": True, "logprob_start_len": 0}
    generate: dict[str, Any] = {"text": PROMPT, "sampling_params": params}
    bodies: dict[str, tuple[str, dict[str, Any]]] = {
        "completion": ("/v1/completions", {**greedy, "prompt": PROMPT}),
        "completion, sampled": ("/v1/completions", {**sampled, "prompt": PROMPT}),
        "completion, n=2": ("/v1/completions", {**sampled, "prompt": PROMPT, "n": 2}),
        "completion, prompts": ("/v1/completions", {**greedy, "prompt": [PROMPT, OTHER]}),
        "completion, prompts, n=2": ("/v1/completions", {**sampled, "prompt": [PROMPT, OTHER], "n": 2}),
        "completion, echo, logprobs": ("/v1/completions", {**greedy, "prompt": PROMPT, "echo": True, "logprobs": 3}),
        "chat": ("/v1/chat/completions", chat),
        "generate": ("/generate", generate),
        "generate, token ids": ("/generate", {"input_ids": [5, 6, 7], "sampling_params": params}),
        "generate, logprobs": ("/generate", {**generate, "return_logprob": True}),
        "generate, logprobs of the prompt": ("/generate", {**generate, **logprobs}),
        "generate, no token": ("/generate", {**generate, **logprobs, "sampling_params": {"max_new_tokens": 0}}),
        "generate, texts": ("/generate", {**generate, "text": [PROMPT, OTHER]}),
        "generate, texts, logprobs of each": (
            "/generate",
            {"text": [PROMPT, OTHER], **logprobs, "logprob_start_len": [2, 9], "sampling_params": [params, params]},
        ),
    }
    streams = {f"{name}, stream": (path, {**body, "stream": True}) for name, (path, body) in bodies.items()}
    return {**bodies, **streams}


def _said(answer: Any, *, stream: bool = False) -> Any:
    """What an answer, whole or as events, says: the text of each choice, and its logprobs."""
    texts: dict[int, str] = {}
    logprobs: dict[int, Any] = {}
    for place, event in enumerate(answer if isinstance(answer, list) else [answer]):
        for choice in event.get("choices", ()):
            said = choice.get("text") or (choice.get("message") or choice.get("delta") or {}).get("content") or ""
            texts[choice["index"]] = texts.get(choice["index"], "") + said
            found = (choice.get("logprobs") or {}).get("token_logprobs") or []
            logprobs.setdefault(choice["index"], []).extend(each and round(each, 3) for each in found)
        if "meta_info" in event:
            index = event.get("index", 0) if stream else place
            texts[index] = event["text"]
            meta = event["meta_info"]
            found = (meta.get("input_token_logprobs") or []) + (meta.get("output_token_logprobs") or [])
            logprobs[index] = [(each[0] and round(each[0], 3), each[1]) for each in found]
    return sorted(texts.values()), [logprobs[index] for index in sorted(logprobs)]


async def shapes(
    http: aiohttp.ClientSession, client: str, url: str, reference: str, without: tuple[str, ...] = ()
) -> Row:
    started, wrong = time.monotonic(), []
    bodies = {name: body for name, body in _bodies().items() if name not in without}
    for name, (path, body) in bodies.items():
        try:
            answers = [await post(http, each, path, body) for each in (url, reference)]
        except (aiohttp.ClientError, TimeoutError) as error:
            wrong.append(f"{name}: {error}")
            continue
        ours, single = (_said(answer, stream="stream" in body) for answer in answers)
        if ours != single:
            wrong.append(f"{name}: {ours} is not {single}")
    return Row(
        client=client,
        what="completions, chats, /generate, whole and streamed: equal to the single process",
        ok=len(bodies) - len(wrong),
        asked=len(bodies),
        seconds=time.monotonic() - started,
        said="; ".join(wrong),
    )


async def recall(http: aiohttp.ClientSession, client: str, url: str, reference: str, count: int) -> Row:
    started, places = time.monotonic(), asyncio.Semaphore(AT_ONCE)

    async def equal(prompt: str) -> bool:
        body = {"model": MODEL, "prompt": prompt, "max_tokens": 5, "temperature": 0}
        async with places:
            found = [_said(await post(http, each, "/v1/completions", body)) for each in (url, reference)]
        return bool(found[0] == found[1])

    ok = sum(await asyncio.gather(*(equal(question.prompt) for question in make_prompts(count, seed=1))))
    seconds = time.monotonic() - started
    return Row(client=client, what="recall questions, equal", ok=ok, asked=count, seconds=seconds)


async def script(python: Path, url: str, file: Path = SCRIPT) -> dict[str, Any]:
    process = await asyncio.create_subprocess_exec(
        str(python), str(file), url, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    said, _ = await output(process, PROGRAM_SECONDS)
    rows = [json.loads(line) for line in said.decode().splitlines() if line.startswith("{")]
    return {row.pop("call"): row for row in rows}


async def compared(
    python: Path, client: str, way: str, url: str, expected: dict[str, Any], file: Path, without: tuple[str, ...] = ()
) -> Row:
    """A script by way of a router: each call's result is the single process's."""
    started = time.monotonic()
    found = await script(python, url, file)
    wanted = {call: said for call, said in expected.items() if call not in without}
    wrong = [
        f"{call}: {found.get(call)} is not {said}"
        for call, said in wanted.items()
        if found.get(call) != said or "error" in said
    ]
    return Row(
        client=client,
        what=f"the script by way of {way}: equal to the single process",
        ok=len(wanted) - len(wrong),
        asked=len(wanted),
        seconds=time.monotonic() - started,
        said="; ".join(wrong),
    )


async def scored(python: Path, url: str, reference: str, build: Path, count: int) -> list[Row]:
    """lm-eval against the single process and the pair."""
    directory = build / "lm_eval"
    await asyncio.to_thread(evaluation.write_tasks, directory, count)
    tasks = tuple(evaluation.TASKS)
    asked = LmEval(python=python, directory=directory, tasks=tasks, model=MODEL, tokenizer=builtin(MODEL))
    return await scored_by(asked, url, reference)


async def scored_by(asked: LmEval, url: str, reference: str) -> list[Row]:
    """Tasks against the single process and the pair."""
    rows = []
    started = time.monotonic()
    single, expected = await asked.run(reference, "single")
    rows.append(_evaluated("the single process", single, expected, expected, started))
    started = time.monotonic()
    scores, answers = await asked.run(url, "pair")
    rows.append(_evaluated("kvbaton router", scores, answers, expected, started))
    return rows


def _evaluated(
    way: str, scores: dict[str, float], answers: dict[str, Any], expected: dict[str, Any], started: float
) -> Row:
    return Row(
        client=f"lm-eval {LM_EVAL}",
        what=f"local-completions by way of {way}: samples whose loglikelihoods and texts equal the single process's",
        ok=sum(answers.get(sample) == answer for sample, answer in expected.items()),
        asked=len(expected),
        seconds=time.monotonic() - started,
        said=", ".join(f"{name} {value:.3f}" for name, value in scores.items()),
    )


async def measured(python: Path, one: Benchmark, url: str, reference: str, build: Path) -> list[Row]:
    """A benchmark against the single process and the pair."""
    rows, expected = [], list[str]()
    for way, asked in (("the single process", reference), ("kvbaton router", url)):
        started = time.monotonic()
        result = build / f"{one.name.replace(' ', '-')}-{way.split()[-1]}.json"
        figures, texts = await benchmarks.measure(python, one, asked, result)
        expected = expected or texts
        rows.append(
            Row(
                client=one.name,
                what=f"by way of {way}: texts equal to the single process's",
                ok=sum(ours == theirs for ours, theirs in zip(texts, expected, strict=False)),
                asked=benchmarks.PROMPTS,
                seconds=time.monotonic() - started,
                said=", ".join(f"{name} {value:.4g}" for name, value in figures.items()),
            )
        )
    return rows


@dataclass(frozen=True, kw_only=True, slots=True)
class Clients:
    """Their interpreters, and Prometheus' promtool; None: not there, and not run."""

    python: Path
    vllm: Path | None = None
    sglang: Path | None = None
    promtool: str | None = None

    def benchmarks(self) -> Iterator[tuple[Path, Benchmark]]:
        for python, several in ((self.vllm, benchmarks.VLLM), (self.sglang, benchmarks.SGLANG)):
            if python is not None:
                yield from ((python, one) for one in several)


async def perform(
    clients: Clients, build: Path, *, count: int, tell: Callable[[Row], None], parts: Sequence[str] = PARTS
) -> list[Row]:
    """Everything; each row is told as it comes."""
    rows: list[Row] = []
    python = clients.python

    async def note(made: Awaitable[Row] | Awaitable[list[Row]]) -> None:
        found = await made
        for row in found if isinstance(found, list) else [found]:
            rows.append(row)
            tell(row)

    async with Fleet(build, model=MODEL, reference=True) as fleet:
        for server in fleet.servers:
            await fleet.ready(server, READY_SECONDS)
        assert fleet.reference is not None  # noqa: S101 - asked for above
        single, ours, http = fleet.reference.url, fleet.router.url, fleet.http
        if "shapes" in parts:
            await note(shapes(http, "kvbaton router", ours, single))
        for part, client, file in (("sdk", SDK_CLIENT, SCRIPT), ("chains", CHAINS_CLIENT, CHAINS_SCRIPT)):
            if part in parts:
                expected = await script(python, single, file)
                await note(compared(python, client, "the single process", single, expected, file))
                await note(compared(python, client, "kvbaton router", ours, expected, file))
        if "lm-eval" in parts:
            await note(scored(python, ours, single, build, count))
        for other, one in clients.benchmarks() if "benchmarks" in parts else ():
            await note(measured(other, one, ours, single, build))
        if "routers" in parts:
            expected = await script(python, single)
            for name, more in ((f"sglang-router {SGLANG_ROUTER}", ()), ("its --mini-lb", ("--mini-lb",))):
                async with sglang_router(python, fleet, build, *more) as url:
                    await note(shapes(http, name, url, single, () if more else ROUTER_REFUSES))
                    await note(recall(http, name, url, single, count))
                    if not more:
                        await note(compared(python, SDK_CLIENT, name, url, expected, SCRIPT, ROUTERS_OWN))
        if "promtool" in parts and clients.promtool is not None:
            await note(checked(clients.promtool, fleet, fleet.servers))
    return rows
