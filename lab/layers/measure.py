"""Prompts in turns: two prefill engines, one of which sends its layers ahead, and the decode engine that both fill.

The model has a wide cache and little to compute for it, so that moving a prompt takes a good part of computing it; what
is measured is the time to the first token at the decode engine, which needs all of it. Both engines' tokens are
compared: the same bytes have to have arrived.

Moving is the part of the time without that comes after the last layer (``exposed``), computing all before it.
"""

from __future__ import annotations

import multiprocessing
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from msgspec import Struct

from kvbaton.errors import ExpiredError, InternalError
from lab.conformance.families import write_weights
from lab.layers.case import WAYS, Case
from lab.layers.ranks import PATIENCE_SECONDS, Answer, EngineSpec, serve

VOCABULARY = 1_024
START_SECONDS = 120.0


class Width(Struct, frozen=True, kw_only=True):
    """The model: ``hidden`` says what a token costs to compute, ``heads`` and ``head`` what its cache weighs."""

    layers: int = 16
    hidden: int = 64
    heads: int = 8
    head: int = 64


def write_model(width: Width, positions: int, directory: Path) -> str:
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width.hidden,
        intermediate_size=2 * width.hidden,
        num_hidden_layers=width.layers,
        num_attention_heads=width.heads,
        num_key_value_heads=width.heads,
        head_dim=width.head,
        max_position_embeddings=positions,
        eos_token_id=1,
    )
    return str(write_weights(config, directory))


class _Engine:
    """The parent's end of one process."""

    def __init__(self, spec: EngineSpec, stack: ExitStack) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe: Connection
        self._pipe, theirs = context.Pipe()
        process = context.Process(target=serve, args=(spec, theirs), daemon=True)
        process.start()
        theirs.close()
        stack.callback(process.join, 10.0)
        stack.callback(self._pipe.close)
        self._name = f"{spec.role} {'with' if spec.ahead else 'without'}"
        self.address = str(self.recv(START_SECONDS))

    def tell(self, command: str, *arguments: object) -> None:
        self._pipe.send((command, arguments))

    def recv(self, seconds: float = PATIENCE_SECONDS) -> Any:
        if not self._pipe.poll(seconds):
            raise ExpiredError(f"the {self._name} engine did not answer within {seconds:g} s")
        kind, value = self._pipe.recv()
        if kind == "error":
            raise InternalError(f"the {self._name} engine: {value}")
        return value


def measure(
    lengths: Sequence[int],
    width: Width,
    *,
    rounds: int,
    threads: int,
    network: str,
    device: str,
    progress: Callable[[str], None],
) -> list[Case]:
    """``rounds`` rounds of every length, the two ways in turns."""
    most = max(lengths)
    with ExitStack() as stack:
        model = write_model(width, most + 16, Path(stack.enter_context(tempfile.TemporaryDirectory())))
        progress("starting engines")
        common: dict[str, Any] = {"model": model, "tokens": most, "threads": threads}
        common |= {"network": network, "device": device}
        decode = _Engine(EngineSpec(role="decode", **common), stack)
        prefills = {way: _Engine(EngineSpec(role="prefill", ahead=way == "ahead", **common), stack) for way in WAYS}
        found = []
        room = 0
        for tokens in lengths:
            case = Case(tokens=tokens)
            for number in range(rounds + 1):
                order = WAYS if number % 2 else WAYS[::-1]
                picked = random.Random(number)
                prompt = tuple(picked.randrange(2, VOCABULARY) for _ in range(tokens))
                told = set()
                for way in order:
                    progress(f"{tokens} tokens, round {number}/{rounds}: {way}")
                    room += 1
                    first, sent, answer = _ask(prefills[way], decode, room, prompt)
                    told.add(answer.token)
                    if number:
                        case.note(
                            way, first, answer.exposed_seconds, sent.cpu_seconds + answer.cpu_seconds, sent.writes
                        )
                if len(told) > 1:
                    raise InternalError(f"{tokens} tokens, round {number}: the two ways gave tokens {sorted(told)}")
            case.bytes, case.moving = answer.bytes, statistics.median(case.exposed["without"])
            case.computing = statistics.median(case.first["without"]) - case.moving
            found.append(case)
        return found


def _ask(prefill: _Engine, decode: _Engine, room: int, prompt: tuple[int, ...]) -> tuple[float, Answer, Answer]:
    """One prompt: seconds to the first token at decode, and both sides' answers."""
    begun = time.perf_counter()
    decode.tell("answer", room, prompt, (prefill.address,))
    prefill.tell("answer", room, prompt, ())
    sent: Answer = prefill.recv()
    answer: Answer = decode.recv()
    return answer.first_at - begun, sent, answer
