"""The environment variable ``KVBATON_SGLANG``: a JSON object. SGLang has no flag that a backend could read.

Names and bounds are checked, what is unknown is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

import msgspec

from kvbaton.errors import ConfigError

VARIABLE = "KVBATON_SGLANG"


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """How a scheduler's rank opens its manager.

    Args:
        host: IP address where the control links of a prefill rank listen; empty: 127.0.0.1 where SGLang's ``--host`` is
            loopback, otherwise the address that SGLang finds for this machine.
        port: the port of the first rank, the others follow it; 0: any.
        backend: the data plane.
        secret_file: file with the secret that all ranks share; needed beyond loopback.
        weights: names the weights, for example their revision. Configurations are compared, weights are not told apart;
            equal on both sides.
        staging_mib: memory through which small pieces travel together where tensor-parallel sizes differ, in MiB, on
            the device of the pages; 0: none.
        settings: every other key, by the names of :class:`kvbaton.Settings`. The deadlines are SGLang's own unless they
            are given here.
    """

    host: str = ""
    port: int = 0
    backend: str = "nixl"
    secret_file: str = ""
    weights: str = ""
    staging_mib: int = 64
    settings: Mapping[str, object] = field(default_factory=dict)

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Options:
        """Raises ConfigError."""
        text = environment.get(VARIABLE, "")
        try:
            values = msgspec.json.decode(text, type=dict[str, object]) if text else {}
        except msgspec.MsgspecError as error:
            raise ConfigError(f"{VARIABLE} is no JSON object: {error}") from None
        return cls.from_mapping(values)

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
            kind = {"str": str, "int": int}[str(known[name].type)]
            if type(value) is not kind:
                raise ConfigError(f"{VARIABLE}: {name}={value!r} must be of type {kind.__name__}")
        try:
            Settings.from_mapping(settings)
        except ConfigError as error:
            raise ConfigError(f"{VARIABLE}: {error.message}", hint=f"or one of: {', '.join(known)}") from None
        options = cls(**own, settings=settings)  # type: ignore[arg-type]
        if not 0 <= options.port < 1 << 16:
            raise ConfigError(f"{VARIABLE}: port={options.port} must be from 0 to 65535")
        if options.staging_mib < 0:
            raise ConfigError(f"{VARIABLE}: staging_mib={options.staging_mib} must not be negative")
        return options

    def secret(self) -> str | None:
        """The shared secret, if there is one. Raises ConfigError where the file cannot be read."""
        if not self.secret_file:
            return None
        from kvbaton.discovery.access import read_secret

        return read_secret(Path(self.secret_file))
