"""The smallest router in front of two vLLM servers with KVBatonConnector: one file, both flows.

Run: python examples/vllm_router.py PREFILL_URL DECODE_URL [--port 8000] [--flow sequential | concurrent]

Sequential, prefill answers before decode is asked. Concurrent, the router mints a room and asks both at once, so that
chunks of the prompt travel while the next ones are computed; decode then needs the addresses of prefill's ranks, which
the first answer of prefill has told. Prefill is asked for one token and one answer, whatever the client wants.
"""

from __future__ import annotations

import argparse
import asyncio
import secrets
from typing import Any, Literal

import aiohttp
from aiohttp import web

Flow = Literal["sequential", "concurrent"]


class VllmRouter:
    def __init__(self, prefill: str, decode: str, flow: Flow) -> None:
        self.prefill, self.decode, self.flow = prefill.rstrip("/"), decode.rstrip("/"), flow
        self.sources: list[str] = []  # addresses of prefill's ranks

    async def ask_prefill(self, session: aiohttp.ClientSession, path: str, body: dict[str, Any], room: str) -> Any:
        """Prefill's ``kv_transfer_params``; none where the prompt is too short to be handed over."""
        params = {"do_remote_decode": True, **({"kvbaton_room": room} if room else {})}
        asked = {**body, "max_tokens": 1, "n": 1, "stream": False, "kv_transfer_params": params}
        asked.pop("stream_options", None)
        if "max_completion_tokens" in asked:
            asked["max_completion_tokens"] = 1
        async with session.post(self.prefill + path, json=asked) as answer:
            answer.raise_for_status()
            found = (await answer.json()).get("kv_transfer_params") or {}
        self.sources = found.get("kvbaton_sources", self.sources)
        return found

    async def handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=600)) as session:
            if self.flow == "concurrent" and self.sources:
                room = str(secrets.randbelow((1 << 53) - 1) + 1)
                params = {"do_remote_prefill": True, "kvbaton_room": room, "kvbaton_sources": self.sources}
                prefill = asyncio.create_task(self.ask_prefill(session, request.path, body, room))
                try:
                    return await self.stream(session, request, {**body, "kv_transfer_params": params})
                finally:
                    await asyncio.gather(prefill, return_exceptions=True)
            params = await self.ask_prefill(session, request.path, body, "")
            return await self.stream(session, request, {**body, **({"kv_transfer_params": params} if params else {})})

    async def stream(
        self, session: aiohttp.ClientSession, request: web.Request, body: dict[str, Any]
    ) -> web.StreamResponse:
        """Decode's answer, as it comes."""
        async with session.post(self.decode + request.path, json=body) as answer:
            response = web.StreamResponse(status=answer.status, headers={"Content-Type": answer.content_type})
            await response.prepare(request)
            async for piece in answer.content.iter_any():
                await response.write(piece)
            await response.write_eof()
            return response

    def app(self) -> web.Application:
        app = web.Application(client_max_size=64 << 20)
        app.router.add_post("/v1/completions", self.handle)
        app.router.add_post("/v1/chat/completions", self.handle)
        return app


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("prefill")
    parser.add_argument("decode")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--flow", choices=("sequential", "concurrent"), default="sequential")
    options = parser.parse_args()
    router = VllmRouter(options.prefill, options.decode, options.flow)
    web.run_app(router.app(), host="127.0.0.1", port=options.port)


if __name__ == "__main__":
    main()
