"""What a decode engine hands on: a prompt that came to it, with the answer so far, to another target.

Rules, the same as of ``serving/engine/departures``: a room goes on as another one, and only once it has succeeded and
holds no lease; it goes on as a whole, what its engine held before it came and what was computed since included; slots
say what is true now, not what came; the units stay until the sender gives them up, and nothing is computed in them
meanwhile.
"""

from __future__ import annotations

from kvbaton.errors import LocalProtocolError
from kvbaton.manager import KVSender
from kvbaton.testing.sim.source_job import SourceJob


class DepartingJob(SourceJob):
    """See the module. One chunk, of units that the engine has kept; only the answer is computed here."""

    def open(self) -> KVSender:
        kept = self.process.engine.take_kept(self.request)
        if kept is None:
            raise LocalProtocolError("this process is not the one that it came to", room=self.request.room)
        self._fresh = kept.job.request.tokens
        self.process.engine.allocator.pass_on(kept, self.tenancy)
        self._allocated, self._computed = True, len(self._steps)
        return super().open()

    def _submit(self, side: KVSender, number: int) -> None:
        super()._submit(side, number)
        self.later(self.request.ready_after, self._departs)

    def _departs(self) -> None:
        self.process.clockwork.happened("departure")
