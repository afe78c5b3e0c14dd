"""The two legs of a request behind a router: one to prefill, one to decode, sent at once, ended together.

Rules:

- Both legs carry the same room, minted here, and where the prefill server's registry is. The prefill leg never streams:
  its answer is only the proof that the prompt was handed over.
- Until decode answers, the first failure of either leg is the request's, and the other leg's connection is closed,
  which makes its server abort. Once decode has answered, the cache has arrived, and prefill can no longer hurt.
- A failure says whether the request may be tried again, and whose it is. A server that blames its peer is not the
  culprit, whichever leg speaks first: the other worker of the pair is.
- Prefill is not told the model's name: each side has its own, and the client's is that of decode.
- Each leg says which half it is for (``routing.ROLE_HEADER``): a server that is the other one refuses.
- Prefill's leg is held here. Decode's is for the caller to hold, because it lasts for as long as its answer is read.

This file must not know of turns, retries or how the client is answered.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from types import TracebackType

import aiohttp
import msgspec

from kvbaton.discovery.client import cause_of
from kvbaton.errors import (
    DisconnectedError,
    ExpiredError,
    OverloadedError,
    PeerLostError,
    RegistryError,
    RemoteProtocolError,
    TransferFailedError,
)
from kvbaton.serving.router.credentials import Credentials, no_credentials
from kvbaton.serving.router.own_limits import is_our_own
from kvbaton.serving.router.worker import Worker
from kvbaton.serving.server.failure import DRAINING, RETRY_AFTER_SECONDS, TRY_AGAIN
from kvbaton.serving.server.openai import ErrorBody, ErrorDetail
from kvbaton.serving.server.routing import ROLE_HEADER

#: Largest error body, and largest whole answer, that is read from a worker.
MAX_ERROR_BYTES = 64 << 10
#: How long the prefill leg may take to end after decode's answer has.
PREFILL_SETTLE_SECONDS = 1.0
#: Fields that only a router sets; what a client says there is dropped, but for the number of a rank.
ROUTER_FIELDS = ("kv_transfer_params",)
ROUTER_PREFIXES = ("bootstrap_", "disagg_")
CLIENT_FIELDS = ("disagg_prefill_dp_rank",)

#: Besides all from 500 on, what another server may answer otherwise: a room or an id that is in use, too many requests.
_AGAIN = (409, 429)
#: Codes of errors in which a server says that the other one of its pair is gone or does not let it in.
BLAMES_PEER = (PeerLostError.code, DisconnectedError.code, RegistryError.code)
#: Codes by which it says that what came from there, or did not come, was wrong.
_BLAMES_TRANSFER = (RemoteProtocolError.code, TransferFailedError.code, ExpiredError.code)

Fields = Mapping[str, msgspec.Raw]


class CallFailed(Exception):
    """One leg failed.

    Args:
        worker: whose leg.
        status: what the client is to get.
        detail: the error, as the worker told it or as we saw it.
        again: another pair may be tried.
        culprit: who has failed, where it is not ``worker``.
        is_suspicious: whoever it was may be of no use to other requests, too.
    """

    def __init__(
        self,
        worker: Worker,
        status: int,
        detail: ErrorDetail,
        *,
        again: bool,
        culprit: Worker | None = None,
        is_suspicious: bool = False,
    ) -> None:
        super().__init__(f"{worker}: {detail.message}")
        self.worker = worker
        self.culprit = culprit if culprit is not None else worker
        self.status = status
        self.detail = detail
        self.again = again
        self.is_suspicious = is_suspicious

    @property
    def body(self) -> ErrorBody:
        """The worker's error, with the worker's name in front unless the client itself is to blame."""
        if self.status < 499:
            return ErrorBody(self.detail)
        return ErrorBody(msgspec.structs.replace(self.detail, message=str(self)))

    @property
    def headers(self) -> dict[str, str]:
        return {"Retry-After": str(RETRY_AFTER_SECONDS)} if self.status in TRY_AGAIN else {}


@dataclass(frozen=True, slots=True)
class Pair:
    """The workers of one attempt and its room."""

    prefill: Worker
    decode: Worker
    room: int


def mint_room() -> int:
    """A random room: positive, 63 bits, never 0."""
    return secrets.randbelow((1 << 63) - 1) + 1


def strip(fields: Fields) -> dict[str, msgspec.Raw]:
    """The client's fields without those that only a router sets."""
    return {
        name: value
        for name, value in fields.items()
        if name in CLIENT_FIELDS or not (name in ROUTER_FIELDS or name.startswith(ROUTER_PREFIXES))
    }


