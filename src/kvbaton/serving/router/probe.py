"""What a worker answers to a probe, and what that makes of it.

A server of ours says what it is; of one that does not (vLLM's ``/health`` has no body) only the status counts.

This file must not know how probes are sent.
"""

from __future__ import annotations

import msgspec

from kvbaton.protocol.messages import PROTOCOL_VERSION
from kvbaton.serving.router.worker import Role, State

MAX_PROBE_BYTES = 64 << 10


class ProbeAnswer(msgspec.Struct):
    """The body of ``/ready``, as ``kvbaton.serving.server.status`` writes it."""

    reason: str = ""
    draining: bool = False
    mode: str = ""
    instance: str = ""
    protocol: int = PROTOCOL_VERSION
    admits: bool = True
    model: str = ""
    max_model_len: int = 0

    def verdict(self, role: Role, path: str, status: int, served: str = "") -> tuple[State, str]:
        """The worker's state, and why it gets no requests. ``served``: the model's name at the other servers of its
        role, where clients' requests name it."""
        trouble = self._trouble(role, served)
        if trouble:
            return State.UNFIT, trouble
        if status == 200:
            return State.READY, ""
        reason = f" ({self.reason})" if self.reason else ""
        return State.DRAINING if self.draining else State.NEW, f"{path} answers HTTP {status}{reason}"

    def _trouble(self, role: Role, served: str) -> str:
        if self.mode and self.mode != role:
            return f"it is a {self.mode} server; name it with --{self.mode}, or start it in mode {role}"
        if self.protocol != PROTOCOL_VERSION:
            return f"it speaks protocol version {self.protocol}, and this router is of version {PROTOCOL_VERSION}"
        if not self.admits:
            return "it does not take this router's secret; give both the same --secret-file"
        if served and self.model and self.model != served:
            return (
                f"it serves the model {self.model[:80]!r}, and other {role} servers here {served[:80]!r}; "
                "start all with the same --served-model-name"
            )
        return ""


def decoded(payload: bytes) -> ProbeAnswer:
    """A body that is none of ours says nothing."""
    try:
        return msgspec.json.decode(payload, type=ProbeAnswer)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return ProbeAnswer()
