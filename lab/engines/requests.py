"""Prompts that every engine of a lab can be asked, and how a server refuses one."""

from __future__ import annotations

import random

from lab.engines.models import VOCABULARY


class Refused(Exception):
    """A server answered with an error: status and text."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(f"HTTP {status}: {text[:300]}")
        self.status = status
        self.text = text


def prompt(length: int, seed: int) -> list[int]:
    chance = random.Random(seed)
    return [chance.randrange(3, VOCABULARY - 2) for _ in range(length)]
