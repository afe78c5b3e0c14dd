"""Links over ZeroMQ: a ROUTER where this rank listens, a DEALER for each link it dials.

What to know:

- Sockets never linger and sends never block. Messages that are sent together travel as the frames of one of ZeroMQ's:
  waking its threads is most of what a message costs. A queue holds :data:`QUEUE_MESSAGES` of those; what does not fit
  is dropped and ``send`` says so. Messages sent while a dialled link is not up wait in that queue (``IMMEDIATE`` is
  off, so that a first message needs no round trip); after a restart of the peer the new process may get messages meant
  for the old one, which is why every message names an instance.
- A dialled link is UP when the ZMTP handshake, CURVE included, has succeeded. It is DOWN when the stream breaks or
  heartbeats stay out. While it is not UP, the address is probed (:mod:`kvbaton.control.probe`), and each refused
  probe is reported as REFUSED, at most once a second.
- Without a secret only loopback addresses are used. With one, every message is encrypted, and a rank with another
  secret gets nothing through: its link never comes UP and is never REFUSED, and what it sends stays in its queue.
- An accepted link lasts as long as one connection of the dialler: after a reconnect it has another id.
- Idle links cost nothing: only what is ready is looked at (:mod:`kvbaton.control.watch`), and probes that are due.

All waiting happens in ``wait``; there is no thread but ZeroMQ's own. This file must not know what messages mean.
"""

from __future__ import annotations

import contextlib
import enum
import itertools
import math
import os
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import zmq
from zmq.utils.monitor import parse_monitor_message

from kvbaton.control.address import Address
from kvbaton.control.base import MAX_MESSAGE_BYTES, Arrived, Changed, LinkChange, LinkId, Links
from kvbaton.control.curve import CurveKeys, ZapHandler
from kvbaton.control.probe import Finding, Probe
from kvbaton.control.watch import Watch
from kvbaton.errors import ConfigError, OverloadedError, TransportError

#: Most messages that wait in each direction of a link.
QUEUE_MESSAGES = 1024
#: Most messages of one accepted connection that wait to be read; more wait at their sender (8 MiB each is possible).
ACCEPTED_MESSAGES = 128
#: Most messages that travel as one of ZeroMQ's; together they are no larger than one may be.
MAX_FRAMES = 64
#: Most items that one ``receive`` returns, and most messages that it takes from one socket.
BATCH = 256
SOCKET_BATCH = 64
#: Most links that may be dialled, and accepted links that are remembered (the one silent for longest goes first).
MAX_DIALLED = 1024
MAX_ACCEPTED = 4096
#: A peer that answers no heartbeat for this long is DOWN; one is sent each interval.
HEARTBEAT_INTERVAL_SECONDS = 2.0
HEARTBEAT_TIMEOUT_SECONDS = 6.0
#: A connection that does not finish its handshake in this time is dropped.
HANDSHAKE_SECONDS = 5.0
CONNECT_SECONDS = 3.0
RECONNECT_FIRST_SECONDS = 0.05
RECONNECT_LONGEST_SECONDS = 1.0
#: How long to wait until an address that is given up is free.
UNBIND_SECONDS = 1.0
#: A new link that is not UP after this time is probed.
PROBE_AFTER_SECONDS = 0.05
#: What CURVE adds to a message before libzmq measures it (33 bytes in libzmq 4.3), and some room.
_CURVE_OVERHEAD_BYTES = 64

_Socket = zmq.Socket[bytes]
_EVENTS = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED


class _Kind(enum.Enum):
    """What is watched; of a link the DEALER, its monitor, and the probe of its address."""

    WAKE = enum.auto()
    ROUTER = enum.auto()
    GATE = enum.auto()
    DEALER = enum.auto()
    MONITOR = enum.auto()
    PROBE = enum.auto()


_NO_LINK = LinkId(0)
_WAKE, _ROUTER, _GATE = (_Kind.WAKE, _NO_LINK), (_Kind.ROUTER, _NO_LINK), (_Kind.GATE, _NO_LINK)


