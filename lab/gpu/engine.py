"""The embedded engine on a device: a pair against the single process, token for token, and layers ahead of the rest."""

from __future__ import annotations

import subprocess
import sys

import msgspec

from kvbaton.errors import InternalError, KVBatonError
from lab.gpu.pool import Device
from lab.layers.measure import Width, measure

DEMO_SECONDS = 150.0
#: A wide cache and little to compute for it, so that moving takes a good part of the time.
WIDTHS: dict[Device, Width] = {"cuda": Width(layers=16, hidden=1024, head=128), "cpu": Width(layers=4)}
#: The longest does not fit the staging memory of a rank.
LENGTHS: dict[Device, tuple[int, ...]] = {"cuda": (1024, 4096), "cpu": (256,)}
LAYERS_ROUNDS = 5


def check_layers(device: Device) -> dict[str, object]:
    """Time to the first token with layers that go ahead of their chunk, and without; both give the same tokens.
    Raises KVBatonError."""
    cases = measure(
        LENGTHS[device],
        WIDTHS[device],
        rounds=LAYERS_ROUNDS,
        threads=1,
        network="",
        device=device,
        progress=lambda _text: None,
    )
    heads = ("whole_ms", "ahead_ms", "exposed_whole_ms", "exposed_ahead_ms", "cpu_whole_ms", "cpu_ahead_ms")
    return {
        f"{case.tokens}": {
            "bytes": case.bytes,
            **dict(zip(heads, case.milliseconds(), strict=True)),
            "ratio": case.ratio,
            "writes": case.writes,
        }
        for case in cases
    }


def check_engine(device: Device) -> dict[str, object]:
    """The demo's prompts. Raises KVBatonError where an answer differs or the demo does not end."""
    command = [sys.executable, "-m", "kvbaton.cli.main", "demo", "--device", device, "--json"]
    try:
        done = subprocess.run(command, capture_output=True, timeout=DEMO_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise InternalError(f"the demo did not end within {DEMO_SECONDS:g} s") from None
    lines = done.stdout.decode().strip().splitlines()
    if not lines:
        raise InternalError(f"the demo ended with {done.returncode}: {done.stderr.decode(errors='replace')[-2000:]}")
    found = msgspec.json.decode(lines[-1])
    wrong = [answer["title"] for answer in found["answers"] if not answer["equal"]]
    if wrong:
        raise KVBatonError(f"{len(wrong)} of {len(found['answers'])} answers differ: {', '.join(wrong[:5])}")
    return {
        "equal": len(found["answers"]),
        "path": found["path"],
        "handoff_bytes": sum(answer["handoff_bytes"] for answer in found["answers"]),
    }
