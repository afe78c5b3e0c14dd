"""``from kvbaton import ...`` and ``KVManager.open``: what somebody meets who has only installed the package."""

from __future__ import annotations

import ast
import importlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

import kvbaton
from kvbaton import ALWAYS_READY, Coordinates, KVManager, KVPoll, Settings, Sizes, Span, layout
from kvbaton.errors import AuthenticationError, ConfigError, LayoutError, LocalProtocolError, RegistryError
from kvbaton.serving.server.lifecycle import port_of, reserve

SECRET = "a secret of enough characters"
#: Longest time that anything in this file may take.
DEADLINE_SECONDS = 20.0
#: Set by every manager here.
WAKEUP = threading.Event()


class Rank:
    """A manager as :meth:`KVManager.open` makes it, and its memory: 8 pages of 4 tokens."""

    def __init__(self, fill: int = 0, **options: object) -> None:
        pool = layout.kv_pool(range(2), pages=8, page_size=4, heads=2, head_bytes=16, dtype="float32")
        self.memory = np.full(layout.pool_bytes(pool), fill, np.uint8)
        region = layout.Region(self.memory.ctypes.data, self.memory.nbytes)
        self.layout = layout.CacheLayout("model", (region,), (pool,))
        self.manager = KVManager.open(self.layout, **{"backend": "memory", "wakeup": WAKEUP, **options})  # type: ignore[arg-type]


@pytest.fixture
def open_rank() -> Iterator[Callable[..., Rank]]:
    with ExitStack() as stack:

        def make(role: str, fill: int = 0, **options: object) -> Rank:
            rank = Rank(fill, role=role, **options)
            stack.callback(rank.manager.close)
            return rank

        yield make


@pytest.fixture
def registry() -> str:
    """An address where nobody listens yet."""
    with reserve("127.0.0.1", 0) as bound:
        return f"127.0.0.1:{port_of(bound)}"


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    """Every thread and socket that a test has opened is gone after it."""
    yield
    left = [thread.name for thread in threading.enumerate() if thread.name.startswith("kvbaton")]
    assert not left


def eventually(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while True:
        WAKEUP.clear()
        if condition():
            return
        assert time.monotonic() < deadline, f"never: {what}"
        WAKEUP.wait(0.05)  # the registry sets nothing


def hand_over(source: Rank, target: Rank, room: int, addresses: list[str]) -> None:
    sender = source.manager.sender(room)
    receiver = target.manager.receiver(room, addresses)
    receiver.publish([Span("kv", 0, 10, (5, 3, 1))], token_count=10)
    eventually(lambda: sender.poll() is KVPoll.WaitingForInput, "decode opens the room")
    sender.submit([Span("kv", 0, 10, (4, 6, 2))], last=True, ready=ALWAYS_READY)
    eventually(lambda: sender.released and receiver.released, "the room ends")
    assert (sender.poll(), receiver.poll()) == (KVPoll.Success, KVPoll.Success), (sender.error, receiver.error)


@pytest.mark.parametrize("backend", ["memory", "nixl"])
def test_two_ranks_hand_over_with_nothing_but_the_front_door(open_rank: Callable[..., Rank], backend: str) -> None:
    source, target = open_rank("prefill", 7, backend=backend), open_rank("decode", backend=backend)
    hand_over(source, target, 1, [source.manager.address])
    pages = target.memory.reshape(4, 8, -1)
    assert (pages[:, [5, 3, 1]] == 7).all()
    assert not pages[:, [0, 2, 4, 6, 7]].any()


def test_a_registry_is_all_that_decode_needs_to_know(open_rank: Callable[..., Rank], registry: str) -> None:
    source = open_rank("prefill", 7, registry=registry, secret=SECRET)
    target = open_rank("decode", registry=registry, secret=SECRET)
    eventually(lambda: source.manager.registered, "prefill registers")
    assert target.manager.registered, "decode needs no registration"
    found = target.manager.lookup(1).result(DEADLINE_SECONDS)
    assert found == (source.manager.address,)
    hand_over(source, target, 1, list(found))
    source.manager.close()

    def is_gone() -> bool:  # lookups are remembered for a second
        return isinstance(target.manager.lookup(2).exception(DEADLINE_SECONDS), RegistryError)

    eventually(is_gone, "the registry ends with the rank that serves it")
    open_rank("prefill", registry=registry, secret=SECRET)  # the port is free again


def test_a_group_is_found_when_all_its_ranks_are_there(open_rank: Callable[..., Rank], registry: str) -> None:
    group = {"registry": registry, "group": "launch", "sizes": Sizes(tp=2)}
    first = open_rank("prefill", **group)
    target = open_rank("decode", registry=registry)
    eventually(lambda: first.manager.registered, "the first rank registers")
    with pytest.raises(RegistryError, match=r"missing dp0\.pp0\.cp0\.tp1"):
        target.manager.lookup(1).result(DEADLINE_SECONDS)
    second = open_rank("prefill", **group, coordinates=Coordinates(tp=1))
    eventually(lambda: second.manager.registered, "the second rank registers")
    assert target.manager.lookup(1).result(DEADLINE_SECONDS) == (first.manager.address, second.manager.address)
    second.manager.close()  # withdraws
    eventually(lambda: "missing" in str(target.manager.lookup(1).exception(DEADLINE_SECONDS)), "it is withdrawn")


def test_a_refused_registration_is_told_when_it_is_asked_for(open_rank: Callable[..., Rank], registry: str) -> None:
    group = {"registry": registry, "group": "launch", "sizes": Sizes(tp=2)}
    open_rank("prefill", **group, secret=SECRET)
    second = open_rank("prefill", **group, coordinates=Coordinates(tp=1), secret="another one, long enough")

    def refused() -> bool:
        try:
            return second.manager.registered
        except AuthenticationError:
            return True

    eventually(refused, "the registry refuses the second rank")
    told = []
    for _ in range(2):  # each raise has an instance of its own
        with pytest.raises(AuthenticationError) as raised:
            _ = second.manager.registered
        told.append(raised.value)
    assert told[0] is not told[1]


def test_a_registry_port_in_use_ends_the_opening_and_leaves_nothing(open_rank: Callable[..., Rank]) -> None:
    with reserve("127.0.0.1", 0) as bound:
        bound.listen()
        files = len(os.listdir("/proc/self/fd"))
        with pytest.raises(ConfigError, match=f"{port_of(bound)}"):
            open_rank("prefill", registry=f"127.0.0.1:{port_of(bound)}")
        assert len(os.listdir("/proc/self/fd")) == files


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"role": "both sides"}, "role: 'both sides' is unknown; use one of: prefill, decode, both"),
        ({"backend": "pigeon"}, "'pigeon' is unknown"),
        ({"host": "prefill.example"}, "no IP address"),
        ({"host": "0.0.0.0"}, "no secret is set"),
        ({"host": "0.0.0.0", "secret": SECRET}, "set the host to advertise"),
        ({"registry": "8998"}, "registry: '8998' is not HOST:PORT"),
        ({"registry": "127.0.0.1:0"}, "registry: '127.0.0.1:0' is not HOST:PORT"),
        ({"sizes": Sizes(tp=2)}, "group: name the engine instance that the 2 ranks belong to"),
        ({"coordinates": Coordinates(tp=2), "sizes": Sizes(tp=2), "group": "g"}, "coordinates.tp: 2 is outside sizes"),
    ],
)
def test_what_cannot_be_opened_is_named(
    open_rank: Callable[..., Rank], options: dict[str, object], complaint: str
) -> None:
    files = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ConfigError) as caught:
        open_rank(**{"role": "prefill", **options})
    assert complaint in str(caught.value)
    assert len(os.listdir("/proc/self/fd")) == files


