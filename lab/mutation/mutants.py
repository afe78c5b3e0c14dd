"""Mutation testing of the protocol: small changes to its source, each of which some test must notice.

    python -m lab mutate [--sample 300] [--seed 1] [--jobs 2] [--json FILE] [--write docs/simulation.md]
    python -m lab mutate --from FILE --again [...]                   only what lived then, with the tests of today
    python -m lab mutate --from FILE --write docs/simulation.md      run nothing: what --json wrote before

For every mutant of ``protocol/`` and ``plan/pair.py`` (one operator changed, one condition negated, one statement
dropped, one table cell ignored, ...) a forked process imports the changed module and runs a fixed sample of the
simulator, then the fast unit and property tests, until something fails. What nothing fails for has survived, and is
printed as a diff. A mutant that takes longer than the time limit is killed too: it hangs.

Not changed, because no behaviour is wrong afterwards: what is for people (texts, stories, ``__repr__``), annotations,
the default of a field, the number behind an enum's member, the size of a bound that a module-level CONSTANT names
(tests read the constant; the code that uses it is changed), and by how much a counter counts (that it counts is
changed).
"""

from __future__ import annotations

import argparse
import ast
import copy
import difflib
import importlib.abc
import importlib.util
import json
import os
import random
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from lab.mutation import report

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src"
SUBJECTS = [*sorted((SOURCE / "kvbaton" / "protocol").glob("*.py")), SOURCE / "kvbaton" / "plan" / "pair.py"]
TESTS = (
    "tests/unit/protocol",
    "tests/unit/test_grants.py",
    "tests/unit/test_timers.py",
    "tests/unit/test_plan.py",
    "tests/unit/test_staging.py",
    "tests/unit/test_compatibility.py",
    "tests/unit/test_verify.py",
    "tests/property",
)
EXPLAINED = ROOT / "tests" / "sim" / "survivors.toml"
#: Seeds of the simulator that every mutant meets before the unit tests.
SIM_SEEDS = 240
#: A mutant that needs longer than this in wall time hangs.
LIMIT_SECONDS = 240
KILLED_BY = {10: "simulator", 11: "tests", 12: "import"}
SURVIVED = 0

_COMPARISONS: dict[type, type] = {
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
_OPERATORS: dict[type, type] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.FloorDiv,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
}


@dataclass(frozen=True)
class Mutant:
    """A changed module. ``node`` numbers the node in the order of ``ast.walk``, ``how`` names the change."""

    path: Path
    node: int
    how: str
    line: int

    @property
    def module(self) -> str:
        return ".".join(self.path.relative_to(SOURCE).with_suffix("").parts)

    def tree(self) -> ast.Module:
        tree = ast.parse(self.path.read_text(encoding="utf-8"))
        _change(list(ast.walk(tree))[self.node], self.how)
        return ast.fix_missing_locations(tree)

    def diff(self) -> list[str]:
        if self.how.startswith("ignore cell"):
            return self._cell()
        before = ast.unparse(ast.parse(self.path.read_text(encoding="utf-8"))).splitlines()
        after = ast.unparse(self.tree()).splitlines()
        lines = list(difflib.unified_diff(before, after, lineterm="", n=0))[3:]
        return [line.strip() for line in lines if not line.startswith("@@")]

    def _cell(self) -> list[str]:
        """A table is one statement: its whole diff would be unreadable."""
        nodes = list(ast.walk(ast.parse(self.path.read_text(encoding="utf-8"))))
        row, number = nodes[self.node], int(self.how.rpartition(" ")[2])
        states = {
            id(v): ast.unparse(k)
            for n in nodes
            if isinstance(n, ast.Dict)
            for k, v in zip(n.keys, n.values, strict=True)
            if k
        }
        cell = f"{states.get(id(row), '')}: {ast.unparse(row.keys[number])}"  # type: ignore[attr-defined]
        return [f"-{cell}: {ast.unparse(row.values[number])}", f"+{cell}: _STALE"]  # type: ignore[attr-defined]


def mutants(path: Path) -> Iterator[Mutant]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    quiet = {id(inner) for outer in ast.walk(tree) for part in _quiet_parts(outer) for inner in ast.walk(part)}
    quiet |= {id(inner) for bound in tree.body if _is_bound(bound) for inner in ast.walk(bound)}
    for number, node in enumerate(ast.walk(tree)):
        if id(node) not in quiet:
            for how in _changes(node):
                yield Mutant(path, number, how, getattr(node, "lineno", 0))


def _quiet_parts(node: ast.AST) -> list[ast.AST]:
    """What is left alone of a node, and all that is in it."""
    if _is_quiet(node):
        return [node]
    parts: list[ast.AST] = list(getattr(node, "decorator_list", ()))  # frozen, slots: for people and type checkers
    if isinstance(node, ast.AnnAssign):
        parts.append(node.annotation)
    elif isinstance(node, ast.ClassDef):  # defaults of fields, numbers of an enum's members
        is_enum = any(isinstance(base, ast.Attribute) and "Enum" in base.attr for base in node.bases)
        parts += [
            one for one in node.body if isinstance(one, ast.AnnAssign) or (is_enum and isinstance(one, ast.Assign))
        ]
    elif isinstance(node, ast.AugAssign) and _is_counter(node.target):
        parts.append(node.value)
    return parts