class PrefillDecodeCall:
    """Both legs of one attempt. Use as an async context manager: leaving it closes both.

    ``credentials`` of each worker go to it; nothing of the client's headers does.
    """

    def __init__(
        self,
        session: aiohttp.ClientSession,
        path: str,
        fields: Fields,
        pair: Pair,
        credentials: Credentials = no_credentials,
    ) -> None:
        self._session = session
        self._path = path
        self._fields = fields
        self._pair = pair
        self._credentials = credentials
        self._prefill: asyncio.Task[None] | None = None
        self._decode: asyncio.Task[aiohttp.ClientResponse] | None = None
        self._answered = False

    async def __aenter__(self) -> PrefillDecodeCall:
        return self

    async def answer(self) -> aiohttp.ClientResponse:
        """Send both; decode's answer, status 200, its body still to be read. Raises CallFailed, from either leg."""
        self._prefill = asyncio.create_task(self._run_prefill())
        self._decode = asyncio.create_task(self._open(self._pair.decode, self._decode_body()))
        waiting: set[asyncio.Task[None] | asyncio.Task[aiohttp.ClientResponse]] = {self._prefill, self._decode}
        while not self._decode.done():
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            if self._prefill.done() and not self._answers():
                self._prefill.result()  # raises its failure
                waiting = {self._decode}
        response = self._decode.result()
        self._answered = True
        return response

    def release(self) -> None:
        """Leave decode's answer to the caller: it is not closed with the call."""
        self._decode = None

    async def settle(self) -> None:
        """After a whole answer: let the prefill leg end by itself, within a bound."""
        if self._prefill is not None:
            await asyncio.wait({self._prefill}, timeout=PREFILL_SETTLE_SECONDS)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        tasks = [task for task in (self._prefill, self._decode) if task is not None]
        self._prefill = self._decode = None  # how a leg ended holds its frames, which hold this and the bodies
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        for result in results:
            if isinstance(result, aiohttp.ClientResponse):
                result.close()

    def _answers(self) -> bool:
        """Whether decode has answered with success."""
        decode = self._decode
        return decode is not None and decode.done() and not decode.cancelled() and decode.exception() is None

    async def _run_prefill(self) -> None:
        prefill = self._pair.prefill
        try:
            async with prefill.leg(), await self._prefill_response() as response:
                await self._read_prefill(response)
        except PeerLostError as error:
            raise lost(prefill, error, self._pair.room) from None
        except (aiohttp.ClientError, OSError) as error:
            raise _unreachable(prefill, error, self._pair.room) from None

    async def _prefill_response(self) -> aiohttp.ClientResponse:
        return await self._open(self._pair.prefill, self._prefill_body())

    async def _read_prefill(self, response: aiohttp.ClientResponse) -> None:
        async for _ in response.content.iter_any():  # nobody needs it, and it may be long
            pass

    def _prefill_body(self) -> bytes:
        """Left out, not null: SGLang and vLLM refuse null for what has a default."""
        fields = {name: value for name, value in self._fields.items() if name not in ("stream_options", "model")}
        return self._body({**fields, "stream": False})

    def _decode_body(self) -> bytes:
        return self._body(self._fields)

    def _body(self, fields: Mapping[str, object]) -> bytes:
        pair = self._pair
        bootstrap = {
            "bootstrap_host": pair.prefill.host,
            "bootstrap_port": pair.prefill.bootstrap_port,
            "bootstrap_room": pair.room,
        }
        return msgspec.json.encode({**fields, **bootstrap})

    async def _open(self, worker: Worker, body: bytes) -> aiohttp.ClientResponse:
        """A leg up to the head of its answer; the answer is a success. Raises CallFailed."""
        try:
            response = await self._session.post(
                worker.url + self._path,
                data=BytesIO(body),
                headers={"Content-Type": "application/json", **self._credentials(worker), ROLE_HEADER: worker.role},
                allow_redirects=False,
            )
        except (aiohttp.ClientError, OSError) as error:  # includes TimeoutError
            raise _unreachable(worker, error, self._pair.room) from None
        worker.heard()
        if response.status == 200:
            return response
        async with response:
            try:
                payload = await response.content.read(MAX_ERROR_BYTES)
            except (aiohttp.ClientError, OSError) as error:
                raise _unreachable(worker, error, self._pair.room) from None
        raise refused(worker, self._pair, response.status, payload)


class _ToldDetail(msgspec.Struct):
    """An error as some server tells it: the codes of ours are words, those of vLLM numbers."""

    message: str
    type: str = "http_error"
    code: str | int | None = "http"
    param: str | None = None


class _Told(msgspec.Struct):
    error: _ToldDetail


def lost(worker: Worker, error: PeerLostError, room: int) -> CallFailed:
    """How an attempt fails one of whose workers is lost."""
    return _gone(worker, f"{error.message} [room {room}]")


def broken_off(worker: Worker, cause: str, room: int) -> CallFailed:
    """How an attempt fails whose answer has no end."""
    return _gone(worker, f"the server went away within its answer ({cause}); send the request again [room {room}]")


def _unreachable(worker: Worker, error: Exception, room: int) -> CallFailed:
    if is_our_own(error):
        trouble = f"the router can open no connection ({cause_of(error)}); try again later, or raise its limits"
        detail = ErrorDetail(message=trouble, type="rate_limit_error", code=OverloadedError.code)
        return CallFailed(worker, 429, detail, again=False)
    cause = f"the server cannot be reached or went away ({cause_of(error)})"
    return _gone(worker, f"{cause}; send the request again [room {room}]")


def _gone(worker: Worker, message: str) -> CallFailed:
    detail = ErrorDetail(message=message, type="service_unavailable_error", code=PeerLostError.code)
    return CallFailed(worker, 503, detail, again=True, is_suspicious=True)


def refused(worker: Worker, pair: Pair, status: int, payload: bytes) -> CallFailed:
    """How an attempt fails to which a worker has answered with an error."""
    try:
        told = msgspec.json.decode(payload, type=_Told).error
        detail = ErrorDetail(message=told.message, type=told.type, code=str(told.code), param=told.param)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        detail = ErrorDetail(message=f"the server answered HTTP {status}", type="http_error", code="http")
    named = detail.param or ""
    is_ours = named.startswith(ROUTER_PREFIXES) and named not in CLIENT_FIELDS  # of what the router itself wrote
    if status < 400 or status == 401 or (status < 500 and is_ours):  # no worker of ours, or a secret or an allow-list
        status = 502  # that are not ours: not the client's doing
    culprit = worker
    if detail.code in (*BLAMES_PEER, *_BLAMES_TRANSFER):
        culprit = pair.decode if worker is pair.prefill else pair.prefill
    return CallFailed(
        worker,
        status,
        detail,
        again=status >= 500 or status in _AGAIN,
        culprit=culprit,
        is_suspicious=detail.code in (DRAINING, *BLAMES_PEER),
    )
