"""The hosts under which a server is asked: what its operator told it, and where a connection really arrived.

A browser's page whose own name was re-bound to 127.0.0.1 (DNS rebinding) shows that name in ``Host``, and a page of
another site shows itself in ``Origin``; neither is ever one of a server's names. A token that was made for one host and
port (:mod:`kvbaton.discovery.access`) is good for no server but the one that has this name.

This file must not know HTTP frameworks or secrets.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from kvbaton.discovery.access import is_loopback, is_printable_host, unbracketed
from kvbaton.errors import AuthenticationError, ConfigError

HTTP_PORT = 80
HTTPS_PORT = 443
ALLOWED_HOST_FLAG = "--allowed-host"
ALLOWED_ORIGIN_FLAG = "--allowed-origin"
ANY_ORIGIN = "*"
#: Of a host that is not ours, as many characters are said again.
_SAID = 80


@dataclass(frozen=True, slots=True)
class ServerNames:
    """See the module.

    Args:
        hosts: what the server was told to listen at and to advertise.
        allowed: an operator's further names, each with one port or (None) any.
        checks: whether a request must name one of them: on loopback, and where the operator has given a list.
        origins: other sites whose pages may ask this server and read its answers; ``*``: all.
    """

    hosts: tuple[str, ...] = ()
    allowed: tuple[tuple[str, int | None], ...] = ()
    checks: bool = True
    origins: frozenset[str] = frozenset()

    @staticmethod
    def of(host: str, *advertised: str, allowed: Sequence[str] = (), origins: Sequence[str] = ()) -> ServerNames:
        """Of a server that listens at ``host``. Raises ConfigError for what is neither HOST nor HOST:PORT, or no
        origin."""
        listed = [host_and_port(text, flag=ALLOWED_HOST_FLAG) for text in allowed]
        configured = tuple(plain(name) for name in (host, *advertised) if name)
        others = tuple((plain(name), port) for name, port in listed)
        sites = frozenset(_origin(text) for text in origins)
        return ServerNames(configured, others, checks=is_loopback(host) or bool(others), origins=sites)

    def check(self, host_header: str | None, origin: str | None, *, here: str = "") -> None:
        """Raises AuthenticationError for a request to another host, or from another site's page. ``here``: the address
        where its connection has arrived, by which probes may ask: no name can be re-bound to be that."""
        if not self.checks:
            return
        host, _ = split(host_header or "")
        if not (self._knows(host) or (here and host == plain(here))):
            raise AuthenticationError(
                f"Host: {(host_header or '')[:_SAID]!r} is no name of this server; its operator adds one with "
                f"{ALLOWED_HOST_FLAG}"
            )
        if origin is not None and not (self.admits(origin) or self._is_own_page(origin, host_header or "")):
            raise AuthenticationError(
                f"Origin: {origin[:_SAID]!r} is another site; this server's operator allows one with "
                f"{ALLOWED_ORIGIN_FLAG}"
            )

    def admits(self, origin: str) -> bool:
        """Whether pages of this other site may read what is answered."""
        return ANY_ORIGIN in self.origins or origin.lower() in self.origins

    def is_audience(self, audience: str, arrived_at: tuple[str, int]) -> bool:
        """Whether ``HOST:PORT`` is this server. ``arrived_at``: the connection's own address here, host and port."""
        host, port = split(audience)
        here, bound = plain(arrived_at[0]), arrived_at[1]
        if port == bound and (host == here or host in self.hosts):
            return True
        return any(host == name and port == (bound if only is None else only) for name, only in self.allowed)

    def _knows(self, host: str) -> bool:
        return is_loopback(host) or host in self.hosts or any(host == name for name, _ in self.allowed)

    def _is_own_page(self, origin: str, host_header: str) -> bool:
        """A page that this server, or a proxy in front of it that the operator names, has delivered."""
        try:
            authority = urlsplit(origin).netloc
        except ValueError:
            return False
        host, _ = split(authority)
        return bool(authority) and (
            authority.lower() == host_header.lower() or any(host == name for name, _ in self.allowed)
        )


def _origin(text: str) -> str:
    """As a browser says it. Raises ConfigError."""
    plainly = text.strip().rstrip("/").lower()
    scheme, separator, authority = plainly.partition("://")
    if plainly == ANY_ORIGIN or (
        separator and scheme.isalpha() and is_printable_host(authority) and "/" not in authority
    ):
        return plainly
    raise ConfigError(f"{ALLOWED_ORIGIN_FLAG} {text!r} is no origin; write SCHEME://HOST, SCHEME://HOST:PORT or *")


def plain(host: str) -> str:
    """A host as it is compared: lower case, no brackets, addresses in one spelling, ``localhost`` as 127.0.0.1."""
    bare = unbracketed(host).lower()
    if bare == "localhost":
        return "127.0.0.1"
    try:
        address = ipaddress.ip_address(bare)
    except ValueError:
        return bare
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(address)


def audience_of(host: str, port: int) -> str:
    """``HOST:PORT`` as tokens are bound to it, IPv6 addresses in brackets."""
    name = plain(host)
    return f"[{name}]:{port}" if ":" in name else f"{name}:{port}"


def audience_of_url(url: str) -> str:
    """``HOST:PORT`` of a URL. Raises ConfigError."""
    try:
        parts = urlsplit(url)
        return audience_of(parts.hostname or "", parts.port or (HTTPS_PORT if parts.scheme == "https" else HTTP_PORT))
    except ValueError as error:
        raise ConfigError(f"{url!r} is no URL: {error}") from None


def split(authority: str) -> tuple[str, int]:
    """The plain host and the port of a ``Host`` header; without one HTTP's own, and 0 for what is no port."""
    host, port = _parted(authority)
    if port is None:
        return plain(host), HTTP_PORT
    return plain(host), int(port) if port.isascii() and port.isdecimal() and len(port) <= 5 else 0


def host_and_port(text: str, *, flag: str) -> tuple[str, int | None]:
    """``HOST``, ``HOST:PORT``, ``[IPv6]`` or ``[IPv6]:PORT``, as an operator writes it. Raises ConfigError."""
    host, port = _parted(text)
    if not is_printable_host(host) or (port and not (port.isdecimal() and 0 < int(port) <= 65535)):
        raise ConfigError(f"{flag} {text!r} is neither HOST nor HOST:PORT")
    return unbracketed(host).lower(), int(port) if port else None


def _parted(text: str) -> tuple[str, str | None]:
    """``HOST`` and what stands where a port does; None without one. An IPv6 address with a port is in brackets."""
    host, colon, port = text.rpartition(":")
    if not colon or text.endswith("]") or (":" in host and not host.endswith("]")):
        return text, None
    return host, port
