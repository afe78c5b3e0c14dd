"""The list of the deployment's rules fits the source: what takes one out can be done."""

from __future__ import annotations

import pytest

from kvbaton.errors import ConfigError
from lab.mutation.rules import ROOT, Rule, rules


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule.name)
def test_a_rule_can_be_taken_out(rule: Rule) -> None:
    path = ROOT / "src" / "kvbaton" / rule.file
    source = path.read_text(encoding="utf-8")
    without = rule.taken_out(source)
    assert without != source
    compile(without, str(path), "exec")
    assert rule.tests
    assert all((ROOT / test.split()[0]).exists() for test in rule.tests)


def test_a_text_that_is_not_there_or_not_the_only_one_is_refused() -> None:
    rule = Rule(name="r", file="f", text="x = 1\n", without="", tests=())
    for source in ("", "x = 1\nx = 1\n"):
        with pytest.raises(ConfigError, match="'r': f has its text"):
            rule.taken_out(source)
