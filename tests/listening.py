"""Where processes listen, from /proc: what a library has opened counts as well."""

from __future__ import annotations

import ipaddress
import socket
import struct
from collections.abc import Iterable
from pathlib import Path

LISTEN = "0A"


def listeners(pid: int) -> set[str]:
    """Addresses at which a process listens: ``HOST PORT``."""
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


def beyond_loopback(pids: Iterable[int]) -> dict[int, set[str]]:
    """Of every process that others than this machine can reach, where."""
    return {
        pid: beyond
        for pid in pids
        if (beyond := {place for place in listeners(pid) if not ipaddress.ip_address(place.split()[0]).is_loopback})
    }
