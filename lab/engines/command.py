"""The command line of a campaign: which scenes and cases, where the engine's environment and the logs are."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from kvbaton.errors import ConfigError
from lab.engines.campaign import Play, Row, perform

SceneT = TypeVar("SceneT")
SettingT = TypeVar("SettingT")


def add_campaign_arguments(parser: argparse.ArgumentParser, name: str, engine: str) -> None:
    parser.add_argument("--scene", default="", help="only the scene of this name, or those with it in their name")
    parser.add_argument("--case", default="", help="only cases with one of these in their name, separated by commas")
    parser.add_argument("--json", action="store_true", help="one JSON object a row on stdout")
    parser.add_argument(
        "--venv", type=Path, default=Path(f".venv-{name}"), help=f"{engine}'s environment, made if missing"
    )
    parser.add_argument("--build", type=Path, default=Path(f"build/{name}"), help="where models and logs go")


def run_campaign(
    options: argparse.Namespace,
    plays: Sequence[Play[SettingT, SceneT]],
    opened: Callable[..., AbstractAsyncContextManager[SceneT]],
    prepare: Callable[[Path], Path],
) -> int:
    """``opened`` is given a play, and by name ``python``, ``models`` and ``logs``. The exit status."""
    chosen = [play for play in plays if play.name == options.scene]
    chosen = chosen or [play for play in plays if options.scene in play.name]
    if not chosen:
        raise ConfigError(f"no scene is called {options.scene!r}; there are: {', '.join(play.name for play in plays)}")
    python = prepare(options.venv.absolute())
    logs = options.build / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    where: dict[str, Any] = {"python": python, "models": options.build / "models", "logs": logs}

    def tell(row: Row) -> None:
        if options.json:
            print(msgspec.json.encode(row).decode(), flush=True)
        mark = "ok  " if row.ok else "FAIL"
        print(f"{mark} {row.scene}: {row.case} ({row.seconds:.0f} s): {row.said}", file=sys.stderr, flush=True)

    rows = asyncio.run(perform(chosen, lambda play: opened(play, **where), only=options.case, tell=tell))
    print(f"{sum(row.ok for row in rows)} of {len(rows)} cases green", file=sys.stderr)
    return 0 if rows and all(row.ok for row in rows) else 1
