"""Which cases run on which scene, and a row for each."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from kvbaton.errors import KVBatonError
from lab.sglang import cases
from lab.sglang.cases import Case
from lab.sglang.requests import Refused
from lab.sglang.scene import Scene, Setting, opened


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    scene: str
    case: str
    ok: bool
    seconds: float
    said: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Play:
    """One scene and its cases, in order."""

    name: str
    setting: Setting
    cases: tuple[Case, ...]


TOKENS = (cases.lengths, cases.many_at_once)

PLAYS: Sequence[Play] = (
    Play(
        name="qwen3",
        setting=Setting(family="qwen3"),
        cases=(
            *TOKENS,
            cases.metrics,
            cases.duplicate_room,
            cases.client_gone,
            cases.aborts,
            cases.idle,
            cases.through_sglang_router,
            cases.through_our_router,
            cases.decode_killed,
            cases.prefill_killed,
        ),
    ),
    Play(name="qwen3, recorded", setting=Setting(family="qwen3", recorded=True), cases=(cases.contract,)),
    Play(
        name="qwen3, radix cache on decode",
        setting=Setting(family="qwen3", decode_arguments=("--disaggregation-decode-enable-radix-cache",)),
        cases=(cases.prefix_hits, *TOKENS),
    ),
    Play(
        name="qwen3, decode short of pages",
        setting=Setting(family="qwen3", tokens=2_048, decode_arguments=("--num-reserved-decode-tokens", "16")),
        cases=(cases.retraction,),
    ),
    Play(
        name="qwen3, with a secret",
        setting=Setting(family="qwen3", secret=True),
        cases=(cases.lengths, cases.strangers),
    ),
    Play(name="qwen3, TP 2 to 1", setting=Setting(family="qwen3", tp=(2, 1)), cases=TOKENS),
    Play(
        name="qwen3, staged, TP 2 to 1",
        setting=Setting(family="qwen3", tp=(2, 1), options={"staging": "always"}),
        cases=TOKENS,
    ),
    Play(name="qwen3, TP 1 to 2", setting=Setting(family="qwen3", tp=(1, 2)), cases=TOKENS),
    Play(name="deepseek_v3", setting=Setting(family="deepseek_v3"), cases=TOKENS),
    Play(name="gemma3", setting=Setting(family="gemma3"), cases=TOKENS),
)


async def perform(
    plays: Sequence[Play], *, only: str, python: Path, models: Path, logs: Path, tell: Callable[[Row], None]
) -> list[Row]:
    """Run what ``only`` names (a part of a case's name; empty: all)."""
    rows: list[Row] = []

    def add(row: Row) -> None:
        rows.append(row)
        tell(row)

    for play in plays:
        chosen = [case for case in play.cases if only in case.__name__]
        if not chosen:
            continue
        try:
            async with opened(play.setting, name=play.name, python=python, models=models, logs=logs) as scene:
                for case in chosen:
                    add(await _row(play, case, scene))
        except KVBatonError as error:
            add(Row(scene=play.name, case="start", ok=False, seconds=0.0, said=str(error)))
    return rows


async def _row(play: Play, case: Case, scene: Scene) -> Row:
    started = time.monotonic()
    try:
        ok, said = True, await case(scene)
    except (AssertionError, KVBatonError, Refused, aiohttp.ClientError, TimeoutError) as error:
        ok, said = False, f"{type(error).__name__}: {error}"
    return Row(scene=play.name, case=case.__name__, ok=ok, seconds=time.monotonic() - started, said=said)
