"""Which NIXL is installed. The only file that names its packages.

NIXL is published as one wheel per CUDA version, ``nixl-cu12`` and ``nixl-cu13``, which have the same interface and
import without CUDA, and as the meta package ``nixl``, which requires both and takes the one that fits torch's CUDA. A
build from source is called ``nixl`` alone.
"""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

from kvbaton.errors import ConfigError

WHEELS = ("nixl_cu12", "nixl_cu13")
META = "nixl"
PACKAGES = (*WHEELS, META)


def load() -> ModuleType:
    """The interface (``_api``) of the NIXL that is installed.

    A wheel that is alone is taken. Otherwise the meta package chooses: it may import torch for that.

    Raises ConfigError, with what to install, where there is none or none can be imported.
    """
    wheels = [name for name in WHEELS if importlib.util.find_spec(name) is not None]
    reasons = []
    for name in wheels if len(wheels) == 1 else (META, *wheels):
        try:
            importlib.import_module(name)  # the meta package puts the wheel's interface in place of its own
            return importlib.import_module(f"{name}._api")
        except ImportError as error:
            if not (isinstance(error, ModuleNotFoundError) and error.name == name):
                reasons.append(f"{name}: {error}")
    what = f"NIXL cannot be imported ({'; '.join(reasons)})" if reasons else "NIXL is not installed"
    raise ConfigError(f"{what}: pip install 'kvbaton[cu12]' for CUDA 12, 'kvbaton[cu13]' for CUDA 13")
