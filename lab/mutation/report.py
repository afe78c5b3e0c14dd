"""What ``mutants.py`` found, as a section of a Markdown page: score, verdicts, and each survivor with why it may live.

Explanations are in ``tests/sim/survivors.toml``, keyed by module and diff, so that they outlive lines that move::

    [[survivor]]
    module = "protocol.session"
    diff = ["- self.greeting = 1", "+ self.greeting = 2"]
    why = "greetings are compared only"

The same change at several places of a module has one explanation. This file must not know how mutants are made or run.
"""

from __future__ import annotations

import sys
import tomllib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kvbaton.errors import ConfigError
from lab.docs.page import filled

START, END = "<!-- mutation -->", "<!-- /mutation -->"
SURVIVED = "survived"
UNEXPLAINED = "not explained yet"
#: One verdict as ``python -m lab mutate --json`` writes it: where, how, verdict, seconds, and of survivors the diff;
#: ``since`` is what kills a survivor by now, empty if nothing does.
Record = Mapping[str, Any]
Key = tuple[str, tuple[str, ...]]


def explanations(path: Path) -> dict[Key, str]:
    """By module and diff. Raises ConfigError."""
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
        return {(one["module"], tuple(one["diff"])): one["why"] for one in found.get("survivor", ())}
    except (OSError, tomllib.TOMLDecodeError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: {error!r}; each [[survivor]] has module, diff (a list) and why") from error


def key_of(record: Record) -> Key:
    return record["where"].rpartition(":")[0], tuple(record.get("diff", ()))


def section(records: Sequence[Record], every: int, why: Mapping[Key, str]) -> str:
    """``every``: how many mutants there are, of which ``records`` are a sample."""
    if not records:
        raise ConfigError("no verdict was recorded: there is nothing to write")
    verdicts = Counter(record["verdict"] for record in records)
    tried, killed = len(records), len(records) - verdicts[SURVIVED]
    drawn = f"all {tried}" if tried == every else f"{tried} of {every}, drawn at random,"
    lines = [
        f"**Score {killed / tried:.3f}**: {killed} of {tried} mutants killed ({drawn} were tried).",
        "",
        "| verdict | mutants |",
        "|---|---|",
        *(f"| {name} | {count} |" for name, count in verdicts.most_common()),
    ]
    survivors = sorted(filter(_lives, records), key=_place)
    since = verdicts[SURVIVED] - len(survivors)
    if since:
        what = "are killed by tests that were written since, or are no longer in the source"
        lines += ["", f"{since} of the {verdicts[SURVIVED]} survivors {what}."]
    if survivors:
        lines += ["", "| survivor | change | why it may live |", "|---|---|---|"]
        lines += [f"| {_file(one)} | {_change(one)} | {why.get(key_of(one), UNEXPLAINED)} |" for one in survivors]
    return "\n".join(lines)


def _lives(record: Record) -> bool:
    return record["verdict"] == SURVIVED and not record.get("since")


def _place(record: Record) -> tuple[str, int]:
    module, _, line = record["where"].rpartition(":")
    return module, int(line)


def _file(record: Record) -> str:
    module, line = _place(record)
    return f"`{module.replace('.', '/')}.py:{line}`"


def _change(record: Record) -> str:
    return "<br>".join(_code(line) for line in record["diff"])


def _code(text: str) -> str:
    fence = "``" if "`" in text else "`"
    return f"{fence}{text}{fence}".replace("|", r"\|")


def write(page: Path, records: Sequence[Record], every: int, explained: Path) -> None:
    """Put the section between the page's markers, and say on stderr which explanations are missing or unused.

    Raises ConfigError.
    """
    why = explanations(explained)
    text = page.read_text(encoding="utf-8")
    page.write_text(filled(page, text, START, END, section(records, every, why)), encoding="utf-8")
    seen = {key_of(record) for record in records if _lives(record)}
    _complain("without an explanation", seen - why.keys())
    _complain("explained, but no survivor of this run", why.keys() - seen)


def _complain(what: str, keys: Iterable[Key]) -> None:
    for module, diff in sorted(keys):
        print(f"{what}: {module}: {' '.join(diff)}", file=sys.stderr)
