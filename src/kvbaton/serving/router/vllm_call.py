"""The two legs of a request in front of vLLM servers with :class:`kvbaton.engines.vllm.KVBatonConnector`.

Rules:

- Prefill is asked for one token of one answer, whatever the client wants; its answer names the room that decode is to
  be filled from, and the control addresses of its ranks. A prompt that is too short is not handed over: decode gets
  the request as it is.
- The first request to a prefill server is sequential: prefill answers, then decode is asked. From then on the router
  knows the ranks' addresses, mints the room, and asks both at once: chunks travel while the next ones are computed.
- Addresses are forgotten with the first leg that fails: a server that was started again has others.

``kv_transfer_params`` are those of :mod:`kvbaton.engines.vllm.params`.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Mapping

import aiohttp
import msgspec

from kvbaton.serving.router.calls import CallFailed, Fields, Pair, PrefillDecodeCall
from kvbaton.serving.router.credentials import Credentials, no_credentials
from kvbaton.serving.server.openai import ErrorDetail

#: Largest answer of prefill that is read: one token, and the addresses of at most 1,024 ranks.
MAX_PREFILL_ANSWER_BYTES = 1 << 20
MAX_PREFILL_SERVERS = 1024
#: What of a request makes prefill's answer long, or more than one: sent so, or not at all (vLLM takes null for few).
_PREFILL_OVERRIDES: dict[str, object] = {"max_tokens": 1, "n": 1, "stream": False}
_NOT_FOR_PREFILL = frozenset(
    ("best_of", "echo", "logprobs", "top_logprobs", "prompt_logprobs", "min_tokens", "stop", "stream_options")
)

Params = dict[str, object]


class _PrefillAnswer(msgspec.Struct):
    kv_transfer_params: Params | None = None


class KnownSources:
    """The control addresses of each prefill server's ranks, as its last answer named them."""

    def __init__(self) -> None:
        self._by_url: OrderedDict[str, list[object]] = OrderedDict()

    def of(self, url: str) -> list[object] | None:
        return self._by_url.get(url)

    def learn(self, url: str, params: Mapping[str, object]) -> None:
        sources = params.get("kvbaton_sources")
        if isinstance(sources, list) and sources:
            self._by_url[url] = sources
            if len(self._by_url) > MAX_PREFILL_SERVERS:
                self._by_url.popitem(last=False)

    def forget(self, url: str) -> None:
        self._by_url.pop(url, None)


class VllmCall(PrefillDecodeCall):
    """See the module."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        path: str,
        fields: Fields,
        pair: Pair,
        credentials: Credentials = no_credentials,
        *,
        known: KnownSources,
    ) -> None:
        ours = {name: value for name, value in fields.items() if name != "rid"}
        super().__init__(session, path, ours, pair, credentials)
        self._known = known
        self._room = ""
        self._params: Params | None = None

    async def answer(self) -> aiohttp.ClientResponse:
        sources = self._known.of(self._pair.prefill.url)
        try:
            if sources is not None:
                self._room = str(self._pair.room)
                self._params = {"do_remote_prefill": True, "kvbaton_room": self._room, "kvbaton_sources": sources}
                return await super().answer()
            self._prefill = asyncio.create_task(self._run_prefill())
            await self._prefill
            self._decode = asyncio.create_task(self._open(self._pair.decode, self._decode_body()))
            response = await self._decode
        except CallFailed:
            self._known.forget(self._pair.prefill.url)
            raise
        self._answered = True
        return response

    def _prefill_body(self) -> bytes:
        params: Params = {"do_remote_decode": True}
        if self._room:
            params["kvbaton_room"] = self._room
        overrides = dict(_PREFILL_OVERRIDES)
        if "max_completion_tokens" in self._fields:
            overrides["max_completion_tokens"] = 1
        kept = {name: value for name, value in self._fields.items() if name not in _NOT_FOR_PREFILL}
        return msgspec.json.encode({**kept, **overrides, "kv_transfer_params": params})

    def _decode_body(self) -> bytes:
        params = {"kv_transfer_params": self._params} if self._params else {}
        return msgspec.json.encode({**self._fields, **params})

    async def _read_prefill(self, response: aiohttp.ClientResponse) -> None:
        body = bytearray()
        async for piece in response.content.iter_any():
            body += piece
            if len(body) > MAX_PREFILL_ANSWER_BYTES:
                raise self._strange(f"more than {MAX_PREFILL_ANSWER_BYTES} bytes for one token")
        try:
            params = msgspec.json.decode(body, type=_PrefillAnswer).kv_transfer_params
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise self._strange(f"what is no completion ({error})") from None
        if params is not None:
            self._known.learn(self._pair.prefill.url, params)
        if not self._room:
            self._params = params

    def _strange(self, what: str) -> CallFailed:
        prefill = self._pair.prefill
        message = f"the server answers {what}; it must be vLLM with KVBatonConnector"
        return CallFailed(prefill, 502, ErrorDetail(message=message, type="http_error", code="http"), again=False)
