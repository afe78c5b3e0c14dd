"""What one run consists of, as plain data: groups of ranks, requests, faults. Made by ``generate``, cut by ``shrink``.

Times are seconds of the world's clock since its start, durations in seconds. Everything that is drawn while a run goes
on (latencies, the order in which bytes land) comes from streams named after the thing it happens to, so that taking
one fault out of a scenario leaves the rest of the run as it was.
"""

from __future__ import annotations

from typing import Literal

import msgspec
from msgspec import Struct

from kvbaton.plan.costs import HOST_COSTS

#: An engine that takes less than this for a prompt is not slow.
PROMPT_SECONDS = 2.0

#: ``fused``: K and V of a token side by side; ``stacked``: all layers of a page side by side.
Order = Literal["HND", "NHD", "fused", "stacked"]


class SimModel(Struct, frozen=True, kw_only=True):
    """What both sides serve. ``heads`` 1 with more ranks than heads is what MLA and GQA replicas are."""

    layers: int = 1
    heads: int = 2
    item_bytes: int = 2
    latent: bool = False
    index: bool = False
    state_items: int = 0
    window: int = 0


class Clock(Struct, frozen=True, array_like=True):
    """A rank's own clock: ``rate * now + offset``."""

    rate: float = 1.0
    offset: float = 0.0


class SimGroup(Struct, frozen=True, kw_only=True):
    """The ranks of one side of one engine: ``tp * pp`` of them, pipeline-major.

    Args:
        lazy: how long the engine takes to notice that a room has changed.
        must_progress: bytes only land while the target's driver asks its transport to (sockets, not RDMA).
        fence_breaks_others: cutting off one peer breaks what is in flight to the others.
        staging_slots, staging_slot_bytes: memory through which small pieces may travel together.
        misfit: this group has another element type: every pairing with it must be refused.
    """

    name: str
    tp: int = 1
    pp: int = 1
    page_size: int = 2
    order: Order = "HND"
    pages: int = 8
    slots: int = 3
    clocks: tuple[Clock, ...] = (Clock(),)
    lazy: float = 0.0
    must_progress: bool = False
    fence_breaks_others: bool = False
    misfit: bool = False
    staging_slots: int = 0
    staging_slot_bytes: int = 512  # holds a block of every part of every model that is generated

    @property
    def size(self) -> int:
        return self.tp * self.pp

    def rank(self, number: int) -> str:
        return f"{self.name}.{number}"


class SimStep(Struct, frozen=True, array_like=True):
    """Layers ``[start, stop)`` of a chunk, counted from 0, are computed; without layers all of it is."""

    chunk: int
    start: int = 0
    stop: int = 0


Begun = Literal["", "there", "late", "lost"]


class SimRequest(Struct, frozen=True, kw_only=True):
    """One prompt on both sides. Times are relative to its start: 0, or the end of the request named by ``after``.

    Args:
        chunks: token numbers where a chunk ends; the last is the number of tokens.
        source_at, target_at: when each engine gets it.
        publish_after: from then until the target engine publishes units: the time in its queue.
        steps: how the chunks are handed over, in this order; none: each as a whole.
        chunk_every: computing time of a chunk, in which its steps share.
        ready_after: from submission of a chunk until its fence opens.
        ready_raises: the fence of this chunk, or step, counted from 1, raises when it should open; 0: none does.
        eager: submit chunks without waiting for the target.
        skip_prefix: the source submits nothing that the target holds already.
        source_abort, target_abort: when that engine gives it up; None: never.
        lone_abort: only the first rank of the side gives up.
        back: the other way round: from the group ``target`` to the group ``source``.
        onward: the group ``target``, to which ``after`` brought it, hands it on to this group of the targets, with the
            answer so far, in the units where it lies; None: the group ``source`` computes and sends it.
        gap: the source engine forgets to submit this chunk; 0: none.
        rival: its room is in use by another request already.
        declines: the target engine wants nothing of it, from when it gets it on.
        spare: the target engine does not know how long the prompt is, and has units for so many tokens more; None: it
            knows.
        preempt: when the source engine takes its units back, to compute the prompt again; None: never.
        begun: the target engine has heard that the sources have begun it. They have, all of them; or they get it only
            now, since the word was that of another one; or they have lost it, as those do that were started again.
    """

    number: int
    room: int
    source: int = 0
    target: int = 0
    prefix: int = 0
    chunks: tuple[int, ...] = (4,)
    steps: tuple[SimStep, ...] = ()
    after: int | None = None
    source_at: float = 0.0
    target_at: float = 0.0
    publish_after: float = 0.0
    chunk_every: float = 0.001
    ready_after: float = 0.0
    ready_raises: int = 0
    eager: bool = False
    skip_prefix: bool = False
    source_abort: float | None = None
    target_abort: float | None = None
    lone_abort: bool = False
    rival: bool = False
    back: bool = False
    onward: int | None = None
    gap: int = 0
    declines: bool = False
    spare: int | None = None
    preempt: float | None = None
    begun: Begun = ""

    @property
    def tokens(self) -> int:
        return self.chunks[-1]


