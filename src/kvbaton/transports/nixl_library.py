"""NIXL as a library: imported once in a process, its log, and its exceptions as ours."""

from __future__ import annotations

import logging
import os
from contextlib import ExitStack
from types import ModuleType
from typing import Any

from kvbaton.errors import DisconnectedError, TransportError
from kvbaton.transports import nixl_package
from kvbaton.transports.ucxlog import UcxLog


class NixlLibrary:
    """See the module."""

    def __init__(self) -> None:
        self.log = UcxLog()
        with ExitStack() as failed:
            failed.callback(self.log.close)
            self.api = self._import()
            failed.pop_all()
        bindings: ModuleType = self.api.nixlBind
        raised: list[type[Exception]] = [
            kind for kind in vars(bindings).values() if isinstance(kind, type) and issubclass(kind, Exception)
        ]
        self.errors: tuple[type[Exception], ...] = (*raised, RuntimeError, ValueError, TypeError, LookupError)
        self._gone = (bindings.nixlRemoteDisconnectError,)
        self._no_table = (bindings.nixlNotFoundError,)

    @staticmethod
    def _import() -> Any:
        raise_exceptions = logging.raiseExceptions
        api = nixl_package.load()
        logging.raiseExceptions = raise_exceptions  # nixl turns it off for the whole process
        if "NIXL_LOG_LEVEL" not in os.environ:  # and writes INFO lines to stdout, which belongs to data
            logger = logging.getLogger("nixl")
            logger.handlers.clear()
            logger.propagate = True
            logger.setLevel(logging.WARNING)
        return api

    def is_disconnect(self, error: Exception) -> bool:
        return isinstance(error, self._gone)

    def translate(self, error: Exception, doing: str, peer: str = "") -> TransportError:
        """The one place where nixl's exceptions become ours."""
        name = type(error).__name__
        if self.is_disconnect(error):
            return DisconnectedError(f"{doing}: the peer is gone ({name})", peer=peer)
        if isinstance(error, self._no_table):
            return TransportError(f"{doing}: memory is not registered, or the peer is not known ({name})", peer=peer)
        return TransportError(f"{doing}: {name}: {error}", peer=peer)


_library: NixlLibrary | None = None


def library() -> NixlLibrary:
    """The one of this process. Raises ConfigError where NIXL cannot be imported."""
    global _library
    if _library is None:
        _library = NixlLibrary()
    return _library
