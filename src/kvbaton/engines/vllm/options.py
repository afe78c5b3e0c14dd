"""``kv_connector_extra_config``: what an operator may say to the connector."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvbaton.discovery.access import is_loopback
from kvbaton.engines.options import RankOptions

EVERY_INTERFACE = ("0.0.0.0", "::")


@dataclass(frozen=True, kw_only=True)
class Options(RankOptions):
    """How a worker opens its manager; the first rank is rank 0 of data-parallel rank 0.

    Args:
        host: IP address where the control links of a prefill rank listen; ``advertise``: the one that decode dials,
            where that is another.
        quarantine: answer for a request at once when its room has failed, and keep its blocks aside until no write
            can touch them; without it the request waits for that too.

    ``bootstrap_timeout`` among the settings is how long prefill keeps a finished prompt for decode.
    """

    SOURCE: ClassVar[str] = "kv_connector_extra_config"

    host: str = "127.0.0.1"
    advertise: str = ""
    quarantine: bool = True

    def place_data_plane(self, *, receives: bool) -> None:
        """Where peers reach it. Those of a rank that ``receives`` may be anywhere, unless there is no secret or it is
        told a ``host``: every interface stays then."""
        if receives and self.secret_file and is_loopback(self.host):
            return
        self.keep_to(self.advertise if self.host in EVERY_INTERFACE else self.host)
