"""The deployment's rules, each taken out of the source in turn: the tests that are named for it must fail.

    python -m lab rules [--only WORDS]

What :mod:`lab.mutation.mutants` does by chance for the protocol, ``rules.toml`` does by hand for what surrounds it: the
router, its probes, circuits and retries, the registry, what is compared before anything is sent. Every rule is first
checked with its tests as they are, which must pass, and then without the rule, where each must fail. The source is
changed in a copy of the tree.

This file must not know what the rules say.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import msgspec

from kvbaton.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
RULES = Path(__file__).with_suffix(".toml")
TREE = ("src", "tests", "lab", "examples", "pyproject.toml", "README.md")
#: A test that takes longer hangs without the rule.
LIMIT_SECONDS = 60.0
_FAILED, _NONE_FOUND = 1, 5


class Rule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """See ``rules.toml``. ``file`` is below ``src/kvbaton``; each of ``tests`` is a file and options of pytest."""

    name: str
    file: str
    text: str
    without: str
    tests: tuple[str, ...]

    def taken_out(self, source: str) -> str:
        """Raises ConfigError unless ``text`` is there exactly once."""
        count = source.count(self.text)
        if count != 1:
            raise ConfigError(f"rules.toml: {self.name!r}: {self.file} has its text {count} times")
        return source.replace(self.text, self.without)


class _Rules(msgspec.Struct, forbid_unknown_fields=True):
    rule: tuple[Rule, ...]


def rules() -> tuple[Rule, ...]:
    return msgspec.convert(tomllib.loads(RULES.read_text(encoding="utf-8")), _Rules).rule


def campaign(only: str = "", jobs: int = 2) -> int:
    """Try every rule whose name contains ``only``. Returns an exit code: 0 if its tests notice each."""
    chosen = [rule for rule in rules() if only in rule.name]
    kept: list[str] = []
    with ThreadPoolExecutor(jobs) as pool:
        for number, (rule, verdict) in enumerate(zip(chosen, pool.map(_try, chosen), strict=True), 1):
            print(f"{number:3} of {len(chosen)}  {verdict:8}  {rule.name}", flush=True)
            if verdict != "noticed":
                kept.append(rule.name)
    print(f"{len(chosen) - len(kept)} of {len(chosen)} rules: their tests notice when they are taken out")
    return 1 if kept else 0


def _try(rule: Rule) -> str:
    with _copy() as tree:
        if any(_run(tree, test) != 0 for test in rule.tests):
            return "broken"  # before anything was changed
        path = tree / "src" / "kvbaton" / rule.file
        path.write_text(rule.taken_out(path.read_text(encoding="utf-8")), encoding="utf-8")
        outcomes = [_run(tree, test) for test in rule.tests]
    return "noticed" if all(outcome == _FAILED for outcome in outcomes) else "kept"


def _run(tree: Path, test: str) -> int:
    """pytest's exit code; that of a failure where the test hangs."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *shlex.split(test)]
    try:
        done = subprocess.run(command, cwd=tree, capture_output=True, check=False, timeout=LIMIT_SECONDS)
    except subprocess.TimeoutExpired:
        return _FAILED
    if done.returncode == _NONE_FOUND:
        raise ConfigError(f"rules.toml: no test is chosen by {test!r}")
    return done.returncode


@contextmanager
def _copy() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="kvbaton-rules-") as directory:
        tree = Path(directory)
        for name in TREE:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy2(ROOT / name, tree / name)
        yield tree
