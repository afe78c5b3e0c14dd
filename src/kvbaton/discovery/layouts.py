"""What memory a running rank has, asked at its control address: whatever engine it serves.

A rank answers a greeting with its own, which carries its layout, and with a verdict. This greeting names no data plane
that anybody has, so that the verdict is a refusal: nobody begins to reach memory that is not there.
"""

from __future__ import annotations

import time
import uuid

from kvbaton.control.base import Arrived, LinkChange
from kvbaton.control.zmq import ZmqLinks
from kvbaton.errors import ExpiredError, MessageError, PeerLostError
from kvbaton.layout import CacheLayout, Coordinates, Region, aux_pool
from kvbaton.plan.layout_file import RankLayout
from kvbaton.protocol.messages import PROTOCOL_VERSION, Hello, decode, encode

ASK_SECONDS = 10.0
#: How often the greeting is sent, in seconds: a message may be lost with its link.
AGAIN_SECONDS = 1.0

_NAME = "kvbaton layout"
_NOTHING = CacheLayout(_NAME, (Region(0, 1),), (aux_pool(slots=1, slot_bytes=1, region=0),))


def ask_layout(address: str, *, secret: str | None = None, seconds: float = ASK_SECONDS) -> RankLayout:
    """The memory of the rank whose control links listen at ``address``, and its place in its group.

    Raises ConfigError for an address that cannot be (without a secret all but loopback), PeerLostError where nobody
    listens, ExpiredError where nobody answers: another program listens there, or the secret is another one.
    """
    ours = uuid.uuid4().hex
    hello = Hello(
        sender=ours,
        version=PROTOCOL_VERSION,
        group=_NAME,
        group_size=1,
        coordinates=Coordinates(),
        layout=_NOTHING,
        agent_metadata=b"",
        transport="none",
    )
    until = time.monotonic() + seconds
    with ZmqLinks(secret=secret) as links:
        link = links.dial(address)
        while (left := until - time.monotonic()) > 0:
            links.send(link, encode(hello))
            again = time.monotonic() + min(left, AGAIN_SECONDS)
            while (pause := again - time.monotonic()) > 0:
                links.wait(pause)
                for item in links.receive():
                    if isinstance(item, Arrived):
                        found = _answer_to(ours, item.payload)
                        if found is not None:
                            return found
                    elif item.change is LinkChange.REFUSED:
                        raise PeerLostError(f"nobody listens at {address}", peer=address)
    raise ExpiredError(
        f"no rank answers at {address} within {seconds:g} s; is it a rank's control address, and the secret the same?",
        peer=address,
    )


def _answer_to(ours: str, payload: bytes) -> RankLayout | None:
    try:
        message = decode(payload)
    except MessageError:
        return None
    if not isinstance(message, Hello) or message.answers != ours:
        return None
    return RankLayout(
        layout=message.layout, coordinates=message.coordinates, group_size=message.group_size, group=message.group
    )
