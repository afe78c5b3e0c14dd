"""All transfers of this rank: live ones, tombstones, and the writes that are out for them."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable

from kvbaton.errors import InternalError, KVBatonError, OverloadedError, TransferFailedError, from_code
from kvbaton.protocol import table
from kvbaton.protocol.context import Context
from kvbaton.protocol.events import PeerFenced, PeerQuiesced, WriteBroken, WriteSettled, WriteUnderWay
from kvbaton.protocol.messages import (
    Abort,
    AnyMessage,
    Close,
    Done,
    Drained,
    Failed,
    Forgotten,
    Grant,
    Opened,
    Query,
    Role,
    TransferKey,
)
from kvbaton.protocol.peers import Peers
from kvbaton.protocol.session import Session
from kvbaton.protocol.transfer import On, Outgoing, State, Transfer

TransferAddress = tuple[str, Role, TransferKey]
#: What the steps of each cell of the table are counted as.
_CELLS = {(state, on): f"{state.value}:{on.value}" for state in State for on in On}


class Transfers:
    """See the module. ``on_change`` is called with each transfer that an event was handed to."""

    def __init__(self, context: Context, peers: Peers, on_change: Callable[[Transfer], None]) -> None:
        self._context = context
        self._peers = peers
        self._on_change = on_change
        self._live: dict[TransferAddress, Transfer] = {}
        self._tombstones: OrderedDict[TransferAddress, Transfer] = OrderedDict()
        self._forgotten_below: OrderedDict[str, int] = OrderedDict()
        self._leased: set[Transfer] = set()  # incoming, and a peer may still write
        self._moving: set[Transfer] = set()  # of these, those that a peer has said it writes
        self._tombstones_of: dict[str, OrderedDict[TransferAddress, None]] = {}  # tombstones by peer
        self._rooms_of: Counter[str] = Counter()  # live outgoing transfers, and the units granted in them, by peer
        self._units_of: Counter[str] = Counter()

    @property
    def quiet(self) -> bool:
        """No write of ours is in flight."""
        return not self._context.writes

    @property
    def receiving(self) -> bool:
        """Whether the memory of any transfer may still be written."""
        return bool(self._leased)

    @property
    def moving(self) -> bool:
        """Whether bytes of any transfer are on their way to us and need our help to land."""
        return bool(self._moving)

    def any_with(self, session: Session) -> bool:
        """Whether a transfer of this session is live."""
        return any((t.peer, t.role) == (session.peer, session.role) for t in self._live.values())

    def live(self) -> list[Transfer]:
        return list(self._live.values())

    def sizes(self) -> dict[str, int]:
        return {
            "transfers": len(self._live),
            "tombstones": len(self._tombstones),
            "forgotten_below": len(self._forgotten_below),
            "writes": len(self._context.writes),
        }

    def find(self, peer: str, role: Role, key: TransferKey) -> Transfer | None:
        """A transfer, live or ended."""
        address = (peer, role, key)
        return self._live.get(address) or self._tombstones.get(address)

    def is_forgotten(self, peer: str, key: TransferKey) -> bool:
        """Whether a transfer of this age may have ended here before: it must not begin (again)."""
        return key.id <= self._forgotten_below.get(peer, 0)

    def check_load(self, peer: str, grants: Iterable[Grant]) -> None:
        """Raise OverloadedError if a peer may open no further room with these grants."""
        settings = self._context.settings
        if self._rooms_of[peer] >= settings.rooms_per_peer:
            raise OverloadedError(f"{settings.rooms_per_peer} rooms are open for this decode rank; try again later")
        if self._units_of[peer] + sum(len(grant.units) for grant in grants) > settings.units_per_peer:
            raise OverloadedError(f"{settings.units_per_peer} units are granted by this decode rank; try again later")

    def _count(self, transfer: Transfer, sign: int) -> None:
        for load, amount in ((self._rooms_of, 1), (self._units_of, _units(transfer))):
            load[transfer.peer] += sign * amount
            if not load[transfer.peer]:
                del load[transfer.peer]

    def begin(self, transfer: Transfer) -> None:
        self._live[transfer.peer, transfer.role, transfer.key] = transfer
        if transfer.role == "source":
            self._count(transfer, 1)
        table.begin(transfer, self._context.now)
        self._note_lease(transfer)

    def step(self, transfer: Transfer, on: On, detail: object = None) -> None:
        """Apply one event to one transfer. Raises RemoteProtocolError for a message that must not be."""
        before = transfer.state
        self._context.counters[_CELLS[before, on]] += 1
        try:
            table.step(transfer, on, self._context.now, detail)
        finally:
            if transfer.state is State.CLOSED and before is not State.CLOSED:
                self._record_tombstone(transfer)
            self._note_lease(transfer)
            self._on_change(transfer)

    def _note_lease(self, transfer: Transfer) -> None:
        if transfer.incoming is None:
            return
        if transfer.leased:
            self._leased.add(transfer)
            if transfer.incoming.moving:
                self._moving.add(transfer)
        else:
            self._leased.discard(transfer)
            self._moving.discard(transfer)

    def _record_tombstone(self, transfer: Transfer) -> None:
        """Move a closed transfer to the tombstones. What is forgotten is refused from then on, never taken for new."""
        address = (transfer.peer, transfer.role, transfer.key)
        if self._live.pop(address, None) is not None and transfer.role == "source":
            self._count(transfer, -1)
        if transfer.outgoing is not None:
            transfer.outgoing.drop_units()
        self._tombstones[address] = transfer
        of_peer = self._tombstones_of.setdefault(transfer.peer, OrderedDict())
        of_peer[address] = None
        if transfer.quarantined:
            self._context.counters["leases_released_by_policy"] += 1
        if len(of_peer) > self._context.settings.tombstones_per_peer:
            self._forget(next(iter(of_peer)))
        if len(self._tombstones) > self._context.settings.tombstones:
            self._forget(next(iter(self._tombstones)))

    def _forget(self, address: TransferAddress) -> None:
        peer, role, key = address
        del self._tombstones[address]
        del self._tombstones_of[peer][address]
        if not self._tombstones_of[peer]:
            del self._tombstones_of[peer]
        if role == "source":
            self._refuse_below(peer, key.id)

    def _refuse_below(self, peer: str, transfer_id: int) -> None:
        """Never accept an Open up to this id again: the target was told that nothing of it is in flight."""
        self._forgotten_below[peer] = max(self._forgotten_below.pop(peer, 0), transfer_id)
        if len(self._forgotten_below) > self._context.settings.sessions:
            self._forgotten_below.popitem(last=False)

    def step_peer(self, session: Session, on: On, error: KVBatonError) -> None:
        """Something happened to a peer: to all transfers with it."""
        for transfer in self.live():
            if (transfer.peer, transfer.role) == (session.peer, session.role):
                self.step(transfer, on, error.in_room(transfer.key.room))

    def on_peer_quiesced(self, event: PeerQuiesced) -> None:
        for transfer in self.live():
            if transfer.peer == event.peer:
                self.step(transfer, On.PEER_QUIESCED)

    def on_write_under_way(self, event: WriteUnderWay) -> None:
        transfer = self._context.writes.get(event.write)
        if transfer is not None:
            self.step(transfer, On.WRITE_UNDER_WAY, event.write)

    def on_write_settled(self, event: WriteSettled) -> None:
        transfer = self._context.writes.pop(event.write, None)
        if transfer is not None:
            self.step(transfer, On.WRITE_SETTLED, event.write)

    def on_write_broken(self, event: WriteBroken) -> None:
        transfer = self._context.writes.get(event.write)
        if transfer is not None:
            self.step(transfer, On.WRITE_BROKEN, event.error)

    def on_peer_fenced(self, event: PeerFenced) -> None:
        for transfer in self.live():
            if transfer.peer == event.peer and transfer.role == "source":
                for write in transfer.as_source().outstanding:
                    self._context.writes.pop(write, None)
                self.step(transfer, On.PEER_FENCED, None)
        self._peers.fenced(event.peer)

    def answer_unknown(self, session: Session, message: AnyMessage, key: TransferKey) -> None:
        """A message about a transfer that we do not know (any more) creates nothing and is answered truthfully."""
        self._context.counters["messages_unknown_room"] += 1
        ours, link = self._context.instance, session.link
        if isinstance(message, Abort):
            self.record_tombstone(
                session, key, from_code(message.code, message.reason, peer=session.peer, room=key.room)
            )
            self._context.send_on(link, Drained(sender=ours, receiver=session.peer, key=key))
        elif isinstance(message, Query):
            self.record_tombstone(session, key, TransferFailedError("forgotten here", peer=session.peer, room=key.room))
            self._context.send_on(link, Forgotten(sender=ours, receiver=session.peer, key=key))
        elif isinstance(message, Opened | Done | Failed):
            self._context.send_on(link, Close(sender=ours, receiver=session.peer, key=key, success=False))

    def record_tombstone(self, session: Session, key: TransferKey, error: KVBatonError) -> None:
        """Remember an end without a beginning: a copy of its Open that still arrives must not begin anything."""
        if session.pair is not None and not self.is_forgotten(session.peer, key):
            transfer = Transfer(
                key,
                session.peer,
                self._context,
                outgoing=Outgoing(pair=session.pair, grants={}, parts=(), token_count=0),
            )
            transfer.error = error
            transfer.state = State.CLOSED
            self._record_tombstone(transfer)

    def check_invariants(self) -> None:
        for write, transfer in self._context.writes.items():
            if write not in transfer.as_source().outstanding:
                raise InternalError(f"write {write} is not outstanding in {transfer}")
        for address, transfer in self._live.items():
            if transfer.state is State.CLOSED or address in self._tombstones:
                raise InternalError(f"{transfer} is closed and live at once")
            owned = transfer.state in (State.DRAINING, State.SETTLING, State.QUIESCING)  # by session, fence, transport
            if self._context.timers.get(transfer, "deadline") is None and not owned:
                raise InternalError(f"{transfer} has no deadline")
        if len(self._tombstones) > self._context.settings.tombstones:
            raise InternalError("too many tombstones")
        by_peer = {address for of_peer in self._tombstones_of.values() for address in of_peer}
        if by_peer != self._tombstones.keys() or not all(self._tombstones_of.values()):
            raise InternalError("the tombstones by peer are not the tombstones")
        leased = {transfer for transfer in self._live.values() if transfer.role == "target" and transfer.leased}
        if leased != self._leased:
            raise InternalError(f"leased transfers are miscounted: {self._leased ^ leased}")
        if self._moving != {transfer for transfer in leased if transfer.as_target().moving}:
            raise InternalError(f"transfers that need help are miscounted: {self._moving}")
        outgoing = [transfer for transfer in self._live.values() if transfer.role == "source"]
        if self._rooms_of != Counter(transfer.peer for transfer in outgoing):
            raise InternalError(f"live rooms by peer are miscounted: {self._rooms_of}")
        if self._units_of.total() != sum(map(_units, outgoing)):
            raise InternalError(f"granted units by peer are miscounted: {self._units_of}")


def _units(transfer: Transfer) -> int:
    return sum(len(grant.units) for grant in transfer.as_source().grants.values())
