"""``kvbaton eval``: asks a server questions that only an intact cache can answer."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec

from kvbaton.cli.settings import add_log_level, positive, seconds
from kvbaton.errors import ConfigError
from kvbaton.serving.evaluation.recall import ANSWER_LENGTH, RecallPrompt, is_correct, make_prompts, score

if TYPE_CHECKING:
    from kvbaton.serving.evaluation.client import Completion

SEED = 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("task", choices=("recall",), help="recall: in-context key to value, greedy")
    parser.add_argument("--url", required=True, help="an OpenAI-compatible server, e.g. http://127.0.0.1:8000")
    parser.add_argument("-n", "--count", type=positive, default=200, help="questions")
    parser.add_argument("--concurrency", type=positive, default=8, help="questions at once")
    parser.add_argument("--seed", type=int, default=SEED, help="the same seed asks the same questions")
    parser.add_argument("--model", default=None, help="the model's name; left out: the server's first")
    parser.add_argument("--timeout-secs", type=seconds, default=300.0, help="limit of one question")
    parser.add_argument("--json", action="store_true", help="data on stdout, with every answer")
    add_log_level(parser)


def run(options: argparse.Namespace) -> int:
    if options.seed < 0:
        raise ConfigError(f"--seed {options.seed} must be at least 0")
    prompts = make_prompts(options.count, options.seed)
    try:
        completions = asyncio.run(_ask(options, prompts))
    except ModuleNotFoundError as error:
        raise ConfigError(f"eval needs the package {error.name!r}", hint="pip install 'kvbaton[serve]'") from None
    failed = [completion for completion in completions if completion.error]
    if options.json:
        print(msgspec.json.encode(_report(options, prompts, completions)).decode())
    else:
        result = score(prompts, [completion.text for completion in completions])
        print(f"recall: {result.accuracy:.4f} ({result.correct} of {result.total} right, {len(failed)} failed)")
    for completion in failed[:3]:
        print(f"kvbaton: a question failed: {completion.error}", file=sys.stderr)
    return 1 if failed else 0


async def _ask(options: argparse.Namespace, prompts: Sequence[RecallPrompt]) -> list[Completion]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from kvbaton.serving.evaluation.client import CompletionClient

    columns = (TextColumn("recall"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    async with CompletionClient(options.url, model=options.model, timeout_seconds=options.timeout_secs) as client:
        with Progress(*columns, console=Console(stderr=True)) as progress:
            task = progress.add_task("recall", total=len(prompts))
            return await client.complete_all(
                [prompt.prompt for prompt in prompts],
                max_tokens=ANSWER_LENGTH,
                concurrency=options.concurrency,
                done=lambda _completion: progress.advance(task),
            )


def _report(
    options: argparse.Namespace, prompts: Sequence[RecallPrompt], completions: Sequence[Completion]
) -> dict[str, object]:
    result = score(prompts, [completion.text for completion in completions])
    return {
        "task": "recall",
        "url": options.url,
        "seed": options.seed,
        "count": result.total,
        "correct": result.correct,
        "accuracy": result.accuracy,
        "failed": sum(1 for completion in completions if completion.error),
        "answers": [
            {
                "prompt": prompt.prompt,
                "expected": prompt.answer,
                "answer": completion.text,
                "correct": is_correct(prompt, completion.text),
                "error": completion.error,
                "seconds": completion.seconds,
            }
            for prompt, completion in zip(prompts, completions, strict=True)
        ],
    }
