"""``kvbaton demo``: one prefill, one decode, one router as processes; every answer compared with a single process."""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from kvbaton.cli.settings import add_log_level, positive
from kvbaton.cli.signals import exit_on_sigterm
from kvbaton.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from kvbaton.serving.demo.show import Compared
    from kvbaton.serving.fleet import Fleet

STREAMED = 3
SHOWN_CHARACTERS = 28


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="recall", help="a directory, a bundled model, or a hub id")
    parser.add_argument("--concurrent", type=positive, default=32, help="prompts asked at once")
    parser.add_argument(
        "--disaggregation-transfer-backend", choices=("nixl", "memory"), default="nixl", help="how bytes travel"
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where the servers compute")
    parser.add_argument("--json", action="store_true", help="data on stdout instead of a table")
    add_log_level(parser)


def run(options: argparse.Namespace) -> int:
    exit_on_sigterm()
    try:
        from rich.console import Console

        import kvbaton.serving.server.launch  # noqa: F401 - all that the servers need is here, or fail now
    except ModuleNotFoundError as error:
        raise ConfigError(f"the demo needs the package {error.name!r}", hint="pip install 'kvbaton[serve]'") from None
    return asyncio.run(_demo(options, Console(stderr=True, highlight=False)))


async def _demo(options: argparse.Namespace, console: Console) -> int:
    from kvbaton.serving.demo.show import CHUNK_TOKENS, PAGE_SIZE
    from kvbaton.serving.fleet import Fleet

    with tempfile.TemporaryDirectory(prefix="kvbaton-demo-") as directory:
        fleet = Fleet(
            Path(directory),
            model=options.model,
            reference=True,
            backend=options.disaggregation_transfer_backend,
            extra=(
                *("--page-size", str(PAGE_SIZE), "--chunked-prefill-size", str(CHUNK_TOKENS)),
                *("--device", options.device),
            ),
        )
        async with fleet:
            await _wait(fleet, console)
            await _stream(fleet, console)
            compared = await _compare(fleet, options.concurrent, console)
            await fleet.all_returned()
            path = (await fleet.info(fleet.prefills[0]))["handoff"]["evidence"] or "unknown"
    if options.json:
        sys.stdout.write(msgspec.json.encode(_data(compared, path)).decode() + "\n")
    else:
        _print(compared, path)
    return 0 if all(one.equal for one in compared) else 1


async def _wait(fleet: Fleet, console: Console) -> None:
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(finished_text="[green]✓"), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:

        async def watch(name: str, task: int) -> None:
            server = next(server for server in fleet.servers if server.name == name)
            await fleet.ready(server)
            progress.update(progress.task_ids[task], completed=1, description=f"{name} ready at {server.url}")

        for server in fleet.servers:
            progress.add_task(f"{server.name} starts", total=1)
        await asyncio.gather(*(watch(server.name, task) for task, server in enumerate(fleet.servers)))


async def _stream(fleet: Fleet, console: Console) -> None:
    from kvbaton.serving.demo.show import concurrent_questions, stream

    for question in concurrent_questions(STREAMED):
        console.print(f"[dim]…{_short(question.prompt)}[/dim] ", end="")
        async for piece in stream(fleet.http, fleet.router.url, question):
            console.print(piece, end="", style="bold", markup=False)
        console.print()


async def _compare(fleet: Fleet, count: int, console: Console) -> list[Compared]:
    from kvbaton.serving.demo.show import Compared, ask, ask_all, concurrent_questions, edge_questions

    assert fleet.reference is not None  # noqa: S101 - asked for above
    edges, many = edge_questions(), concurrent_questions(count)
    with console.status("asking at the edges of pages and chunks") as status:
        answers = [await ask(fleet.http, fleet.router.url, question) for question in edges]
        status.update(f"asking {count} at once")
        answers += await ask_all(fleet.http, fleet.router.url, many)
        status.update("asking the single process")
        references = [await ask(fleet.http, fleet.reference.url, question) for question in (*edges, *many)]
    return [
        Compared(question=question, answer=answer, reference=reference)
        for question, answer, reference in zip((*edges, *many), answers, references, strict=True)
    ]


def _short(prompt: str) -> str:
    return prompt[-SHOWN_CHARACTERS:].replace("\n", "⏎")


def _data(compared: list[Compared], path: str) -> dict[str, object]:
    return {
        "equal": all(one.equal for one in compared),
        "path": path,
        "answers": [
            {
                "title": one.question.title,
                "prompt": one.question.prompt,
                "text": one.answer.text,
                "tokens": one.answer.tokens,
                "reference_tokens": one.reference.tokens,
                "equal": one.equal,
                "handoff_bytes": one.answer.bytes,
                "handoff_seconds": one.answer.seconds,
                "exposed_seconds": one.answer.exposed_seconds,
                "error": one.answer.error or one.reference.error,
            }
            for one in compared
        ],
    }


def _print(compared: list[Compared], path: str) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title="prefill → decode, against a single process", title_justify="left")
    for heading in ("what", "prompt ends with", "answer", "equal"):
        table.add_column(heading)
    for heading in ("bytes handed over", "grant to arrival ms", "exposed hand-off ms"):
        table.add_column(heading, justify="right")
    for one in compared:
        answer = one.answer
        table.add_row(
            one.question.title,
            Text(_short(one.question.prompt)),
            Text(answer.error or answer.text.replace("\n", "⏎")),
            Text("yes", "green") if one.equal else Text("NO", "bold red"),
            f"{answer.bytes:,}",
            f"{answer.seconds * 1e3:.1f}",
            f"{answer.exposed_seconds * 1e3:.2f}",
        )
    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
    console.print(table)
    equal = sum(one.equal for one in compared)
    total = sum(one.answer.bytes for one in compared)
    console.print(f"{equal} of {len(compared)} answers equal, token for token; {total:,} bytes handed over by {path}")
    console.print("no page, slot or room is held any more; all processes have ended")
