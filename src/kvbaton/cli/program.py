"""A program of commands: imports the one that is asked for, runs it, turns errors into one line and an exit code.

Exit codes: 0 done; 1 it went wrong while running; 2 a setting or argument is wrong and nothing was started; 130 Ctrl-C.
A command is a module with ``add_arguments(parser)`` and ``run(options) -> int``; its line in ``--help`` stands in the
program's table, so that ``--help`` imports no command.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

from kvbaton import __version__
from kvbaton.cli.settings import describe, start_logging, with_environment
from kvbaton.cli.spelling import OneLineParser, check_flags
from kvbaton.cli.stderr import forgiving_stderr
from kvbaton.errors import ConfigError, KVBatonError

FAILED = 1
WRONG = 2
INTERRUPTED = 130


class CliCommand(Protocol):
    def add_arguments(self, parser: argparse.ArgumentParser) -> None: ...

    def run(self, options: argparse.Namespace) -> int: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Program:
    """``commands``: name → (the module that runs it, its line in ``--help``)."""

    name: str
    description: str
    commands: Mapping[str, tuple[str, str]]

    def command(self, name: str) -> CliCommand:
        return cast(CliCommand, importlib.import_module(self.commands[name][0]))

    def parsers(self, names: Collection[str]) -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
        """The whole parser, and the complete parsers of the commands called ``names``."""
        parser = OneLineParser(prog=self.name, description=self.description, allow_abbrev=False)
        parser.add_argument("--version", action="version", version=f"kvbaton {__version__}")
        subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
        own = {}
        for name, (_, line) in self.commands.items():
            own[name] = subparsers.add_parser(
                name,
                help=line,
                description=line,
                allow_abbrev=False,
                formatter_class=argparse.ArgumentDefaultsHelpFormatter,
                epilog="Each flag can be set by a variable: --page-size by KVBATON_PAGE_SIZE; the flag wins.",
            )
            if name in names:
                self.command(name).add_arguments(own[name])
        return parser, {name: own[name] for name in own if name in names}

    def main(self, arguments: Sequence[str] | None = None, environment: Mapping[str, str] | None = None) -> int:
        """Run one command; returns its exit code."""
        typed = list(sys.argv[1:] if arguments is None else arguments)
        with forgiving_stderr():
            try:
                return self._run(typed, os.environ if environment is None else environment)
            except KVBatonError as error:
                print(f"kvbaton: {error}", file=sys.stderr)
                if error.hint:
                    print(f"hint: {error.hint}", file=sys.stderr)
                return WRONG if isinstance(error, ConfigError) else FAILED
            except KeyboardInterrupt:
                return INTERRUPTED

    def _run(self, typed: list[str], environment: Mapping[str, str]) -> int:
        name = typed[0] if typed else ""
        parser, own = self.parsers((name,))
        used: set[str] = set()
        if name in own:
            check_flags(own[name], typed)
            typed, used = with_environment(own[name], typed, environment)
        options = parser.parse_args(typed)
        if hasattr(options, "log_level"):
            start_logging(options.log_level)
            print(f"{self.name} {name}: {describe(options, own[name], used)}", file=sys.stderr)
        return self.command(name).run(options)
