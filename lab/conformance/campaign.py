"""All cells, family by family: checkpoints made, servers started, cells run one after the other, everything ended."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from kvbaton.errors import ConfigError, KVBatonError
from lab.conformance.cells import TOPOLOGIES, Cell, CellJudge, PairTopology
from lab.conformance.families import FAMILIES, write_model
from lab.conformance.servers import Servers, Zygote
from lab.conformance.shape import Shape

#: What the default tests run: every kind of pool, several writers, shared heads, a stage, unequal pages, a prefix,
#: staging, data parallelism.
QUICK: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("llama", ("TP 4→2, more ranks than KV heads",)),
    ("gpt_oss", ("PP 2→1", "DP 2→2, TP 2→1, prefill chooses")),
    ("deepseek_v32", ("page 16→64", "prefix hit none", "prefix hit full")),
    ("qwen3_next", ("TP 2→1, layer by layer", "TP 2→1, staged")),
)
SINGLE = Shape()

Plan = Sequence[tuple[str, Sequence[PairTopology]]]


def choose(families: Sequence[str], topologies: Sequence[str], *, quick: bool) -> Plan:
    """The cells asked for; all where nothing is named. Raises ConfigError for an unknown name."""
    known = {topology.name: topology for topology in TOPOLOGIES}
    wrong = [name for name in families if name not in FAMILIES] + [name for name in topologies if name not in known]
    if wrong:
        raise ConfigError(f"{wrong[0]!r} is neither a family ({', '.join(FAMILIES)}) nor one of {', '.join(known)}")
    if quick:
        return [(family, [known[name] for name in names]) for family, names in QUICK]
    chosen = [known[name] for name in topologies] or list(TOPOLOGIES)
    return [(family, chosen) for family in families or FAMILIES]


async def run(plan: Plan, directory: Path, told: Callable[[Cell], None]) -> list[Cell]:
    """Run every cell of ``plan`` with checkpoints and logs in ``directory``; ``told`` hears of each as it ends."""
    cells: list[Cell] = []
    async with Zygote() as zygote:
        for family, topologies in plan:
            for kv_heads in _variants(family, topologies):
                async with Servers(zygote, directory) as servers:
                    of_variant = [t for t in topologies if _variant(family, t) == kv_heads]
                    for cell in await _family(family, kv_heads, of_variant, servers, directory, told):
                        cells.append(cell)
    order = [(family, topology.name) for family, topologies in plan for topology in topologies]
    return sorted(cells, key=lambda cell: order.index((cell.family, cell.topology)))


async def _family(
    family: str,
    kv_heads: int | None,
    topologies: Sequence[PairTopology],
    servers: Servers,
    directory: Path,
    told: Callable[[Cell], None],
) -> list[Cell]:
    """The cells of one checkpoint."""
    name = family if kv_heads is None else f"{family}-kv{kv_heads}"
    model = directory / name
    started = time.monotonic()
    cells = []
    try:
        await asyncio.to_thread(write_model, family, model, kv_heads=kv_heads)
        await servers.start([SINGLE, *(shape for t in topologies for shape in (t.source, t.target))], model)
        judge = CellJudge(family, servers, servers.server(SINGLE, model))
    except (KVBatonError, OSError, ValueError) as error:
        seconds = round(time.monotonic() - started, 3)
        cells = [
            Cell(family=family, topology=t.name, equal=False, seconds=seconds, reason=f"not started: {error}")
            for t in topologies
        ]
        for cell in cells:
            told(cell)
        return cells
    for topology in topologies:
        try:
            source, target = servers.server(topology.source, model), servers.server(topology.target, model)
        except KVBatonError as error:
            cell = Cell(family=family, topology=topology.name, equal=False, seconds=0.0, reason=str(error))
        else:
            cell = await judge.run(topology, source, target)
        told(cell)
        cells.append(cell)
    return cells


def _variant(family: str, topology: PairTopology) -> int | None:
    """The number of KV heads that a family's checkpoint must have for a topology, None for its own."""
    own = FAMILIES[family][1].get("num_key_value_heads", 1)
    latent = "kv_lora_rank" in FAMILIES[family][1]
    if topology.kv_heads is None or latent or own <= topology.kv_heads:
        return None
    return topology.kv_heads


def _variants(family: str, topologies: Sequence[PairTopology]) -> list[int | None]:
    return list(dict.fromkeys(_variant(family, topology) for topology in topologies))
