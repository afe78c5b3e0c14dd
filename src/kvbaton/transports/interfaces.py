"""Which network interfaces UCX uses: it listens on each of them, by default on all that are up.

Rules:

- UCX reads ``UCX_NET_DEVICES`` when it is loaded, so :func:`restrict` is called before the first agent, and before a
  fork. A value that the operator has set stays.
- Ethernet is restricted to the interfaces of the addresses that are named. RDMA devices stay beside them, for they
  open no port: which fabric they reach is decided by its partitions. Loopback alone is loopback alone.

This file must not know of servers or of NIXL.
"""

from __future__ import annotations

import array
import fcntl
import ipaddress
import logging
import os
import socket
import struct
from collections.abc import Iterable
from pathlib import Path

VARIABLE = "UCX_NET_DEVICES"
LOOPBACK = "lo"
_LIST_ADDRESSES = 0x8912  # SIOCGIFCONF
_ADDRESS_BYTES = 40  # struct ifreq on 64 bits: a name of 16 bytes, a struct sockaddr_in, padding
_MAX_ADDRESSES = 1024
_RDMA = Path("/sys/class/infiniband")
_log = logging.getLogger(__name__)


def restrict(addresses: Iterable[str]) -> None:
    """Have UCX use the interfaces that have ``addresses``, and no other Ethernet interface.

    Where one of them is no address of this machine (address translation, a name) nothing is restricted, and the log
    says so.
    """
    chosen = os.environ.get(VARIABLE)
    if chosen is not None:
        _log.info("UCX listens on %s, as %s says", chosen, VARIABLE)
        return
    wanted = dict.fromkeys(addresses)
    found = {address: interface_of(address) for address in wanted}
    missing = [address for address, name in found.items() if name is None]
    if missing or not wanted:
        _log.warning(
            "UCX listens on every interface: %s is not an address of this machine; set %s to the one that it is to use",
            ", ".join(missing) or "what peers dial",
            VARIABLE,
        )
        return
    names = dict.fromkeys(name for name in found.values() if name is not None)
    devices = list(names) if set(names) == {LOOPBACK} else [*names, *_rdma_devices()]
    os.environ[VARIABLE] = ",".join(devices)
    _log.info("UCX listens on %s; set %s to choose otherwise", ",".join(devices), VARIABLE)


def interface_of(address: str) -> str | None:
    """The interface that has an IP address; None where none has. All of 127.0.0.0/8 is loopback's."""
    try:
        wanted = ipaddress.ip_address(address)
    except ValueError:
        return None
    if wanted.is_loopback:
        return LOOPBACK
    return _all_addresses().get(wanted)


def source_towards(host: str) -> str:
    """The address of this machine that packets to ``host`` are sent from; nothing is sent to find out.

    Raises OSError where there is no such host, or no way to it.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as unsent:
        unsent.connect(address)
        return str(unsent.getsockname()[0]).partition("%")[0]


def _all_addresses() -> dict[ipaddress.IPv4Address | ipaddress.IPv6Address, str]:
    """Interfaces by address."""
    found: dict[ipaddress.IPv4Address | ipaddress.IPv6Address, str] = {}
    room = array.array("B", bytes(_ADDRESS_BYTES * _MAX_ADDRESSES))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        question = struct.pack("@iP", len(room), room.buffer_info()[0])
        used, _ = struct.unpack("@iP", fcntl.ioctl(any_socket, _LIST_ADDRESSES, question))
    for start in range(0, used, _ADDRESS_BYTES):
        entry = room[start : start + _ADDRESS_BYTES].tobytes()
        name = entry[:16].partition(b"\0")[0].decode().partition(":")[0]  # eth0:1 is a second address of eth0
        found[ipaddress.IPv4Address(entry[20:24])] = name
    table = Path("/proc/net/if_inet6")
    for row in table.read_text().splitlines() if table.is_file() else ():
        digits, *_, name = row.split()
        found[ipaddress.IPv6Address(bytes.fromhex(digits))] = name
    return found


def _rdma_devices() -> list[str]:
    """Every port of every RDMA device, as UCX calls them: ``mlx5_0:1``."""
    return sorted(f"{port.parts[-3]}:{port.name}" for port in _RDMA.glob("*/ports/*"))
