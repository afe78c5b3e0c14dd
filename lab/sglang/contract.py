"""The calls that SGLang makes of a transfer backend, recorded from real processes, and compared with those that are
kept.

The record is kept in ``tests/sglang``, where a test replays it on our halves without SGLang: a new version of SGLang
that calls in another order, or with other numbers, shows here first. Of the polls are kept the first that said
WaitingForInput, Success or Failed; how often a scheduler polls in between depends on the clock.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

KEPT = Path(__file__).parents[2] / "tests" / "sglang" / "calls_0_5_23.json"
#: Names the directory that the recorder writes to.
DIRECTORY = "KVBATON_LAB_CALLS"

Record = dict[str, list[Any]]


def read(directory: Path) -> Record:
    """What was written into ``directory``, by role: one list of calls for each request, and the memory."""
    found: Record = {}
    for role in ("prefill", "decode"):
        rooms: dict[int, list[Any]] = {}
        for line in (directory / f"{role}.jsonl").read_bytes().splitlines():
            room, name, carried = msgspec.json.decode(line)
            rooms.setdefault(room, []).append([name, carried])
        found[role] = list(rooms.values())
    return found


def plug_in(directory: Path, module: str) -> Path:
    """A package of metadata alone, by which SGLang finds ``lab.sglang.MODULE:load``; for PYTHONPATH."""
    found = directory / f"kvbaton_lab_{module}-0.dist-info"
    found.mkdir(parents=True, exist_ok=True)
    (found / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kvbaton-lab-{module}\nVersion: 0\n")
    (found / "entry_points.txt").write_text(f"[sglang.srt.plugins]\nkvbaton_{module} = lab.sglang.{module}:load\n")
    return directory
