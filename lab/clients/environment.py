"""A virtual environment of its own for the clients of others, at the versions that were tried. Benchmarks of vLLM and
SGLang run in the environments of ``python -m lab vllm`` and ``python -m lab sglang``, where those are there."""

from __future__ import annotations

from pathlib import Path

from lab.engines.environment import made, pip

SGLANG_ROUTER = "0.3.2"
OPENAI = "3.57.0"
LM_EVAL = "0.4.13"
LANGCHAIN_OPENAI = "1.7.4"
LITELLM = "1.110.2"
#: lm-eval counts a prompt's tokens with the model's tokenizer; it needs no torch.
TRANSFORMERS = "5.24.0"
_WANTED = (
    f"sglang-router=={SGLANG_ROUTER}",
    f"openai=={OPENAI}",
    f"lm-eval[api]=={LM_EVAL}",
    f"transformers=={TRANSFORMERS}",
    f"langchain-openai=={LANGCHAIN_OPENAI}",
    f"litellm=={LITELLM}",
)


def prepare(directory: Path) -> Path:
    """The interpreter of the environment in ``directory``, made unless it is there. Raises ConfigError."""
    return made(directory, (Path(__file__),), lambda python, _: pip(python, "install", *_WANTED))


def interpreter(directory: Path) -> Path | None:
    """That of an environment which others have made; None where it is not there."""
    python = directory / "bin" / "python"
    return python if python.is_file() else None
