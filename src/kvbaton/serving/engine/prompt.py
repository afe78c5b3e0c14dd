"""A prompt on its way through the model, chunk by chunk.

Every chunk but the last ends on a page boundary, so that what is handed over is whole pages.
This file must not know of peers, sampling or schedulers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from kvbaton.serving.engine.ahead import Ahead
from kvbaton.serving.engine.pool import BlockTable
from kvbaton.serving.engine.prompt_logprobs import no_records, prompt_tokens_of, records_of
from kvbaton.serving.engine.request import PromptToken
from kvbaton.serving.engine.runner import ModelRunner


def chunk_stop(start: int, total: int, chunk_tokens: int, page_size: int) -> int:
    """Where the chunk that starts at ``start`` ends: a page boundary, or ``total``. At least one page long."""
    stop = (start + chunk_tokens) // page_size * page_size
    return min(total, max(stop, (start // page_size + 1) * page_size))


class PromptRun:
    """``computed`` tokens of ``tokens`` lie in ``block_table``. ``alternatives``: beside each token's logprob in
    ``records``, which has one for every computed token that another follows; None: for none."""

    def __init__(self, tokens: Sequence[int], block_table: BlockTable, alternatives: int | None = None) -> None:
        self.tokens = tokens
        self.block_table = block_table
        self.computed = 0
        self.records = no_records(len(tokens) - 1 if alternatives is not None else 0)
        self._alternatives = alternatives

    @property
    def finished(self) -> bool:
        return self.computed == len(self.tokens)

    def chunk(self, chunk_tokens: int, page_size: int) -> range:
        """The tokens of the next chunk."""
        return range(self.computed, chunk_stop(self.computed, len(self.tokens), chunk_tokens, page_size))

    def advance(
        self,
        runner: ModelRunner,
        chunk_tokens: int,
        page_size: int,
        ahead_of: Callable[[int], Ahead | None] = lambda _stop: None,
    ) -> Any:
        """Compute the next chunk. Returns the logits [1, vocabulary] after its last token. Raises InternalError.

        ``ahead_of``: where the layers of the chunk that ends at a token may go.
        """
        chunk = self.chunk(chunk_tokens, page_size)
        tokens, ahead = self.tokens[chunk.start : chunk.stop], ahead_of(chunk.stop)
        return self.take(
            chunk, runner.prefill_chunk(tokens, chunk.start, self.block_table, ahead=ahead, every=self.every)
        )

    @property
    def every(self) -> bool:
        """Whether the logits of every token are wanted."""
        return self._alternatives is not None

    def take(self, chunk: range, logits: Any) -> Any:
        """``chunk`` has been computed, with these logits of its last token or of ``every`` one. Returns the last's."""
        if self._alternatives is not None:
            following = self.tokens[chunk.start + 1 : chunk.stop + 1]
            self.records[chunk.start : chunk.start + len(following)] = records_of(logits, following, self._alternatives)
        self.computed = chunk.stop
        return logits[-1:]

    def prompt_logprobs(self) -> tuple[PromptToken, ...] | None:
        """What the records say; None where there are none to be."""
        return None if self._alternatives is None else prompt_tokens_of(self.records, self._alternatives)

    def __repr__(self) -> str:
        return f"PromptRun({self.computed} of {len(self.tokens)} tokens)"


def advance_together(runs: Sequence[PromptRun], runner: ModelRunner, chunk: range) -> list[Any]:
    """Compute the next chunk of several prompts in one pass: the same tokens of each, and ``every`` alike.

    Returns what :meth:`PromptRun.advance` does, of each. Raises InternalError, with none of them advanced.
    """
    tokens = [run.tokens[chunk.start : chunk.stop] for run in runs]
    logits = runner.prefill_chunks(tokens, chunk.start, [run.block_table for run in runs], every=runs[0].every)
    return [run.take(chunk, part) for run, part in zip(runs, logits.chunk(len(runs)), strict=True)]
