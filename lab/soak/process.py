"""The parent's end of one rank's process."""

from __future__ import annotations

import multiprocessing
from multiprocessing.connection import Connection
from typing import Any

from kvbaton.errors import ExpiredError, TransferFailedError, TransportError
from lab.soak.rank import HALT, SoakRankSpec, serve

TIMEOUT_SECONDS = 120.0


class RankProcess:
    """A rank that was started; ``tell`` and ``hear``, or ``ask`` for both."""

    def __init__(self, spec: SoakRankSpec) -> None:
        context = multiprocessing.get_context("spawn")
        self.spec = spec
        self._pipe: Connection
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(spec, theirs), daemon=True)
        self._process.start()
        theirs.close()
        self.address = str(self.recv()["address"])

    def tell(self, command: str, *arguments: object) -> None:
        self._pipe.send((command, arguments))

    def halt(self) -> None:
        """Give up the batch that is being played."""
        self._pipe.send(HALT)

    def answers_within(self, seconds: float) -> bool:
        return self._pipe.poll(seconds)

    def recv(self) -> Any:
        if not self._pipe.poll(TIMEOUT_SECONDS):
            raise ExpiredError(f"the {self.spec.side} did not answer within {TIMEOUT_SECONDS:g} s")
        try:
            kind, value = self._pipe.recv()
        except (EOFError, ConnectionError):
            self._process.join(5.0)
            raise TransportError(f"the {self.spec.side} died (exit code {self._process.exitcode})") from None
        if kind == "error":
            raise TransferFailedError(f"the {self.spec.side}: {value}")
        return value

    def ask(self, command: str, *arguments: object) -> Any:
        self.tell(command, *arguments)
        return self.recv()

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone. Idempotent."""
        self._process.kill()
        self._process.join()
        self._pipe.close()

    def stop(self) -> int:
        """End it in order; how many rooms it still held."""
        leased = int(self.ask("stop"))
        self._process.join(TIMEOUT_SECONDS)
        self.kill()
        return leased
