"""Which vLLM the connector was written for and run with. Its connector interface is declared experimental: a version
that nobody has run is refused, not hoped for."""

from __future__ import annotations

import importlib

from kvbaton.errors import ConfigError

SUPPORTED = ("0.32",)


def check_version() -> None:
    """Raise ConfigError unless the vLLM that is installed is one of :data:`SUPPORTED`."""
    try:
        version = str(importlib.import_module("vllm.version").__version__)
    except ModuleNotFoundError as error:
        raise ConfigError(f"vLLM cannot be imported: {error}", hint="pip install vllm") from None
    if ".".join(version.split(".")[:2]) not in SUPPORTED:
        raise ConfigError(
            f"this connector was written for vLLM {', '.join(f'{known}.x' for known in SUPPORTED)}, found {version}",
            hint="install that version of vLLM, or a kvbaton that knows yours",
        )
