"""The calls that vLLM makes for hand-offs, recorded from real processes, and compared with those that are kept.

The record is kept in ``tests/vllm``, where a test replays it against a stand-in of vLLM: a new version of vLLM that
calls in another order, or with other numbers, shows here first. How often a step repeats in which nothing happens
depends on the clock and is left out. Of each half are kept:

- ``start``: the calls before the first step, by name
- ``steps``: the orders of calls within a step that occur, by name
- ``life``: calls that concern a request, with what they carry
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

KEPT = Path(__file__).parents[2] / "tests" / "vllm" / "calls_0_32.json"
#: Names the directory that the recording connector writes to.
DIRECTORY = "KVBATON_LAB_CALLS"
#: Calls that open a step.
OPENING = ("build_connector_meta", "handle_preemptions", "bind_connector_metadata")

#: Calls that come between steps, whenever a request arrives or goes on.
BETWEEN = (
    "on_new_request",
    "get_num_new_matched_tokens",
    "get_loaded_kv_cache_group_ids",
    "update_state_after_alloc",
)

Record = dict[str, dict[str, list[Any]]]


def read(directory: Path, halves: Sequence[str] = ("scheduler", "worker")) -> Record:
    """The record of what was written into ``directory``."""
    found = {}
    for half in halves:
        lines = (directory / f"{half}.jsonl").read_bytes().splitlines()
        found[half] = _sorted_out([msgspec.json.decode(line) for line in lines])
    return found


def _sorted_out(calls: list[tuple[str, Any]]) -> dict[str, list[Any]]:
    start: list[str] = []
    steps: list[list[str]] = []
    for name, _ in calls:
        opens = name in OPENING and not (steps and steps[-1] == ["handle_preemptions"])
        if opens:
            steps.append([])
        if name not in BETWEEN:
            (steps[-1] if steps else start).append(name)
    return {
        "start": start,
        "steps": sorted(msgspec.json.decode(step) for step in {msgspec.json.encode(_once(step)) for step in steps}),
        "life": [[name, carried] for name, carried in calls if any_of(carried)],
    }


def _once(step: list[str]) -> list[str]:
    """Names in order, each once: how many requests a step concerns is not what is kept."""
    return list(dict.fromkeys(step))


def any_of(carried: Any) -> bool:
    """Whether a call carried anything: counts that are all zero did not."""
    return any(any_of(each) for each in carried) if isinstance(carried, list) else bool(carried)
