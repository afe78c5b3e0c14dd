"""Two small tasks of our own for lm-eval, on the recall model.

``recall_choice`` asks for the loglikelihood of the right value and of three others behind each prompt (``echo`` with
``logprobs``, prompts as lists of token ids, in batches), ``recall_generate`` for the value itself. Every number and
text that lm-eval was given for a sample must be the single process's.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from kvbaton.serving.evaluation.recall import ANSWER_LENGTH, VALUE_CHARACTERS, make_prompts

#: Pairs in a prompt: a short one, so that many are asked.
PAIRS = (8, 24)
TASKS = {
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
    for name, text in TASKS.items():
        (directory / f"{name}.yaml").write_text(text.format(data=data, length=ANSWER_LENGTH))
