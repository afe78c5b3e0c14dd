"""Which of a client's headers go on to the workers, and which of a worker's come back.

Rules: ``X-Request-Id`` and the W3C trace context always do, others where the operator names them. What is between two
hops only, or says who somebody is, never does.

This file must not know routes or workers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from aiohttp import web

from kvbaton.errors import ConfigError
from kvbaton.serving.server.request_ids import HEADER, request_id_of

#: https://www.w3.org/TR/trace-context/
TRACE_CONTEXT = ("traceparent", "tracestate")
MAX_VALUE_CHARACTERS = 1024
_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,64}")
_VALUE = re.compile(r"[ -~]*")
_NEVER = frozenset(
    (
        *("authorization", "proxy-authorization", "cookie", "set-cookie", "host", "origin", "expect", "date", "server"),
        *("connection", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade", "retry-after", "allow"),
    )
)


class PassedHeaders:
    """The names, beside those that always pass."""

    def __init__(self, names: Iterable[str] = ()) -> None:
        """Raises ConfigError for a name that is none, or that must not pass."""
        self._names = (*TRACE_CONTEXT, *names)
        for name in names:
            lower = name.lower()
            if not _NAME.fullmatch(name) or lower in _NEVER or lower.startswith(("content-", "x-kvbaton-")):
                raise ConfigError(f"--forward-header {name!r} is no header that may be passed on")

    def of_client(self, http: web.Request) -> dict[str, str]:
        """What goes on to the workers."""
        return {HEADER: request_id_of(http), **self._named(http.headers)}

    def of_worker(self, headers: Mapping[str, str]) -> dict[str, str]:
        """What comes back."""
        return self._named(headers)

    def _named(self, headers: Mapping[str, str]) -> dict[str, str]:
        found = {name: headers[name] for name in self._names if name in headers}
        return {
            name: value
            for name, value in found.items()
            if len(value) <= MAX_VALUE_CHARACTERS and _VALUE.fullmatch(value)
        }
