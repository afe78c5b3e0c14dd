"""What an operator may set of the router, by flag and by variable, arrives where it counts."""

from __future__ import annotations

import argparse
import dataclasses

import pytest

from kvbaton.cli import router
from kvbaton.cli.settings import with_environment
from kvbaton.errors import ConfigError
from kvbaton.serving.router.router import RouterConfig

PAIR = ["--prefill", "http://127.0.0.1:1", "--decode", "http://127.0.0.1:2"]
#: Flags that are about the process, or that others of the configuration are made of.
NO_FIELD = {
    *("prefill", "decode", "pd_disaggregation", "host", "port", "log_level", "grace_period_secs"),
    *("worker_startup_timeout_secs", "secret_file", "api_key", "api_key_file", "allowed_host", "allowed_origin"),
}
CHECKS = {
    "--health-check-interval-secs": ("interval_secs", "0.25", 0.25),
    "--health-check-timeout-secs": ("timeout_secs", "0.5", 0.5),
    "--health-failure-threshold": ("failure_threshold", "7", 7),
    "--health-check-endpoint": ("endpoint", "/alive", "/alive"),
}


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser()
    router.add_arguments(made)
    return made


def configured(words: list[str], environment: dict[str, str] | None = None) -> RouterConfig:
    completed, _ = with_environment(parser(), [*PAIR, *words], environment or {})
    return router.router_config(parser().parse_args(completed))


@pytest.mark.parametrize("flag", CHECKS)
def test_limits_of_health_checks_by_flag_and_by_variable(flag: str) -> None:
    name, value, expected = CHECKS[flag]
    assert getattr(configured([]).health_checks, name) != expected
    assert getattr(configured([flag, value]).health_checks, name) == expected
    variable = "KVBATON_" + flag[2:].upper().replace("-", "_")
    assert getattr(configured([], {variable: value}).health_checks, name) == expected


def test_every_flag_goes_somewhere() -> None:
    flags = {action.dest for action in parser()._actions} - {"help"}
    assert flags - {field.name for field in dataclasses.fields(RouterConfig)} == NO_FIELD


def test_a_route_of_health_checks_begins_with_a_slash() -> None:
    with pytest.raises(ConfigError, match="--health-check-endpoint 'ready' must begin with /"):
        configured(["--health-check-endpoint", "ready"])
