"""A target that does not know how long the prompt is: the source says it with the proof of delivery."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from msgspec import structs

from kvbaton.protocol.effects import KVPoll
from kvbaton.protocol.events import GrantsPublished
from kvbaton.protocol.messages import AnyMessage, Done, Grant
from kvbaton.testing.rank import Rank

from .scene import SHAPES, Scene


def publish(scene: Scene, *, spare: int) -> None:
    """Units for up to ``spare`` tokens more than there are."""
    for rank in scene.targets:
        grants = []
        for grant in scene.grants(rank):
            rows = rank.layout.pool(grant.pool).rows
            stop = grant.token_stop + spare if grant.token_stop else 0
            count = -(-stop // rows) - grant.token_start // rows if stop else len(grant.units)
            free = (unit for unit in range(rank.layout.pool(grant.pool).units) if unit not in grant.units)
            units = [*grant.units[:count], *(next(free) for _ in range(count - len(grant.units)))]
            grants.append(Grant(grant.pool, grant.token_start, stop, tuple(units)))
        most = scene.shape.tokens + spare
        rank.do(GrantsPublished(scene.room, tuple(grants), most, at_most=True))


def opened(scene: Scene, *, spare: int) -> Scene:
    scene.open_senders()
    scene.open_receivers()
    publish(scene, spare=spare)
    scene.world.run()
    return scene


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("spare", [0, 1, 9])
def test_what_there_is_arrives_and_its_length_with_it(name: str, spare: int) -> None:
    scene = opened(Scene(SHAPES[name]), spare=spare)
    assert scene.status("target").token_count == 0
    scene.submit_all()
    scene.expect_success()
    assert scene.status("target").token_count == scene.shape.tokens


def test_a_prompt_that_is_longer_than_what_was_granted_fails_by_its_length() -> None:
    scene = opened(Scene(SHAPES["1→1"]), spare=-3)
    scene.submit_all()
    scene.expect_failed()
    assert "22" in str(scene.status("target").error)
    assert "19" in str(scene.status("target").error)


def test_sources_that_do_not_agree_on_the_length_fail_the_room() -> None:
    scene = opened(Scene(SHAPES["2→1"]), spare=9)
    told: list[int] = []

    def lying(sender: Rank, _to: Rank, message: AnyMessage) -> int | Sequence[AnyMessage]:
        if isinstance(message, Done) and sender is scene.sources[1]:
            told.append(message.token_count)
            return [structs.replace(message, token_count=message.token_count - 1)]
        return 1

    scene.world.network = lying
    scene.submit_all()
    assert told
    assert scene.status("target").poll is KVPoll.Failed


def test_a_source_that_claims_more_than_was_granted_is_not_believed() -> None:
    scene = opened(Scene(SHAPES["1→1"]), spare=0)

    def lying(_from: Rank, _to: Rank, message: AnyMessage) -> int | Sequence[AnyMessage]:
        return [structs.replace(message, token_count=99)] if isinstance(message, Done) else 1

    scene.world.network = lying
    scene.submit_all()
    assert scene.status("target").poll is KVPoll.Failed
