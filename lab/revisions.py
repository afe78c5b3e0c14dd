"""The embedded engine of an earlier revision of kvbaton against the one here: two processes that take turns.

Both run the same weights on as many threads and answer the same prompts greedily; one waits while the other computes.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from types import TracebackType

import msgspec

from kvbaton.errors import ConfigError, PeerLostError
from lab.rounds import Order, Played, Round, Scenario

ROOT = Path(__file__).parents[1]


def sources(revision: str, directory: Path) -> Path:
    """The ``src`` of a revision, laid into ``directory``. Raises ConfigError."""
    found = subprocess.run(("git", "archive", revision, "src"), cwd=ROOT, capture_output=True, check=False)
    if found.returncode:
        raise ConfigError(f"{revision}: {found.stderr.decode('utf-8', 'replace').strip()}")
    directory.mkdir(parents=True, exist_ok=True)
    with tarfile.open(fileobj=io.BytesIO(found.stdout)) as archive:
        archive.extractall(directory, filter="data")
    return directory / "src"


class Contestant:
    """One engine in a process of its own; a context manager."""

    def __init__(self, source: Path, model: Path, threads: int) -> None:
        path = os.pathsep.join((str(source), str(ROOT)))
        self._process = subprocess.Popen(
            (sys.executable, "-m", "lab.rounds", str(model), str(threads)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=source,
            env={**os.environ, "PYTHONPATH": path},
        )

    def play(self, scenario: Scenario, seed: int) -> Played:
        """Raises PeerLostError where the process has ended."""
        assert self._process.stdin is not None  # noqa: S101 - pipes, as asked for above
        assert self._process.stdout is not None  # noqa: S101
        self._process.stdin.write(msgspec.json.encode(Order(scenario, seed)) + b"\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise PeerLostError("an engine has ended; what it said is above")
        return msgspec.json.decode(line, type=Played)

    def __enter__(self) -> Contestant:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()


@dataclass(slots=True)
class Comparison:
    """``equal`` answers of ``answers``, over all rounds."""

    scenario: Scenario
    before: list[Round] = field(default_factory=list)
    after: list[Round] = field(default_factory=list)
    equal: int = 0
    answers: int = 0

    @property
    def wall_ratio(self) -> float:
        """Of what a round takes: 1.02 is 2 % slower than before."""
        return median(one.wall for one in self.after) / median(one.wall for one in self.before)

    @property
    def processor_ratio(self) -> float:
        return median(one.processor for one in self.after) / median(one.processor for one in self.before)


def compare(before: Contestant, after: Contestant, scenario: Scenario, rounds: int) -> Comparison:
    """``rounds`` of each in turn, who goes first changing, after a short one that warms up."""
    result = Comparison(scenario)
    for one in (before, after):
        one.play(Scenario(scenario.prompts, 16, 2), -1)
    for number in range(rounds):
        order = (before, after) if number % 2 else (after, before)
        played = {one: one.play(scenario, number) for one in order}
        result.before.append(played[before].round)
        result.after.append(played[after].round)
        pairs = zip(played[before].answers, played[after].answers, strict=True)
        result.equal += sum(ours == theirs for ours, theirs in pairs)
        result.answers += scenario.prompts
    return result
