"""What an operator may say to an adapter: its own options and the facade's settings in one mapping, all by name.

Names and bounds are checked, what is unknown is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import ClassVar, Self

from kvbaton.errors import ConfigError
from kvbaton.transports.interfaces import restrict

LOCALHOST = "127.0.0.1"
_KINDS: dict[str, type] = {"str": str, "int": int, "bool": bool}


@dataclass(frozen=True, kw_only=True)
class RankOptions:
    """How one rank of an engine opens its manager.

    Args:
        port: where the control links of the first prefill rank listen, the others follow it; 0: any.
        backend: the data plane.
        secret_file: file with the secret that all ranks share; needed beyond loopback.
        weights: names the weights, for example their revision. Configurations are compared, weights are not told
            apart; equal on both sides.
        settings: every other key, by the names of :class:`kvbaton.Settings`.
    """

    #: What the operator calls the mapping, for messages.
    SOURCE: ClassVar[str]

    port: int = 0
    backend: str = "nixl"
    secret_file: str = ""
    weights: str = ""
    settings: Mapping[str, object] = field(default_factory=dict)

    @classmethod
    def from_mapping(cls, values: Mapping[str, object]) -> Self:
        """Raises ConfigError for a key that is unknown or a value that cannot be."""
        from kvbaton.protocol.settings import Settings

        known = {f.name: f for f in fields(cls) if f.name != "settings"}
        own: dict[str, object] = {}
        settings: dict[str, object] = {}
        for name, value in values.items():
            (own if name in known else settings)[name] = value
        for name, value in own.items():
            kind = _KINDS[str(known[name].type)]
            if type(value) is not kind:
                raise ConfigError(f"{cls.SOURCE}: {name}={value!r} must be of type {kind.__name__}")
        try:
            Settings.from_mapping(settings)
        except ConfigError as error:
            raise ConfigError(f"{cls.SOURCE}: {error.message}", hint=f"or one of: {', '.join(known)}") from None
        options = cls(**own, settings=settings)  # type: ignore[arg-type]
        options.check()
        return options

    def check(self) -> None:
        """Raises ConfigError for a number out of its bounds."""
        if not 0 <= self.port < 1 << 16:
            raise ConfigError(f"{self.SOURCE}: port={self.port} must be from 0 to 65535")

    def keep_to(self, address: str) -> None:
        """Have the data plane use the interface of ``address`` alone; where there is no secret loopback's, for all
        peers are on this machine then. To be called before the first manager is opened."""
        if self.backend == "nixl":
            restrict([address if self.secret_file else LOCALHOST])

    def secret(self) -> str | None:
        """The shared secret, if there is one. Raises ConfigError where the file cannot be read."""
        if not self.secret_file:
            return None
        from kvbaton.discovery.access import read_secret

        return read_secret(Path(self.secret_file))
