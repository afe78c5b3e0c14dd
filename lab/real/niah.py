"""RULER's ``niah_single_1`` (Hsieh et al., 2024) as lm-eval has it, at a length that two CPU cores can do: a number is
hidden in a text that says the same again and again, and asked for. Made from a seed, nothing is downloaded."""

from __future__ import annotations

from pathlib import Path

TASK = "niah_single_1_short"
TOKENS, ANSWER_TOKENS = 512, 32
_YAML = f"""task: {TASK}
dataset_path: ""
dataset_name: ""
output_type: generate_until
test_split: test
custom_dataset: !function {TASK}.samples
doc_to_text: "{{{{input}}}}"
doc_to_target: "{{{{outputs}}}}"
gen_prefix: "{{{{gen_prefix}}}}"
target_delimiter: " "
process_results: !function {TASK}.process_results
metric_list: [{{metric: found, aggregation: mean, higher_is_better: true}}]
generation_kwargs: {{do_sample: false, temperature: 0.0, max_gen_toks: {ANSWER_TOKENS}, until: []}}
"""
_FUNCTIONS = f"""from lm_eval.tasks.ruler.common_utils import postprocess_pred, string_match_all
from lm_eval.tasks.ruler.niah_utils import niah_single_1


def samples(**given):
    return niah_single_1(**{{**given, "max_seq_lengths": [{TOKENS}]}})


def process_results(doc, results):
    return {{"found": string_match_all(postprocess_pred(results), [doc["outputs"]])}}
"""


def write_task(directory: Path) -> dict[str, str]:
    """Its description; the variables that lm-eval is to have. The task's module looks for a sentence tokenizer, which
    this kind of text does not need, and would download it."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"{TASK}.yaml").write_text(_YAML)
    (directory / f"{TASK}.py").write_text(_FUNCTIONS)
    (directory / "nltk" / "tokenizers" / "punkt_tab").mkdir(parents=True, exist_ok=True)
    return {"NLTK_DATA": str(directory / "nltk")}