@dataclass(eq=False, slots=True)
class _Dialled:
    """A link we opened: its DEALER, the DEALER's monitor, and the probe of its address."""

    link: LinkId
    socket: _Socket
    monitor: _Socket
    probe: Probe
    up: bool = False


@dataclass(slots=True)
class _Accepted:
    """The links others opened: ids by connection (a ROUTER identity), the longest silent first."""

    links: OrderedDict[bytes, LinkId] = field(default_factory=OrderedDict)
    identities: dict[LinkId, bytes] = field(default_factory=dict)
    closed: OrderedDict[bytes, None] = field(default_factory=OrderedDict)

    def heard(self, identity: bytes, ids: itertools.count[int]) -> LinkId | None:
        """The link of a message, None if we closed it."""
        if identity in self.closed:
            return None
        link = self.links.get(identity)
        if link is None:
            link = self.links[identity] = LinkId(next(ids))
            self.identities[link] = identity
            if len(self.links) > MAX_ACCEPTED:
                self.identities.pop(self.links.popitem(last=False)[1])
        self.links.move_to_end(identity)
        return link

    def gone(self, link: LinkId) -> bytes | None:
        """Forget a link; its identity, if it was known."""
        identity = self.identities.pop(link, None)
        if identity is not None:
            self.links.pop(identity)
        return identity

    def close(self, link: LinkId) -> None:
        """Forget a link and ignore what it still brings in."""
        identity = self.gone(link)
        if identity is not None:
            self.closed[identity] = None
            if len(self.closed) > MAX_ACCEPTED:
                self.closed.popitem(last=False)


