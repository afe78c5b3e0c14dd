"""What is particular to links over ZeroMQ: real processes, the operating system's proofs, secrets, strangers."""

from __future__ import annotations

import itertools
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
import zmq

from kvbaton.control import zmq as zmq_links
from kvbaton.control.address import Address
from kvbaton.control.base import MAX_MESSAGE_BYTES, Changed, LinkChange, LinkId
from kvbaton.control.curve import CurveKeys
from kvbaton.control.probe import LEAST_REFUSED_PAUSE_SECONDS, Finding, Probe
from kvbaton.control.watch import Watch
from kvbaton.control.zmq import ZmqLinks
from kvbaton.errors import ConfigError
from kvbaton.testing.link_log import Log, until
from kvbaton.testing.links_conformance import LinksConformance

SECRET = "a secret of many words"
connected = LinksConformance.connected

ECHO = """
import sys
from kvbaton.control.base import Arrived
from kvbaton.control.watch import Watch
from kvbaton.control.zmq import ZmqLinks
links = ZmqLinks(sys.argv[1])
print(links.address, flush=True)
while True:
    links.wait(None)
    for item in links.receive():
        if isinstance(item, Arrived):
            links.send(item.link, item.payload)
"""


@contextmanager
def echo_process(bind: str = "tcp://127.0.0.1:0") -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process that sends every message back, and its address."""
    with subprocess.Popen([sys.executable, "-c", ECHO, bind], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process, process.stdout.readline().strip()
        finally:
            process.kill()


@pytest.fixture
def here() -> Iterator[Log]:
    with ZmqLinks() as links:
        yield Log(links)


def echoes(here: Log, link: LinkId, payload: bytes) -> None:
    assert here.links.send(link, payload)
    until(lambda: payload in here.payloads(link), here)


def test_a_killed_process_is_refused_and_its_successor_found(here: Log) -> None:
    with echo_process() as (process, address):
        link = here.links.dial(address)
        echoes(here, link, b"first")
        process.kill()
        process.wait()
        until(lambda: LinkChange.REFUSED in here.changes(link), here)
        assert here.changes(link)[:3] == [LinkChange.UP, LinkChange.DOWN, LinkChange.REFUSED]
    with echo_process(address):
        until(lambda: here.changes(link)[-1] is LinkChange.UP, here)
        echoes(here, link, b"second")


def test_a_stopped_process_is_down_and_not_refused(here: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zmq_links, "HEARTBEAT_INTERVAL_SECONDS", 0.05)
    monkeypatch.setattr(zmq_links, "HEARTBEAT_TIMEOUT_SECONDS", 0.3)
    with echo_process() as (process, address):
        link = here.links.dial(address)
        echoes(here, link, b"first")
        process.send_signal(signal.SIGSTOP)
        until(lambda: here.changes(link)[-1] is LinkChange.DOWN, here)
        process.send_signal(signal.SIGCONT)
        until(lambda: here.changes(link)[-1] is LinkChange.UP, here)
        echoes(here, link, b"second")
        assert LinkChange.REFUSED not in here.changes(link)


def test_refusals_are_repeated_but_not_often_and_wait_wakes_for_them(here: Log) -> None:
    with ZmqLinks() as gone:
        address = gone.address
    link = here.links.dial(address)
    times = []
    while len(times) < 2:
        here.links.wait(None)
        times += [time.monotonic() for item in here.links.receive() if item == Changed(link, LinkChange.REFUSED)]
    assert 0.9 < times[1] - times[0] < 5


def test_an_idle_pair_costs_next_to_nothing(here: Log) -> None:
    with ZmqLinks() as other:
        connected(here, Log(other))
        before = time.process_time()
        here.links.wait(1.0)
        other.wait(0.5)
        assert time.process_time() - before < 0.05  # a loop that spins takes all of it


@pytest.mark.parametrize(("listener", "dialler"), [(SECRET, "another secret, as long"), (SECRET, None), (None, SECRET)])
def test_without_the_same_secret_nothing_gets_through(listener: str | None, dialler: str | None) -> None:
    with ZmqLinks(secret=listener) as first, ZmqLinks(secret=dialler) as second, ZmqLinks(secret=listener) as third:
        here, stranger, friend = Log(first), Log(second), Log(third)
        shut_out = second.dial(first.address)
        for number in range(10):
            second.send(shut_out, b"stranger %d" % number)
        link = connected(friend, here)
        for number in range(50):  # many turns of everybody, while libzmq re-dials
            payload = b"friend %d" % number
            assert third.send(link, payload)
            until(lambda payload=payload: payload in here.payloads(), here, stranger, friend)
            stranger.step()
        assert all(payload.startswith(b"friend") for payload in here.payloads())
        assert stranger.items == []


def test_knowing_the_servers_key_is_not_enough() -> None:
    """The gate admits the derived client key only, even where a stranger has learned the server's public key."""
    keys = CurveKeys.derive(SECRET)
    with ZmqLinks(secret=SECRET) as links, ZmqLinks(secret=SECRET) as other, zmq.Context() as context:
        here, friend = Log(links), Log(other)
        with context.socket(zmq.DEALER) as stranger:
            stranger.linger = 0
            stranger.curve_publickey, stranger.curve_secretkey = zmq.curve_keypair()
            stranger.curve_serverkey = keys.server_public
            monitor = stranger.get_monitor_socket(zmq.EVENT_HANDSHAKE_FAILED_AUTH)
            stranger.connect(links.address)
            stranger.send(b"let me in")
            until(lambda: bool(monitor.poll(0)), here)
            stranger.disable_monitor()
            monitor.close()
        link = connected(friend, here)
        assert other.send(link, b"friend")
        until(lambda: bool(here.payloads()), here, friend)
        assert here.payloads() == [b"friend"]


