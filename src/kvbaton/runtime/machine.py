"""Which machine this is: the same for all its processes and containers, another after each boot."""

from __future__ import annotations

import hashlib
from pathlib import Path

_BOOT = Path("/proc/sys/kernel/random/boot_id")


def machine() -> str:
    """A name that says nothing of the machine but whether two are one; empty where the system does not tell."""
    try:
        boot = _BOOT.read_bytes().strip()
    except OSError:
        return ""
    return hashlib.blake2b(boot, digest_size=8, person=b"kvbaton").hexdigest()
