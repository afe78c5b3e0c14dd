"""lm-eval against one of our servers: two small tasks of our own on the recall model.

``recall_choice`` asks for the loglikelihood of the right value and of three others behind each prompt (``echo`` with
``logprobs``, prompts as lists of token ids, in batches), ``recall_generate`` for the value itself. Every number and
text that lm-eval was given for a sample must be the single process's.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from kvbaton.serving.evaluation.recall import ANSWER_LENGTH, VALUE_CHARACTERS, make_prompts
from kvbaton.serving.models import builtin
from lab.clients.row import program

MODEL = "recall"
#: Pairs in a prompt: a short one, so that many are asked.
PAIRS = (8, 24)
#: Prompts of one HTTP request, and requests at once.
BATCH, AT_ONCE = 8, 4
_TASKS = {
    "recall_choice": """task: recall_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: choices
doc_to_target: label
target_delimiter: ""
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
""",
    "recall_generate": """task: recall_generate
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: answer
target_delimiter: ""
generation_kwargs: {{max_gen_toks: {length}, until: [";"], temperature: 0}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
""",
}
#: Nothing of a hub is needed.
_OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


def write_tasks(directory: Path, count: int) -> None:
    """Their data and their descriptions."""
    directory.mkdir(parents=True, exist_ok=True)
    source, data = random.Random(5), directory / "recall.jsonl"
    with data.open("w") as lines:
        for question in make_prompts(count, seed=5, pairs=PAIRS):
            others = ["".join(source.choices(VALUE_CHARACTERS, k=ANSWER_LENGTH)) for _ in range(3)]
            label = source.randrange(4)
            choices = [*others[:label], question.answer, *others[label:]]
            line = {"prompt": question.prompt, "answer": question.answer, "choices": choices, "label": label}
            lines.write(json.dumps(line) + "\n")
    for name, text in _TASKS.items():
        (directory / f"{name}.yaml").write_text(text.format(data=data, length=ANSWER_LENGTH))


async def evaluate(python: Path, url: str, directory: Path, name: str) -> tuple[dict[str, float], dict[str, Any]]:
    """The scores that lm-eval prints, and what it was answered for each sample."""
    output = directory / name
    arguments = {
        "model": MODEL,
        "base_url": f"{url}/v1/completions",
        "tokenizer_backend": "huggingface",
        "tokenizer": str(builtin(MODEL)),
        "num_concurrent": str(AT_ONCE),
        "max_retries": "1",
    }
    await program(
        *(str(python), "-m", "lm_eval", "--model", "local-completions"),
        *("--model_args", ",".join(f"{key}={value}" for key, value in arguments.items())),
        *("--tasks", ",".join(_TASKS), "--include_path", str(directory), "--batch_size", str(BATCH)),
        *("--output_path", str(output), "--log_samples"),
        log=directory / f"{name}.log",
        variables=_OFFLINE,
    )
    return _scores(output), _samples(output)


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


def _samples(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for task in _TASKS:
        for line in _newest(output, f"samples_{task}_*.jsonl").read_text().splitlines():
            sample = json.loads(line)
            found[f"{task} {sample['doc_id']}"] = sample["resps"]
    return found