def _is_counter(node: ast.AST) -> bool:
    home = node.value if isinstance(node, ast.Subscript) else None
    return isinstance(home, ast.Attribute) and home.attr == "counters"


def _is_bound(node: ast.AST) -> bool:
    """``MAX_ROWS = 1 << 20``: arithmetic on numbers alone, in capitals."""
    if not (isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id.isupper()):
        return False
    arithmetic = ast.Constant | ast.BinOp | ast.UnaryOp | ast.operator | ast.unaryop
    return all(isinstance(inner, arithmetic) for inner in ast.walk(node.value))


def _is_quiet(node: ast.AST) -> bool:
    """What is for people only: imports, texts, stories, ``__repr__``."""
    if isinstance(node, ast.Import | ast.ImportFrom | ast.JoinedStr):
        return True
    if isinstance(node, ast.FunctionDef) and node.name in ("__repr__", "story", "waits_for", "sizes", "describe"):
        return True
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return True
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "tell":
        return True
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and _is_quiet(node.value)


def _changes(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in _COMPARISONS:
        yield "comparison"
    elif isinstance(node, ast.BoolOp):
        yield "and-or"
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield "drop not"
    elif isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        yield "operator"
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield "truth"
    elif isinstance(node, ast.Constant) and isinstance(node.value, int):
        yield "number"
    elif isinstance(node, ast.If) and not isinstance(node.test, ast.Compare | ast.BoolOp | ast.UnaryOp):
        yield "negate"
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield "drop call"
    elif isinstance(node, ast.Raise | ast.AugAssign) or _assigns_elsewhere(node):
        yield "drop statement"
    elif isinstance(node, ast.Dict) and node.keys and isinstance(node.keys[-1], ast.Attribute):
        for i, value in enumerate(node.values):
            home = value.value if isinstance(value, ast.Attribute) else None
            if isinstance(home, ast.Name) and home.id in ("sending", "receiving"):
                yield f"ignore cell {i}"


def _assigns_elsewhere(node: ast.AST) -> bool:
    """An assignment that outlives its function; a local one would only be a NameError."""
    return isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute | ast.Subscript)


def _change(node: ast.AST, how: str) -> None:
    if isinstance(node, ast.Compare):
        node.ops = [_COMPARISONS[type(node.ops[0])]()]
    elif isinstance(node, ast.BoolOp):
        node.op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
    elif isinstance(node, ast.UnaryOp):
        _become(node, node.operand)
    elif isinstance(node, ast.BinOp):
        node.op = _OPERATORS[type(node.op)]()
    elif isinstance(node, ast.Constant):
        node.value = (not node.value) if isinstance(node.value, bool) else node.value + 1  # type: ignore[operator]
    elif isinstance(node, ast.If):
        node.test = ast.UnaryOp(ast.Not(), node.test)
    elif isinstance(node, ast.Dict):
        node.values[int(how.rpartition(" ")[2])] = ast.Name("_STALE", ast.Load())
    else:
        _become(node, ast.Pass())


def _become(node: ast.AST, other: ast.AST) -> None:
    other = copy.copy(other)
    node.__class__ = other.__class__
    keep = {name: getattr(node, name) for name in ("lineno", "col_offset", "end_lineno", "end_col_offset")}
    node.__dict__.clear()
    node.__dict__.update({**keep, **other.__dict__})


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports one module from a changed tree."""

    def __init__(self, mutant: Mutant) -> None:
        self._mutant = mutant

    def find_spec(
        self, name: str, _path: Sequence[str] | None, _target: ModuleType | None = None, /
    ) -> ModuleSpec | None:
        if name != self._mutant.module:
            return None
        return importlib.util.spec_from_loader(name, self, origin=str(self._mutant.path))

    def exec_module(self, module: ModuleType) -> None:
        module.__file__ = str(self._mutant.path)
        exec(compile(self._mutant.tree(), str(self._mutant.path), "exec"), module.__dict__)


def trial(mutant: Mutant | None, log: Path) -> int:
    """In a forked process: what kills the mutant, as an exit code."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.chdir(ROOT)
    if mutant is not None:
        sys.meta_path.insert(0, Finder(mutant))
    try:
        from kvbaton.testing.sim.campaign import run_seeds
    except Exception as error:  # noqa: BLE001
        print(error)
        return 12
    for first in range(0, SIM_SEEDS, 20):
        findings = run_seeds(range(first, first + 20)).findings
        if findings:
            print(findings[0])
            return 10
    import pytest

    arguments = ["-x", "-q", "-p", "no:cacheprovider", "--hypothesis-seed=1", *TESTS]
    return SURVIVED if pytest.main(arguments) == 0 else 11


