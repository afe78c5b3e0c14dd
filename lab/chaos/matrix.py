"""Runs cells one after another in as few scenes as possible; a cell that goes wrong gets its successors a new scene."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path

from kvbaton.errors import KVBatonError
from lab.chaos.cell import CellResult, FaultCell
from lab.chaos.fault import Spec
from lab.chaos.scene import Expected, Scene, expected_answers

Progress = Callable[[Spec, CellResult | None], None]


async def run_matrix(
    specs: Sequence[Spec], directory: Path, progress: Progress, *, expected: Expected | None = None
) -> list[CellResult]:
    """Results in the order of ``specs``; ``progress`` is called before each (None) and after. ``expected``: what every
    answer must be, if that is known; else a single process is started and asked."""
    expected = expected or await expected_answers(directory)
    results: list[CellResult] = []
    for (network, workers), cells in itertools.groupby(specs, lambda spec: (spec.network, spec.workers)):
        scene: Scene | None = None
        async with AsyncExitStack() as closing:
            for spec in cells:
                progress(spec, None)
                try:
                    if scene is None:
                        await closing.aclose()
                        fresh = Scene(directory, expected, network=network, workers=workers)
                        scene = await closing.enter_async_context(fresh)
                    result = await FaultCell(scene, spec).run()
                except KVBatonError as error:
                    result = CellResult(spec=spec, outcome="broken", failures=(f"{type(error).__name__}: {error}",))
                if not result.ok:
                    scene = None
                results.append(result)
                progress(spec, result)
    return results
