"""The leader's end of a group: what it cannot order is not begun here either."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
from ranks import ROOMS, MakeRank

from kvbaton.errors import InternalError
from kvbaton.serving.engine.group import Group, GroupManager
from kvbaton.serving.engine.pool import Pools

BEGIN: dict[str, Callable[[GroupManager, str], Any]] = {
    "prefill": lambda manager, _source: manager.sender(next(ROOMS)),
    "decode": lambda manager, source: manager.receiver(next(ROOMS), [source]),
}


@pytest.mark.parametrize("transport", ["memory"])
@pytest.mark.parametrize("role", BEGIN)
def test_a_room_that_the_others_cannot_be_told_of_ends_here_at_once(make_rank: MakeRank, role: str) -> None:
    source = make_rank("prefill")
    rank = source if role == "prefill" else make_rank("decode")
    group = Group([])
    group.lost = InternalError("rank 1 of this group is gone")
    with pytest.raises(InternalError, match="rank 1 of this group is gone"):
        BEGIN[role](GroupManager(rank.manager, group, cast(Pools, None)), source.manager.address)
    rank.wait_until(lambda: not rank.manager.live_rooms, "nobody would ever have ended it")
    assert not group._sides
