"""Which bootstrap registries a decode server may be sent to: a request names one, so anything else is SSRF."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from kvbaton.control.address import Address
from kvbaton.discovery.access import is_loopback, is_printable_host, unbracketed
from kvbaton.discovery.names import host_and_port, plain
from kvbaton.errors import ConfigError, RegistryError

FLAG = "--disaggregation-bootstrap-allow"


@dataclass(frozen=True, slots=True)
class AllowList:
    """Hosts, each with one port or (None) any. Empty: this machine's loopback only."""

    entries: tuple[tuple[str, int | None], ...] = ()

    @staticmethod
    def parse(entries: Sequence[str]) -> AllowList:
        """From ``HOST``, ``HOST:PORT``, ``[IPv6]`` or ``[IPv6]:PORT``. Raises ConfigError."""
        return AllowList(tuple(host_and_port(text, flag=FLAG) for text in entries))

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
                f"an operator adds it with {FLAG}"
            )

    def check_link(self, address: str, registry: Collection[str]) -> None:
        """Raises RegistryError unless a rank may be dialled at ``address`` (``tcp://IP:PORT``), as a registry says, and
        ConfigError for what is no address.

        ``registry``: the registry's own IP addresses, where ranks may always be. Where there is a list, other hosts
        must be on it, whatever the port.
        """
        host = plain(Address.parse(address).host)
        if self.entries and host not in {plain(name) for name in (*registry, *(name for name, _ in self.entries))}:
            raise RegistryError(
                f"a rank is said to be at {host}, which is not on this server's allow-list; "
                f"an operator adds it with {FLAG}"
            )


def bare(host: str) -> str:
    """A host as it is compared: lower case, no brackets."""
    return unbracketed(host).lower()
