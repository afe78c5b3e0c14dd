"""What a rank's cache memory is: pools of pages or slots, as plain integers.

- :mod:`kvbaton.layout.geometry`: regions, planes, pools, layouts: the one geometry that the plan sees
- :mod:`kvbaton.layout.pools`: constructors for the paged kinds (K/V, latent, window, index keys, scales) and for aux
- :mod:`kvbaton.layout.state`: constructors for slots of recurrent state
- :mod:`kvbaton.layout.strides`: pools of tensors that an engine has made, from their strides
- :mod:`kvbaton.layout.window`: which tokens of a sliding window move
- :mod:`kvbaton.layout.coordinates`: where a rank stands in its group
- :mod:`kvbaton.layout.validation`: what a layout must not contradict

Nothing here may know sockets, torch, engines or peers.
"""

from kvbaton.layout.coordinates import Coordinates
from kvbaton.layout.geometry import (
    MAX_PLANES,
    MAX_POOLS,
    MAX_STRIDE,
    MAX_UNITS,
    NO_LAYER,
    Axis,
    CacheLayout,
    MemoryKind,
    Plane,
    Pool,
    PoolKind,
    Region,
    Staging,
)
from kvbaton.layout.pools import (
    Fusion,
    InteriorOrder,
    aux_pool,
    index_pool,
    kv_pool,
    mla_pool,
    pool_bytes,
    scale_pool,
    swa_pool,
)
from kvbaton.layout.state import Shard, StateTensor, gated_delta_net, mamba2, state_pool
from kvbaton.layout.strides import Strided, pool_of_strides
from kvbaton.layout.window import window_range

__all__ = [
    "MAX_PLANES",
    "MAX_POOLS",
    "MAX_STRIDE",
    "MAX_UNITS",
    "NO_LAYER",
    "Axis",
    "CacheLayout",
    "Coordinates",
    "Fusion",
    "InteriorOrder",
    "MemoryKind",
    "Plane",
    "Pool",
    "PoolKind",
    "Region",
    "Shard",
    "Staging",
    "StateTensor",
    "Strided",
    "aux_pool",
    "gated_delta_net",
    "index_pool",
    "kv_pool",
    "mamba2",
    "mla_pool",
    "pool_bytes",
    "pool_of_strides",
    "scale_pool",
    "state_pool",
    "swa_pool",
    "window_range",
]
