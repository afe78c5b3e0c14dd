"""What a bare machine with torch lacks, as wheels in a folder: fetched here, without the storage plug-ins of NIXL.

A machine that has a GPU to lend often has no network; the wheels travel with the checkout and are installed by
``tools/gpu_check``. The whole stays under 64 MiB.
"""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

from kvbaton.errors import ConfigError

#: For CPython 3.12, CUDA 13. transformers: newer than what the engine needs at least.
PACKAGES = ("nixl-cu13==1.5.1", "msgspec", "pyzmq", "transformers>=5.23,<6", "rich", "prometheus-client")
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64", "any")
#: Parts of NIXL that move nothing between two processes: storage, expert parallelism, etcd, tools.
LEFT_OUT = (
    "nixl_ep_",
    "ucx_perftest",
    ".scripts/",
    "GPUNETIO",
    "INFINIA",
    "GUSLI",
    "LIBFABRIC",
    "plugin_OBJ",
    "plugin_AZURE",
    "plugin_HF3FS",
    "plugin_GDS",
    "libazure",
    "libaws",
    "libgusli",
)
MOST_BYTES = 60 << 20


def pack(folder: Path) -> int:
    """Fill ``folder`` with wheels; their bytes. Raises ConfigError where the index does not give them."""
    folder.mkdir(parents=True, exist_ok=True)
    for wheel in folder.glob("*.whl"):
        wheel.unlink()
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version", "3.12", "--implementation", "cp", "--dest", str(folder)]
    command += [f"--abi={abi}" for abi in ("cp312", "abi3", "none")]
    command += [f"--platform={platform}" for platform in PLATFORMS]
    for package in PACKAGES:
        if subprocess.run([*command, package], check=False).returncode:
            raise ConfigError(f"pip cannot fetch {package} for CPython 3.12 on x86-64 Linux")
    for wheel in folder.glob("nixl_cu13-*.whl"):
        _repack(wheel)
    size = sum(wheel.stat().st_size for wheel in folder.glob("*.whl"))
    if size > MOST_BYTES:
        raise ConfigError(f"the wheels have {size:,} bytes, more than {MOST_BYTES:,}")
    return size


def _repack(wheel: Path) -> None:
    smaller = wheel.with_suffix(".smaller")
    with (
        zipfile.ZipFile(wheel) as whole,
        zipfile.ZipFile(smaller, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as part,
    ):
        for item in whole.infolist():
            if not any(word in item.filename for word in LEFT_OUT):
                part.writestr(item, whole.read(item))
    smaller.replace(wheel)
