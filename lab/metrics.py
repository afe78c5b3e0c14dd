"""What a server counts, read from its ``/metrics``."""

from __future__ import annotations

import aiohttp


async def scraped(http: aiohttp.ClientSession, url: str) -> dict[str, float]:
    """The values of the server at ``url`` by name and labels, as they stand there."""
    async with http.get(f"{url}/metrics") as response:
        lines = (await response.text()).splitlines()
    found = {}
    for line in lines:
        name, _, value = line.rpartition(" ")
        if name and not line.startswith("#"):
            found[name] = float(value)
    return found


async def summed(http: aiohttp.ClientSession, url: str) -> dict[str, float]:
    """Likewise by name, summed over labels."""
    found: dict[str, float] = {}
    for name, value in (await scraped(http, url)).items():
        bare = name.partition("{")[0]
        found[bare] = found.get(bare, 0.0) + value
    return found