def test_a_layout_that_cannot_be_is_refused_and_nothing_stays_open(registry: str) -> None:
    rank = Rank(role="decode")
    rank.manager.close()
    files = len(os.listdir("/proc/self/fd"))
    with pytest.raises(LayoutError):
        KVManager.open(
            layout.CacheLayout("model", (), rank.layout.pools), role="prefill", backend="memory", registry=registry
        )
    assert len(os.listdir("/proc/self/fd")) == files


def test_a_rank_opens_its_own_side_of_rooms_only(open_rank: Callable[..., Rank]) -> None:
    with pytest.raises(LocalProtocolError, match="role prefill opens no target"):
        open_rank("prefill").manager.receiver(1, ["tcp://127.0.0.1:1"])
    with pytest.raises(LocalProtocolError, match="role decode opens no source"):
        open_rank("decode").manager.sender(1)
    both = open_rank("both", settings=Settings(bootstrap_timeout=1.0)).manager
    both.sender(1)
    both.receiver(1, ["tcp://127.0.0.1:1"])


def test_a_lookup_needs_a_registry_and_a_manager_that_runs(open_rank: Callable[..., Rank], registry: str) -> None:
    with pytest.raises(ConfigError, match="registry='HOST:PORT'"):
        open_rank("decode").manager.lookup(1)
    target = open_rank("decode", registry=registry).manager
    with pytest.raises(ConfigError, match="not HOST:PORT"):
        target.lookup(1, registry="nowhere")
    waiting = target.lookup(1)  # nobody listens there: it goes on asking
    target.close()
    assert waiting.cancelled() or isinstance(waiting.exception(), RegistryError)
    with pytest.raises(LocalProtocolError):
        target.lookup(2)


def test_a_manager_that_runs_may_be_used_in_a_with_statement(open_rank: Callable[..., Rank]) -> None:
    with open_rank("prefill").manager as manager:
        manager.start()
    with pytest.raises(LocalProtocolError, match="closed"):
        manager.start()


def test_every_public_name_is_there_and_is_what_the_types_say() -> None:
    tree = ast.parse(Path(kvbaton.__file__).read_text())
    (typed,) = [node for node in tree.body if isinstance(node, ast.If)]
    imported = {alias.name: node.module for node in typed.body for alias in node.names}
    assert sorted(imported) == kvbaton.__all__
    for name, module in imported.items():
        home = importlib.import_module(module)
        value = getattr(kvbaton, name)
        assert value is (home if home is value else getattr(home, name))
        assert name in dir(kvbaton)
    with pytest.raises(AttributeError, match="'KVManger'"):
        _ = kvbaton.KVManger


def test_importing_is_light() -> None:
    """The best of three: the machine may be busy. aiohttp and torch come with what needs them, never with the names."""
    script = """
import sys, time
start = time.perf_counter()
import kvbaton
seconds = time.perf_counter() - start
from kvbaton import *
heavy = {"torch", "aiohttp", "transformers", "rich", "prometheus_client", "nixl_cu12", "nixl_cu13", "nixl"}
assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()
print(seconds)
"""
    runs = [subprocess.run([sys.executable, "-c", script], capture_output=True, text=True) for _ in range(3)]
    assert not [run.stderr for run in runs if run.returncode], runs
    assert min(float(run.stdout) for run in runs) < 0.3
