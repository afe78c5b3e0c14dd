"""``kvbaton COMMAND``: the commands that come with the package."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

from kvbaton.cli.program import Program

KVBATON = Program(
    name="kvbaton",
    description="Hands the cache of a prompt from prefill to decode.",
    commands={
        "serve": ("kvbaton.cli.serve", "serve a model: alone, or as the prefill or decode half of a pair"),
        "router": ("kvbaton.cli.router", "send every request to a prefill and a decode server at once"),
        "demo": (
            "kvbaton.cli.demo",
            "hand prompts over between two processes and compare every token with a single process",
        ),
        "story": ("kvbaton.cli.story", "tell what happened to a room, on both sides, and what it waits for now"),
        "check": (
            "kvbaton.cli.check",
            "compare the layouts of a prefill and a decode side: every difference, before any traffic",
        ),
        "layout": ("kvbaton.cli.layout", "write down the memory of running ranks, of any engine, for check"),
        "plan": ("kvbaton.cli.plan", "draw who sends what to whom between two topologies of a model"),
        "eval": ("kvbaton.cli.eval", "measure a server's answers"),
        "bench": (
            "kvbaton.cli.bench",
            "measure the data plane against raw NIXL and memcpy, in one run, with verified bytes",
        ),
        "sim": (
            "kvbaton.cli.sim",
            "try to break the protocol: real cores and plans in simulated worlds full of faults, each from one seed",
        ),
    },
)


def main(arguments: Sequence[str] | None = None, environment: Mapping[str, str] | None = None) -> int:
    """Run one command; returns its exit code."""
    return KVBATON.main(arguments, environment)


if __name__ == "__main__":
    sys.exit(main())
