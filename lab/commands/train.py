"""``python -m lab train``: trains the bundled recall model."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("src/kvbaton/serving/models/recall"), help="where it goes")
    parser.add_argument("--seed", type=int, default=7, help="of weights and prompts")
    parser.add_argument("--peak-rate", type=float, default=2e-3, help="highest learning rate")
    parser.add_argument("--warm-up-steps", type=int, default=100, help="until the highest rate")
    parser.add_argument("--decay-steps", type=int, default=1_800, help="from the highest rate to none")
    parser.add_argument("--limit-minutes", type=float, default=19.0, help="stop then, whatever was learnt")


def run(options: argparse.Namespace) -> int:
    from lab.training.recall import HELD_OUT_PROMPTS, TrainingSettings, held_out_accuracy, save, train

    words = vars(options)
    settings = TrainingSettings(**{name: words[name] for name in TrainingSettings.__dataclass_fields__})
    for moment, model, tokenizer in train(settings):
        save(model, tokenizer, settings.out)
        accuracy = held_out_accuracy(settings.out)
        print(f"{moment}: {accuracy:.4f} of {HELD_OUT_PROMPTS} held-out full-length prompts right", flush=True)
    return 0
