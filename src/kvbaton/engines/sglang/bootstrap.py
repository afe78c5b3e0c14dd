"""SGLang's bootstrap server, as its launchers, routers and health checks know it, and what is asked of it.

A prefill rank registers there; the address that it registers is its control address. A decode rank asks for the sizes
of the group and then for the address of every rank of one data-parallel rank.
"""

from __future__ import annotations

import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

from kvbaton.control.address import Address
from kvbaton.discovery.access import is_printable_host
from kvbaton.discovery.names import audience_of
from kvbaton.discovery.proof import MAC_HEADER, TIME_PATH, Asked
from kvbaton.errors import AuthenticationError, RegistryError

#: One question, in seconds; SGLang asks on its scheduler's thread.
ASK_SECONDS = 2.0
#: How long a rank tries to register, in seconds, and the pause between.
REGISTER_SECONDS = 60.0
PAUSE_SECONDS = 0.5
MAX_ANSWER_BYTES = 1 << 20
#: Most prefill groups whose addresses are remembered.
MAX_GROUPS = 1024


class Client:
    """Asks bootstrap servers. With a secret it shows each server a token for that one alone, and believes an answer
    only from a server that knows the secret: the address may have come from a request."""

    def __init__(self, secret: str | None = None) -> None:
        self._secret = secret

    def ask(self, url: str, *, body: object = None, method: str = "GET", seconds: float = ASK_SECONDS) -> Any:
        """The answer's JSON; of what is no JSON its text. Raises RegistryError, AuthenticationError."""
        data = b"" if body is None else json.dumps(body).encode()
        parts = urlsplit(url)
        if parts.hostname is None or not is_printable_host(parts.hostname):
            raise RegistryError(f"{url!r} names no server")
        audience, path = audience_of(parts.hostname, parts.port or 80), f"{parts.path}?{parts.query}".rstrip("?")
        headers, asked = {"Content-Type": "application/json", "Host": audience}, None
        if self._secret is not None:
            asked = Asked(secret=self._secret, audience=audience, method=method, path=path)
            told = self._time(f"{parts.scheme}://{parts.netloc}{TIME_PATH}", seconds) if method != "GET" else ""
            headers |= asked.headers(told, data)
        request = urllib.request.Request(url, data=data or None, method=method, headers=headers)
        try:
            with _OPENER.open(request, timeout=seconds) as answer:
                content = answer.read(MAX_ANSWER_BYTES)
                code = answer.headers.get(MAC_HEADER)
        except urllib.error.HTTPError as error:
            raise RegistryError(f"{url} answers {error.code}: {error.read(200).decode(errors='replace')}") from None
        except (OSError, ValueError) as error:
            raise RegistryError(f"{url} does not answer: {error}") from None
        if asked is not None and not asked.is_answered(code, content):
            raise AuthenticationError(f"{url}: whoever answers there does not know this deployment's secret")
        try:
            return json.loads(content)
        except ValueError:
            return content.decode(errors="replace")

    def _time(self, url: str, seconds: float) -> str:
        """The server's time, which a registration must name."""
        told = self.ask(url, seconds=seconds)
        if not (isinstance(told, dict) and isinstance(told.get("time"), str)):
            raise RegistryError(f"{url} does not tell the time")
        return str(told["time"])

    def register(self, url: str, row: Mapping[str, object], *, seconds: float = REGISTER_SECONDS) -> None:
        """Register a prefill rank at ``url``; the server may still be starting. Raises RegistryError,
        AuthenticationError."""
        until = time.monotonic() + seconds
        while True:
            try:
                self.ask(url, body=dict(row), method="PUT")
                return
            except RegistryError:
                if time.monotonic() >= until:
                    raise
            time.sleep(PAUSE_SECONDS)


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        """The address may have come from a request."""


_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirects)


class Groups:
    """Where the ranks of prefill groups listen, by the server's address and the data-parallel rank; asked once.

    Args:
        fetch: asks a URL, as :meth:`Client.ask`.
    """

    def __init__(self, fetch: Callable[[str], Any]) -> None:
        self._fetch = fetch
        self._lock = threading.Lock()
        self._sources: dict[tuple[str, int], tuple[str, ...]] = {}

    def sizes(self, server: str) -> dict[str, Any]:
        """What the server says of the group. Raises RegistryError."""
        found = self._fetch(_route(server, -1, -1, -1, -1))
        if not isinstance(found, dict):
            raise RegistryError(f"{server} does not say how many prefill ranks there are")
        return found

    def sources(self, server: str, dp_rank: int, *, tp_size: int, pp_size: int) -> tuple[str, ...]:
        """Control addresses of every rank of a data-parallel rank. Raises RegistryError."""
        with self._lock:
            known = self._sources.get((server, dp_rank))
        if known is not None:
            return known
        found = []
        for pp in range(pp_size):
            for tp in range(tp_size):
                rank = self._fetch(_route(server, dp_rank, 0, tp, pp))
                try:
                    found.append(str(Address(str(rank["rank_ip"]), int(rank["rank_port"]))))
                except (KeyError, TypeError, ValueError):
                    raise RegistryError(f"{server} does not say where prefill rank tp {tp}, pp {pp} listens") from None
        with self._lock:
            if len(self._sources) >= MAX_GROUPS:
                self._sources.clear()
            self._sources[server, dp_rank] = tuple(found)
        return tuple(found)

    def forget(self, address: str) -> list[str]:
        """A rank at this address is lost: forget its group. The servers that knew it."""
        with self._lock:
            lost = [key for key, sources in self._sources.items() if address in sources]
            for key in lost:
                del self._sources[key]
        return sorted({server for server, _ in lost})

    def forget_server(self, server: str) -> None:
        """Forget everything that a server has said."""
        with self._lock:
            for key in [key for key in self._sources if key[0] == server]:
                del self._sources[key]


def _route(server: str, dp: int, cp: int, tp: int, pp: int) -> str:
    return f"http://{server}/route?prefill_dp_rank={dp}&prefill_cp_rank={cp}&target_tp_rank={tp}&target_pp_rank={pp}"
