"""The control port of a process that has few files left: it shuts for strangers and opens again by itself."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time

from kvbaton.control.address import Address
from kvbaton.control.base import Arrived
from kvbaton.control.zmq import ZmqLinks

FEW_FILES = 64
ECHO = f"""
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, ({FEW_FILES}, {FEW_FILES}))
from kvbaton.control.base import Arrived
import kvbaton.control.zmq as module
from kvbaton.control.zmq import ZmqLinks
module.HANDSHAKE_SECONDS = 0.5  # 5 in life
links = ZmqLinks("tcp://127.0.0.1:0")
print(links.address, flush=True)
while True:
    links.wait(None)
    for item in links.receive():
        if isinstance(item, Arrived):
            links.send(item.link, item.payload)
"""


def echo(links: ZmqLinks, address: str, payload: bytes, seconds: float) -> bool:
    """Whether a message to ``address`` comes back in time."""
    link = links.dial(address)
    links.send(link, payload)
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        links.wait(0.1)
        if any(isinstance(item, Arrived) and item.payload == payload for item in links.receive()):
            links.close_link(link)
            return True
    links.close_link(link)
    return False


def test_half_open_connections_use_up_files_for_a_handshake_at_most() -> None:
    with (
        subprocess.Popen([sys.executable, "-c", ECHO], stdout=subprocess.PIPE, text=True) as process,
        ZmqLinks() as links,
    ):
        assert process.stdout is not None
        held: list[socket.socket] = []
        try:
            address = process.stdout.readline().strip()
            parsed = Address.parse(address)
            assert echo(links, address, b"before", 10.0)
            for _ in range(3 * FEW_FILES):
                with contextlib.suppress(OSError):
                    held.append(socket.create_connection((parsed.host, parsed.port), timeout=1.0))
            assert len(held) > FEW_FILES
            assert echo(links, address, b"while they are held", 30.0), "libzmq drops what does not shake hands"
            assert process.poll() is None
        finally:
            for one in held:
                one.close()
            process.kill()
