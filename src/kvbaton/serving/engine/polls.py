"""What a room is, when several ranks of a group have a part in it: pure functions of what each of them says."""

from __future__ import annotations

from collections.abc import Iterable

from kvbaton.protocol.effects import KVPoll

#: From the first to the last state of a room that goes well.
_PROGRESS = (KVPoll.Bootstrapping, KVPoll.WaitingForInput, KVPoll.Transferring, KVPoll.Success)


def combine(polls: Iterable[KVPoll]) -> KVPoll:
    """Failed if any rank failed, Success only if all have succeeded, else what the slowest rank says.

    A rank that has succeeded while another has not even begun leaves the group where that one is.
    """
    seen = set(polls)
    if KVPoll.Failed in seen:
        return KVPoll.Failed
    return next((poll for poll in _PROGRESS if poll in seen), KVPoll.Bootstrapping)