def test_keys_follow_from_the_secret_alone() -> None:
    assert CurveKeys.derive(SECRET) == CurveKeys.derive(SECRET) != CurveKeys.derive("another of enough characters")
    assert SECRET not in repr(CurveKeys.derive(SECRET))
    keys = CurveKeys.derive(SECRET)
    assert keys.server_secret != keys.client_secret
    with pytest.raises(ConfigError):
        CurveKeys.derive(" ")


@pytest.mark.parametrize(
    "noise",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\xff" * 4096,
        bytes(range(256)) * 64,
        b"\xff" + bytes(8) + bytes(range(256)) * 8,  # a peer of ZMTP 2, and messages
        b"\x01\x00" + b"\x05\x00spam" * 99,  # of ZMTP 1, likewise
        b"\xff\x00\x00\x00\x00\x00\x00\x00\x01\x7f\x03\x00NULL"
        + bytes(16)
        + b"\x00"
        + bytes(31)
        + b"\x02"
        + b"\xff" * 99,
    ],
)
@pytest.mark.parametrize("secret", [None, SECRET])
def test_noise_on_the_port_does_no_harm(noise: bytes, secret: str | None) -> None:
    with ZmqLinks(secret=secret) as first, ZmqLinks(secret=secret) as second, ExitStack() as stack:
        here, friend = Log(first), Log(second)
        parsed = Address.parse(first.address)
        for _ in range(5):
            stranger = stack.enter_context(socket.create_connection((parsed.host, parsed.port)))
            stranger.sendall(noise)
            here.step()
        link = connected(friend, here)
        assert second.send(link, b"friend")
        until(lambda: bool(here.payloads()), here, friend)
        assert here.payloads() == [b"friend"]


def test_foreign_zeromq_messages_are_dropped(here: Log) -> None:
    with zmq.Context() as context, context.socket(zmq.DEALER) as foreign, context.socket(zmq.DEALER) as large:
        for socket_ in (foreign, large):
            socket_.linger = 0
            socket_.connect(here.links.address)
        foreign.send_multipart([b"frame"] * (zmq_links.MAX_FRAMES + 1))
        foreign.send_multipart([bytes(MAX_MESSAGE_BYTES), b"more"])
        foreign.send(b"one")
        large.send(bytes(MAX_MESSAGE_BYTES + 1))
        large.send(bytes(MAX_MESSAGE_BYTES + 100))
        until(lambda: b"one" in here.payloads(), here)
        with ZmqLinks() as other:
            friend = Log(other)
            connected(friend, here)
        assert here.payloads() == [b"one"]


def test_it_is_known_that_more_came_than_one_receive_returns(here: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zmq_links, "BATCH", 16)
    with ZmqLinks() as there:
        assert here.links.send(here.links.dial(there.address), *[b"frame"] * 40)
        there.wait(10.0)
        assert [(len(there.receive()), there.unread) for _ in range(4)] == [
            (16, True),
            (16, True),
            (8, False),
            (0, False),
        ]


