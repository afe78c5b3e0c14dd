"""Every kind of cache through real cores, and the scenarios that broke SGLang, by the number of the pull request."""

from __future__ import annotations

import pytest
from groups import Cut
from kinds import DENSE, EVERYTHING, GQA, Request

from kvbaton.layout import Coordinates
from kvbaton.protocol.effects import KVPoll
from kvbaton.protocol.events import Chunk, ChunkSubmitted, GrantsPublished, ReceiverOpened, SenderOpened
from kvbaton.protocol.messages import Done, Grant, Open
from kvbaton.testing.rank import Rank
from kvbaton.testing.world import World
from unit.protocol.scene import QUICK

ROOM = 11


class Play:
    """One request between two groups in a world; the test plays both engines."""

    def __init__(self, request: Request, room: int = ROOM) -> None:
        self.request = request
        self.room = room
        self.world = World(QUICK)
        self.sources = self._add("p", request.source)
        self.targets = self._add("d", request.target)

    def _add(self, name: str, group) -> list[Rank]:
        ranks = []
        for i, layout in enumerate(group.layouts):
            place = Coordinates(pp=i // group.cut.tp, tp=i % group.cut.tp)
            rank = self.world.add(f"{name}{i}", layout, group=name, group_size=len(group.layouts), coordinates=place)
            rank.memory = {
                region.address: group.memory[region.address - group.base :][: region.length]
                for region in layout.regions
            }
            ranks.append(rank)
        return ranks

    def open(self) -> None:
        for rank in self.sources:
            rank.do(SenderOpened(self.room))
        for rank in self.targets:
            rank.do(ReceiverOpened(self.room, tuple(source.address for source in self.sources)))
            grants = self.request.grants(rank.layout)
            rank.do(GrantsPublished(self.room, grants, self.request.prompt.tokens))
        self.world.run()

    def submit(self, number: int) -> None:
        last = number == len(self.request.chunks) - 1
        for rank in self.sources:
            spans = self.request.chunk(rank.layout, number)
            rank.do(ChunkSubmitted(self.room, Chunk(spans=spans, last=last)))
        self.world.run()

    def play(self) -> None:
        self.open()
        for number in range(len(self.request.chunks)):
            self.submit(number)

    def manifest(self, target: Rank, source: Rank) -> set[str]:
        """Pools of the parts that a target wants of a source."""
        opens = [m for _, a, b, m in self.world.trace if isinstance(m, Open) and (a, b) == (target.name, source.name)]
        return {part.part.pool for part in opens[-1].parts}

    def expect_success(self) -> None:
        for role, ranks in (("source", self.sources), ("target", self.targets)):
            for rank in ranks:
                status = rank.status(role, self.room)  # type: ignore[arg-type]
                assert status.poll is KVPoll.Success, (rank.name, status, self.world.describe())
        assert self.request.differences() == []


def play(request: Request) -> Play:
    scene = Play(request)
    scene.play()
    scene.expect_success()
    return scene


def test_sglang_25699_a_dense_model_has_no_state_part() -> None:
    """There the side that expects a state and the side that sends one each decided by its own `if`: every dense model
    hung. Here nobody decides: the manifest is the plan's."""
    scene = play(Request(DENSE, Cut(), Cut(), chunks=(16, 32)))
    assert scene.manifest(scene.targets[0], scene.sources[0]) == {"kv", "aux"}


def test_sglang_22145_several_tp_writers_with_one_pp_rank_are_several_writers() -> None:
    """There completion was keyed by the pipeline rank: four tensor-parallel writers of one stage were one."""
    scene = Play(Request(DENSE, Cut(tp=4, pp=1), Cut(), chunks=(16,)))
    slow = scene.sources[2]
    slow.hold_writes = True
    scene.play()
    target = scene.targets[0]
    assert sum(isinstance(message, Done) for *_, message in scene.world.trace) == 3
    assert target.status("target", ROOM).poll is KVPoll.Transferring
    slow.release_writes()
    scene.world.run()
    scene.expect_success()


@pytest.mark.parametrize(
    ("source_tp", "target_tp"), [(4, 1), (8, 1), (1, 4), (1, 8), (8, 2), (2, 8), (4, 8), (8, 4), (8, 8)]
)
def test_sglang_22145_more_ranks_than_kv_heads(source_tp: int, target_tp: int) -> None:
    """There the number of heads was guessed from one rank's: 0 % accuracy, or a division by nothing at 4 to 8."""
    scene = play(Request(GQA, Cut(tp=source_tp), Cut(tp=target_tp), chunks=(16,)))
    written = {
        target.name: [source.name for source in scene.sources if "kv" in scene.manifest(target, source)]
        for target in scene.targets
    }
    assert all(len(writers) == (2 if target_tp == 1 and source_tp > 1 else 1) for writers in written.values()), written


def test_sglang_18939_kv_window_index_and_state_in_one_request() -> None:
    """There an unknown kind of state was not sent and yet waited for."""
    cuts = Cut(tp=2, pp=2, page_size=8, swa_page_size=4), Cut(tp=4, page_size=4, swa_page_size=8)
    scene = play(Request(EVERYTHING, *cuts, tokens=61, chunks=(16, 48)))
    wanted = [scene.manifest(scene.targets[0], source) for source in scene.sources]
    assert set().union(*wanted) == {"kv", "kv_scale", "swa", "mla", "index", "state", "aux"}


def test_sglang_18939_a_kind_that_prefill_lacks_is_refused_by_name() -> None:
    """What would be waited for in vain there is a verdict here, before any byte."""
    request = Request(EVERYTHING, Cut(), Cut())
    lacking = request.source.ranks[0]
    pools = tuple(pool for pool in lacking.layout.pools if pool.name != "index")
    lacking.layout = type(lacking.layout)(lacking.layout.model, lacking.layout.regions, pools)
    scene = Play(request)
    scene.open()
    status = scene.targets[0].status("target", ROOM)
    assert status.poll is KVPoll.Failed
    assert "pool 'index' layer 2 plane 'key': the target needs items [0]" in str(status.error)
    assert request.untouched()


def test_sglang_23967_a_slow_writer_holds_up_no_other_room() -> None:
    """There one queue served all rooms, one chunk at a time."""
    scene = Play(Request(DENSE, Cut(tp=2), Cut(), chunks=(16,)))
    slow = scene.sources[0]
    slow.hold_writes = True
    scene.play()
    held, slow.held = slow.held, []
    slow.hold_writes = False
    assert held
    stuck, scene.room = scene.room, scene.room + 1
    scene.play()
    scene.expect_success()
    assert scene.targets[0].status("target", stuck).poll is not KVPoll.Success
    slow.held = held
    slow.release_writes()
    scene.world.run()
    assert scene.targets[0].status("target", stuck).poll is KVPoll.Success


@pytest.mark.parametrize(
    ("source", "target", "prefix"),
    [
        (Cut(), Cut(), 0),
        (Cut(tp=2), Cut(), 8),
        (Cut(), Cut(tp=2), 16),
        (Cut(tp=4, order="NHD"), Cut(order="HND"), 0),
        (Cut(pp=4), Cut(pp=2), 8),
        (Cut(page_size=16, swa_page_size=16), Cut(page_size=4, swa_page_size=4), 12),
        (Cut(page_size=4, swa_page_size=4), Cut(page_size=16, swa_page_size=16), 16),
        (Cut(tp=2, fusion="item"), Cut(tp=4, fusion="page"), 0),
        (Cut(tp=2, pp=2), Cut(tp=4), 48),
        (Cut(tp=2), Cut(tp=4, pp=2), 61),
    ],
    ids=str,
)
def test_everything_at_once_in_other_topologies(source: Cut, target: Cut, prefix: int) -> None:
    play(Request(EVERYTHING, source, target, tokens=61, prefix=prefix, chunks=(16, 32, 48)))


def test_a_full_hit_moves_state_and_aux_alone() -> None:
    scene = play(Request(EVERYTHING, Cut(), Cut(), tokens=48, prefix=48))
    assert scene.manifest(scene.targets[0], scene.sources[0]) == {"state", "aux"}


def test_a_source_that_dropped_too_much_of_a_window_fails_the_room_by_name() -> None:
    scene = Play(Request(EVERYTHING, Cut(), Cut()))
    scene.open()
    rank = scene.sources[0]
    spans = list(scene.request.chunk(rank.layout, 0))
    at = next(i for i, span in enumerate(spans) if span.pool == "swa")
    swa = spans[at]
    spans[at] = Grant("swa", swa.token_start + 4, swa.token_stop, swa.units[1:])
    rank.do(ChunkSubmitted(ROOM, Chunk(spans=tuple(spans), last=True)))
    scene.world.run()
    for side, status in (("source", rank.status("source", ROOM)), ("target", scene.targets[0].status("target", ROOM))):
        assert status.poll is KVPoll.Failed, side
        assert "pool 'swa': chunk starts at token 28 but 24 is next" in str(status.error)