class ZmqLinks(Links):
    """See the module.

    Args:
        bind: where to listen; port 0 lets the system choose.
        secret: shared by all ranks that may talk to each other; None: this host only, in the clear.
        advertise: host that peers dial (an IP address), where it differs from the one in ``bind``.

    Raises ConfigError for an address that cannot be, is taken, or is open to the network without a secret.
    """

    def __init__(self, bind: str = "tcp://127.0.0.1:0", *, secret: str | None = None, advertise: str = "") -> None:
        here = Address.parse(bind, any_port=True)
        if secret is None and not here.is_loopback:
            hint = "set a secret that all ranks share, or bind to 127.0.0.1"
            raise ConfigError(f"{here} is open to the network and no secret is set", hint=hint)
        if here.is_wildcard and not advertise:
            raise ConfigError(f"{here} says not where peers find this rank: set the host to advertise")
        shown = Address.parse(f"tcp://{advertise}:0", any_port=True) if advertise else here
        self._keys = CurveKeys.derive(secret) if secret is not None else None
        self._inbox: deque[Arrived | Changed] = deque()
        self._more = False  # a socket has more than was read from it
        self._dialled: dict[LinkId, _Dialled] = {}
        self._accepted = _Accepted()
        self._ids = itertools.count(1)
        self._probing: dict[LinkId, _Dialled] = {}
        self._context: zmq.Context[_Socket] = zmq.Context()
        self._context.max_sockets = 4 * MAX_DIALLED
        self._watch: Watch[tuple[_Kind, LinkId]] = Watch()
        self._gate = ZapHandler(self._context, self._keys)
        self._router = self._new_socket(zmq.ROUTER, here)
        try:
            self._listen(here)
        except zmq.ZMQError as error:
            self._watch.close()
            self._context.destroy(linger=0)
            raise ConfigError(f"cannot listen at {here}: {error.strerror}") from error
        port = Address.parse(self._router.getsockopt_string(zmq.LAST_ENDPOINT)).port
        self._address = Address(shown.host, port)
        self._wake_lock = threading.Lock()
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._watch.add_file(_WAKE, self._wake_fd)
        self._watch.add_socket(_ROUTER, self._router)
        self._watch.add_socket(_GATE, self._gate.socket)

    def __repr__(self) -> str:
        up = sum(dialled.up for dialled in self._dialled.values())
        state = "closed" if self._context.closed else f"dialled={len(self._dialled)} ({up} up)"
        return f"<ZmqLinks {self._address} {state} accepted={len(self._accepted.links)}>"

    @property
    def address(self) -> str:
        return str(self._address)

    def _new_socket(self, kind: int, there: Address) -> _Socket:
        socket: _Socket = self._context.socket(kind)
        socket.linger = 0
        socket.sndhwm = socket.rcvhwm = QUEUE_MESSAGES
        socket.maxmsgsize = MAX_MESSAGE_BYTES + _CURVE_OVERHEAD_BYTES
        socket.sndtimeo = 0
        socket.ipv6 = there.is_ipv6
        socket.handshake_ivl = _milliseconds(HANDSHAKE_SECONDS)
        socket.heartbeat_ivl = _milliseconds(HEARTBEAT_INTERVAL_SECONDS)
        socket.heartbeat_timeout = socket.heartbeat_ttl = _milliseconds(HEARTBEAT_TIMEOUT_SECONDS)
        return socket

    def _listen(self, here: Address) -> None:
        self._router.router_mandatory = True
        self._router.rcvhwm = ACCEPTED_MESSAGES
        if self._keys:
            self._keys.guard_server(self._router)
        self._gate.guard(self._router)
        self._router.bind(str(here))

    # -- links

    def dial(self, address: str) -> LinkId:
        there = Address.parse(address)
        if there.is_wildcard:
            raise ConfigError(f"{there} is no address of a rank: dial the one it advertises")
        if self._keys is None and not there.is_loopback:
            raise ConfigError(f"{there} is on the network and no secret is set: set the one of that rank")
        if self._context.closed:
            raise ConfigError(f"links of {self._address} are closed")
        if len(self._dialled) >= MAX_DIALLED:
            raise OverloadedError(f"{MAX_DIALLED} links are open: close some")
        try:
            dialled = self._connect(there)
        except zmq.ZMQError as error:  # this process has no descriptor left, or no memory
            raise TransportError(f"cannot dial {there}: {error.strerror}; raise the limit of open files") from error
        self._dialled[dialled.link] = dialled
        self._watch.add_socket((_Kind.DEALER, dialled.link), dialled.socket)
        self._watch.add_socket((_Kind.MONITOR, dialled.link), dialled.monitor)
        self._start_probe(dialled, time.monotonic(), PROBE_AFTER_SECONDS)
        return dialled.link

    def _connect(self, there: Address) -> _Dialled:
        socket = self._new_socket(zmq.DEALER, there)
        try:
            socket.reconnect_ivl = _milliseconds(RECONNECT_FIRST_SECONDS)
            socket.reconnect_ivl_max = _milliseconds(RECONNECT_LONGEST_SECONDS)
            socket.connect_timeout = _milliseconds(CONNECT_SECONDS)
            if self._keys:
                self._keys.guard_client(socket)
            dialled = _Dialled(LinkId(next(self._ids)), socket, socket.get_monitor_socket(_EVENTS), Probe(there))
            socket.connect(str(there))
        except zmq.ZMQError:
            socket.close()
            raise
        return dialled

    def send(self, link: LinkId, *payloads: bytes) -> bool:
        sent = [self._send_frames(link, frames) for frames in _batches(payloads)]  # behind one that is dropped as well
        return all(sent)

    def _send_frames(self, link: LinkId, frames: Sequence[bytes]) -> bool:
        """Messages as the frames of one of ZeroMQ's: its thread is woken, and the peer's, once for all of them."""
        if not _is_ours(frames):
            return False
        identity = self._accepted.identities.get(link)
        try:
            if identity is not None:
                self._watch.touched(_ROUTER)
                self._router.send_multipart((identity, *frames), zmq.NOBLOCK)
            elif link in self._dialled:
                self._watch.touched((_Kind.DEALER, link))
                self._dialled[link].socket.send_multipart(frames, zmq.NOBLOCK)
            else:
                return False
        except zmq.Again:
            return False
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            self._accepted.gone(link)
            return False
        return True

    def close_link(self, link: LinkId) -> None:
        self._accepted.close(link)
        dialled = self._dialled.pop(link, None)
        if dialled is None:
            return
        self._stop_probe(dialled)
        self._watch.remove((_Kind.DEALER, link))
        self._watch.remove((_Kind.MONITOR, link))
        dialled.socket.disable_monitor()
        dialled.monitor.close(linger=0)  # a socket left open would make close() wait for ever
        dialled.socket.close(linger=0)

    # -- waiting and receiving

    def receive(self) -> list[Arrived | Changed]:
        if self._context.closed:
            return []
        self._more = False
        self._serve(self._watch.wait(0.0))
        batch = [self._inbox.popleft() for _ in range(min(BATCH, len(self._inbox)))]
        return [item for item in batch if item.link in self._dialled or item.link in self._accepted.identities]

    @property
    def unread(self) -> bool:
        return self._more or bool(self._inbox)

    def wait(self, timeout_seconds: float | None) -> None:
        until = math.inf if timeout_seconds is None else time.monotonic() + timeout_seconds
        while not self._inbox and not self._context.closed:
            due = min((d.probe.due for d in self._probing.values() if d.probe.due is not None), default=math.inf)
            ready = self._watch.wait(min(until, due) - time.monotonic())
            if _WAKE in ready:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(self._wake_fd)
                return
            if any(kind in (_Kind.ROUTER, _Kind.DEALER) for kind, _ in ready):
                return
            self._serve(ready)
            if time.monotonic() >= until:
                return

    def wake(self) -> None:
        with self._wake_lock:
            if self._wake_fd >= 0:
                with contextlib.suppress(BlockingIOError):  # the counter is full: wait returns anyway
                    os.eventfd_write(self._wake_fd, 1)

    def _serve(self, ready: list[tuple[_Kind, LinkId]]) -> None:
        """Everything that is ready: who may come in, which links changed, which addresses refuse, then messages."""
        now = time.monotonic()
        answered = {link for kind, link in ready if kind is _Kind.PROBE}
        for kind, link in ready:
            if kind is _Kind.GATE:
                self._gate.answer()
            elif kind is _Kind.MONITOR:
                self._read_monitor(self._dialled[link], now)
        for dialled in list(self._probing.values()):
            self._step_probe(dialled, now, answered=dialled.link in answered)
        self._read_messages([key for key in ready if key[0] in (_Kind.ROUTER, _Kind.DEALER)])

    def _start_probe(self, dialled: _Dialled, now: float, after_seconds: float = 0.0) -> None:
        self._watch.remove((_Kind.PROBE, dialled.link))
        dialled.probe.start(now, after_seconds)
        self._probing[dialled.link] = dialled

    def _stop_probe(self, dialled: _Dialled) -> None:
        self._watch.remove((_Kind.PROBE, dialled.link))
        dialled.probe.stop()
        self._probing.pop(dialled.link, None)

    def _step_probe(self, dialled: _Dialled, now: float, *, answered: bool) -> None:
        """Only links that are not up are probed."""
        key = (_Kind.PROBE, dialled.link)
        before = dialled.probe.waits_on
        if before is not None and (answered or (dialled.probe.due is not None and now >= dialled.probe.due)):
            self._watch.remove(key)  # the step closes it
        if dialled.probe.step(now, answered) is Finding.REFUSED:
            self._inbox.append(Changed(dialled.link, LinkChange.REFUSED))
        after = dialled.probe.waits_on
        if after is not None and after is not before:
            self._watch.add_file(key, after.fileno(), writable=True)

    def _read_monitor(self, dialled: _Dialled, now: float) -> None:
        for _ in range(SOCKET_BATCH):
            try:
                event = parse_monitor_message(dialled.monitor.recv_multipart(zmq.NOBLOCK))["event"]
            except zmq.Again:
                return
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                dialled.up = True
                self._stop_probe(dialled)
                self._inbox.append(Changed(dialled.link, LinkChange.UP))
            elif event == zmq.EVENT_DISCONNECTED and dialled.up:
                dialled.up = False
                self._start_probe(dialled, now)
                self._read_dealer(dialled, QUEUE_MESSAGES)  # what came before the break comes first
                self._inbox.append(Changed(dialled.link, LinkChange.DOWN))

    def _read_messages(self, ready: list[tuple[_Kind, LinkId]]) -> None:
        """A few from each socket, those first that were not read last time, until a batch is full."""
        for kind, link in ready:
            if len(self._inbox) >= BATCH:
                self._more = True
                return
            if kind is _Kind.ROUTER:
                self._read_router()
            elif link in self._dialled:
                self._read_dealer(self._dialled[link], SOCKET_BATCH)

    def _read_dealer(self, dialled: _Dialled, most: int) -> None:
        self._watch.touched((_Kind.DEALER, dialled.link))
        for _ in range(most):
            frames = _next_message(dialled.socket)
            if not frames:
                return
            if _is_ours(frames):
                self._inbox.extend(Arrived(dialled.link, payload) for payload in frames)
        self._more = True

    def _read_router(self) -> None:
        self._watch.touched(_ROUTER)
        for _ in range(SOCKET_BATCH):
            frames = _next_message(self._router)
            if not frames:
                return
            identity, *payloads = frames
            link = self._accepted.heard(identity, self._ids) if _is_ours(payloads) else None
            if link is not None:
                self._inbox.extend(Arrived(link, payload) for payload in payloads)
        self._more = True

    def sizes(self) -> dict[str, int]:
        return {
            "dialled": len(self._dialled),
            "accepted": len(self._accepted.links),
            "closed": len(self._accepted.closed),
            "inbox": len(self._inbox),
        }

    def stop_listening(self) -> None:
        if self._context.closed or self._router.closed:
            return
        self._watch.remove(_ROUTER)
        self._accepted = _Accepted()
        closed = self._router.get_monitor_socket(zmq.EVENT_CLOSED)
        self._router.unbind(self._router.getsockopt_string(zmq.LAST_ENDPOINT))
        closed.poll(_milliseconds(UNBIND_SECONDS))  # ZeroMQ closes it on a thread of its own
        self._router.disable_monitor()
        closed.close(linger=0)
        self._router.close(linger=0)

    def close(self) -> None:
        if self._context.closed:
            return
        for link in list(self._dialled):
            self.close_link(link)
        with self._wake_lock:
            self._watch.remove(_WAKE)
            os.close(self._wake_fd)
            self._wake_fd = -1
        self.stop_listening()
        self._watch.remove(_GATE)
        self._gate.socket.close(linger=0)
        self._watch.close()
        self._context.term()


def _next_message(socket: _Socket) -> list[bytes]:
    """The frames of the next message; none if there is none. Looking first costs less than an exception."""
    if not socket.getsockopt(zmq.EVENTS) & zmq.POLLIN:  # type: ignore[arg-type, operator]
        return []
    try:
        return socket.recv_multipart(zmq.NOBLOCK)
    except zmq.Again:
        return []


def _batches(payloads: Sequence[bytes]) -> Iterator[list[bytes]]:
    """Messages by what may travel together; one that is too large for anybody stays alone."""
    batch: list[bytes] = []
    size = 0
    for payload in payloads:
        if batch and (len(batch) == MAX_FRAMES or size + len(payload) > MAX_MESSAGE_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(payload)
        size += len(payload)
    yield batch


def _is_ours(frames: Sequence[bytes]) -> bool:
    return 1 <= len(frames) <= MAX_FRAMES and sum(map(len, frames)) <= MAX_MESSAGE_BYTES


def _milliseconds(seconds: float) -> int:
    return round(seconds * 1000)
