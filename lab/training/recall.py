"""Train the bundled recall model: a tiny Qwen3 that answers the prompts of serving.evaluation.recall from its KV cache.

The skill to learn is induction (find the asked key, copy what followed it), which appears suddenly or not at all.
What makes it appear within minutes on two CPU cores: attention that starts out sharp, many questions after one list
of pairs, loss on the answers only, and lists that grow as soon as the present ones are answered. The learning rate is
held until the lists have their full length and then falls to zero. Positions need no random offsets: rotary attention
sees differences only.
"""

import json
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from kvbaton.serving.evaluation.recall import (
    ANSWER_LENGTH,
    FULL_LENGTH_PAIRS,
    list_pairs,
    make_pairs,
    make_prompts,
    question,
    score,
)

PAD, UNKNOWN, BEGIN, END = "<pad>", "<unk>", "<bos>", "<eos>"
CHARACTERS = "\n" + "".join(map(chr, range(0x20, 0x7F)))
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
MAXIMUM_POSITIONS = 2048
TOKENIZER_CLASS = "PreTrainedTokenizerFast"
IGNORED = -100

LESSONS = ((2, 6), (2, 12), (4, 24), (8, 44), (8, 96))
"""Fewest and most pairs of a list, lesson by lesson; the last goes beyond the full length."""
PASS_ACCURACY = 0.93
"""Share of right answer tokens, smoothed over steps, that ends a lesson."""
QUESTIONS_PER_LIST = 20
TOKENS_PER_STEP = 6_000
REPORT_STEPS = 25
INITIAL_QUERY_SCALE = 2.0
"""Starting weight of the query norms. At the usual 1.0 the lessons take three times as many steps."""
EVALUATION_SEED = 20_001
HELD_OUT_PROMPTS = 200


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """What the command line may change."""

    out: Path
    seed: int
    peak_rate: float
    warm_up_steps: int
    decay_steps: int
    limit_minutes: float


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character of printable ASCII and newline; every other character is ``<unk>``. Adds no token."""
    vocabulary = {token: index for index, token in enumerate([PAD, UNKNOWN, BEGIN, END, *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNKNOWN,
        bos_token=BEGIN,
        eos_token=END,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=MAXIMUM_POSITIONS,
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """An untrained Qwen3 with grouped-query attention and tied embeddings."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=MAXIMUM_POSITIONS,
        initializer_range=0.04,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        dtype="float32",
    )
    model = Qwen3ForCausalLM(config)
    for layer in model.model.layers:
        torch.nn.init.constant_(layer.self_attn.q_norm.weight, INITIAL_QUERY_SCALE)
    return model


class Lists:
    """An endless source of training batches: a list of pairs, then questions, each with its answer and ``<eos>``."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
        self._source = random.Random(seed)
        self._ids = tokenizer.get_vocab()
        self._end = [tokenizer.eos_token_id]

    def _encode(self, text: str) -> list[int]:
        return [self._ids[character] for character in text]

    def _sequence(self, pair_count: int) -> tuple[list[int], list[int]]:
        """Token ids, and of the same length the label of each: itself in an answer, ``IGNORED`` elsewhere."""
        pairs = make_pairs(self._source, pair_count)
        ids = self._encode(list_pairs(self._source, pairs))
        labels = [IGNORED] * len(ids)
        for key in self._source.sample(list(pairs), min(pair_count, QUESTIONS_PER_LIST)):
            asked, answered = self._encode(question(key)), self._encode(pairs[key]) + self._end
            ids += asked + answered
            labels += [IGNORED] * len(asked) + answered
        return ids, labels

    def batch(self, lesson: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and labels, each [sequences, tokens], padded on the right, of about ``TOKENS_PER_STEP`` tokens.

        The lists of one batch have almost the same number of pairs, so that little is padding.
        """
        fewest, most = lesson
        pair_count = self._source.randint(fewest, most)
        sequences: list[tuple[Any, Any]] = []
        while not sequences or len(sequences) * len(sequences[0][0]) < TOKENS_PER_STEP:
            sequences.append(self._sequence(pair_count))
        width = max(len(ids) for ids, _ in sequences)
        ids = [ids + [0] * (width - len(ids)) for ids, _ in sequences]
        labels = [labels + [IGNORED] * (width - len(labels)) for _, labels in sequences]
        return torch.tensor(ids), torch.tensor(labels)


