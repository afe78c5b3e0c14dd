"""What the mutation report says of verdicts, survivors and their explanations."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvbaton.errors import ConfigError
from lab.mutation import report as mutation_report

RECORDS = [
    {"where": "protocol.rooms:12", "how": "negate", "verdict": "simulator", "seconds": 1.0},
    {"where": "protocol.rooms:30", "how": "number", "verdict": "survived", "seconds": 9.0, "diff": ["- a | b", "+ a"]},
    {"where": "plan:7", "how": "truth", "verdict": "survived", "seconds": 9.0, "diff": ["- True", "+ False"]},
]
EXPLAINED = """
[[survivor]]
module = "protocol.rooms"
diff = ["- a | b", "+ a"]
why = "nobody can see it"

[[survivor]]
module = "protocol.rooms"
diff = ["- gone"]
why = "was killed since"
"""


def test_a_survivor_that_is_killed_by_now_leaves_the_list_and_not_the_score() -> None:
    killed = [*RECORDS[:2], {**RECORDS[2], "since": "tests"}]
    section = mutation_report.section(killed, 10, {})
    assert "**Score 0.333**: 1 of 3" in section
    assert "1 of the 2 survivors are killed by tests that were written since, or" in section
    assert "`plan.py:7`" not in section
    assert "`protocol/rooms.py:30`" in section


def test_the_section_is_put_between_the_markers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, explained = tmp_path / "page.md", tmp_path / "survivors.toml"
    page.write_text("before\n<!-- mutation -->\nold\n<!-- /mutation -->\nafter\n")
    explained.write_text(EXPLAINED)
    mutation_report.write(page, RECORDS, 10, explained)
    written = page.read_text()
    assert written.startswith("before\n")
    assert written.endswith("<!-- /mutation -->\nafter\n")
    assert "old" not in written
    assert "**Score 0.333**: 1 of 3 mutants killed (3 of 10, drawn at random, were tried)." in written
    assert "| survived | 2 |" in written
    assert r"| `protocol/rooms.py:30` | `- a \| b`<br>`+ a` | nobody can see it |" in written
    assert "| `plan.py:7` | `- True`<br>`+ False` | not explained yet |" in written
    told = capsys.readouterr().err
    assert "without an explanation: plan: - True + False" in told
    assert "no survivor of this run: protocol.rooms: - gone" in told


def test_the_repositorys_explanations_are_read() -> None:
    mutation_report.explanations(Path(__file__).parents[1] / "sim" / "survivors.toml")


def test_a_wrong_explanation_is_named(tmp_path: Path) -> None:
    (tmp_path / "wrong.toml").write_text('[[survivor]]\nmodule = "plan"\n')
    with pytest.raises(ConfigError, match=r"wrong\.toml"):
        mutation_report.explanations(tmp_path / "wrong.toml")
