"""What a process of a server is to its peers, and where it stands among the others.

This file must not know of models, processes or transports.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from kvbaton.discovery.placement import group_of
from kvbaton.discovery.registry import RegistryCoordinates as Place
from kvbaton.layout import Coordinates
from kvbaton.manager import new_instance
from kvbaton.serving.engine.shard import RankShard


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerRank:
    """What a process is to its peers. ``launch`` is minted when a server starts: a restart is a new group.

    Each of the ``dp_size`` data-parallel ranks is a whole group by itself, made of the ranks of ``shard``.
    """

    instance: str = field(default_factory=new_instance)
    launch: str = field(default_factory=new_instance)
    shard: RankShard = field(default_factory=RankShard)
    dp_rank: int = 0
    dp_size: int = 1

    @property
    def group(self) -> str:
        """The ranks that serve a room together."""
        return group_of(self.launch, self.dp_rank, self.dp_size)

    @property
    def alone(self) -> bool:
        """Whether the server has no other rank."""
        return self.shard.ranks * self.dp_size == 1

    @property
    def number(self) -> int:
        """Among all ranks of the server."""
        return self.dp_rank * self.shard.ranks + self.shard.rank

    def place(self, shard: RankShard) -> Place:
        """Where a rank of this group stands, as the registry knows it."""
        return Place(dp=self.dp_rank, pp=shard.pp_rank, tp=shard.tp_rank)

    def coordinates(self, shard: RankShard) -> Coordinates:
        """The same, as peers know it."""
        return Coordinates(dp=self.dp_rank, pp=shard.pp_rank, tp=shard.tp_rank)

    def __str__(self) -> str:
        return f"data-parallel rank {self.dp_rank}"
