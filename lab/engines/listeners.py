"""Where the servers of an engine listen beyond loopback, beside what the engine opens there by itself."""

from __future__ import annotations

from lab.engines.server import EngineServer


def compared(plain: EngineServer, *servers: EngineServer) -> str:
    """``plain`` is the engine alone. Raises AssertionError for a server that listens beyond loopback at more places."""
    own = plain.beyond_loopback()
    alone = f"the engine by itself at {', '.join(own) or 'none'}"
    for server in servers:
        found = server.beyond_loopback()
        if len(found) > len(own):
            raise AssertionError(f"{server.name} listens beyond loopback at {', '.join(found)}; {alone}")
    return f"nothing of ours beyond loopback; {alone}"
