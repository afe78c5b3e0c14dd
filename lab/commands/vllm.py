"""``python -m lab vllm``: the connector in real vLLM processes, token for token, and with every failure."""

from __future__ import annotations

import argparse

from kvbaton.cli.signals import exit_on_sigterm


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from lab.engines.command import add_campaign_arguments

    add_campaign_arguments(parser, "vllm", "vLLM")


def run(options: argparse.Namespace) -> int:
    exit_on_sigterm()
    from lab.engines.command import run_campaign
    from lab.vllm.campaign import PLAYS
    from lab.vllm.environment import prepare
    from lab.vllm.scene import opened

    return run_campaign(options, PLAYS, opened, prepare)
