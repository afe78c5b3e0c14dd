"""Two groups of ranks on paper, and everything that the plan between them moves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import get_args

import numpy as np

from kvbaton.errors import ConfigError, IncompatibleError
from kvbaton.explain.model import ModelCache
from kvbaton.layout import CacheLayout, Fusion, InteriorOrder, Region, pool_bytes, window_range
from kvbaton.plan.compatibility import group_differences
from kvbaton.plan.pair import PartPlan, pair_plan

MAX_RANKS = 1024
#: Address spaces of ranks on paper lie apart.
_SPACING = 1 << 46


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupSettings:
    """How one side cuts the model."""

    tp: int = 1
    pp: int = 1
    page_size: int = 16
    order: InteriorOrder = "HND"
    fusion: Fusion = "none"

    @classmethod
    def parse(cls, text: str, *, page_size: int) -> GroupSettings:
        """From ``tp=4,pp=2,page=64,order=NHD,fusion=page``, each optional. Raises ConfigError."""
        given: dict[str, object] = {"page_size": page_size}
        choices = {"order": get_args(InteriorOrder), "fusion": get_args(Fusion)}
        names = {"page": "page_size", **{field.name: field.name for field in fields(cls)}}
        for setting in text.split(","):
            name, equals, value = setting.strip().partition("=")
            field = names.get(name)
            if field is None or not equals:
                raise ConfigError(f"{setting!r} in {text!r} is no setting; use tp=, pp=, page=, order= and fusion=")
            if field in choices:
                if value not in choices[field]:
                    raise ConfigError(f"{setting!r}: {name} is one of {', '.join(choices[field])}")
                given[field] = value
            elif not value.isdecimal() or not 1 <= int(value) < 1 << 20:
                raise ConfigError(f"{setting!r}: {value!r} is not a positive number")
            else:
                given[field] = int(value)
        side = cls(**given)  # type: ignore[arg-type]
        if side.tp * side.pp > MAX_RANKS:
            raise ConfigError(f"{text!r} has {side.tp * side.pp} ranks, at most {MAX_RANKS} are planned")
        return side

    def __str__(self) -> str:
        return f"TP {self.tp}, PP {self.pp}, page {self.page_size}, {self.order}" + (
            f", fused by {self.fusion}" if self.fusion != "none" else ""
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class RankOnPaper:
    """A rank of a side: its name, its stage's layers, and a layout whose addresses are invented."""

    name: str
    pp: int
    tp: int
    layers: range
    layout: CacheLayout


@dataclass(frozen=True, kw_only=True, slots=True)
class Flow:
    """One part that one source rank writes for one target rank, for :attr:`Explanation.tokens` tokens.

    ``items``: of the widest tensor, over all ranks. ``token_bytes``: per token, 0 for slots. ``descriptors``:
    contiguous pieces where pages are scattered in memory; ``piece_bytes``: of the smallest.
    """

    source: int
    target: int
    pool: str
    kind: str
    layer_start: int
    layer_stop: int
    item_start: int
    item_stop: int
    items: int
    token_bytes: float
    bytes: int
    descriptors: int
    piece_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Explanation:
    """All flows between two groups."""

    model: ModelCache
    tokens: int
    source_side: GroupSettings
    target_side: GroupSettings
    sources: tuple[RankOnPaper, ...]
    targets: tuple[RankOnPaper, ...]
    flows: tuple[Flow, ...]

    @property
    def bystanders(self) -> tuple[int, ...]:
        """Source ranks that write nothing for anybody: told, so that they can conclude."""
        writers = {flow.source for flow in self.flows}
        return tuple(i for i in range(len(self.sources)) if i not in writers)

    def writers_of(self, target: int) -> tuple[int, ...]:
        """Source ranks that write for a target rank."""
        return tuple(sorted({flow.source for flow in self.flows if flow.target == target}))

    def between(self, source: int, target: int) -> tuple[Flow, ...]:
        return tuple(flow for flow in self.flows if (flow.source, flow.target) == (source, target))


