"""A process without a descriptor left: what it needs then is loaded already, and what fails is told by its name."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kvbaton.control.address import Address
from kvbaton.control.probe import Finding, Probe
from kvbaton.control.zmq import ZmqLinks
from kvbaton.errors import TransportError

HAND_OFF = """
import sys
import test_staging_rooms as rooms

ring = rooms.Ring(sys.argv[1], source_slots=1, target_slots=1)
before = set(sys.modules)
room = rooms.Room(ring, 0)
room.submit()
for rank, side in ((ring.target, room.receiver), *zip(ring.sources, room.senders)):
    rank.wait_until(lambda: side.released, f"the end of {side}")
    assert side.error is None, side.error
late = sorted(set(sys.modules) - before)
ring.close()
print("late:", *late)
"""


def test_a_hand_off_loads_nothing(transport: str) -> None:
    """A module that is first imported then needs a descriptor; so it was with the first copy out of a slot."""
    here = Path(__file__).parent
    ran = subprocess.run(
        [sys.executable, "-c", HAND_OFF, transport],
        env=os.environ | {"PYTHONPATH": f"{here}:{here.parent}"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.stdout.split() == ["late:"], ran.stdout + ran.stderr


@contextmanager
def no_descriptor_left() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("secret", [None, "a secret of many words"])
def test_a_dial_fails_by_name_and_the_next_succeeds(secret: str | None) -> None:
    with ZmqLinks(secret=secret) as there, ZmqLinks(secret=secret) as links:
        before = open_descriptors()
        with no_descriptor_left(), pytest.raises(TransportError, match="limit of open files"):
            links.dial(there.address)
        assert open_descriptors() == before
        links.dial(there.address)


def test_a_probe_asks_again_later() -> None:
    probe = Probe(Address.parse("tcp://127.0.0.1:9"))
    probe.start(0.0)
    with no_descriptor_left():
        assert probe.step(0.0, answered=False) is Finding.OTHER
    assert probe.due is not None
    assert probe.due > 0.0
    probe.stop()
