"""What a router shows its workers, each its own: a token for one is of no use at another."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from kvbaton.serving.router.worker import Worker

#: The headers for a worker.
Credentials = Callable[[Worker], Mapping[str, str]]


def no_credentials(_worker: Worker) -> Mapping[str, str]:
    """Of a deployment without a secret."""
    return {}
