"""What the scheduler half tells every worker in a step, and what a worker tells back. Plain data, pickled by vLLM.

Block ids are vLLM's; a room is known by the id of the request that owns it wherever vLLM has to hear of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Blocks:
    """Blocks of one pool that hold tokens ``start`` to ``stop``; 0, 0 and one block for a slot of state."""

    pool: str
    start: int
    stop: int
    ids: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Offer:
    """A room of prefill that decode may open before anything of its prompt is computed."""

    request: str
    room: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Expect:
    """A room for which vLLM will have blocks sooner or later: prefill is told that it is wanted. ``begun`` as in
    :class:`Receive`."""

    room: int
    sources: tuple[str, ...]
    begun: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Receive:
    """Grant blocks to a room. ``begun``: prefill has answered that it has the room."""

    request: str
    room: int
    sources: tuple[str, ...]
    tokens: int
    begun: bool
    blocks: tuple[Blocks, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Decline:
    """Nothing is wanted of a room: its prefill may free everything. vLLM hears nothing of it."""

    room: int
    sources: tuple[str, ...]
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """Computed by the forward pass of this step."""

    request: str
    room: int
    last: bool
    blocks: tuple[Blocks, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Drop:
    """A room that prefill does not complete. ``report``: vLLM keeps the blocks until it hears that they are free."""

    request: str
    reason: str
    report: bool


@dataclass(kw_only=True)
class Orders:
    """One step. ``idle``: it computes nothing.

    Args:
        refuse: requests that are parked although nothing can be received for them, and why.
        give_up: requests of decode that were aborted while their room is live.
        report: requests of prefill that have finished: vLLM waits to hear that their blocks are free.
        preempted: requests whose blocks vLLM takes away in this step.
    """

    offer: list[Offer] = field(default_factory=list)
    expect: list[Expect] = field(default_factory=list)
    receive: list[Receive] = field(default_factory=list)
    decline: list[Decline] = field(default_factory=list)
    refuse: list[tuple[str, str]] = field(default_factory=list)
    give_up: list[str] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)
    report: list[str] = field(default_factory=list)
    drop: list[Drop] = field(default_factory=list)
    preempted: list[str] = field(default_factory=list)
    idle: bool = False


@dataclass(kw_only=True)
class Results:
    """What vLLM has to hear after a step: ids of requests, each once. What failed is in ``received`` too."""

    sent: set[str] = field(default_factory=set)
    received: set[str] = field(default_factory=set)
    failed: set[str] = field(default_factory=set)
