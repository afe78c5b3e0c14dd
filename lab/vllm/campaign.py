"""Which cases run on which scene."""

from __future__ import annotations

from collections.abc import Sequence

from lab.engines.campaign import Play
from lab.vllm import comparison, failures, refusals, service, tokens
from lab.vllm.scene import Scene, Setting

TOKENS = (tokens.lengths_sequential, tokens.lengths_concurrent, tokens.many_at_once)

TOKENS_OF_RANKS = (tokens.lengths_sequential, tokens.lengths_concurrent, tokens.some_at_once)

PLAYS: Sequence[Play[Setting, Scene]] = (
    Play(
        name="qwen3",
        setting=Setting(family="qwen3", options={"bootstrap_timeout": 15.0}),
        cases=(
            *TOKENS,
            tokens.prefix_hits,
            service.layouts,
            service.through_the_router,
            tokens.several_answers,
            tokens.same_params_twice,
            tokens.rejected_on_decode,
            failures.garbage_in_params,
            failures.dead_address,
            failures.other_prompt,
            failures.decode_aborted_while_parked,
            failures.prefill_aborted,
            failures.nobody_decodes,
            failures.prefill_silent,
            service.idle,
            service.metrics,
            service.listeners,
            failures.decode_killed,
            failures.prefill_killed,
            service.bench_serve,
            service.endurance,
            tokens.logprobs_of_the_prompt,
        ),
    ),
    Play(name="qwen3, recorded", setting=Setting(family="qwen3", recorded=True), cases=(service.contract,)),
    Play(
        name="qwen3, policy fail",
        setting=Setting(family="qwen3", policy="fail", options={"bootstrap_timeout": 15.0}),
        cases=(
            refusals.nobody_at_the_address,
            refusals.no_room,
            refusals.prompts_differ,
            refusals.decode_comes_too_late,
            refusals.prefill_is_aborted,
            refusals.prefill_stands_still,
            refusals.prefill_is_killed,
        ),
    ),
    Play(
        name="qwen3, prefill short of blocks",
        setting=Setting(family="qwen3", prefill_blocks=34),
        cases=(failures.preempted,),
    ),
    Play(name="qwen3, TP 2 to 1", setting=Setting(family="qwen3", tp=(2, 1)), cases=TOKENS_OF_RANKS),
    Play(name="qwen3, TP 1 to 2", setting=Setting(family="qwen3", tp=(1, 2)), cases=TOKENS_OF_RANKS),
    Play(name="qwen3, TP 2 to 2", setting=Setting(family="qwen3", tp=(2, 2)), cases=TOKENS_OF_RANKS),
    Play(
        name="qwen3 against NixlConnector",
        setting=Setting(family="qwen3", rival=True, plain=False, arguments=("--no-enable-prefix-caching",)),
        cases=(comparison.latencies, comparison.idle),
    ),
    Play(
        name="gpt_oss against NixlConnector",
        setting=Setting(family="gpt_oss", rival=True, arguments=("--no-enable-prefix-caching",)),
        cases=(comparison.windows,),
    ),
    Play(name="gpt_oss", setting=Setting(family="gpt_oss"), cases=(*TOKENS, tokens.prefix_hits)),
    Play(name="gemma3", setting=Setting(family="gemma3"), cases=(*TOKENS, tokens.prefix_hits)),
    Play(
        name="granite_hybrid",
        setting=Setting(family="granite_hybrid", arguments=("--no-enable-prefix-caching",)),
        cases=TOKENS,
    ),
    Play(
        name="granite_hybrid, TP 2 to 1",
        setting=Setting(family="granite_hybrid", arguments=("--no-enable-prefix-caching",), tp=(2, 1)),
        cases=TOKENS_OF_RANKS,
    ),
    Play(
        name="granite_hybrid, TP 1 to 2",
        setting=Setting(family="granite_hybrid", arguments=("--no-enable-prefix-caching",), tp=(1, 2)),
        cases=TOKENS_OF_RANKS,
    ),
    Play(
        name="granite_hybrid, TP 2 to 2",
        setting=Setting(family="granite_hybrid", arguments=("--no-enable-prefix-caching",), tp=(2, 2)),
        cases=TOKENS_OF_RANKS,
    ),
    Play(name="gpt_oss, TP 2 to 1", setting=Setting(family="gpt_oss", tp=(2, 1)), cases=TOKENS_OF_RANKS),
    Play(name="gpt_oss, TP 2 to 2", setting=Setting(family="gpt_oss", tp=(2, 2)), cases=TOKENS_OF_RANKS),
    Play(name="deepseek_v3", setting=Setting(family="deepseek_v3"), cases=(tokens.lengths_from_cache,)),
)
