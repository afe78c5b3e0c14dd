"""An answer that moves from one decode server to another, with its cache: the server that leaves is the source of a
room of its own, and what is left of its stream stands for prefill's leg.

This file must not know of turns, retries or how the client is answered.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import aiohttp
import msgspec

from kvbaton.discovery.client import cause_of
from kvbaton.serving.router.calls import (
    MAX_ERROR_BYTES,
    CallFailed,
    Fields,
    Pair,
    PrefillDecodeCall,
    broken_off,
    refused,
)
from kvbaton.serving.router.credentials import Credentials
from kvbaton.serving.router.events import Events
from kvbaton.serving.router.worker import Worker
from kvbaton.serving.server import journal

#: How long a server may take to say whether it hands on.
ASK_SECONDS = 3.0
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Move:
    """Where an answer is to go: the new pair, whose source is the old decode server, and the ranks of that one."""

    pair: Pair
    sources: tuple[str, ...]


class Departed(Exception):
    """The old server tells no more of the answer. ``rest``: its stream, which ends when it has been handed on."""

    def __init__(self, move: Move, rest: aiohttp.ClientResponse) -> None:
        super().__init__(f"{move.pair.prefill} hands on to {move.pair.decode}")
        self.move = move
        self.rest = rest


async def ask(session: aiohttp.ClientSession, worker: Worker, room: int, to: int, headers: Mapping[str, str]) -> bool:
    """Ask the server that answers ``room`` to hand on in the room ``to``. False where it does not; it goes on then."""
    timeout = aiohttp.ClientTimeout(total=ASK_SECONDS)
    body = msgspec.json.encode({"room": room, "to": to})
    try:
        async with session.post(
            f"{worker.url}/hand_over",
            data=body,
            headers={"Content-Type": "application/json", **headers},
            timeout=timeout,
            allow_redirects=False,
        ) as response:
            return bool(response.status == 200)
    except (aiohttp.ClientError, OSError) as error:  # includes TimeoutError
        _log.info("%s was asked to hand on room %d: %s", worker, room, cause_of(error))
        return False


class HandedOnCall(PrefillDecodeCall):
    """Decode is asked; the other leg is the rest of the old server's stream. Its failures can always be made good by
    computing the answer so far again."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        path: str,
        fields: Fields,
        pair: Pair,
        credentials: Credentials,
        *,
        rest: aiohttp.ClientResponse,
    ) -> None:
        super().__init__(session, path, fields, pair, credentials)
        self._rest = rest

    async def answer(self) -> aiohttp.ClientResponse:
        try:
            return await super().answer()
        except CallFailed as failure:
            failure.again = True
            raise

    async def __aexit__(self, *ending: object) -> None:
        try:
            await super().__aexit__(*ending)  # type: ignore[arg-type]
        finally:
            self._rest.close()

    async def _prefill_response(self) -> aiohttp.ClientResponse:
        return self._rest

    async def _read_prefill(self, response: aiohttp.ClientResponse) -> None:
        """Raises CallFailed where handing on has failed."""
        events, source = Events(), self._pair.prefill
        async for piece in response.content.iter_any():
            for one in events.feed(piece):
                line, _, data = one.partition(b"\n")
                try:
                    said = journal.notice_of(line[1:]) if line.startswith(b":") else None
                except msgspec.MsgspecError as error:
                    raise broken_off(source, f"its record cannot be read ({error})", self._pair.room) from None
                if said is not None and said.status:
                    raise refused(source, self._pair, said.status, data.removeprefix(b"data: "))
            if events.held_bytes > MAX_ERROR_BYTES:
                raise broken_off(source, "what is left of its stream has no end", self._pair.room)
