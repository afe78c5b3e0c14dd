"""``kv_connector_extra_config``: names and bounds are checked, what is unknown is refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

from kvbaton.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """How a worker opens its manager.

    Args:
        host: IP address where the control links of a prefill rank listen; ``advertise``: the one that decode dials,
            where that is another.
        port: the port of rank 0 of data-parallel rank 0, the others follow it; 0: any.
        backend: the data plane.
        secret_file: file with the secret that all ranks share; needed beyond loopback.
        weights: names the weights, for example their revision. vLLM does not tell them apart; equal on both sides.
        quarantine: answer for a request at once when its room has failed, and keep its blocks aside until no write
            can touch them; without it the request waits for that too.
        settings: every other key, by the names of :class:`kvbaton.Settings`. ``bootstrap_timeout`` is how long prefill
            keeps a finished prompt for decode.
    """

    host: str = "127.0.0.1"
    port: int = 0
    advertise: str = ""
    backend: str = "nixl"
    secret_file: str = ""
    weights: str = ""
    quarantine: bool = True
    settings: Mapping[str, object] = field(default_factory=dict)

    @classmethod
    def from_mapping(cls, values: Mapping[str, object]) -> Options:
        """Raises ConfigError for a key that is unknown or a value that cannot be."""
        from kvbaton import Settings

        known = {f.name: f for f in fields(cls) if f.name != "settings"}
        own: dict[str, object] = {}
        settings: dict[str, object] = {}
        for name, value in values.items():
            (own if name in known else settings)[name] = value
        for name, value in own.items():
            kind = {"str": str, "int": int, "bool": bool}[str(known[name].type)]
            if type(value) is not kind:
                raise ConfigError(f"kv_connector_extra_config: {name}={value!r} must be of type {kind.__name__}")
        try:
            Settings.from_mapping(settings)
        except ConfigError as error:
            raise ConfigError(
                f"kv_connector_extra_config: {error.message}", hint=f"or one of: {', '.join(known)}"
            ) from None
        options = cls(**own, settings=settings)  # type: ignore[arg-type]
        if not 0 <= options.port < 1 << 16:
            raise ConfigError(f"kv_connector_extra_config: port={options.port} must be from 0 to 65535")
        return options

    def secret(self) -> str | None:
        """The shared secret, if there is one. Raises ConfigError where the file cannot be read."""
        if not self.secret_file:
            return None
        from kvbaton.discovery.access import read_secret

        return read_secret(Path(self.secret_file))