def _guarded(mutant: Mutant, log: Path) -> int:
    try:
        return trial(mutant, log)
    except BaseException:  # noqa: BLE001 - whatever it is kills the mutant
        traceback.print_exc()
        return 13


@dataclass
class Running:
    mutant: Mutant
    started: float
    log: Path


def run_all(chosen: Sequence[Mutant], jobs: int, limit: float) -> Iterator[tuple[Mutant, str, float]]:
    """Try mutants, ``jobs`` at a time; (mutant, what killed it or "", seconds)."""
    waiting, running = list(reversed(chosen)), dict[int, Running]()
    while waiting or running:
        while waiting and len(running) < jobs:
            mutant = waiting.pop()
            log = Path(f"/tmp/kvbaton-mutant-{os.getpid()}-{len(waiting)}.log")
            child = os.fork()
            if child == 0:
                os.setpgid(0, 0)
                os._exit(_guarded(mutant, log))
            running[child] = Running(mutant, time.monotonic(), log)
        child, status = os.waitpid(-1, os.WNOHANG)
        if child:
            done = running.pop(child)
            code = os.waitstatus_to_exitcode(status)
            if code != 13:
                done.log.unlink(missing_ok=True)
            yield done.mutant, _verdict(code), time.monotonic() - done.started
            continue
        for pid, late in running.items():
            if time.monotonic() - late.started > limit:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def _verdict(code: int) -> str:
    if code == SURVIVED:
        return ""
    return "time limit" if code == -signal.SIGKILL else KILLED_BY.get(code, "crash")


def campaign(options: argparse.Namespace) -> int:
    """Try mutants as ``lab.commands.mutate`` says. Returns an exit code."""
    every = [m for path in SUBJECTS for m in mutants(path) if options.only in m.module]
    if options.recorded:
        records = json.loads(options.recorded.read_text(encoding="utf-8"))
        if options.again:
            _try_again(records, every, options)
    else:
        count = min(options.sample, len(every)) if options.sample else len(every)
        chosen = every if count == len(every) else random.Random(options.seed).sample(every, count)
        print(f"{len(every)} mutants of {len(SUBJECTS)} modules, {len(chosen)} tried", file=sys.stderr)
        records = _try(chosen, options)
    if options.write:
        report.write(options.write, records, len(every), EXPLAINED)
    verdicts = Counter(record["verdict"] for record in records)
    killed = len(records) - verdicts["survived"]
    print(f"score {killed / len(records):.3f}: {killed} of {len(records)} killed, {dict(verdicts)}")
    return 0


def _try_again(records: list[dict[str, Any]], every: Sequence[Mutant], options: argparse.Namespace) -> None:
    """What kills by now each mutant that lived when it was drawn: ``since`` in its record."""
    chosen: dict[Mutant, dict[str, Any]] = {}
    for record in records:
        if record["verdict"] != "survived" or record.get("since"):
            continue
        module, _, line = record["where"].rpartition(":")
        alike = [m for m in every if m.module == f"kvbaton.{module}" and m.how == record["how"]]
        same = [m for m in alike if m not in chosen and m.diff() == record["diff"]]
        if same:  # lines may have moved
            chosen[min(same, key=lambda mutant: abs(mutant.line - int(line)))] = record
        else:
            record["since"] = "not in the source any more"
    for mutant, verdict, _ in run_all(list(chosen), options.jobs, options.limit):
        chosen[mutant]["since"] = verdict
        print(f"{chosen[mutant]['where']} {mutant.how}: {verdict or 'lives'}", file=sys.stderr)
    if options.json:
        options.json.write_text(json.dumps(records, indent=1), encoding="utf-8")


def _where(mutant: Mutant) -> str:
    return f"{mutant.module.removeprefix('kvbaton.')}:{mutant.line}"


def _try(chosen: Sequence[Mutant], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Run mutants; what became of each, told while it goes on."""
    import msgspec  # noqa: F401 - what mutants do not touch is imported once
    import numpy  # noqa: F401
    import pytest  # noqa: F401

    verdicts, records = Counter[str](), list[dict[str, Any]]()
    for number, (mutant, verdict, seconds) in enumerate(run_all(chosen, options.jobs, options.limit), 1):
        verdicts[verdict or "survived"] += 1
        where = _where(mutant)
        records.append({"where": where, "how": mutant.how, "verdict": verdict or "survived", "seconds": seconds})
        if not verdict:
            records[-1]["diff"] = mutant.diff()
            print(f"survived {where} {mutant.how}: {' '.join(mutant.diff())}", flush=True)
        if number % 20 == 0:
            print(f"{number} of {len(chosen)}: {dict(verdicts)}", file=sys.stderr)
        if options.json:
            options.json.write_text(json.dumps(records, indent=1), encoding="utf-8")
    return records
