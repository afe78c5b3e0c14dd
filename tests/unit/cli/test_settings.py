"""Flags and the variables behind them."""

import argparse

import pytest

from kvbaton.cli import router, serve
from kvbaton.cli.settings import describe, port, positive, seconds, variable_of, with_environment
from kvbaton.errors import ConfigError


def parser_of(command) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    command.add_arguments(parser)
    return parser


def parsed(command, arguments, environment):
    parser = parser_of(command)
    completed, used = with_environment(parser, arguments, environment)
    return parser.parse_args(completed), used


def test_every_flag_has_its_own_variable():
    for command in (serve, router):
        variables = [variable_of(action) for action in parser_of(command)._actions]
        named = [variable for variable in variables if variable is not None]
        assert len(named) == len(set(named)) > 10
        assert all(variable.startswith("KVBATON_") for variable in named)


def test_a_variable_stands_in_for_a_flag_that_was_not_typed():
    environment = {"KVBATON_MODEL": "m", "KVBATON_PORT": "1234", "KVBATON_PAGE_SIZE": "32", "OTHER": "x"}
    options, used = parsed(serve, ["--port", "99"], environment)
    assert (options.model, options.port, options.page_size) == ("m", 99, 32)
    assert used == {"KVBATON_MODEL", "KVBATON_PAGE_SIZE"}
    assert parsed(serve, ["--port=98"], environment)[0].port == 98
    assert parsed(serve, ["--model-path", "n"], environment)[0].model == "n"


def test_repeated_flags_come_in_groups():
    environment = {"KVBATON_PREFILL": "http://a:1 8998; http://b:2", "KVBATON_DECODE": "http://c:3;http://d:4;"}
    options, _ = parsed(router, [], environment)
    assert options.prefill == [["http://a:1", "8998"], ["http://b:2"]]
    assert options.decode == [["http://c:3"], ["http://d:4"]]
    options, _ = parsed(router, ["--prefill", "http://x:1"], environment)
    assert options.prefill == [["http://x:1"]]  # the flag wins, nothing is merged
    options, _ = parsed(serve, ["--model", "m"], {"KVBATON_DISAGGREGATION_BOOTSTRAP_ALLOW": "a; b:1"})
    assert options.disaggregation_bootstrap_allow == ["a", "b:1"]


@pytest.mark.parametrize(("value", "expected"), [("1", True), ("Yes", True), ("off", False), ("FALSE", False)])
def test_switches(value, expected):
    assert parsed(router, [], {"KVBATON_PD_DISAGGREGATION": value})[0].pd_disaggregation is expected


def test_a_switch_that_is_neither_on_nor_off():
    with pytest.raises(ConfigError, match="KVBATON_PD_DISAGGREGATION='maybe' is neither on nor off"):
        parsed(router, [], {"KVBATON_PD_DISAGGREGATION": "maybe"})


def test_the_settings_in_use_say_where_they_come_from():
    parser = parser_of(serve)
    completed, used = with_environment(parser, ["--model", "m"], {"KVBATON_PORT": "5"})
    text = describe(parser.parse_args(completed), parser, used)
    assert "model=m " in text
    assert "port=5 (KVBATON_PORT)" in text
    assert "page_size=16 " in text


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        *((port, text) for text in ("65536", "-1", "x", "")),
        *((positive, text) for text in ("0", "1.5", "²", "-1")),
        *((seconds, text) for text in ("0", "inf", "nan", "x")),
    ],
)
def test_values_that_are_none(kind, text):
    with pytest.raises(argparse.ArgumentTypeError):
        kind(text)


def test_values():
    assert (port("0"), port("65535"), positive("7"), seconds("0.5")) == (0, 65535, 7, 0.5)
