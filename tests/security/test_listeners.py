"""Where the processes of a deployment listen: on loopback only, unless somebody asked for more."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from kvbaton.serving.demo.show import ask, concurrent_questions
from kvbaton.serving.fleet import Fleet

LISTEN = "0A"


def listeners(pid: int) -> set[str]:
    """Addresses at which a process listens, from /proc: what a library opened counts as well."""
    inodes = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = str(link.readlink())
        except OSError:  # closed meanwhile
            continue
        if target.startswith("socket:["):
            inodes.add(target[8:-1])
    found = set()
    for table in ("tcp", "tcp6"):
        for row in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = row.split()
            if fields[3] == LISTEN and fields[9] in inodes:
                host, _, port = fields[1].partition(":")
                found.add(f"{address(host)} {int(port, 16)}")
    return found


def address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """From /proc/net/tcp: words of 32 bits in the machine's byte order."""
    words = [struct.pack("=I", int(text[at : at + 8], 16)) for at in range(0, len(text), 8)]
    return ipaddress.ip_address(
        socket.inet_ntop(socket.AF_INET if len(words) == 1 else socket.AF_INET6, b"".join(words))
    )


def family(fleet: Fleet) -> Iterator[tuple[str, int]]:
    """Every process of a fleet: (server, pid)."""
    for server in fleet.servers:
        assert server.process is not None
        for process in (
            psutil.Process(server.process.pid),
            *psutil.Process(server.process.pid).children(recursive=True),
        ):
            yield server.name, process.pid


@pytest.mark.parametrize("size", [(), ("--tensor-parallel-size", "2"), ("--data-parallel-size", "2")], ids=str)
def test_no_process_of_a_loopback_deployment_listens_beyond_loopback(
    size: tuple[str, ...], runner: asyncio.Runner, tmp_path: Path
) -> None:
    async def scenario() -> dict[str, set[str]]:
        async with Fleet(tmp_path, model="recall", reference=True, extra=size) as fleet:
            await fleet.all_ready()
            for question in concurrent_questions(2):
                answer = await ask(fleet.http, fleet.router.url, question)
                assert not answer.error, answer
                assert answer.bytes > 0, "it was not handed over"
            ways = (await fleet.info(fleet.prefills[0]))["handoff"]["evidence"]
            assert "memory" in ways or "cma" in ways or "sysv" in ways, (
                f"on one machine bytes go through memory: {ways}"
            )
            return {f"{name} {pid}": listeners(pid) for name, pid in family(fleet)}

    found = runner.run(scenario())
    assert len(found) >= (4 if not size else 7), found
    assert all(found[one] for one in found if one.startswith("router"))
    outside = {
        name: where
        for name, places in found.items()
        if (where := {place for place in places if not ipaddress.ip_address(place.split()[0]).is_loopback})
    }
    assert not outside
