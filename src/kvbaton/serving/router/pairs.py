"""Which prefill and decode servers can hand over to each other, found out before a request is sent to them.

Rules:

- A pair counts once its check has passed: decode finds prefill's group in its registry (port, allow-list, secret), and
  the memory of the two fits (model, weights, tokenizer, element type, sizes), field by field.
- A verdict holds for two processes: one that was started again is checked again. A bad verdict is looked at again from
  time to time, since a registry or an allow-list may have been mended.
- The first bad verdict is one warning, the same again is counted, and its end is told with the count.
- A server that does not say which process it is cannot be checked, and is taken for what it was given as.

This file must not know of rooms, requests or whose turn it is.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import aiohttp
import msgspec

from kvbaton.discovery.client import cause_of
from kvbaton.errors import KVBatonError
from kvbaton.plan.groups import compare_groups
from kvbaton.plan.layout_file import MAX_LAYOUT_BYTES, RankLayout, decode
from kvbaton.serving.router.bounded import bounded
from kvbaton.serving.router.credentials import Credentials
from kvbaton.serving.router.worker import Worker
from kvbaton.serving.server.openapi import LAYOUT_PATH
from kvbaton.serving.server.routing import PAIR_PATH

#: Limit of one question of a check; a registry is asked behind one of them.
CHECK_SECONDS = 10.0
#: A bad verdict is this old before it is looked at again.
RECHECK_SECONDS = 5.0
MAX_ANSWER_BYTES = 4 << 20
UNCHECKED = "it is being checked whether the two can hand over"
_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Verdict:
    """Of two processes. ``trouble``: why they do not hand over; ``count``: how often that was found."""

    instances: tuple[str, str]
    trouble: str
    at: float
    count: int = 1


class Pairs:
    """The verdicts of one router."""

    def __init__(self, session: aiohttp.ClientSession, as_router: Credentials, as_operator: Credentials) -> None:
        self._session = session
        self._as_router = as_router
        self._as_operator = as_operator
        self._verdicts: dict[tuple[Worker, Worker], _Verdict] = {}

    def trouble(self, prefill: Worker, decode: Worker) -> str:
        """Why these two are not to be used together; empty where they are."""
        if not (prefill.instance and decode.instance):
            return ""
        verdict = self._verdicts.get((prefill, decode))
        if verdict is None or verdict.instances != (prefill.instance, decode.instance):
            return UNCHECKED
        return verdict.trouble

    async def check(self, prefills: Sequence[Worker], decodes: Sequence[Worker]) -> None:
        """Check the pairs of these workers whose verdict is due."""
        now = time.monotonic()
        due = [(prefill, decode) for prefill in prefills for decode in decodes if self._is_due(prefill, decode, now)]
        if due:
            layouts = await self._layouts({worker for pair in due for worker in pair})
            await asyncio.gather(*(self._check(prefill, decode, layouts) for prefill, decode in due))

    def forget(self, worker: Worker) -> None:
        """It is no worker of ours any more."""
        self._verdicts = {pair: verdict for pair, verdict in self._verdicts.items() if worker not in pair}

    def _is_due(self, prefill: Worker, decode: Worker, now: float) -> bool:
        trouble = self.trouble(prefill, decode)
        return trouble == UNCHECKED or (bool(trouble) and now - self._verdicts[prefill, decode].at >= RECHECK_SECONDS)

    async def _check(
        self, prefill: Worker, decode: Worker, layouts: Mapping[Worker, tuple[RankLayout, ...] | str]
    ) -> None:
        instances = prefill.instance, decode.instance
        trouble = _length_trouble(prefill, decode) or await self._registry_trouble(prefill, decode)
        ours, theirs = layouts[prefill], layouts[decode]
        if not trouble:
            if isinstance(ours, str) or isinstance(theirs, str):
                trouble = "; ".join(side for side in (ours, theirs) if isinstance(side, str) and side)
            else:
                found = await asyncio.to_thread(compare_groups, ours, theirs)
                more = f" (and {len(found) - 1} more: kvbaton check)" if len(found) > 1 else ""
                trouble = f"{found[0].message}{more}" if found else ""
        self._take(prefill, decode, _Verdict(instances, trouble, time.monotonic()))

    def _take(self, prefill: Worker, decode: Worker, verdict: _Verdict) -> None:
        before = self._verdicts.get((prefill, decode))
        self._verdicts[prefill, decode] = verdict
        if before is not None and before.trouble == verdict.trouble:
            verdict.count = before.count + 1
        elif verdict.trouble:
            _log.warning("%s and %s cannot hand over: %s", prefill, decode, verdict.trouble)
        elif before is not None and before.trouble:
            _log.info("%s and %s hand over; they did not at %d checks", prefill, decode, before.count)

    async def _registry_trouble(self, prefill: Worker, decode: Worker) -> str:
        query = f"?bootstrap_host={prefill.host}&bootstrap_port={prefill.bootstrap_port}"
        status, payload = await self._ask(decode, PAIR_PATH + query, self._as_router(decode))
        if status in (200, 404):  # 404: a server that cannot tell
            return ""
        return f"{decode}: {_message(payload) or f'HTTP {status}'}"

    async def _layouts(self, workers: set[Worker]) -> dict[Worker, tuple[RankLayout, ...] | str]:
        """The memory of each, or why it is not known; empty where the server has none to tell of."""

        async def ask(worker: Worker) -> tuple[RankLayout, ...] | str:
            status, payload = await self._ask(worker, LAYOUT_PATH, self._as_operator(worker), MAX_LAYOUT_BYTES)
            if status in (400, 404):
                return ""
            if status != 200:
                return f"{worker}: {_message(payload) or f'HTTP {status}'}"
            try:
                return await asyncio.to_thread(decode, payload, str(worker))
            except KVBatonError as error:
                return str(error)

        asked = list(workers)
        return dict(zip(asked, await asyncio.gather(*map(ask, asked)), strict=True))

    async def _ask(
        self, worker: Worker, path: str, headers: Mapping[str, str], most_bytes: int = MAX_ANSWER_BYTES
    ) -> tuple[int, bytes]:
        """Status and answer; status 0 and why not where there is none."""
        timeout = aiohttp.ClientTimeout(total=CHECK_SECONDS)
        try:
            async with self._session.get(
                worker.url + path, timeout=timeout, headers=headers, allow_redirects=False
            ) as response:
                return response.status, await bounded(response, most_bytes)
        except (aiohttp.ClientError, OSError) as error:
            message = f"it does not answer ({cause_of(error)})"
            return 0, msgspec.json.encode({"error": {"message": message}})


def _length_trouble(prefill: Worker, decode: Worker) -> str:
    """A request that one of them takes, the other would refuse."""
    ours, theirs = prefill.max_model_len, decode.max_model_len
    if ours == theirs or not (ours and theirs):
        return ""
    return f"max_model_len: prefill has {ours}, decode {theirs}; start both with the same model"


class _Detail(msgspec.Struct):
    message: str = ""


class _Failure(msgspec.Struct):
    error: _Detail


def _message(payload: bytes) -> str:
    try:
        return msgspec.json.decode(payload, type=_Failure).error.message
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return ""
