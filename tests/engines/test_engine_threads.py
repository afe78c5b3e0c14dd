"""Who loads a model or makes its pools keeps no OpenMP threads: they would slow the engine's down."""

from __future__ import annotations

import subprocess
import sys

import pytest

from kvbaton.errors import ConfigError
from kvbaton.serving.engine.threads import aside, use_threads

#: A process of its own: in this one others may have asked for threads long ago.
SCRIPT = """
import os, time, torch
from kvbaton.serving.engine.memory import PoolConfig
from kvbaton.serving.engine.model import load_model
from kvbaton.serving.engine.pool import Pools
from kvbaton.serving.engine.threads import aside, use_threads

use_threads(2)

def threads():
    return len(os.listdir("/proc/self/task"))

def settled():  # those of a thread that has ended take a moment to end, too
    until, least = time.monotonic() + 1.0, threads()
    while time.monotonic() < until:
        least = min(least, threads())
    return least

aside(lambda: torch.zeros(1 << 22).add_(1.0))  # torch keeps one for all of the process
kept = settled()
model = load_model("recall", threads=2)
pools = Pools(model.geometry, PoolConfig(pages=4096), model=model.fingerprint)
print(kept, settled())
torch.zeros(1 << 22).add_(1.0)  # what would have happened
print(threads())
"""


def test_neither_loading_nor_pools_leave_threads_behind() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    kept, after, with_openmp = map(int, done.stdout.split())
    assert after <= kept < with_openmp


def test_what_is_done_aside_returns_or_raises() -> None:
    assert aside(lambda: 7) == 7
    with pytest.raises(ConfigError, match="threads=0"):
        aside(lambda: use_threads(0))
