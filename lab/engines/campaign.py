"""Which cases run on which scene, and a row for each."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import aiohttp

from kvbaton.errors import KVBatonError
from lab.engines.requests import Refused

SceneT = TypeVar("SceneT")
SettingT = TypeVar("SettingT")


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    scene: str
    case: str
    ok: bool
    seconds: float
    said: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Play(Generic[SettingT, SceneT]):
    """One scene and its cases, in order. A case asks something of the scene and says in one line what came of it, or
    raises AssertionError."""

    name: str
    setting: SettingT
    cases: tuple[Callable[[SceneT], Awaitable[str]], ...]


#: Starts a play's servers; ends them.
Opened = Callable[[Play[SettingT, SceneT]], AbstractAsyncContextManager[SceneT]]


def check(got: Any, expected: Any, what: str) -> None:
    """Raises AssertionError unless they are equal."""
    if got != expected:
        raise AssertionError(f"{what}: {got} instead of {expected}")


async def perform(
    plays: Sequence[Play[SettingT, SceneT]],
    opened: Opened[SettingT, SceneT],
    *,
    only: str,
    tell: Callable[[Row], None],
) -> list[Row]:
    """Run what ``only`` names (parts of cases' names, separated by commas; empty: all)."""
    rows: list[Row] = []

    def add(row: Row) -> None:
        rows.append(row)
        tell(row)

    for play in plays:
        chosen = [case for case in play.cases if any(part in case.__name__ for part in only.split(","))]
        if not chosen:
            continue
        try:
            async with opened(play) as scene:
                for case in chosen:
                    add(await _row(play.name, case, scene))
        except KVBatonError as error:
            add(Row(scene=play.name, case="start", ok=False, seconds=0.0, said=str(error)))
    return rows


async def _row(name: str, case: Callable[[SceneT], Awaitable[str]], scene: SceneT) -> Row:
    started = time.monotonic()
    try:
        ok, said = True, await case(scene)
    except (AssertionError, KVBatonError, Refused, aiohttp.ClientError, TimeoutError) as error:
        ok, said = False, f"{type(error).__name__}: {error}"
    return Row(scene=name, case=case.__name__, ok=ok, seconds=time.monotonic() - started, said=said)
