"""Whether one group of ranks can hand over to another: every reason why not, before any traffic."""

from __future__ import annotations

from collections.abc import Sequence

from kvbaton.errors import IncompatibleError
from kvbaton.plan.compatibility import group_differences
from kvbaton.plan.layout_file import RankLayout
from kvbaton.plan.staging import slots_too_small


def compare_groups(prefill: Sequence[RankLayout], decode: Sequence[RankLayout]) -> list[IncompatibleError]:
    """Every difference between two groups; missing ranks first, because much else follows from them."""
    found = []
    for side, ranks in (("prefill", prefill), ("decode", decode)):
        if len(ranks) != ranks[0].group_size:
            advice = "give the layouts of all ranks of the group"
            found.append(
                IncompatibleError(
                    f"{side}.ranks: {len(ranks)} of {ranks[0].group_size} ranks are there: {advice}",
                    field=f"{side}.ranks",
                    ours=str(len(ranks) if side == "prefill" else ""),
                    theirs=str(len(ranks) if side == "decode" else ""),
                    hint=advice,
                )
            )
    if prefill[0].group and prefill[0].group == decode[0].group:
        advice = "name a prefill and a decode server"
        found.append(
            IncompatibleError(
                f"group: both sides are one server, which cannot hand over to itself: {advice}",
                field="group",
                ours=prefill[0].group,
                theirs=decode[0].group,
                hint=advice,
            )
        )
    layouts = [[rank.layout for rank in side] for side in (prefill, decode)]
    return [*found, *(group_differences(*layouts) or slots_too_small(*layouts))]
