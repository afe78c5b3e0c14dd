"""An attacker as a process of its own, on loopback only: ``python -m lab.flood.attacker '[{"kind": ..., ...}]'``.

Kinds: ``half_open`` (connections that never say a word), ``noise`` (random bytes, some dressed as HTTP or ZMTP),
``bodies`` (huge ones in pieces, and one whose length alone is huge), ``rooms`` (messages about rooms that nobody knows,
from a peer that has shaken hands and from strangers), ``posts`` (JSON that becomes millions of values, or a chat
whose template never ends), ``one_byte`` (posts whose body does not come), ``registrations`` (ranks that are none).
Several go on at once. It says on stdout, as JSON, what each got.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import resource
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from random import Random
from typing import Any

#: Connections that are opened at once.
BATCH = 250
NOISE_BYTES = 2048
NICE = 10
JSON = "Content-Type: application/json"
PATIENCE_SECONDS = 20.0
DRESSES = (
    b"",
    b"GET / HTTP/1.1\r\n",
    b"POST /v1/completions HTTP/1.1\r\nContent-Length: 99\r\n\r\n",
    b"\xff" + bytes(8),
)


def main() -> None:
    attacks = json.loads(sys.argv[1])
    step_back()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    print(json.dumps(asyncio.run(all_of(attacks))))


def step_back() -> None:
    """An attacker is on a machine of its own: it shall not take the servers' processor as well. Where the kernel shares
    the processor out by sessions, niceness counts between processes of one session only, and a session has its own."""
    os.nice(NICE)
    os.setsid()
    with contextlib.suppress(OSError):  # another kernel
        Path("/proc/self/autogroup").write_text(str(NICE))


async def all_of(attacks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each with its own options, all at once."""

    def begun(kind: str, **options: Any) -> Awaitable[dict[str, Any]]:
        return asyncio.to_thread(rooms, **options) if kind == "rooms" else KINDS[kind](**options)

    return await asyncio.gather(*(begun(**attack) for attack in attacks))


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


def filled(start: str, piece: str, end: str, size: int) -> bytes:
    """A body of about ``size`` bytes: ``piece`` again and again, with commas."""
    return (start + ",".join([piece] * ((size - len(start) - len(end)) // (len(piece) + 1))) + end).encode()


def distinct_fields(size: int) -> bytes:
    """A body of about ``size`` bytes whose fields nobody knows, no two alike."""
    fields, length = ['"prompt":"a"'], 0
    while length < size:
        fields.append(f'"f{len(fields)}":0')
        length += len(fields[-1]) + 1
    return ("{" + ",".join(fields) + "}").encode()


#: What a body is made of: (path, body of a size).
CHAT = '"messages":[{"role":"user","content":"q"}]'
PAYLOADS: dict[str, tuple[str, Callable[[int], bytes]]] = {
    "tools": ("/v1/chat/completions", lambda size: filled("{" + CHAT + ',"tools":[', "[]", "]}", size)),
    "token ids": ("/v1/completions", lambda size: filled('{"prompt":[', "1", "]}", size)),
    "fields": ("/v1/completions", distinct_fields),
    "template": ("/v1/chat/completions", lambda _size: ("{" + CHAT + "}").encode()),
}


def head(port: int, path: str, length: int, method: str = "POST") -> bytes:
    return f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n{JSON}\r\nContent-Length: {length}\r\n\r\n".encode()


async def posts(ports: list[int], payload: str, size: int, at_once: int, seconds: float) -> dict[str, Any]:
    """``at_once`` whole bodies at a time, to one port after the other, again and again."""
    statuses: Counter[str] = Counter()
    path, make = PAYLOADS[payload]
    body = await asyncio.to_thread(make, size)
    until = time.monotonic() + seconds

    async def one(number: int) -> None:
        while time.monotonic() < until:
            try:
                reader, writer = await asyncio.open_connection("127.0.0.1", ports[number % len(ports)])
                writer.write(head(ports[number % len(ports)], path, len(body)) + body)
                answer = await asyncio.wait_for(reader.readline(), PATIENCE_SECONDS)
                statuses[answer.decode()[9:12] or "hung up"] += 1
                writer.transport.abort()
            except (OSError, TimeoutError):
                statuses["hung up"] += 1
            number += at_once

    await asyncio.gather(*(one(number) for number in range(at_once)))
    return dict(statuses)


async def one_byte(ports: list[int], count: int, seconds: float) -> dict[str, Any]:
    """``count`` posts at each port that send one byte of their body; what is closed within ``seconds`` is opened
    again. However late its turn comes, each is opened once."""
    statuses: Counter[str] = Counter()
    until = time.monotonic() + seconds

    async def one(port: int) -> None:
        for attempt in itertools.count():
            if attempt and time.monotonic() >= until:
                return
            try:
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(head(port, "/v1/completions", 100) + b"{")
                statuses["opened"] += 1
                with contextlib.suppress(TimeoutError):
                    answer = await asyncio.wait_for(reader.readline(), max(0.1, until - time.monotonic()))
                    statuses[answer.decode()[9:12] or "hung up"] += 1
                writer.transport.abort()
            except OSError:
                statuses["refused"] += 1
                await asyncio.sleep(0.1)

    await asyncio.gather(*(one(port) for port in ports for _ in range(count)))
    return dict(statuses)


async def registrations(port: int, each_second: int, seconds: float, seed: int) -> dict[str, Any]:
    """Ranks that are none, at places of all kinds; every tenth is no registration at all."""
    statuses: Counter[str] = Counter()
    random, started = Random(seed), time.monotonic()

    async def one(number: int) -> None:
        route = {
            "instance": f"i{random.randrange(1 << 32)}",
            "group": f"g{random.randrange(16)}",
            "address": f"tcp://127.0.0.1:{random.randrange(1, 65536)}",
            "layout_digest": "",
            "http_port": 1,
            "coordinates": {"tp": random.randrange(4096)},
            "sizes": {"tp": 4096},
        }
        registration = {"route": route, "lock": f"{number:064x}"}
        body = random.randbytes(512) if number % 10 == 9 else json.dumps(registration).encode()
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(head(port, "/route", len(body), "PUT") + body)
            answer = await asyncio.wait_for(reader.readline(), PATIENCE_SECONDS)
            statuses[answer.decode()[9:12] or "hung up"] += 1
            writer.transport.abort()
        except (OSError, TimeoutError):
            statuses["hung up"] += 1

    tasks = []
    for number in range(int(each_second * seconds)):
        await asyncio.sleep(max(0.0, started + number / each_second - time.monotonic()))
        tasks.append(asyncio.create_task(one(number)))
    await asyncio.gather(*tasks)
    return dict(statuses)


def rooms(address: str, count: int, backend: str) -> dict[str, Any]:
    """``count`` rooms opened by a peer whose memory fits, and as many messages of strangers."""
    import msgspec
    import numpy as np
    import zmq

    from kvbaton.layout import CacheLayout, Coordinates, Region
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

        empty = CacheLayout("", (), ())
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


def next_of(socket: Any, kind: type[Any]) -> Any:
    from kvbaton.protocol.messages import decode

    while socket.poll(int(PATIENCE_SECONDS * 1000)):
        message = decode(socket.recv())
        if isinstance(message, kind):
            return message
    raise TimeoutError(f"no {kind.__name__} came")


KINDS: dict[str, Callable[..., Coroutine[Any, Any, dict[str, Any]]]] = {
    "half_open": half_open,
    "noise": noise,
    "bodies": bodies,
    "posts": posts,
    "one_byte": one_byte,
    "registrations": registrations,
}

if __name__ == "__main__":
    main()
