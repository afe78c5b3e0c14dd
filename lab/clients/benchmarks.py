"""The benchmarks of vLLM and SGLang against one of our servers: that they run, what they print, and that every text
they were given is the single process's. Their figures are of a toy model on a CPU, and say nothing about speed."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvbaton.serving.models import builtin
from lab.clients.row import program

MODEL = "recall"
PROMPTS = 48
INPUT_TOKENS, OUTPUT_TOKENS = 96, 16
AT_ONCE = 8
_OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "VLLM_TARGET_DEVICE": "cpu"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Benchmark:
    """One client. ``command`` makes its arguments of the server's URL and the file for its result."""

    name: str
    command: Callable[[str, Path], Sequence[str]]
    figures: tuple[str, ...]


def _vllm(url: str, result: Path) -> Sequence[str]:
    return (
        *("-m", "vllm.entrypoints.cli.main", "bench", "serve", "--backend", "openai", "--base-url", url),
        *("--endpoint", "/v1/completions", "--model", MODEL, "--tokenizer", str(builtin(MODEL))),
        *("--dataset-name", "random", "--num-prompts", str(PROMPTS), "--random-input-len", str(INPUT_TOKENS)),
        *("--random-output-len", str(OUTPUT_TOKENS), "--max-concurrency", str(AT_ONCE), "--ignore-eos"),
        *("--temperature", "0", "--seed", "3", "--save-result", "--save-detailed"),
        *("--result-dir", str(result.parent), "--result-filename", result.name),
    )


def _sglang(backend: str) -> Callable[[str, Path], Sequence[str]]:
    def command(url: str, result: Path) -> Sequence[str]:
        return (
            *("-m", "sglang.bench_serving", "--backend", backend, "--base-url", url, "--model", MODEL),
            *("--tokenizer", str(builtin(MODEL)), "--dataset-name", "random-ids", "--num-prompts", str(PROMPTS)),
            *("--random-input-len", str(INPUT_TOKENS), "--random-output-len", str(OUTPUT_TOKENS)),
            *("--random-range-ratio", "1.0", "--max-concurrency", str(AT_ONCE), "--seed", "3"),
            *("--output-details", "--output-file", str(result), "--disable-tqdm"),
        )

    return command


VLLM = (
    Benchmark(
        name="vllm bench serve",
        command=_vllm,
        figures=("completed", "failed", "output_throughput", "median_ttft_ms", "median_tpot_ms", "median_itl_ms"),
    ),
)
SGLANG = tuple(
    Benchmark(
        name=f"sglang.bench_serving --backend {backend}",
        command=_sglang(backend),
        figures=("completed", "output_throughput", "median_ttft_ms", "median_tpot_ms", "median_itl_ms"),
    )
    for backend in ("sglang-oai", "sglang")
)


async def measure(python: Path, one: Benchmark, url: str, result: Path) -> tuple[dict[str, float], list[str]]:
    """The figures that it prints, and the texts that it was given."""
    result.unlink(missing_ok=True)
    await program(str(python), *one.command(url, result), log=result.with_suffix(".log"), variables=_OFFLINE)
    found: dict[str, Any] = json.loads(result.read_text().splitlines()[-1])
    return {name: found[name] for name in one.figures}, found["generated_texts"]
