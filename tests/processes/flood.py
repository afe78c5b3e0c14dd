"""An attacker as a process of its own, on loopback only: ``python flood.py '{"flood": ..., "ports": [...], ...}'``.

Floods: ``half_open`` (connections that never say a word), ``noise`` (random bytes, some dressed as HTTP or ZMTP),
``bodies`` (huge ones in pieces, and one whose length alone is huge), ``rooms`` (messages about rooms that nobody knows,
from a peer that has shaken hands and from strangers). Each sends its share and says on stdout, as JSON, what it got.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import sys
import time
from collections import Counter
from random import Random
from typing import Any

#: Connections that are opened at once.
BATCH = 250
NOISE_BYTES = 2048
JSON = "Content-Type: application/json"
PATIENCE_SECONDS = 20.0
DRESSES = (
    b"",
    b"GET / HTTP/1.1\r\n",
    b"POST /v1/completions HTTP/1.1\r\nContent-Length: 99\r\n\r\n",
    b"\xff" + bytes(8),
)


def main() -> None:
    options = json.loads(sys.argv[1])
    os.nice(10)  # an attacker is on a machine of its own: it shall not take the servers' processor as well
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    flood = options.pop("flood")
    if flood == "rooms":
        result = rooms(**options)
    else:
        result = asyncio.run({"half_open": half_open, "noise": noise, "bodies": bodies}[flood](**options))
    print(json.dumps(result))


async def half_open(ports: list[int], count: int, hold_seconds: float) -> dict[str, Any]:
    """``count`` connections to each port, one port after the other; held for a while, then dropped."""
    opened: Counter[str] = Counter()
    for port in ports:
        held = []
        for start in range(0, count, BATCH):
            batch = (asyncio.open_connection("127.0.0.1", port) for _ in range(min(BATCH, count - start)))
            for connection in await asyncio.gather(*batch, return_exceptions=True):
                if isinstance(connection, tuple):
                    held.append(connection)
                else:
                    opened["refused"] += 1
        opened["opened"] += len(held)
        await asyncio.sleep(hold_seconds)
        opened["closed by the server"] += sum(reader.at_eof() for reader, _ in held)
        for _, writer in held:
            writer.transport.abort()
        await asyncio.sleep(0.1)
    return dict(opened)


async def noise(ports: list[int], count: int, seed: int) -> dict[str, Any]:
    random, sent = Random(seed), 0
    for number in range(count):
        with contextlib.suppress(OSError, TimeoutError):
            _, writer = await asyncio.open_connection("127.0.0.1", ports[number % len(ports)])
            writer.write(random.choice(DRESSES) + random.randbytes(NOISE_BYTES))
            await asyncio.wait_for(writer.drain(), 1.0)
            sent += 1
            writer.transport.abort()
    return {"sent": sent}


async def bodies(targets: list[list[Any]], size: int, count: int) -> dict[str, Any]:
    """Bodies of ``size`` bytes to (method, port, path); every other one without a length."""
    statuses: Counter[str] = Counter()

    async def one(number: int) -> None:
        method, port, path = targets[number % len(targets)]
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        chunked = number // len(targets) % 2 == 0
        length = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {size}"
        answer = asyncio.create_task(reader.readline())
        try:
            writer.write(f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n{JSON}\r\n{length}\r\n\r\n".encode())
            piece = bytes(1 << 18)
            for _ in range(size // len(piece)):
                writer.write(b"%x\r\n%s\r\n" % (len(piece), piece) if chunked else piece)
                await asyncio.wait_for(writer.drain(), PATIENCE_SECONDS)
                if answer.done() and writer.transport.is_closing():
                    break
            statuses[(await asyncio.wait_for(answer, PATIENCE_SECONDS)).decode()[9:12]] += 1
        except (OSError, TimeoutError):
            said = answer.result() if answer.done() and not answer.exception() else b""
            statuses[said.decode()[9:12] or "hung up"] += 1
        finally:
            answer.cancel()
            writer.transport.abort()

    for start in range(0, count, 4):
        await asyncio.gather(*(one(number) for number in range(start, min(start + 4, count))))
    return dict(statuses)


def rooms(address: str, count: int, backend: str) -> dict[str, Any]:
    """``count`` rooms opened by a peer whose memory fits, and as many messages of strangers."""
    import msgspec
    import numpy as np
    import zmq

    from kvbaton.layout import Coordinates, Region
    from kvbaton.plan.pair import pair_plan
    from kvbaton.protocol.grants import parts_of
    from kvbaton.protocol.messages import Grant, Hello, Open, Ping, TransferKey, Verdict, decode, encode
    from kvbaton.transports import make_transport

    answers: Counter[str] = Counter()
    with zmq.Context() as context, context.socket(zmq.DEALER) as link, context.socket(zmq.DEALER) as strange:
        for socket in (link, strange):
            socket.linger = 0
            socket.sndtimeo = 1000
            socket.connect(address)

        def say_hello(layout: Any, metadata: bytes, name: str) -> Hello:
            return Hello(
                sender=name,
                version=1,
                group=name,
                group_size=1,
                coordinates=Coordinates(),
                layout=layout,
                agent_metadata=metadata,
                transport=backend,
            )

        empty = msgspec.convert({"model": "", "regions": (), "pools": ()}, type(_any_layout()))
        link.send(encode(say_hello(empty, b"", "i-spy")))
        theirs = next_of(link, Hello).layout
        buffers = [np.zeros(region.length, dtype=np.uint8) for region in theirs.regions]
        regions = tuple(
            Region(buffer.ctypes.data, region.length) for buffer, region in zip(buffers, theirs.regions, strict=True)
        )
        ours = msgspec.structs.replace(theirs, regions=regions)
        with make_transport(backend, "i-flood") as transport:
            transport.register(regions)
            link.send(encode(say_hello(ours, transport.metadata(), "i-flood")))
            hello, verdict = next_of(link, Hello), next_of(link, Verdict)
            while verdict.receiver != "i-flood":
                verdict = next_of(link, Verdict)
            answers["greeted"] = int(verdict.compatible)
            pair = pair_plan(theirs, ours)
            link.send(encode(msgspec.structs.replace(verdict, sender="i-flood", receiver=hello.sender)))
            for number in range(count):
                grants = tuple(
                    Grant(pool.name, 0, pool.rows if pool.paged else 0, (number % pool.units,)) for pool in ours.pools
                )
                opening = Open(
                    sender="i-flood",
                    receiver=hello.sender,
                    key=TransferKey(number + 1, number + 1),
                    token_count=1,
                    grants=grants,
                    parts=parts_of(pair, grants),
                    ttl_seconds=60.0,
                )
                with contextlib.suppress(zmq.Again):
                    link.send(encode(opening))
                    strange.send(encode(Ping(sender=f"i-strange{number}", receiver="nobody")))
                for socket in (link, strange):
                    while socket.poll(0):
                        message = decode(socket.recv())
                        answers[getattr(message, "code", "") or type(message).__name__] += 1
            until = time.monotonic() + 2 * PATIENCE_SECONDS
            while time.monotonic() < until and answers["Opened"] + answers["overloaded"] < count:
                for socket in (link, strange):
                    while socket.poll(50):
                        message = decode(socket.recv())
                        answers[getattr(message, "code", "") or type(message).__name__] += 1
    return dict(answers)


def _any_layout() -> Any:
    from kvbaton.layout import CacheLayout

    return CacheLayout("", (), ())


def next_of(socket: Any, kind: type) -> Any:
    from kvbaton.protocol.messages import decode

    while socket.poll(int(PATIENCE_SECONDS * 1000)):
        message = decode(socket.recv())
        if isinstance(message, kind):
            return message
    raise TimeoutError(f"no {kind.__name__} came")


if __name__ == "__main__":
    main()
