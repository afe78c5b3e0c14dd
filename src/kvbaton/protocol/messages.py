"""Messages between ranks: tagged structs, msgpack bytes, bounded sizes. The only wire format of the control plane.

Rules of change: fields are only added, with defaults; a tag is never reused; a change of meaning raises
:data:`PROTOCOL_VERSION`, and peers with different versions refuse each other at ``Hello``. Durations cross the wire,
instants never. Every message carries the instance of its sender and, once known, of its receiver: a message for
another instance is never acted on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
import numpy as np
from msgspec import Meta, Struct
from numpy.typing import NDArray

from kvbaton.errors import MessageError
from kvbaton.layout import CacheLayout, Coordinates
from kvbaton.layout.coordinates import MAX_TEXT, Count, Text
from kvbaton.plan.pair import PartId

PROTOCOL_VERSION = 1

#: Largest message in bytes; the same bound as of the links.
MAX_MESSAGE_BYTES = 8 << 20
MAX_GRANTS = 64
MAX_UNITS_PER_GRANT = 1 << 20
MAX_UNIT = (1 << 31) - 1
#: Rooms that one ping names.
MAX_QUEUED = 4_096

InstanceId = Annotated[str, Meta(min_length=1, max_length=64)]
MAX_SECONDS = 86_400.0
Seconds = Annotated[float, Meta(ge=0, le=MAX_SECONDS)]
if TYPE_CHECKING:
    #: Of a message that has come it is a tuple; of an engine it may be an array of its own, which travels as the same.
    Units = Sequence[int] | NDArray[np.int32]
else:
    Units = Annotated[tuple[Annotated[int, Meta(ge=0, le=MAX_UNIT)], ...], Meta(max_length=MAX_UNITS_PER_GRANT)]
Role = Literal["source", "target"]


class TransferKey(Struct, frozen=True, array_like=True, gc=False):
    """One attempt to fill one room: the router's room, an id minted by the target's instance, a generation."""

    room: Count
    id: Count
    generation: Count = 1

    def __str__(self) -> str:
        return f"{self.room}/{self.id}.{self.generation}"


class Grant(Struct, frozen=True, array_like=True, gc=False):
    """Units of one target pool that a transfer may write, for a token range (see ``manager.Span``)."""

    pool: Text
    token_start: Count
    token_stop: Count
    units: Units


class StagingGrant(Struct, frozen=True, array_like=True, gc=False):
    """Slots of the target's staging memory through which a part is to travel."""

    part: PartId
    slots: Units


class PartBytes(Struct, frozen=True, array_like=True, gc=False):
    """A part and the bytes it moves."""

    part: PartId
    bytes: Count


class Message(Struct, frozen=True, tag_field="type", kw_only=True):
    """Root of all messages."""

    sender: InstanceId


class Hello(Message, frozen=True, tag="hello"):
    """Who we are and what our memory is. The dialler speaks first; the other side answers with its own."""

    version: Count
    group: Text
    group_size: Annotated[int, Meta(ge=1, le=65_536)]
    coordinates: Coordinates
    layout: CacheLayout
    agent_metadata: bytes
    transport: Text
    answers: Text = ""  #: instance whose Hello this answers; empty when dialling
    #: Grows with every greeting of an instance, and ``receiver`` is whom it takes the other side for: a greeting that
    #: was recorded, or that was meant for another rank, moves no session to another link.
    hello_sequence: Count = msgspec.field(default=0, name="greeting")
    receiver: Text = ""
    #: Names the machine, equal for all its processes: some ways are there within one only. Empty: unknown.
    machine: Text = ""


class Verdict(Message, frozen=True, tag="verdict"):
    """What the sender thinks of the pairing. Both sides say it; both must agree on ``plan_digest``."""

    receiver: InstanceId
    compatible: bool
    plan_digest: Text = ""
    code: Text = ""
    field: Text = ""
    ours: Text = ""
    theirs: Text = ""
    reason: Text = ""


class Ping(Message, frozen=True, tag="ping", omit_defaults=True):
    """Are you there? Answered with Pong; any message counts as a sign of life."""

    receiver: InstanceId
    #: Target → source: rooms that it will open as soon as its engine has memory for them; as many pings as it takes.
    queued: Annotated[tuple[Count, ...], Meta(max_length=MAX_QUEUED)] = ()


class Pong(Message, frozen=True, tag="pong"):
    receiver: InstanceId


class UnknownPeer(Message, frozen=True, tag="stranger"):
    """The sender has no session with the receiver: greet again."""

    receiver: str


