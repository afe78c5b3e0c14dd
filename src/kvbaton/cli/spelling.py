"""What is said of a command line that is wrong: one line, and the word that was probably meant."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Iterable, Sequence
from typing import NoReturn

from kvbaton.errors import ConfigError


class OneLineParser(argparse.ArgumentParser):
    """Raises ConfigError where argparse prints its usage and exits."""

    def error(self, message: str) -> NoReturn:
        chosen = _CHOICE.search(message)
        likely = _likely(chosen[1], _QUOTED.findall(chosen[2]) or chosen[2].split(", ")) if chosen else ""
        raise ConfigError(f"{message}{likely}", hint=f"{self.prog} --help")


_CHOICE = re.compile(r"invalid choice: '?([^' ]*)'? \(choose from (.*)\)")
_QUOTED = re.compile(r"'([^']*)'")


def check_flags(parser: argparse.ArgumentParser, typed: Sequence[str]) -> None:
    """Raises ConfigError for a flag that the command does not have, before anything else is said of the line."""
    known = parser._option_string_actions
    for word in typed:
        flag = word.partition("=")[0]
        if word == "--":
            return
        if flag.startswith("--") and flag not in known:
            raise ConfigError(f"{flag} is no flag of {parser.prog}{_likely(flag, known)}", hint=f"{parser.prog} --help")


def _likely(word: str, known: Iterable[str]) -> str:
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {found[0]}?" if found else ""
