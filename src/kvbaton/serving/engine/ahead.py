"""Layers that are handed over while the next ones are computed.

Rules: what goes ahead is only in advance of the chunk, which the scheduler submits whole once it is computed; nothing
depends on it, and where it cannot be, nothing goes. A model shows its layers as a list of modules, one for each layer
of its cache; a model of any other shape is computed as before. Hooks stand for one forward pass: a batch that sends
nothing ahead pays nothing.

This file must not know of requests, sampling or transports.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from kvbaton.engines.port import Fence, Sender
from kvbaton.errors import KVBatonError
from kvbaton.manager import Span
from kvbaton.serving.engine.geometry import Geometry
from kvbaton.serving.engine.shard import RankShard

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Ahead:
    """Where the layers of a chunk go: the sender of its room, and the units that hold it."""

    sender: Sender
    spans: tuple[Span, ...]

    def layer_done(self, layer: int, ready: Fence) -> None:
        """What is wrong with it is told when the whole chunk is submitted."""
        try:
            self.sender.submit(self.spans, layers=(layer, layer + 1), last=False, ready=ready)
        except KVBatonError as error:
            logger.debug("layer %d stays behind: %s", layer, error)


def layer_modules(network: Any, geometry: Geometry, shard: RankShard) -> dict[int, Any]:
    """The modules of this rank's layers that leave something in the cache, by layer; none where they are not one for
    each layer of the model."""
    lists = (module for module in network.modules() if isinstance(module, nn.ModuleList))
    found = next((modules for modules in lists if len(modules) == geometry.layers), None)
    if found is None or len(set(map(id, found))) != len(found):
        return {}
    kept = (layer for layer in shard.layers(geometry.layers) if geometry.holds[layer].anything)
    return {layer: found[layer] for layer in kept}


@contextmanager
def watched(modules: Mapping[int, Any], done: Callable[[int], None]) -> Iterator[None]:
    """Call ``done(layer)`` as soon as each layer has been computed on this thread, inside the block. Two engines of one
    process may share the modules."""
    here = threading.get_ident()

    def computed(layer: int, *_: object) -> None:
        if threading.get_ident() == here:
            done(layer)

    hooks = [module.register_forward_hook(partial(computed, layer)) for layer, module in modules.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