class Rate:
    """The learning rate: a linear rise, held until ``start_decay``, then half a cosine down to zero."""

    def __init__(self, settings: TrainingSettings) -> None:
        self._settings = settings
        self._decay_start: int | None = None

    def start_decay(self, step: int) -> None:
        """Begin to fall at ``step``."""
        self._decay_start = step

    def finished(self, step: int) -> bool:
        """Whether the rate has come down to zero."""
        return self._decay_start is not None and step >= self._decay_start + self._settings.decay_steps

    def at(self, step: int) -> float:
        """The rate of ``step``."""
        rise = min(1.0, (step + 1) / self._settings.warm_up_steps)
        if self._decay_start is None:
            return self._settings.peak_rate * rise
        fallen = (step - self._decay_start) / self._settings.decay_steps
        return self._settings.peak_rate * rise * 0.5 * (1 + math.cos(math.pi * min(1.0, fallen)))


def make_optimizer(model: Qwen3ForCausalLM) -> torch.optim.AdamW:
    """AdamW that decays matrices only."""
    matrices = [weight for weight in model.parameters() if weight.dim() > 1]
    vectors = [weight for weight in model.parameters() if weight.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98))


def learn(
    model: Qwen3ForCausalLM, optimizer: torch.optim.Optimizer, ids: torch.Tensor, labels: torch.Tensor
) -> tuple[float, float]:
    """Take one step. Returns the loss and the share of answer tokens that were right before it."""
    targets = labels[:, 1:]
    answered = targets != IGNORED
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    logits = model.lm_head(hidden[:, :-1][answered])
    loss = cross_entropy(logits, targets[answered])
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    accuracy = (logits.argmax(-1) == targets[answered]).float().mean()
    return loss.item(), accuracy.item()


@torch.no_grad()  # type: ignore[untyped-decorator] # its types are not read
def held_out_accuracy(directory: Path) -> float:
    """Exact-match share on full-length prompts, by plain greedy ``generate`` with the model saved in ``directory``."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = Qwen3ForCausalLM.from_pretrained(directory).eval()
    prompts = make_prompts(HELD_OUT_PROMPTS, EVALUATION_SEED, pairs=FULL_LENGTH_PAIRS)
    continuations = []
    for prompt in prompts:
        inputs = tokenizer(prompt.prompt, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=ANSWER_LENGTH, do_sample=False)
        continuations.append(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :]))
    return score(prompts, continuations).accuracy


def save(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Write everything that ``from_pretrained`` needs; greedy decoding is the default."""
    model.generation_config.do_sample = False
    model.save_pretrained(directory)
    (directory / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(directory)
    named = directory / "tokenizer_config.json"
    # transformers 5 writes a class name of its own that transformers 4 does not know; both load this one.
    named.write_text(json.dumps(json.loads(named.read_text()) | {"tokenizer_class": TOKENIZER_CLASS}, indent=2) + "\n")


def train(settings: TrainingSettings) -> Iterator[tuple[str, Qwen3ForCausalLM, PreTrainedTokenizerFast]]:
    """Train, printing progress; yields the model when it starts the last lesson and when it is done."""
    torch.manual_seed(settings.seed)
    tokenizer = make_tokenizer()
    model, lists, rate = make_model(tokenizer).train(), Lists(tokenizer, settings.seed), Rate(settings)
    print(f"{model.num_parameters():,} parameters", flush=True)
    optimizer = make_optimizer(model)
    started, step, lesson, smooth = time.monotonic(), 0, 0, 0.0
    while not rate.finished(step) and time.monotonic() - started < settings.limit_minutes * 60:
        for group in optimizer.param_groups:
            group["lr"] = rate.at(step)
        loss, accuracy = learn(model, optimizer, *lists.batch(LESSONS[lesson]))
        smooth += 0.1 * (accuracy - smooth)
        if step % REPORT_STEPS == 0:
            elapsed = f"elapsed {time.monotonic() - started:.0f}s"
            print(f"step {step} lesson {lesson} loss {loss:.4f} accuracy {smooth:.4f} {elapsed}", flush=True)
        step += 1
        if smooth > PASS_ACCURACY and lesson < len(LESSONS) - 1:
            lesson, smooth = lesson + 1, 0.0
            if lesson == len(LESSONS) - 1:
                rate.start_decay(step)
                yield "last lesson", model, tokenizer
    yield "done", model, tokenizer
