"""``python -m lab sglang``: the transfer backend in real SGLang processes, token for token, and with every failure."""

from __future__ import annotations

import argparse

from kvbaton.cli.signals import exit_on_sigterm


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from lab.engines.command import add_campaign_arguments

    add_campaign_arguments(parser, "sglang", "SGLang")


def run(options: argparse.Namespace) -> int:
    exit_on_sigterm()
    from lab.engines.command import run_campaign
    from lab.sglang.campaign import PLAYS
    from lab.sglang.environment import prepare
    from lab.sglang.scene import opened

    return run_campaign(options, PLAYS, opened, prepare)
