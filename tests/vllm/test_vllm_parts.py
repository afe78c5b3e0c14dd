"""The connector's parts, one by one: what clients send, what operators set, which blocks hold which tokens."""

from __future__ import annotations

import subprocess
import sys
import types
from dataclasses import dataclass, field
from typing import Any

import pytest
from vllm_stand_in import BLOCK, DENSE, FULL, HYBRID, STATE, SWA, Pool

from kvbaton import Finished
from kvbaton.engines.vllm import tally, versions
from kvbaton.engines.vllm.admission import Admission, Need
from kvbaton.engines.vllm.groups import CacheGroups
from kvbaton.engines.vllm.options import Options
from kvbaton.engines.vllm.orders import Blocks, Decline, Expect, Orders, Receive
from kvbaton.engines.vllm.params import MAX_ROOM, answer, decode_leg, mint_room, prefill_leg
from kvbaton.engines.vllm.quarantine import Quarantine
from kvbaton.engines.vllm.worker import WorkerHalf, unit_maker
from kvbaton.errors import ConfigError, DeclinedError, KVBatonError, LayoutError, LocalProtocolError, PeerLostError

ADDRESS = "tcp://127.0.0.1:8998"


def decode_params(**changes: Any) -> dict[str, Any]:
    return {"do_remote_prefill": True, "kvbaton_room": "12", "kvbaton_sources": [ADDRESS], **changes}


@pytest.mark.parametrize("params", [None, {}, {"do_remote_decode": False}, {"do_remote_prefill": None}, {"other": 1}])
def test_a_request_that_asks_for_nothing(params: dict[str, Any] | None) -> None:
    assert prefill_leg(params) is None
    assert decode_leg(params) is None


def test_what_proxies_send_with_nulls_is_understood() -> None:
    """vLLM's own proxies name every field of NixlConnector."""
    params = {"do_remote_decode": True, "do_remote_prefill": False, "remote_block_ids": None, "remote_host": None}
    leg = prefill_leg(params)
    assert leg is not None
    assert leg.room is None


def test_an_answer_goes_to_decode_as_it_is() -> None:
    leg = decode_leg(answer(7, [ADDRESS], group="g", request_id="r", tp_size=1))
    assert leg is not None
    assert (leg.room, leg.sources, leg.begun) == (7, (ADDRESS,), True)


def test_rooms_survive_a_double() -> None:
    rooms = [mint_room() for _ in range(1000)]
    assert all(0 < room <= MAX_ROOM and int(float(room)) == room for room in rooms)


@pytest.mark.parametrize(
    "changes",
    [
        {"kvbaton_room": 12},
        {"kvbaton_room": ""},
        {"kvbaton_room": "0"},
        {"kvbaton_room": "-1"},
        {"kvbaton_room": "1e3"},
        {"kvbaton_room": "٣"},
        {"kvbaton_room": str(1 << 53)},
        {"kvbaton_room": "9" * 1000},
        {"kvbaton_sources": None},
        {"kvbaton_sources": []},
        {"kvbaton_sources": ADDRESS},
        {"kvbaton_sources": [7]},
        {"kvbaton_sources": ["tcp://somewhere:8998"]},
        {"kvbaton_sources": ["ipc:///tmp/x"]},
        {"kvbaton_sources": ["tcp://0.0.0.0:8998"]},
        {"kvbaton_sources": ["tcp://127.0.0.1:0"]},
        {"kvbaton_sources": [ADDRESS, "tcp://localhost:8998"]},
        {"kvbaton_sources": [f"tcp://127.0.0.1:{port}" for port in range(1, 1100)]},
        {"kvbaton_begun": "yes"},
        {"do_remote_prefill": 1},
    ],
)
def test_what_a_client_may_get_wrong(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        decode_leg(decode_params(**changes))


def test_options() -> None:
    options = Options.from_mapping({"port": 9000, "bootstrap_timeout": 30, "weights": "r1"})
    assert (options.port, options.weights, dict(options.settings)) == (9000, "r1", {"bootstrap_timeout": 30})


@pytest.mark.parametrize(
    "values",
    [
        {"prot": 9000},
        {"port": "9000"},
        {"port": 70_000},
        {"quarantine": 1},
        {"bootstrap_timeout": "30"},
        {"bootstrap_timeout": -1},
        {"bootstrap_timeout": True},
        {"bootstrap_timeout": float("nan")},
        {"staging": "sometimes"},
        {"costs": 1},
    ],
)
def test_options_that_cannot_be(values: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(values))):
        Options.from_mapping(values)


