"""Which SGLang the backend was written for and run with. Its base classes are no stable interface: a version that
nobody has run is refused, not hoped for."""

from __future__ import annotations

from importlib import metadata

from kvbaton.errors import ConfigError

SUPPORTED = ("0.5.23",)


def check_version() -> None:
    """Raise ConfigError unless the SGLang that is installed is one of :data:`SUPPORTED`."""
    try:
        version = metadata.version("sglang")
    except metadata.PackageNotFoundError:
        raise ConfigError("SGLang is not installed", hint="pip install sglang") from None
    if version.split("+")[0] not in SUPPORTED:
        raise ConfigError(
            f"this transfer backend was written for SGLang {', '.join(SUPPORTED)}, found {version}",
            hint="install that version of SGLang, or a kvbaton that knows yours",
        )
