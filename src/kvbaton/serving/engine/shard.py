"""A rank's share of one model: which heads of each layer (tensor parallelism), which layers (pipeline parallelism).

This file must not know of torch, pools or processes.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvbaton.errors import ConfigError
from kvbaton.layout import Axis


@dataclass(frozen=True, kw_only=True, slots=True)
class RankShard:
    """Rank ``tp_rank`` of ``tp_size`` in stage ``pp_rank`` of ``pp_size``. Rank 0 of stage 0 leads the group."""

    tp_size: int = 1
    tp_rank: int = 0
    pp_size: int = 1
    pp_rank: int = 0

    def __post_init__(self) -> None:
        if not (0 <= self.tp_rank < self.tp_size and 0 <= self.pp_rank < self.pp_size):
            raise ConfigError(f"{self!r} does not exist")

    def __str__(self) -> str:
        return f"rank {self.rank}"

    @property
    def ranks(self) -> int:
        """Ranks of the whole group."""
        return self.tp_size * self.pp_size

    @property
    def rank(self) -> int:
        """This rank's number in the group, tp fastest."""
        return self.pp_rank * self.tp_size + self.tp_rank

    @property
    def first(self) -> bool:
        """Whether this stage reads tokens; only it keeps aux rows."""
        return self.pp_rank == 0

    @property
    def last(self) -> bool:
        """Whether this stage gives logits."""
        return self.pp_rank == self.pp_size - 1

    def layers(self, total: int) -> range:
        """Layers of this stage: as equal as can be, earlier stages the longer ones. Raises ConfigError."""
        if self.pp_size > total:
            raise ConfigError(f"pipeline-parallel size {self.pp_size} is more than the model's {total} layers")
        least, longer = divmod(total, self.pp_size)
        start = self.pp_rank * least + min(self.pp_rank, longer)
        return range(start, start + least + (self.pp_rank < longer))

    def axis(self, items: int) -> Axis:
        """How ``items`` heads lie over the ranks of a stage: divided, or each held by several ranks."""
        axis = Axis(items, self.tp_size, self.tp_rank)
        axis.validate("tensor parallelism")
        return axis

    def all(self) -> list[RankShard]:
        """Every rank of the group, tp fastest."""
        return [
            RankShard(tp_size=self.tp_size, tp_rank=tp, pp_size=self.pp_size, pp_rank=pp)
            for pp in range(self.pp_size)
            for tp in range(self.tp_size)
        ]
