"""What an operator may set of the protocol, by flag and by variable, arrives where it counts."""

from pathlib import Path

import msgspec
import pytest

from kvbaton.cli.main import main
from kvbaton.cli.program import WRONG
from kvbaton.plan.costs import Costs
from kvbaton.protocol.settings import Settings
from kvbaton.serving.server.launch import ServeConfig

FLAGS = {
    "--disaggregation-handshake-timeout": "1.5",
    "--disaggregation-bootstrap-timeout": "2.5",
    "--disaggregation-waiting-timeout": "3.5",
    "--disaggregation-heartbeat-interval": "4.5",
}


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[ServeConfig]:
    """Configurations that would have been served."""
    configs: list[ServeConfig] = []
    monkeypatch.setattr("kvbaton.cli.serve.exit_on_sigterm", lambda: None)
    monkeypatch.setattr("kvbaton.cli.program.start_logging", lambda _level: None)
    monkeypatch.setattr("kvbaton.serving.server.launch.serve", lambda config, **_: configs.append(config))
    return configs


def test_deadlines_by_flag_and_by_variable_are_the_same(served: list[ServeConfig]) -> None:
    words = [word for pair in FLAGS.items() for word in pair]
    variables = {"KVBATON_" + flag[2:].upper().replace("-", "_"): value for flag, value in FLAGS.items()}
    assert main(["serve", "--model", "m", *words], {}) == 0
    assert main(["serve", "--model", "m"], variables) == 0
    for config in served:
        settings = config.settings()
        assert settings.handshake_timeout == 1.5
        assert settings.bootstrap_timeout == 2.5
        assert settings.waiting_timeout == 3.5
        assert settings.silence_seconds == 9.0


def test_without_flags_the_protocols_own_deadlines_hold(served: list[ServeConfig]) -> None:
    assert main(["serve", "--model", "m"], {}) == 0
    assert served[0].settings() == Settings()


def test_an_advertised_address_must_be_one(served: list[ServeConfig], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--model", "m", "--disaggregation-control-advertise", "10.0.0.1:99"], {}) == WRONG
    assert "tcp://" in capsys.readouterr().err
    assert main(["serve", "--model", "m", "--disaggregation-control-advertise", "tcp://10.0.0.1:99"], {}) == 0
    assert [config.control_advertise for config in served] == ["tcp://10.0.0.1:99"]


def test_staging_by_flag_and_by_variable_are_the_same(served: list[ServeConfig], tmp_path: Path) -> None:
    costs = Costs(descriptor_seconds=1e-5)
    file = tmp_path / "costs.json"
    file.write_bytes(msgspec.json.encode(costs))
    flags = {
        "--staging": "always",
        "--staging-mib": "8",
        "--staging-slot-bytes": "65536",
        "--transfer-costs": str(file),
        "--disaggregation-mode": "decode",
    }
    words = [word for pair in flags.items() for word in pair]
    variables = {"KVBATON_" + flag[2:].upper().replace("-", "_"): value for flag, value in flags.items()}
    assert main(["serve", "--model", "m", *words], {}) == 0
    assert main(["serve", "--model", "m"], variables) == 0
    for config in served:
        assert (config.staging_bytes, config.staging_slot_bytes) == (8 << 20, 65536)
        assert (config.settings().staging, config.settings().costs) == ("always", costs)


def test_only_halves_of_a_pair_get_staging_memory(served: list[ServeConfig]) -> None:
    prefill = ["serve", "--model", "m", "--disaggregation-mode", "prefill"]
    for words in (
        ["serve", "--model", "m"],
        [*prefill, "--staging", "never"],
        [*prefill, "--staging-mib", "0"],
        prefill,
    ):
        assert main(words, {}) == 0
    assert [config.staging_bytes for config in served] == [0, 0, 0, None]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--staging-mib", "1", "--staging-slot-bytes", "1048577"], "set --staging-mib to at least 2"),
        (["--staging", "always", "--staging-mib", "0"], "set --staging-mib to at least 1"),
        (["--staging-mib", "-1"], "is not a whole number of at least 0"),
        (["--transfer-costs", "/no/such/file"], "write one with `kvbaton bench calibrate`"),
    ],
)
def test_staging_that_cannot_be_is_refused(
    served: list[ServeConfig], capsys: pytest.CaptureFixture[str], words: list[str], says: str
) -> None:
    try:
        code = main(["serve", "--model", "m", *words], {})
    except SystemExit as stop:  # argparse ends the process itself
        code = stop.code
    assert code == WRONG
    assert says in capsys.readouterr().err
    assert served == []
