"""Which bootstrap registries a decode server may be sent to: a request names one, so anything else is SSRF."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvbaton.discovery.access import is_loopback, is_printable_host, unbracketed
from kvbaton.errors import ConfigError


@dataclass(frozen=True, slots=True)
class AllowList:
    """Hosts, each with one port or (None) any. Empty: this machine's loopback only."""

    entries: tuple[tuple[str, int | None], ...] = ()

    @staticmethod
    def parse(entries: Sequence[str]) -> AllowList:
        """From ``HOST``, ``HOST:PORT``, ``[IPv6]`` or ``[IPv6]:PORT``. Raises ConfigError."""
        return AllowList(tuple(_entry(text) for text in entries))

    def check(self, host: str, port: int) -> None:
        """Raises ConfigError unless the registry at ``host:port`` may be asked."""
        if not is_printable_host(host):
            allowed = False
        elif self.entries:
            allowed = any(bare(host) == name and only in (None, port) for name, only in self.entries)
        else:
            allowed = is_loopback(host)
        if not allowed:
            raise ConfigError(
                f"bootstrap_host: {host!r} port {port} is not on this server's allow-list; "
                "an operator adds it with --disaggregation-bootstrap-allow"
            )


def bare(host: str) -> str:
    """A host as it is compared: lower case, no brackets."""
    return unbracketed(host).lower()


def _entry(text: str) -> tuple[str, int | None]:
    host, colon, port = text.rpartition(":")
    if not colon or text.endswith("]") or (":" in host and not host.endswith("]")):
        host, port = text, ""
    if not is_printable_host(host) or (port and not (port.isdecimal() and 0 < int(port) <= 65535)):
        raise ConfigError(f"--disaggregation-bootstrap-allow {text!r} is neither HOST nor HOST:PORT")
    return bare(host), int(port) if port else None
