"""The client of a fault cell: one request, one deadline, and an outcome that cannot be misread."""

from __future__ import annotations

import time
from dataclasses import dataclass
from io import BytesIO
from typing import Literal

import aiohttp
import msgspec

from kvbaton.serving.demo.show import JSON, Question

Kind = Literal["answer", "error", "untyped", "late"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ClientOutcome:
    """What a client got. ``error``: a typed one (``code`` and a message); ``untyped``: anything else that is no answer;
    ``late``: nothing within the deadline."""

    kind: Kind
    tokens: tuple[int, ...] = ()
    code: str = ""
    message: str = ""
    ended_at: float = 0.0

    @property
    def label(self) -> str:
        return self.code if self.kind == "error" else self.kind


async def request(http: aiohttp.ClientSession, url: str, question: Question, *, limit_seconds: float) -> ClientOutcome:
    """Ask once."""
    timeout = aiohttp.ClientTimeout(total=limit_seconds)
    body = BytesIO(msgspec.json.encode(question.body()))
    try:
        async with http.post(f"{url}/v1/completions", data=body, headers=JSON, timeout=timeout) as response:
            payload = await response.read()
    except TimeoutError:
        return ClientOutcome(kind="late", message=f"no answer within {limit_seconds:g} s", ended_at=time.monotonic())
    except (aiohttp.ClientError, OSError) as error:
        return ClientOutcome(kind="untyped", message=repr(error), ended_at=time.monotonic())
    return _read(response.status, payload)


def _read(status: int, payload: bytes) -> ClientOutcome:
    now = time.monotonic()
    try:
        answer = msgspec.json.decode(payload, type=dict[str, msgspec.Raw])
        if status == 200:
            choices = msgspec.json.decode(answer["choices"], type=list[dict[str, msgspec.Raw]])
            tokens = msgspec.json.decode(choices[0]["token_ids"], type=tuple[int, ...])
            return ClientOutcome(kind="answer", tokens=tokens, ended_at=now)
        error = msgspec.json.decode(answer["error"], type=dict[str, str | None])
        code, message = error["code"] or "", error["message"] or ""
    except (msgspec.MsgspecError, KeyError, IndexError) as error:
        return ClientOutcome(kind="untyped", message=f"HTTP {status}: {error}: {payload[:200]!r}", ended_at=now)
    typed = bool(code and message) and code not in ("http", "internal", "error")
    return ClientOutcome(kind="error" if typed else "untyped", code=code, message=message, ended_at=now)