def explain(model: ModelCache, source: GroupSettings, target: GroupSettings, *, tokens: int = 1024) -> Explanation:
    """The plan between two groups for a prompt of ``tokens`` tokens.

    Raises LayoutError where a side cannot hold the model, IncompatibleError (the first difference) where the sides do
    not fit each other.
    """
    sources = ranks_of(model, source, tokens=tokens, side="prefill")
    targets = ranks_of(model, target, tokens=tokens, side="decode")
    for difference in group_differences([r.layout for r in sources], [r.layout for r in targets]):
        raise IncompatibleError(difference.message, field=difference.field, ours=difference.ours)
    flows = []
    for t, receiver in enumerate(targets):
        for s, sender in enumerate(sources):
            for part in pair_plan(sender.layout, receiver.layout).parts:
                flows.append(_flow(s, t, part, sender.layout, receiver.layout, tokens))
    return Explanation(
        model=model,
        tokens=tokens,
        source_side=source,
        target_side=target,
        sources=sources,
        targets=targets,
        flows=tuple(flows),
    )


def ranks_of(model: ModelCache, cut: GroupSettings, *, tokens: int, side: str) -> tuple[RankOnPaper, ...]:
    """The ranks of one side, stage by stage."""
    layers = len(model.kinds)
    if cut.pp > layers:
        raise ConfigError(f"pp={cut.pp} on {side}: the model has only {layers} layers")
    found: list[RankOnPaper] = []
    for stage in range(cut.pp):
        owned = range(layers * stage // cut.pp, layers * (stage + 1) // cut.pp)
        for rank in range(cut.tp):
            pools = model.pools(
                owned,
                page_size=cut.page_size,
                pages=-(-tokens // cut.page_size) + 1,
                slots=2,
                tp_size=cut.tp,
                tp_rank=rank,
                order=cut.order,
                fusion=cut.fusion,
                with_aux=side == "decode" or stage == cut.pp - 1,
            )
            base = (len(found) + 1) * _SPACING
            regions = [Region(base + i * (_SPACING >> 6), pool_bytes(pool)) for i, pool in enumerate(pools)]
            layout = CacheLayout(model.fingerprint, tuple(regions), tuple(pools))
            layout.validate()
            name = f"{side} " + (f"pp{stage} " if cut.pp > 1 else "") + f"tp{rank}"
            found.append(RankOnPaper(name=name, pp=stage, tp=rank, layers=owned, layout=layout))
    return tuple(found)


def _flow(s: int, t: int, part: PartPlan, source: CacheLayout, target: CacheLayout, tokens: int) -> Flow:
    mine, other = source.pool(part.id.pool), target.pool(part.id.pool)
    granted = range(tokens)
    if mine.paged:
        granted = window_range(tokens, mine.window, target_page=other.rows, source_page=mine.rows)
    blocks = part.blocks(granted.start, granted.stop)
    return Flow(
        source=s,
        target=t,
        pool=part.id.pool,
        kind=mine.kind,
        layer_start=part.id.layer_start,
        layer_stop=part.id.layer_stop,
        item_start=part.id.item_start,
        item_stop=part.id.item_stop,
        items=max(plane.axis.items for plane in mine.planes),
        token_bytes=part.block_bytes / part.block_rows if part.paged else 0.0,
        bytes=len(blocks) * part.block_bytes,
        descriptors=len(blocks) * len(part.lane_bytes),
        piece_bytes=int(np.min(part.lane_bytes)),
    )


def totals(flows: Iterable[Flow]) -> Mapping[str, float]:
    """Sums over flows."""
    chosen = list(flows)
    return {
        "token_bytes": sum(flow.token_bytes for flow in chosen),
        "bytes": sum(flow.bytes for flow in chosen),
        "descriptors": sum(flow.descriptors for flow in chosen),
        "piece_bytes": min((flow.piece_bytes for flow in chosen), default=0),
    }
