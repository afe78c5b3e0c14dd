"""Which cases run on which scene."""

from __future__ import annotations

from collections.abc import Sequence

from lab.engines.campaign import Play
from lab.sglang import cases, comparison
from lab.sglang.scene import Scene, Setting

TOKENS = (cases.lengths, cases.many_at_once)

PLAYS: Sequence[Play[Setting, Scene]] = (
    Play(
        name="qwen3",
        setting=Setting(family="qwen3", options=cases.PATIENCE),
        cases=(
            *TOKENS,
            cases.metrics,
            cases.listeners,
            cases.duplicate_room,
            cases.memory_released,
            cases.client_gone,
            cases.nobody_comes,
            cases.aborts,
            cases.idle,
            cases.through_sglang_router,
            cases.through_our_router,
            cases.decode_killed,
            cases.prefill_killed,
        ),
    ),
    Play(name="qwen3, recorded", setting=Setting(family="qwen3", recorded=True), cases=(cases.contract,)),
    Play(
        name="qwen3, radix cache on decode",
        setting=Setting(family="qwen3", decode_arguments=("--disaggregation-decode-enable-radix-cache",)),
        cases=(cases.prefix_hits, *TOKENS),
    ),
    Play(
        name="qwen3, decode short of pages",
        setting=Setting(family="qwen3", tokens=2_048, decode_arguments=("--num-reserved-decode-tokens", "16")),
        cases=(cases.retraction,),
    ),
    Play(
        name="qwen3, with a secret",
        setting=Setting(family="qwen3", secret=True),
        cases=(cases.lengths, cases.strangers),
    ),
    Play(name="qwen3, TP 2 to 1", setting=Setting(family="qwen3", tp=(2, 1)), cases=TOKENS),
    Play(
        name="qwen3, staged, TP 2 to 1",
        setting=Setting(family="qwen3", tp=(2, 1), options={"staging": "always"}),
        cases=(*TOKENS, cases.staged),
    ),
    Play(name="qwen3, TP 1 to 2", setting=Setting(family="qwen3", tp=(1, 2)), cases=TOKENS),
    Play(
        name="qwen3, staged, TP 1 to 2",
        setting=Setting(family="qwen3", tp=(1, 2), options={"staging": "always"}),
        cases=(*TOKENS, cases.staged),
    ),
    Play(
        name="qwen3 against nixl",
        setting=Setting(family="qwen3", rival=True, arguments=("--disable-radix-cache",)),
        cases=(comparison.latencies, comparison.idle, comparison.answers),
    ),
    Play(name="deepseek_v3", setting=Setting(family="deepseek_v3", plug_in="latents_on_cpu"), cases=TOKENS),
    Play(
        name="deepseek_v3, TP 2 to 1",
        setting=Setting(family="deepseek_v3", plug_in="latents_on_cpu", tp=(2, 1)),
        cases=TOKENS,
    ),
    Play(name="gemma3", setting=Setting(family="gemma3"), cases=TOKENS),
    Play(
        name="lfm2",
        setting=Setting(
            family="lfm2",
            plug_in="convolutions_on_cpu",
            arguments=("--disable-radix-cache",),
            environment={"SGLANG_MAMBA_CONV_DTYPE": "float32"},  # as the model: chunks may then be cut anywhere
        ),
        cases=TOKENS,
    ),
)
