"""A command line that is wrong gets one line, with the word that was probably meant."""

from __future__ import annotations

import pytest

from kvbaton.cli.main import main


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["serve", "--modle", "x"], "--modle is no flag of kvbaton serve; did you mean --model?"),
        (["serve", "--model=x", "--zzz"], "--zzz is no flag of kvbaton serve"),
        (["serve", "--model", "x", "--dtype", "float23"], "did you mean float32?"),
        (["serve", "--model", "x", "--port", "many"], "argument --port: "),
        (["serve"], "the following arguments are required: --model"),
        (["rooter"], "did you mean router?"),
    ],
)
def test_what_is_wrong_is_one_line(typed: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(typed, {}) == 2
    lines = capsys.readouterr().err.splitlines()
    assert said in lines[0]
    assert [line.partition(" ")[0] for line in lines] == ["kvbaton:", "hint:"]


@pytest.mark.parametrize("flags", [["--tp", "2"], ["--pp", "2"], ["--dp", "2"]])
def test_short_names_of_parallel_sizes(flags: list[str]) -> None:
    from kvbaton.cli.main import KVBATON

    parser, _ = KVBATON.parsers(("serve",))
    options = parser.parse_args(["serve", "--model", "x", *flags])
    sizes = (options.tensor_parallel_size, options.pipeline_parallel_size, options.data_parallel_size)
    assert sorted(sizes) == [1, 1, 2]


def test_a_device_that_is_not_there_is_said_before_anything_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from kvbaton.errors import ConfigError
    from kvbaton.serving.engine.model import check_device

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    check_device("cpu")
    with pytest.raises(ConfigError, match="--device cuda"):
        check_device("cuda")


def test_keys_are_not_in_the_line_of_settings() -> None:
    from kvbaton.cli.main import KVBATON
    from kvbaton.cli.settings import describe

    parser, own = KVBATON.parsers(("serve",))
    options = parser.parse_args(["serve", "--model", "x", "--api-key", "a-key-of-somebody"])
    said = describe(options, own["serve"], set())
    assert "api_key=(set)" in said
    assert "a-key-of-somebody" not in said