def test_accepted_links_are_bounded(here: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zmq_links, "MAX_ACCEPTED", 2)
    with ExitStack() as stack:
        friends = [Log(stack.enter_context(ZmqLinks())) for _ in range(3)]
        links = [connected(friend, here) for friend in friends]
        heard = []
        for friend, link in zip(friends, links, strict=True):
            friend.links.send(link, b"hello")
            until(lambda: len(here.payloads()) == len(heard) + 1, here)
            heard.append(here.last_link())
        assert [here.links.send(link, b"x") for link in heard] == [False, True, True]
        friends[0].links.send(links[0], b"hello again")
        until(lambda: here.payloads()[-1] == b"hello again", here)
        assert here.last_link() not in heard


@pytest.mark.parametrize("bind", ["tcp://0.0.0.0:0", "tcp://[::]:0", "tcp://192.0.2.1:0"])
def test_the_network_needs_a_secret(bind: str) -> None:
    with pytest.raises(ConfigError, match="no secret"):
        ZmqLinks(bind)


def test_a_wildcard_needs_an_advertised_host() -> None:
    with pytest.raises(ConfigError, match="advertise"):
        ZmqLinks("tcp://0.0.0.0:0", secret=SECRET)
    with ZmqLinks("tcp://0.0.0.0:0", secret=SECRET, advertise="127.0.0.1") as links, ZmqLinks(secret=SECRET) as other:
        assert links.address.startswith("tcp://127.0.0.1:")
        connected(Log(other), Log(links))


def test_ipv6() -> None:
    if not os.path.exists("/proc/net/if_inet6"):
        pytest.skip("no IPv6 on this host")
    with ZmqLinks("tcp://[::1]:0") as links, ZmqLinks() as other:
        assert links.address.startswith("tcp://[::1]:")
        connected(Log(other), Log(links))
        gone = links.address
        links.close()
        here = Log(other)
        link = other.dial(gone)
        until(lambda: here.changes(link) == [LinkChange.REFUSED], here)


@pytest.mark.parametrize(
    "text", ["tcp://127.0.0.1:8998", "tcp://[::1]:8998", "tcp://[fe80::1]:1", "tcp://0.0.0.0:65535"]
)
def test_addresses_survive_parsing(text: str) -> None:
    assert str(Address.parse(text)) == text


def test_localhost_is_an_address() -> None:
    assert str(Address.parse("tcp://localhost:8998")) == "tcp://127.0.0.1:8998"


def test_a_probe_asks_ever_less_often() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        probe = Probe(Address("127.0.0.1", listener.getsockname()[1]))  # bound, but it does not listen
        probe.start(100.0)
        found = []
        for now in itertools.accumulate(itertools.repeat(0.01, 2500), initial=100.0):
            finding = probe.step(now, answered=probe.waits_on is not None)
            if finding is not None:
                found.append((round(now - 100.0, 1), finding))
        assert {finding for _, finding in found} == {Finding.REFUSED}
        pauses = [later[0] - earlier[0] for earlier, later in itertools.pairwise(found)]
        assert min(pauses) >= LEAST_REFUSED_PAUSE_SECONDS - 0.1
        assert [round(pause) for pause in pauses] == [1, 2, 4, 5, 5, 5]
        probe.stop()
        assert probe.due is None


def test_a_probe_of_a_listener_proves_nothing() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        probe = Probe(Address("127.0.0.1", listener.getsockname()[1]))
        probe.start(0.0)
        finding = probe.step(0.0, answered=False)
        if finding is None:
            assert probe.step(5.0, answered=True) is Finding.OTHER
        else:
            assert finding is Finding.OTHER
        probe.stop()


def test_idle_links_are_not_looked_at(here: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    """With 800 links each receive took 2.7 ms."""
    with ExitStack() as stack:
        for _ in range(20):
            other = Log(stack.enter_context(ZmqLinks()))
            link = LinksConformance.connected(here, other)
        while here.links.receive():
            pass
        asked = []
        real = Watch._is_ready
        monkeypatch.setattr(Watch, "_is_ready", lambda watch, key: asked.append(key) or real(watch, key))
        assert other.links.send(other_link(other, here, link), b"news")
        until(lambda: b"news" in here.payloads(link), here)
        assert {one for _, one in asked} <= {link, 0}
        assert here.links.receive() == []
        asked.clear()
        assert here.links.receive() == []
        assert asked == []


def other_link(other: Log, here: Log, link: LinkId) -> LinkId:
    """The accepted end of a link."""
    assert here.links.send(link, b"hello")
    until(lambda: b"hello" in other.payloads(), other)
    return other.last_link()
