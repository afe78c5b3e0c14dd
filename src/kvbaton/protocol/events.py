"""What can happen to the core: inputs, past tense, plain data. And what an engine hands it."""

from __future__ import annotations

from typing import NewType

from msgspec import Struct

from kvbaton.control.base import LinkId
from kvbaton.errors import KVBatonError
from kvbaton.plan.coverage import Layers
from kvbaton.protocol.messages import Grant, Role

WriteId = NewType("WriteId", int)
"""One write that the core asked for; minted by the core, never reused."""


class Chunk(Struct, frozen=True, kw_only=True):
    """Units that a source has finished computing: per pool a token range and the units that hold it; in ``layers``
    (absolute ids, half open), or in all."""

    spans: tuple[Grant, ...]
    last: bool
    layers: Layers | None = None

    @property
    def token_stop(self) -> int:
        """First token after the chunk."""
        return max((span.token_stop for span in self.spans), default=0)

    def __str__(self) -> str:
        layers = f" of layers {self.layers[0]}..{self.layers[1] - 1}" if self.layers is not None else ""
        return f"chunk to token {self.token_stop}{layers}"


class Dialed(Struct, frozen=True):
    """The link asked for by ``Dial`` exists (connected or not)."""

    address: str
    link: LinkId


class DialFailed(Struct, frozen=True):
    """There can be no link to ``address``."""

    address: str
    error: KVBatonError


class MessageArrived(Struct, frozen=True):
    link: LinkId
    payload: bytes


class LinkUp(Struct, frozen=True):
    """A dialled link is connected again: perhaps to another process."""

    link: LinkId


class LinkRefused(Struct, frozen=True):
    """Nobody listens at the dialled address: the process that did has closed or died. A proof, not a guess."""

    link: LinkId


class SenderOpened(Struct, frozen=True):
    """The engine has a request to prefill for this room."""

    room: int


class ChunkSubmitted(Struct, frozen=True):
    room: int
    chunk: Chunk


class ChunksWithdrawn(Struct, frozen=True):
    """The engine wants the units of its chunks back, and will submit their tokens again.

    ``seen``: how many calls it has made for the room, this one included; of those between, none is to come.
    """

    room: int
    seen: int


class ReceiverOpened(Struct, frozen=True):
    """The engine expects a room from the source ranks at these addresses.

    ``begun``: they have said that they have it, so that one that does not know it need not wait for it.
    """

    room: int
    sources: tuple[str, ...]
    begun: bool = False


class GrantsPublished(Struct, frozen=True):
    """The engine has leased units for a room. ``at_most``: its prompt may have fewer tokens."""

    room: int
    grants: tuple[Grant, ...]
    token_count: int
    at_most: bool = False


class AbortRequested(Struct, frozen=True):
    """Our engine gives a room up."""

    room: int
    role: Role
    error: KVBatonError


class WriteUnderWay(Struct, frozen=True):
    """A write was posted and did not settle at once: it may need the target's help to land."""

    write: WriteId


class WriteSettled(Struct, frozen=True):
    """A write is complete, or was never posted: it touches no memory any more."""

    write: WriteId


class WriteBroken(Struct, frozen=True):
    """A write failed; until its peer is fenced it may still touch memory."""

    write: WriteId
    error: KVBatonError


class PeerPrepared(Struct, frozen=True):
    """The transport can write to this peer."""

    peer: str


class PeerUnprepared(Struct, frozen=True):
    """The transport cannot write to this peer."""

    peer: str
    error: KVBatonError


class PeerFenced(Struct, frozen=True):
    """The transport has cut this peer off: no write of ours towards it touches any memory any more."""

    peer: str


class PeerQuiesced(Struct, frozen=True):
    """Whatever an ended or fenced peer had put on the wire before has landed in our memory, or never will."""

    peer: str


class AgentReplaced(Struct, frozen=True):
    """The transport has replaced its agent to stop a write: peers reach our memory with this metadata from now on."""

    metadata: bytes


class TimePassed(Struct, frozen=True):
    """The inbox is empty: judge the deadlines. No other event does."""


class ShutdownRequested(Struct, frozen=True):
    """This rank is closing: every live room fails, every peer is told."""

    reason: str


Event = (
    Dialed
    | DialFailed
    | MessageArrived
    | LinkUp
    | LinkRefused
    | SenderOpened
    | ChunkSubmitted
    | ChunksWithdrawn
    | ReceiverOpened
    | GrantsPublished
    | AbortRequested
    | WriteUnderWay
    | WriteSettled
    | WriteBroken
    | PeerPrepared
    | PeerUnprepared
    | PeerFenced
    | PeerQuiesced
    | AgentReplaced
    | TimePassed
    | ShutdownRequested
)
