"""lm-eval against one of our servers: what it prints, and what it was answered."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lab.clients.row import program

#: Prompts of one HTTP request, and requests at once.
BATCH, AT_ONCE = 8, 4
#: Nothing of a hub is needed.
_OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


@dataclass(frozen=True, kw_only=True, slots=True)
class LmEval:
    """Tasks that are described in ``directory``, for a model with the tokenizer in ``tokenizer``. ``limit``: samples of
    each; 0: all."""

    python: Path
    directory: Path
    tasks: Sequence[str]
    model: str
    tokenizer: Path
    limit: int = 0
    variables: Mapping[str, str] = field(default_factory=dict)

    async def run(self, url: str, name: str) -> tuple[dict[str, float], dict[str, Any]]:
        """The scores that it prints, and what it was asked and answered for each sample."""
        output = self.directory / name
        arguments = {
            "model": self.model,
            "base_url": f"{url}/v1/completions",
            "tokenizer_backend": "huggingface",
            "tokenizer": str(self.tokenizer),
            "num_concurrent": str(AT_ONCE),
            "max_retries": "1",
        }
        await program(
            *(str(self.python), "-m", "lm_eval", "--model", "local-completions"),
            *("--model_args", ",".join(f"{key}={value}" for key, value in arguments.items())),
            *("--tasks", ",".join(self.tasks), "--include_path", str(self.directory), "--batch_size", str(BATCH)),
            *("--output_path", str(output), "--log_samples", *(("--limit", str(self.limit)) if self.limit else ())),
            log=self.directory / f"{name}.log",
            variables={**_OFFLINE, **self.variables},
        )
        return _scores(output), self._samples(output)

    def _samples(self, output: Path) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for task in self.tasks:
            for line in _newest(output, f"samples_{task}_*.jsonl").read_text().splitlines():
                sample = json.loads(line)
                found[f"{task} {sample['doc_id']}"] = sample["arguments"], sample["resps"]
        return found


def _newest(output: Path, pattern: str) -> Path:
    return max(output.rglob(pattern), key=lambda path: path.stat().st_mtime)


def _scores(output: Path) -> dict[str, float]:
    results = json.loads(_newest(output, "results_*.json").read_text())["results"]
    return {
        f"{task}: {metric.partition(',')[0]}": value
        for task, metrics in results.items()
        for metric, value in metrics.items()
        if isinstance(value, float) and "stderr" not in metric
    }
