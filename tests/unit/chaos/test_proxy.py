"""The proxy of the fault matrix: real ZeroMQ links through it, and what it does to them."""

from __future__ import annotations

import asyncio
import time

import pytest

from kvbaton.control.address import Address
from kvbaton.control.base import Arrived, Changed, LinkChange
from kvbaton.control.zmq import ZmqLinks
from kvbaton.protocol.messages import Ping, Pong, encode
from kvbaton.serving.fleet import free_ports
from kvbaton.serving.testing.http import run
from lab.chaos.frames import Frames
from lab.chaos.proxy import TcpProxy

PING = Ping(sender="a", receiver="b")
PONG = Pong(sender="b", receiver="a")


class Ends:
    """A listening end, a proxy before it, and an end that dials the proxy; polled, never blocking."""

    def __init__(self) -> None:
        self.listener = ZmqLinks()
        self.dialler = ZmqLinks()
        (self.port,) = free_ports(1)
        self.proxy = TcpProxy(self.port, Address.parse(self.listener.address).port, inspect=True)
        self.seen: dict[str, list[Arrived | Changed]] = {"listener": [], "dialler": []}

    async def __aenter__(self) -> Ends:
        await self.proxy.__aenter__()
        self.link = self.dialler.dial(f"tcp://127.0.0.1:{self.port}")
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.proxy.__aexit__()
        self.listener.close()
        self.dialler.close()

    async def until(self, name: str, what: object, seconds: float = 10.0) -> object:
        """The item at an end that has payload or change ``what``."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            for end, links in (("listener", self.listener), ("dialler", self.dialler)):
                self.seen[end] += links.receive()
            for item in self.seen[name]:
                if what in (getattr(item, "payload", None), getattr(item, "change", None)):
                    self.seen[name].remove(item)
                    return item
            await asyncio.sleep(0.01)
        raise AssertionError(f"{what!r} never came to the {name}: {self.seen}")


def test_messages_pass_both_ways() -> None:
    async def test() -> None:
        async with Ends() as ends:
            ends.dialler.send(ends.link, encode(PING))
            arrived = await ends.until("listener", encode(PING))
            assert isinstance(arrived, Arrived)
            ends.listener.send(arrived.link, encode(PONG))
            await ends.until("dialler", encode(PONG))

    run(test())


def test_a_message_can_be_held_then_released_or_lost() -> None:
    async def test() -> None:
        async with Ends() as ends:
            await ends.until("dialler", LinkChange.UP)
            held: list[object] = []
            ends.proxy.watch = lambda direction, message: not held and not held.append((direction, message))
            ends.dialler.send(ends.link, encode(PING))
            with pytest.raises(AssertionError, match="never came"):
                await ends.until("listener", encode(PING), 0.3)
            assert held == [("in", PING)]
            ends.proxy.release()
            await ends.until("listener", encode(PING))
            held.clear()
            ends.dialler.send(ends.link, encode(PING))
            with pytest.raises(AssertionError, match="never came"):
                await ends.until("listener", encode(PING), 0.3)
            ends.proxy.drop()
            await ends.until("dialler", LinkChange.DOWN)
            await ends.until("dialler", LinkChange.UP)
            with pytest.raises(AssertionError, match="never came"):
                await ends.until("listener", encode(PING), 0.3)

    run(test())


def test_a_door_is_as_alive_as_what_is_behind_it() -> None:
    async def test() -> None:
        async with Ends() as ends:
            await ends.until("dialler", LinkChange.UP)
            ends.listener.close()
            await ends.until("dialler", LinkChange.REFUSED)

    run(test())


def test_frames_in_any_pieces_are_the_same_messages() -> None:
    long = Ping(sender="a" * 60, receiver="b" * 60)
    body = encode(long) * 3
    stream = bytes(64) + b"\x04\x05READY" + _frame(encode(PING)) + _frame(body) + _frame(encode(long))
    for size in (1, 7, 64, 65, len(stream)):
        frames = Frames()
        found = [item for at in range(0, len(stream), size) for item in frames.feed(stream[at : at + size])]
        assert b"".join(piece for piece, _ in found) == stream
        assert [message for _, message in found if message is not None] == [PING, long]


def _frame(body: bytes) -> bytes:
    if len(body) < 256:
        return bytes([0, len(body)]) + body
    return b"\x02" + len(body).to_bytes(8, "big") + body
