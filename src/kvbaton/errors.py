"""Every error kvbaton raises, drawn as one tree.

::

    KVBatonError
    ├── ConfigError               local        a setting or argument is wrong; nothing was started
    │   ├── LayoutError           local        a layout contradicts itself or its memory
    │   ├── CapacityError         local        the request can never fit the pool or a table
    │   │   └── ContextLengthError local       prompt and answer are longer than what the model can see
    │   └── UnknownModelError     local        a model was asked for that is not served
    ├── LocalProtocolError        local        our engine used the facade out of order
    ├── RemoteProtocolError       remote       a peer sent something that the protocol forbids
    │   └── MessageError          remote       bytes that are no message of ours (size, tag, version)
    ├── IncompatibleError         remote       the handshake's verdict: layouts or versions differ
    ├── AuthenticationError       remote       a secret is missing or wrong
    ├── PeerLostError             remote       a peer went silent, died or was replaced
    ├── TransferFailedError       remote       the other side ended the transfer
    │   ├── AbortedError          remote       it was aborted: client gone, engine's choice
    │   │   └── DeclinedError     remote       decode wants nothing of it: it has all, or the request ended before
    │   └── ExpiredError          environment  a deadline passed
    ├── OverloadedError           local        a bounded table is full; try again later
    ├── TransportError            environment  the data plane refused or broke
    │   └── DisconnectedError     environment  the data plane lost a peer
    ├── RegistryError             environment  the bootstrap registry is unreachable or incomplete
    └── InternalError             bug          one of our own invariants does not hold

A leaf has a stable ``code`` (what programs match on), a ``fault`` (whose it is) and one message that
says what to do. ``peer`` and ``room`` are filled where they are known. Errors cross the wire as
``(code, message)`` and are rebuilt by :func:`from_code`.
"""

from __future__ import annotations

import copy
from typing import ClassVar, Literal, Self

Fault = Literal["local", "remote", "environment", "bug"]


class KVBatonError(Exception):
    """Root of the tree.

    Args:
        message: one sentence: what is wrong and what to do.
        peer: the instance or address of the other side, if one is involved.
        room: the room of the transfer, if one is involved.
        hint: one optional line of advice for a person at a terminal.
    """

    code: ClassVar[str] = "error"
    fault: ClassVar[Fault] = "bug"

    def __init__(self, message: str, *, peer: str = "", room: int | None = None, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.peer = peer
        self.room = room
        self.hint = hint
        self.phase = ""

    def again(self) -> Self:
        """The same error with the same cause, to be raised once more: an instance that is raised twice collects the
        tracebacks of all, and is shared between the threads that catch it."""
        twin = copy.copy(self)
        twin.__traceback__ = twin.__context__ = None
        twin.__cause__ = self.__cause__
        return twin

    def in_room(self, room: int, phase: str = "") -> KVBatonError:
        """The same error as the cause of one room's end, which was in ``phase`` (a poll state) then; the original may
        be the cause of many."""
        twin = self.again()
        twin.room = room
        twin.phase = self.phase or phase
        return twin

    def __str__(self) -> str:
        where = "".join(
            (
                f" [room {self.room}]" if self.room is not None else "",
                f" [while {self.phase}]" if self.phase else "",
                f" [peer {self.peer}]" if self.peer else "",
            )
        )
        return f"{self.message}{where}"


class ConfigError(KVBatonError):
    code = "config"
    fault: ClassVar[Fault] = "local"


class LayoutError(ConfigError):
    code = "layout"


class CapacityError(ConfigError):
    code = "capacity"


class ContextLengthError(CapacityError):
    code = "context_length_exceeded"


class UnknownModelError(ConfigError):
    code = "model_not_found"


class LocalProtocolError(KVBatonError):
    code = "misuse"
    fault: ClassVar[Fault] = "local"


class RemoteProtocolError(KVBatonError):
    code = "protocol"
    fault: ClassVar[Fault] = "remote"


class MessageError(RemoteProtocolError):
    code = "message"


class IncompatibleError(KVBatonError):
    """The verdict of a handshake. ``field`` names what differs, ``ours`` and ``theirs`` the values."""

    code = "incompatible"
    fault: ClassVar[Fault] = "remote"

    def __init__(
        self,
        message: str,
        *,
        field: str = "",
        ours: str = "",
        theirs: str = "",
        peer: str = "",
        room: int | None = None,
        hint: str = "",
    ) -> None:
        super().__init__(message, peer=peer, room=room, hint=hint)
        self.field = field
        self.ours = ours
        self.theirs = theirs

    def swapped(self) -> IncompatibleError:
        """The same difference as the other side sees it."""
        return IncompatibleError(
            self.message,
            field=self.field,
            ours=self.theirs,
            theirs=self.ours,
            peer=self.peer,
            room=self.room,
            hint=self.hint,
        )


class AuthenticationError(KVBatonError):
    code = "authentication"
    fault: ClassVar[Fault] = "remote"


class PeerLostError(KVBatonError):
    code = "peer_lost"
    fault: ClassVar[Fault] = "remote"


class TransferFailedError(KVBatonError):
    code = "transfer_failed"
    fault: ClassVar[Fault] = "remote"


class AbortedError(TransferFailedError):
    code = "aborted"


class DeclinedError(AbortedError):
    """How a room ends that decode has no use for; nothing is wrong on either side."""

    code = "declined"


class ExpiredError(TransferFailedError):
    code = "expired"
    fault: ClassVar[Fault] = "environment"


class OverloadedError(KVBatonError):
    code = "overloaded"
    fault: ClassVar[Fault] = "local"


class TransportError(KVBatonError):
    code = "transport"
    fault: ClassVar[Fault] = "environment"


class DisconnectedError(TransportError):
    code = "disconnected"


class RegistryError(KVBatonError):
    code = "registry"
    fault: ClassVar[Fault] = "environment"


class InternalError(KVBatonError):
    code = "internal"
    fault: ClassVar[Fault] = "bug"


def _leaves(root: type[KVBatonError]) -> dict[str, type[KVBatonError]]:
    found = {root.code: root}
    for child in root.__subclasses__():
        found.update(_leaves(child))
    return found


def from_code(code: str, message: str, *, peer: str = "", room: int | None = None) -> KVBatonError:
    """Rebuild an error that crossed the wire. An unknown code becomes :class:`TransferFailedError`."""
    kind = _leaves(KVBatonError).get(code, TransferFailedError)
    return kind(message, peer=peer, room=room)