SECRET = "kX7-a-secret-that-must-stay-one-Q2w"


def test_a_secret_is_read_from_its_file(tmp_path: Any) -> None:
    file = tmp_path / "secret"
    file.write_text(SECRET)
    file.chmod(0o600)
    assert Options.from_mapping({"secret_file": str(file)}).secret() == SECRET
    assert Options.from_mapping({}).secret() is None


def test_backoff_only_where_the_last_token_must_not_have_been_seen() -> None:
    assert [groups.backoff for groups in (DENSE, HYBRID, CacheGroups((FULL, SWA)))] == [0, 1, 1]
    assert [HYBRID.tokens(count) for count in (0, 1, 2)] == [0, 0, 1]


def test_the_window_of_a_grant_ends_with_what_the_next_token_sees() -> None:
    """Of 30 tokens the 31st sees 23..29; vLLM has dropped the blocks before block 5, which begins with token 20."""
    window = CacheGroups((FULL, SWA))
    tables = [list(range(1, 9)), [0] * 5 + [11, 12, 13]]
    assert window.grant(0, 30, tables)[1] == Blocks("window0", 20, 30, (11, 12, 13))
    assert window.grant(24, 30, tables)[1] == Blocks("window0", 24, 30, (12, 13))
    with pytest.raises(LayoutError, match="no block"):
        window.grant(0, 30, [tables[0], [0] * 6 + [12, 13]])


def test_a_chunk_leaves_null_blocks_out() -> None:
    tables = [list(range(1, 9)), [0, 0, 0, 10, 11, 12, 13, 14], [40, 41]]
    blocks = HYBRID.chunk(8, 20, last=False, tables=tables)
    assert blocks == (Blocks("full0", 8, 20, (3, 4, 5)), Blocks("window0", 12, 20, (10, 11)))
    assert HYBRID.chunk(20, 30, last=True, tables=tables)[-1] == Blocks("state0", 0, 0, (41,))


def test_slots_of_speculation_hold_no_state() -> None:
    import dataclasses

    groups = CacheGroups((FULL, dataclasses.replace(STATE, index=1, spare=2)))
    assert groups.chunk(0, 4, last=True, tables=[[1], [7, 8, 9]])[-1].ids == (7,)


