"""What the core wants done: outputs, imperative, plain data. The driver carries them out in order."""

from __future__ import annotations

import enum

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from kvbaton.control.base import LinkId
from kvbaton.errors import KVBatonError
from kvbaton.plan.pair import PairPlan
from kvbaton.plan.staging import StagedPart
from kvbaton.protocol.events import WriteId
from kvbaton.protocol.messages import Role


class KVPoll(enum.IntEnum):
    """State of a room as engines see it; the field's names and order (compare with ``<``, merge with ``min``)."""

    Failed = 0
    Bootstrapping = 1
    WaitingForInput = 2
    Transferring = 3
    Success = 4


class Dial(Struct, frozen=True):
    """Open a link to ``address`` and answer with ``Dialed``."""

    address: str


class CloseLink(Struct, frozen=True):
    link: LinkId


class Send(Struct, frozen=True):
    link: LinkId
    payload: bytes


class PreparePeer(Struct, frozen=True):
    """Make ``peer`` reachable and build the tables of ``pair``, and of its ``staged`` parts; answer with PeerPrepared
    or PeerUnprepared."""

    peer: str
    metadata: bytes
    pair: PairPlan
    staged: tuple[StagedPart | None, ...] = ()


class StagedRun(Struct, frozen=True):
    """Blocks that are gathered and written to a slot of the target's staging memory, from block ``first`` of it on."""

    staged: StagedPart
    slot: int
    first: int
    count: int


class PostWrite(Struct, frozen=True, eq=False):
    """Write table entries of one part; answer with WriteSettled or WriteBroken, exactly once.

    With ``staged`` whole blocks are gathered: ``source_entries`` are those of the first lane, ``target_entries`` is
    empty.
    """

    write: WriteId
    peer: str
    part: int
    source_entries: NDArray[np.int32]
    target_entries: NDArray[np.int32]
    bytes: int
    staged: StagedRun | None = None


class Scatter(Struct, frozen=True, eq=False):
    """Copy the first ``count`` blocks of one of our staging slots to our memory, now. ``target_entries`` are those of
    the first lane, one for each block.

    A driver that cannot reports ``room`` as failed where the core, which counts on it, reports success.
    """

    room: int
    staged: StagedPart
    slot: int
    count: int
    target_entries: NDArray[np.int32]


class CancelWrites(Struct, frozen=True):
    """Do not post these writes if they are not posted yet; a cancelled write settles."""

    writes: frozenset[WriteId]


class FencePeer(Struct, frozen=True):
    """Cut ``peer`` off from our writes; answer with PeerFenced."""

    peer: str


class Quiesce(Struct, frozen=True):
    """Flush what ``peer``, whose writes have ended, may have left in our transport's buffers; answer PeerQuiesced."""

    peer: str


class RoomStatus(Struct, frozen=True, kw_only=True):
    """What an engine may know of a room.

    Args:
        poll: never changes any more once it is Failed or Success.
        error: first root cause, when Failed.
        leased: a write may still touch units that were handed over: of a source, of the chunks so far.
        prefix_len: tokens that every target holds already (source side).
        exposed_seconds: from the last chunk's submission to its last write having settled, the longest of all writers.
        bytes: bytes that the room moves here: the manifest (target), posted so far (source).
        agreed: every source rank is there and compatible: pages may be published (target side).
        token_count: tokens of the prompt, 0 while only the source knows them (target side).
        seen: calls of the engine that this status knows of (source side): chunks, and that they were withdrawn.
        token_seconds: what writing one token of all layers is predicted to take, to all targets together; 0 as long as
            none has opened, or where the layers do not travel by themselves (source side).
    """

    poll: KVPoll = KVPoll.Bootstrapping
    error: KVBatonError | None = None
    leased: bool = False
    prefix_len: int = 0
    bytes: int = 0
    exposed_seconds: float = 0.0
    agreed: bool = False
    token_count: int = 0
    seen: int = 0
    token_seconds: float = 0.0

    @property
    def ended(self) -> bool:
        """It is Failed or Success, and never changes any more."""
        return self.poll is KVPoll.Failed or self.poll is KVPoll.Success


class PeerLost(Struct, frozen=True):
    """Tell the engine that a peer went silent, ended or was replaced.

    Args:
        instance: of the peer; empty where nobody has answered yet.
        address: where we dialled it; empty for one that has dialled us.
        error: why.
    """

    instance: str
    address: str
    error: KVBatonError


class Report(Struct, frozen=True):
    """Tell the engine about a room."""

    room: int
    role: Role
    status: RoomStatus


Effect = (
    Dial | CloseLink | Send | PreparePeer | PostWrite | CancelWrites | FencePeer | Quiesce | Scatter | Report | PeerLost
)
