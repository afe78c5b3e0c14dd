"""Addresses of ranks: ``tcp://host:port`` with an IP literal, so that nothing waits for a name server."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from kvbaton.errors import ConfigError

_SCHEME = "tcp://"


@dataclass(frozen=True, slots=True)
class Address:
    """A parsed address; ``str()`` gives it back, IPv6 hosts in brackets."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str, *, any_port: bool = False) -> Address:
        """Parse ``tcp://127.0.0.1:8998``, ``tcp://[::1]:8998`` or ``tcp://localhost:8998``.

        ``any_port`` also takes port 0 (the system chooses). Raises ConfigError.
        """
        if not text.startswith(_SCHEME):
            raise ConfigError(f"address {text!r} does not start with {_SCHEME}")
        host, colon, port = text[len(_SCHEME) :].rpartition(":")
        if not colon or not (port.isascii() and port.isdecimal()) or not (0 if any_port else 1) <= int(port) <= 65_535:
            raise ConfigError(f"address {text!r} has no valid port")
        if host.startswith("[") != host.endswith("]") or (":" in host and not host.startswith("[")):
            raise ConfigError(f"address {text!r}: an IPv6 host goes in brackets")
        bare = "127.0.0.1" if host == "localhost" else host.removeprefix("[").removesuffix("]")
        try:
            parsed = ipaddress.ip_address(bare)
        except ValueError as error:
            hint = "resolve names before they are published or dialled"
            raise ConfigError(f"address {text!r}: {bare!r} is no IP address", hint=hint) from error
        if (parsed.version == 6) != host.startswith("["):
            raise ConfigError(f"address {text!r}: brackets are for IPv6 hosts only")
        return cls(bare, int(port))

    @property
    def is_ipv6(self) -> bool:
        return ":" in self.host

    @property
    def is_loopback(self) -> bool:
        return ipaddress.ip_address(self.host).is_loopback

    @property
    def is_wildcard(self) -> bool:
        """Every interface: good to listen at, meaningless to dial."""
        return ipaddress.ip_address(self.host).is_unspecified

    def __str__(self) -> str:
        return f"{_SCHEME}[{self.host}]:{self.port}" if self.is_ipv6 else f"{_SCHEME}{self.host}:{self.port}"
