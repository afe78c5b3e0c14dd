"""Flags, and the environment variable behind each: ``--page-size`` is ``KVBATON_PAGE_SIZE``; the flag wins.

Rules: a variable is read as if its flag had been typed, so there is one parser and one message for both. A flag that
takes several values is given as words (``KVBATON_DECODE="http://a:1"``), a flag that may be repeated as groups
separated by ``;`` (``KVBATON_PREFILL="http://a:1 8998; http://b:1 8999"``), a switch as 1/0, true/false, yes/no or
on/off.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from kvbaton.errors import ConfigError
from kvbaton.plan.costs import Costs

T = TypeVar("T")
PREFIX = "KVBATON_"
LOG_FORMAT = "[%(asctime)s] %(levelname)s %(name)s: %(message)s"
#: Flags whose values are not for a log.
_NOT_SAID = ("api_key",)
HIDDEN = "(set)"
LOG_LEVELS = ("debug", "info", "warning", "error")
_SWITCHES = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}


def variable_of(action: argparse.Action) -> str | None:
    """The variable of a flag; None for positionals and ``--help``."""
    flags = [option for option in action.option_strings if option.startswith("--")]
    if not flags or action.dest == "help":
        return None
    return PREFIX + flags[0][2:].upper().replace("-", "_")


def with_environment(
    parser: argparse.ArgumentParser, arguments: Sequence[str], environment: Mapping[str, str]
) -> tuple[list[str], set[str]]:
    """``arguments`` completed by the variables of flags that are not among them, and the names of those variables.

    Raises ConfigError for a switch that is neither on nor off.
    """
    typed = {argument.partition("=")[0] for argument in arguments if argument.startswith("-")}
    completed: list[str] = []
    used: set[str] = set()
    for action in parser._actions:  # argparse has no public list of them
        variable = variable_of(action)
        if variable is None or variable not in environment or typed & set(action.option_strings):
            continue
        used.add(variable)
        completed += _words(action, variable, environment[variable])
    return [*arguments, *completed], used


def _words(action: argparse.Action, variable: str, value: str) -> list[str]:
    flag = next(option for option in action.option_strings if option.startswith("--"))
    if action.nargs == 0:
        switch = _SWITCHES.get(value.strip().lower())
        if switch is None:
            raise ConfigError(f"{variable}={value!r} is neither on nor off; use 1 or 0")
        return [flag] if switch else []
    repeatable = isinstance(action.default, list) or type(action).__name__ == "_AppendAction"
    groups = [group for group in value.split(";") if group.strip()] if repeatable else [value]
    if action.nargs is None:
        return [f"{flag}={group.strip() if repeatable else group}" for group in groups]
    return [word for group in groups for word in (flag, *shlex.split(group))]


def describe(options: argparse.Namespace, parser: argparse.ArgumentParser, used: set[str]) -> str:
    """The resolved settings in one line; those that came from a variable name it."""
    parts = []
    for action in parser._actions:
        variable = variable_of(action)
        if variable is not None:
            origin = f" ({variable})" if variable in used else ""
            value = getattr(options, action.dest)
            parts.append(f"{action.dest}={HIDDEN if value and action.dest in _NOT_SAID else value}{origin}")
    return " ".join(parts)


def config_of(kind: type[T], options: argparse.Namespace) -> T:
    """A dataclass whose fields are called as their flags are, but for the ``disaggregation`` in front of some; a flag
    that was left out and has no default leaves that of the field."""
    given: dict[str, Any] = {}
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        value = getattr(options, field.name, getattr(options, f"disaggregation_{field.name}", None))
        if value is not None:
            given[field.name] = tuple(value) if isinstance(value, list) else value
    return kind(**given)


def add_allowed_host(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--allowed-host",
        action="append",
        metavar="HOST[:PORT]",
        help="further name under which clients or decode servers reach this server's ports, as behind a proxy or "
        "address translation, repeatable; on loopback requests to other names are refused",
    )


def add_allowed_origin(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--allowed-origin",
        action="append",
        metavar="ORIGIN",
        help="other site, as http://chat.example:3000, whose pages may ask this server from a browser (CORS), "
        "repeatable; *: every site",
    )


def add_api_keys(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--api-key",
        action="append",
        metavar="KEY",
        help="key that clients must show, repeatable; none: everybody may ask",
    )
    parser.add_argument(
        "--api-key-file", type=Path, default=None, metavar="FILE", help="file with further keys, one in each line"
    )


def add_strict_fields(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--strict-fields",
        action="store_true",
        help="refuse a request with a field that nobody knows, instead of ignoring the field",
    )


def add_grace_period(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--grace-period-secs",
        type=seconds,
        default=30.0,
        help="seconds that running requests may take to finish after SIGTERM",
    )


def add_log_level(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--log-level", choices=LOG_LEVELS, default="info", help="least level of logs on stderr")


def start_logging(level: str) -> None:
    """Logs go to stderr; stdout is for data."""
    logging.basicConfig(stream=sys.stderr, level=level.upper(), format=LOG_FORMAT, force=True)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # the hub's client logs every request


def port(text: str) -> int:
    """An argparse type: 0 (the system chooses) to 65535."""
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port (0 to 65535)")
    return int(text)


def positive(text: str) -> int:
    """An argparse type: a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def natural(text: str) -> int:
    """An argparse type: a whole number of at least 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 0")
    return int(text)


def seconds(text: str) -> float:
    """An argparse type: a duration above 0."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return value


def share(text: str) -> float:
    """An argparse type: a part, 0 to 1."""
    return _between(text, 0.0, 1.0)


def factor(text: str) -> float:
    """An argparse type: a factor of at least 1."""
    return _between(text, 1.0, 1e6)


def _between(text: str, least: float, most: float) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not least <= value <= most:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from {least:g} to {most:g}")
    return value


def transfer_costs(file: Path | None) -> Costs | None:
    """Costs from a file that ``bench calibrate`` wrote; None without one. Raises ConfigError with its name."""
    if file is None:
        return None
    try:
        return msgspec.json.decode(file.read_bytes(), type=Costs)
    except (OSError, msgspec.MsgspecError) as error:
        raise ConfigError(f"--transfer-costs {file}: {error}; write one with `kvbaton bench calibrate`") from error