class Goodbye(Message, frozen=True, tag="goodbye"):
    """The sender closes in good order: none of its writes is or ever will be in flight."""

    receiver: InstanceId
    reason: Text = ""


class TransferMessage(Message, frozen=True):
    """Root of all messages about one transfer."""

    receiver: InstanceId
    key: TransferKey


class Open(TransferMessage, frozen=True, tag="open", omit_defaults=True):
    """Target → source: these units are leased to you, fill them. Repeated until acknowledged."""

    token_count: Count
    grants: Annotated[tuple[Grant, ...], Meta(max_length=MAX_GRANTS)]
    parts: Annotated[tuple[PartBytes, ...], Meta(max_length=MAX_GRANTS)]
    ttl_seconds: Seconds
    staging: Annotated[tuple[StagingGrant, ...], Meta(max_length=MAX_GRANTS)] = ()
    begun: bool = False  #: the source has said that it has this room: if it has not (any more), it refuses at once
    at_most: bool = False  #: the prompt has ``token_count`` tokens or fewer: how many, ``Done`` says


class Opened(TransferMessage, frozen=True, tag="opened", omit_defaults=True):
    """Source → target: the room is known to us, its lease is noted. Said again, with ``moving``, when a write of ours
    does not settle at once: it may land only with the target's help."""

    moving: bool = False


class Done(TransferMessage, frozen=True, tag="done"):
    """Source → target: every write of every chunk has settled, these bytes are in your memory. Repeated."""

    parts: Annotated[tuple[PartBytes, ...], Meta(max_length=MAX_GRANTS)]
    token_count: Count
    exposed_seconds: Seconds = 0.0  #: from the submission of the last chunk to its last write having settled


class Close(TransferMessage, frozen=True, tag="close"):
    """Target → source: outcome noted, nothing is owed any more."""

    success: bool


class Failed(TransferMessage, frozen=True, tag="failed"):
    """Source → target: this transfer failed. ``drained``: we have no write in flight for it, now or later.

    ``fenced``: we had to cut you off to be sure; bytes may still be in the wire's buffers on your side.
    """

    code: Text
    reason: Text
    drained: bool
    fenced: bool = False


class Abort(TransferMessage, frozen=True, tag="abort"):
    """Target → source: stop, and say Drained when none of your writes can touch our memory any more. Also of a room
    that the target gives up before it has opened it."""

    code: Text
    reason: Text


class Drained(TransferMessage, frozen=True, tag="drained"):
    """Source → target: we have no write in flight for this transfer, now or later. ``fenced`` as in Failed."""

    fenced: bool = False


class Query(TransferMessage, frozen=True, tag="query"):
    """Target → source: nothing heard of this transfer; what is its state? Answered with its last message."""


class Forgotten(TransferMessage, frozen=True, tag="forgotten"):
    """Source → target: never heard of that transfer, or long ended; no write of ours can touch your memory."""


AnyMessage = (
    Hello
    | Verdict
    | Ping
    | Pong
    | UnknownPeer
    | Goodbye
    | Open
    | Opened
    | Done
    | Close
    | Failed
    | Abort
    | Drained
    | Query
    | Forgotten
)


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tolist()
    raise NotImplementedError(f"{type(value).__name__} is not for messages")


_encoder = msgspec.msgpack.Encoder(enc_hook=_plain)
_decoder: msgspec.msgpack.Decoder[AnyMessage] = msgspec.msgpack.Decoder(AnyMessage)


def encode(message: AnyMessage) -> bytes:
    """Bytes of a message. Raises MessageError if it is too large to be accepted anywhere."""
    payload = _encoder.encode(message)
    if len(payload) > MAX_MESSAGE_BYTES:
        raise MessageError(
            f"{type(message).__name__} of {len(payload)} bytes exceeds the limit of {MAX_MESSAGE_BYTES}; "
            "the prompt has too many pages, use larger ones"
        )
    return payload


def decode(payload: bytes) -> AnyMessage:
    """The message that ``payload`` is. Raises MessageError for anything else."""
    if len(payload) > MAX_MESSAGE_BYTES:
        raise MessageError(f"message of {len(payload)} bytes exceeds the limit of {MAX_MESSAGE_BYTES}")
    try:
        return _decoder.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise MessageError(f"not a message of protocol version {PROTOCOL_VERSION}: {error}"[:MAX_TEXT]) from error


def clip(text: str) -> str:
    """Text shortened to what a message may carry."""
    return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 1] + "…"
