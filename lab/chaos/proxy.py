"""A TCP proxy in front of one port, which can be shut, silenced, cut and told to stop at a certain message.

Rules: it is as alive as what stands behind it: once that refuses connections, so does the proxy, until it accepts
again. While held or silent nothing passes in either direction and nothing is lost; ``drop`` closes all connections with
what they held. New connections are accepted while silent: that is what a partition looks like from one side, and a peer
that never speaks from the other.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import Callable
from typing import Literal

from kvbaton.protocol.messages import AnyMessage
from lab.chaos.frames import Frames

Direction = Literal["in", "out"]
Watch = Callable[[Direction, AnyMessage], bool]

RETRY_SECONDS = 0.05
READ_BYTES = 256 << 10
_RESET = struct.pack("ii", 1, 0)


class TcpProxy:
    """Listens at ``port`` of loopback, leads to ``behind``. An async context manager.

    ``inspect``: the stream is unencrypted ZMTP, and :attr:`watch` hears of each message before it passes; where it
    returns true, the message and everything else is held until :meth:`release` or :meth:`drop`.
    """

    def __init__(self, port: int, behind: int, *, inspect: bool) -> None:
        self.port = port
        self.watch: Watch = lambda _direction, _message: False
        self._behind = behind
        self._inspect = inspect
        self._server: asyncio.Server | None = None
        self._passing = asyncio.Event()
        self._shut = False
        self._pipes: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._follower: asyncio.Task[None] | None = None

    async def __aenter__(self) -> TcpProxy:
        self._passing.set()
        self._follower = asyncio.create_task(self._follow())
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._follower is not None:
            self._follower.cancel()
            await asyncio.gather(self._follower, return_exceptions=True)
        await self._stop_listening()
        self.drop()
        await asyncio.gather(*self._pipes, return_exceptions=True)

    def silence(self) -> None:
        """Let nothing pass, in either direction; connections stay, new ones are accepted."""
        self._passing.clear()

    def release(self) -> None:
        """Let everything pass again, what was held first."""
        self._passing.set()

    def drop(self) -> None:
        """Reset all connections, losing what they hold, and let new ones pass."""
        self.watch = lambda _direction, _message: False
        for task in self._pipes:
            task.cancel()
        for writer in self._writers:
            _reset(writer)
        self._passing.set()

    async def shut(self) -> None:
        """Refuse connections and reset those there are, as if nobody lived here."""
        self._shut = True
        await self._stop_listening()
        self.drop()

    def unshut(self) -> None:
        self._shut = False

    async def _follow(self) -> None:
        """Listen while somebody lives behind the proxy."""
        while True:
            if self._server is None and not self._shut and await self._alive():
                with contextlib.suppress(OSError):  # the port is still held by a connection that ends
                    self._server = await asyncio.start_server(
                        self._accept, "127.0.0.1", self.port, reuse_address=True, limit=READ_BYTES
                    )
            await asyncio.sleep(RETRY_SECONDS)

    async def _alive(self) -> bool:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", self._behind)
        except OSError:
            return False
        writer.close()
        return True

    async def _stop_listening(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            server.close()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if task is None:
            return
        self._pipes.add(task)
        self._writers.add(writer)
        try:
            await self._passing.wait()
            await self._join(reader, writer)
        except (OSError, asyncio.CancelledError):
            pass  # a connection that ends is what a proxy is for
        finally:
            self._pipes.discard(task)
            self._writers.discard(writer)
            _reset(writer)
            if not await self._alive():
                await self._stop_listening()

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        behind_reader, behind_writer = await asyncio.open_connection("127.0.0.1", self._behind, limit=READ_BYTES)
        self._writers.add(behind_writer)
        try:
            async with asyncio.TaskGroup() as pumps:
                pumps.create_task(self._pump("in", reader, behind_writer))
                pumps.create_task(self._pump("out", behind_reader, writer))
        except* (OSError, EOFError):
            pass
        finally:
            self._writers.discard(behind_writer)
            _reset(behind_writer)

    async def _pump(self, direction: Direction, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        frames = Frames()
        while data := await reader.read(READ_BYTES):
            for piece, message in frames.feed(data) if self._inspect else [(data, None)]:
                if message is not None and self.watch(direction, message):
                    self._passing.clear()
                await self._passing.wait()
                writer.write(piece)
            await writer.drain()
        raise EOFError


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close at once, with RST: what was on its way is lost, as it is when a process dies."""
    raw = writer.get_extra_info("socket")
    if raw is not None and not writer.is_closing():
        with contextlib.suppress(OSError):
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    writer.close()
