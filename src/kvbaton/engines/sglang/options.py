"""The environment variable ``KVBATON_SGLANG``: a JSON object. SGLang has no flag that a backend could read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import msgspec

from kvbaton.engines.options import RankOptions
from kvbaton.errors import ConfigError

VARIABLE = "KVBATON_SGLANG"


@dataclass(frozen=True, kw_only=True)
class Options(RankOptions):
    """How a scheduler's rank opens its manager.

    Args:
        host: IP address at which this side is reached: the data plane uses its interface, the control links of a
            prefill rank listen there. Empty: 127.0.0.1 where SGLang's ``--host`` is loopback, otherwise the address
            that SGLang finds for this machine.
        staging_mib: memory through which small pieces travel together where tensor-parallel sizes differ, in MiB, on
            the device of the pages; 0: none.

    The deadlines among the settings are SGLang's own unless they are given here.
    """

    SOURCE: ClassVar[str] = VARIABLE

    host: str = ""
    staging_mib: int = 64

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Options:
        """Raises ConfigError."""
        text = environment.get(VARIABLE, "")
        try:
            values = msgspec.json.decode(text, type=dict[str, object]) if text else {}
        except msgspec.MsgspecError as error:
            raise ConfigError(f"{VARIABLE} is no JSON object: {error}") from None
        return cls.from_mapping(values)

    def check(self) -> None:
        super().check()
        if self.staging_mib < 0:
            raise ConfigError(f"{VARIABLE}: staging_mib={self.staging_mib} must not be negative")
