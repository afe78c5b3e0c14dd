"""The embedded engine on a device: prefill and decode against the single process, token for token."""

from __future__ import annotations

import subprocess
import sys

import msgspec

from kvbaton.errors import InternalError, KVBatonError
from lab.gpu.pool import Device

DEMO_SECONDS = 150.0


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