class Trigger(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """When a fault happens: at a time, or ``delay`` after the ``nth`` occurrence of a named event.

    Events: the name of a message type when one is sent, ``post`` when a write is posted, ``departure`` when what an
    engine hands on may be read.
    """

    at: float = 0.0
    event: str = ""
    nth: int = 1
    delay: float = 0.0


class MessageFault(Struct, frozen=True, kw_only=True, tag="message", omit_defaults=True):
    """The ``nth`` message of a type (of any type, if empty), counted over the whole run, and ``count`` - 1 after it.

    ``seconds``: how much later a delayed message arrives, or the second copy of a doubled one; counted from when the
    next message of the type ``until`` is sent, if that is given.
    """

    kind: Literal["drop", "double", "delay"]
    message: str = ""
    nth: int = 1
    count: int = 1
    seconds: float = 0.0
    until: str = ""


class Noise(Struct, frozen=True, kw_only=True, tag="noise", omit_defaults=True):
    """For a while every message may be lost, doubled or delayed (and so overtaken)."""

    at: float = 0.0
    seconds: float
    drop: float = 0.0
    double: float = 0.0
    delay: float = 0.0
    delay_seconds: float = 0.0


WriteFaultKind = Literal[
    "raises",
    "raises_and_lands",
    "breaks",
    "breaks_and_lands",
    "never_settles",
    "lands_never_settles",
    "late",
    "scatter",
]


class WriteFault(Struct, frozen=True, kw_only=True, tag="write", omit_defaults=True):
    """The ``nth`` write posted in the run, and ``count`` - 1 after it. ``seconds``: how late its bytes land."""

    kind: WriteFaultKind
    nth: int = 1
    count: int = 1
    seconds: float = 0.0


RankFaultKind = Literal["pause", "kill", "restart", "vanish", "close", "slow_reader"]


class RankFault(Struct, frozen=True, kw_only=True, tag="rank", omit_defaults=True):
    """A process stops for ``seconds``; dies; dies and stands up again after ``seconds`` at the same address; loses its
    host (nothing ever answers there); closes in good order; or reads one message per ``seconds`` / 10."""

    kind: RankFaultKind
    rank: str
    when: Trigger
    seconds: float = 0.0


class LinkFault(Struct, frozen=True, kw_only=True, tag="link", omit_defaults=True):
    """Messages from ``a`` to ``b`` (or both ways) do not arrive for ``seconds``.

    ``held``: they arrive when the cut heals. ``lost``: they do not. ``broken``: the streams break as well.
    """

    a: str
    b: str
    both: bool
    manner: Literal["held", "lost", "broken"]
    when: Trigger
    seconds: float


class PrepareFault(Struct, frozen=True, kw_only=True, tag="prepare", omit_defaults=True):
    """The ``nth`` attempt of a transport to reach a peer fails."""

    nth: int = 1


Fault = MessageFault | Noise | WriteFault | RankFault | LinkFault | PrepareFault


class Tuning(Struct, frozen=True, kw_only=True):
    """Deadlines and bounds of every rank that differ from run to run."""

    write_bytes: int = 64
    write_entries: int = 8
    window_bytes: int = 128
    window_entries: int = 16
    tombstones: int = 64
    rooms: int = 64
    quarantine_seconds: float | None = None
    staging: Literal["auto", "always", "never"] = "auto"
    post_seconds: float = HOST_COSTS.post_seconds  #: 0: layers are worth a post of their own, always


class Scenario(Struct, frozen=True, kw_only=True):
    """See the module."""

    seed: int
    model: SimModel = SimModel()
    tuning: Tuning = Tuning()
    sources: tuple[SimGroup, ...]
    targets: tuple[SimGroup, ...]
    requests: tuple[SimRequest, ...]
    faults: tuple[Fault, ...] = ()

    @property
    def misuses(self) -> bool:
        """Whether somebody outside did something that must fail: a room used twice at once, groups that do not fit."""
        misfits = {g.misfit for g in (*self.sources, *self.targets)}
        return any(r.rival or r.gap for r in self.requests) or len(misfits) > 1

    def prompt_of(self, request: SimRequest) -> int:
        """The number of the request that computed its tokens first: what is handed on stays what it is."""
        while request.onward is not None:
            request = next(one for one in self.requests if one.number == request.after)
        return request.number

    @property
    def undisturbed(self) -> bool:
        """Whether nothing stands between these requests and their success but aborts: no fault, engines without delay
        but for the time in their queues, room for everybody at once."""
        takes = [
            (r.preempt or 0.0) + (r.chunk_every * len(r.chunks) + r.ready_after) * (1 if r.preempt is None else 2)
            for r in self.requests
        ]
        roomy = all(
            g.pages >= sum(r.tokens + (r.spare or 0) + 1 for r in self.requests) and g.slots >= len(self.requests)
            for g in (*self.sources, *self.targets)
        )
        return roomy and max(takes, default=0.0) < PROMPT_SECONDS and not (self.faults or self.misuses)

    def to_json(self) -> bytes:
        return msgspec.json.format(msgspec.json.encode(self), indent=1)

    @staticmethod
    def from_json(text: bytes | str) -> Scenario:
        return msgspec.json.decode(text, type=Scenario)
