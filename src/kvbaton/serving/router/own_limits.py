"""What this process has too little of: file descriptors, ports, memory for sockets. No worker is to blame for that.

This file must not know of requests.
"""

from __future__ import annotations

import errno
import resource

import aiohttp

#: Of a routed request: its client's connection, one to either worker, and as much again for idle connections.
FILES_OF_A_REQUEST = 4
#: For the listening socket, probes, logs, libraries.
FILES_OF_THE_PROCESS = 64
_OURS = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EADDRNOTAVAIL)


def is_our_own(error: BaseException) -> bool:
    """Whether a connection failed for want of something that this machine should have had."""
    if isinstance(error, aiohttp.ClientConnectorError):
        error = error.os_error
    return isinstance(error, OSError) and error.errno in _OURS


def affordable_requests() -> int:
    """Most requests at a time for which this process may open enough files."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return 1 << 30
    return max(1, (soft - FILES_OF_THE_PROCESS) // FILES_OF_A_REQUEST)
