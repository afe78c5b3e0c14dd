"""``kvbaton COMMAND``: finds the command, runs it, turns errors into one line and an exit code.

Exit codes: 0 done; 1 it went wrong while running; 2 a setting or argument is wrong and nothing was started; 130 Ctrl-C.
A command is a module with ``NAME``, ``HELP``, ``add_arguments(parser)`` and ``run(options) -> int``; it imports what is
heavy inside ``run``.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Protocol

from kvbaton import __version__
from kvbaton.cli import bench, chaos, check, conformance, demo, plan, router, serve, sim, soak, story
from kvbaton.cli import eval as evaluate
from kvbaton.cli.settings import describe, start_logging, with_environment
from kvbaton.cli.stderr import forgiving_stderr
from kvbaton.errors import ConfigError, KVBatonError

FAILED = 1
WRONG = 2
INTERRUPTED = 130


class Command(Protocol):
    NAME: str
    HELP: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None: ...

    def run(self, options: argparse.Namespace) -> int: ...


COMMANDS: tuple[Command, ...] = (
    serve,
    router,
    demo,
    story,
    check,
    plan,
    evaluate,
    bench,
    chaos,
    soak,
    sim,
    conformance,
)


def build_parsers() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The whole parser, and each command's own."""
    parser = argparse.ArgumentParser(
        prog="kvbaton", description="Hands the cache of a prompt from prefill to decode.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"kvbaton {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    own = {}
    for command in COMMANDS:
        own[command.NAME] = commands.add_parser(
            command.NAME,
            help=command.HELP,
            description=command.HELP,
            allow_abbrev=False,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
            epilog="Each flag can be set by a variable: --page-size by KVBATON_PAGE_SIZE; the flag wins.",
        )
        command.add_arguments(own[command.NAME])
    return parser, own


def main(arguments: Sequence[str] | None = None, environment: Mapping[str, str] | None = None) -> int:
    """Run one command; returns its exit code."""
    with forgiving_stderr():
        return _guarded(list(sys.argv[1:] if arguments is None else arguments), environment)


def _guarded(typed: list[str], environment: Mapping[str, str] | None) -> int:
    try:
        return _run(typed, os.environ if environment is None else environment)
    except KVBatonError as error:
        print(f"kvbaton: {error}", file=sys.stderr)
        if error.hint:
            print(f"hint: {error.hint}", file=sys.stderr)
        return WRONG if isinstance(error, ConfigError) else FAILED
    except KeyboardInterrupt:
        return INTERRUPTED


def _run(typed: list[str], environment: Mapping[str, str]) -> int:
    parser, own = build_parsers()
    name = typed[0] if typed else ""
    used: set[str] = set()
    if name in own:
        typed, used = with_environment(own[name], typed, environment)
    options = parser.parse_args(typed)
    command = next(command for command in COMMANDS if options.command == command.NAME)
    if hasattr(options, "log_level"):
        start_logging(options.log_level)
        print(f"kvbaton {name}: {describe(options, own[name], used)}", file=sys.stderr)
    return command.run(options)


if __name__ == "__main__":
    sys.exit(main())
