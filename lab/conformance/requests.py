"""What the zygote is asked. It is a file of its own so that who asks need not import what it has imported."""

from __future__ import annotations

import msgspec


class Start(msgspec.Struct):
    """A command line of kvbaton to run, and where its output goes."""

    arguments: list[str]
    log: str