@pytest.mark.parametrize(
    ("start", "stop", "units"),
    [(0, 8, (14, 15, 4, 5)), (0, 3, (14, 15)), (4, 7, (4, 5)), (4, 6, (4,))],
)
def test_blocks_of_several_units(start: int, stop: int, units: tuple[int, ...]) -> None:
    make = unit_maker([("full0", BLOCK, 2)])
    blocks = (7, 2)[start // BLOCK : -(-stop // BLOCK)]
    assert make(Blocks("full0", start, stop, blocks)).units == units


def test_quarantine_keeps_blocks_until_the_last_proof() -> None:
    pool, quarantine = Pool(8), Quarantine()
    quarantine.bind(pool)
    blocks = pool.take(3)
    quarantine.grant("r", blocks)
    quarantine.update(["r"], ["r"], frozenset({"r"}))
    pool.free_blocks([pool.blocks[block] for block in blocks])  # vLLM, right after it
    assert (len(quarantine), len(pool.free)) == (1, 4)
    quarantine.update([], [], None)
    assert len(quarantine) == 1
    quarantine.update([], [], frozenset())
    assert (len(quarantine), len(pool.free)) == (0, 7)


@dataclass
class SilentRoom:
    """A receiver whose prefill has gone silent: it has failed, and no proof has come."""

    room: int = 5
    error: KVBatonError | None = None
    released: bool = False
    bytes: int = 0
    handoff_seconds: float = 0.0
    exposed_seconds: float = 0.0
    aborted: list[str] = field(default_factory=list)
    published: bool = False

    def publish(self, spans: Any, *, token_count: int) -> None:  # noqa: ARG002
        self.published = True

    def fail(self, error: KVBatonError) -> None:
        self.error = self.error or error

    def abort(self, reason: str) -> None:
        self.aborted.append(reason)


class OneRoom:
    """A manager of that room."""

    def __init__(self) -> None:
        import threading

        self.receiving, self.ended = SilentRoom(), []  # type: tuple[SilentRoom, list[Any]]
        self.wakeup = threading.Event()
        self.live_rooms = self.quarantined_rooms = 0

    def receiver(self, room: int, sources: Any, *, begun: bool, tag: Any) -> SilentRoom:
        assert (room, sources, begun, tag) == (5, (ADDRESS,), True, 5)
        return self.receiving

    def take_freed(self) -> list[Any]:
        return []

    def take_finished(self) -> list[Any]:
        taken, self.ended = self.ended, []
        return taken


BLOCKS = Blocks("full0", 0, 4, (1,))


EXPECT = Expect(room=5, sources=(ADDRESS,), begun=True)
RECEIVE = Receive(request="r", room=5, sources=(ADDRESS,), tokens=4, begun=True, blocks=(BLOCKS,))


def silent(quarantine: bool) -> tuple[WorkerHalf, OneRoom]:
    manager = OneRoom()
    worker = WorkerHalf(manager, units=unit_maker([]), quarantine=quarantine)  # type: ignore[arg-type]
    worker.begin(Orders(receive=[RECEIVE]))
    assert worker.results().received == set()
    manager.receiving.error = PeerLostError("silent for 10 s", room=5)
    return worker, manager


def finished(manager: OneRoom) -> None:
    manager.ended.append(Finished(5, "target", manager.receiving.error, tag=5))


def test_a_silent_prefill_fails_the_request_at_once() -> None:
    worker, manager = silent(quarantine=True)
    results = worker.results()
    assert (results.received, results.failed, worker.leased()) == ({"r"}, {"r"}, frozenset({"r"}))
    assert (worker.results().received, worker.leased()) == (set(), frozenset({"r"}))
    finished(manager)
    assert worker.results().received == set()
    assert (worker.leased(), worker.leased()) == (frozenset(), None)


def test_without_quarantine_the_request_waits_for_the_proof() -> None:
    worker, manager = silent(quarantine=False)
    assert worker.results().received == set()
    finished(manager)
    assert (worker.results().failed, worker.leased()) == ({"r"}, None)


def test_a_request_that_was_given_up_is_not_reported_early() -> None:
    worker, manager = silent(quarantine=True)
    worker.begin(Orders(give_up=["r"]))
    assert worker.results().received == set()
    assert manager.receiving.aborted
    finished(manager)
    assert worker.results().received == {"r"}


def expecting() -> tuple[WorkerHalf, OneRoom]:
    manager = OneRoom()
    worker = WorkerHalf(manager, units=unit_maker([]))  # type: ignore[arg-type]
    worker.begin(Orders(expect=[EXPECT, EXPECT]))
    return worker, manager


def test_an_expected_room_gets_its_blocks_later() -> None:
    worker, manager = expecting()
    assert not manager.receiving.published
    worker.begin(Orders(receive=[RECEIVE]))
    assert manager.receiving.published
    finished(manager)
    assert (worker.results().received, worker.busy) == ({"r"}, False)


def test_a_room_that_failed_before_it_had_blocks_fails_when_it_has() -> None:
    worker, manager = expecting()
    manager.receiving.error = PeerLostError("silent for 10 s", room=5)
    finished(manager)
    assert worker.results().received == set()
    worker.begin(Orders(receive=[RECEIVE]))
    results = worker.results()
    assert (results.received, results.failed, worker.busy) == ({"r"}, {"r"}, False)
    assert not manager.receiving.published


def test_an_expected_room_of_which_nothing_is_wanted_is_declined() -> None:
    worker, manager = expecting()
    worker.begin(Orders(decline=[Decline(room=5, sources=(ADDRESS,), reason="decode has it all")]))
    assert isinstance(manager.receiving.error, DeclinedError)
    assert not worker.busy


def test_a_room_is_not_filled_from_elsewhere_than_it_was_expected() -> None:
    worker, manager = expecting()
    elsewhere = Receive(request="r", room=5, sources=("tcp://127.0.0.1:9",), tokens=4, begun=True, blocks=(BLOCKS,))
    worker.begin(Orders(receive=[elsewhere]))
    assert worker.results().failed == {"r"}
    assert isinstance(manager.receiving.error, LocalProtocolError)
    assert not manager.receiving.published


def small_pool(*, both: bool = False) -> Admission:
    """Thirteen blocks of which the longest prompt needs eight: five may be held for prompts nobody has opened."""
    return Admission([Need(4, 6), Need(4, 2, fixed=True)], blocks=13, longest=100, both=both)


def test_the_blocks_of_a_prompt() -> None:
    admission = small_pool()
    assert [admission.blocks(tokens) for tokens in (1, 4, 5, 24, 25, 1000)] == [3, 3, 4, 8, 8, 8]


def test_what_waits_for_decode_leaves_room_for_the_longest_prompt() -> None:
    admission = small_pool()
    for name in "abc":
        admission.add(name, 4, early=True)
    assert admission.admits("a")
    admission.hold("a")
    assert admission.admits("a")
    assert not admission.admits("b")
    admission.meet("b")
    assert admission.admits("b")
    admission.hold("b")
    admission.meet("a")
    assert (admission.admits("c"), admission.held) == (True, 0)
    for name in "abc":
        admission.end(name)
    assert len(admission) == 0


def test_a_preempted_prompt_begins_anew() -> None:
    admission = small_pool()
    admission.add("a", 4, early=True)
    admission.hold("a")
    admission.give_back("a")
    admission.add("b", 4, early=True)
    admission.hold("b")
    assert (admission.held, admission.admits("a")) == (3, False)


def test_a_long_prompt_waits_for_decode_in_a_small_pool() -> None:
    admission = small_pool()
    admission.add("long", 24, early=True)
    assert not admission.admits("long")
    admission.meet("long")
    assert admission.admits("long")


def test_sequential_prompts_wait_only_beside_early_ones() -> None:
    admission = small_pool()
    for name in "ab":
        admission.add(name, 24, early=False)
        assert admission.admits(name)
        admission.hold(name)
    admission.add("early", 4, early=True)
    admission.add("c", 4, early=False)
    assert not admission.admits("c")
    admission.end("a")
    admission.end("b")
    assert admission.admits("c")
    admission.add("d", 24, early=False)  # longer than what may be held: it begins when none is
    assert admission.admits("d")
    admission.hold("c")
    assert not admission.admits("d")


def test_an_engine_of_both_roles_counts_every_prompt_that_waits_for_a_peer() -> None:
    admission = small_pool(both=True)
    admission.add("a", 4, early=False)
    admission.add("b", 4, early=False)
    admission.hold("a")
    assert not admission.admits("b")
    assert admission.admits("of nobody else")


def test_what_ranks_tallied_is_added_up() -> None:
    one, two = tally.Tally(), tally.Tally()
    one.received("success", handoff_seconds=0.25, exposed_seconds=0.125, size=100)
    two.received("peer_lost", handoff_seconds=9, exposed_seconds=0, size=0)
    two.sent("success")
    assert two.now(live_rooms=2)
    assert not two.now(live_rooms=2)
    data = tally.add(one.take(), two.take())
    assert data["received"] == {"success": 1, "peer_lost": 1}
    assert data["handoff_seconds"] == [0.25]
    assert tally.summary(data)["failed"] == 1
    assert one.empty


@pytest.mark.parametrize(
    ("version", "fits"), [("0.32.0", True), ("0.32.1+cpu", True), ("0.33.0", False), ("dev", False)]
)
def test_the_version_gate(monkeypatch: pytest.MonkeyPatch, version: str, fits: bool) -> None:
    monkeypatch.setitem(sys.modules, "vllm", types.ModuleType("vllm"))
    module = types.ModuleType("vllm.version")
    module.__version__ = version  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm.version", module)
    if fits:
        versions.check_version()
    else:
        with pytest.raises(ConfigError, match=version):
            versions.check_version()


def test_the_package_and_its_halves_need_neither_vllm_nor_sockets() -> None:
    """The scheduler half, in a process of its own: nothing that opens sockets or moves bytes is imported."""
    script = (
        "import sys, kvbaton.engines.vllm, kvbaton.engines.vllm.scheduler, kvbaton.engines.vllm.options;"
        "print([m for m in ('zmq', 'torch', 'vllm', 'nixl', 'kvbaton.manager') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
