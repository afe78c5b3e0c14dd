"""A virtual environment of its own with SGLang on a CPU and this kvbaton.

SGLang asks for the CUDA builds of its kernels and of torchvision. Neither is called for the models here: a stub of
``sgl_kernel`` raises when it is, and torchvision skips what its CPU-less build cannot load.
"""

from __future__ import annotations

from pathlib import Path

from lab.engines.environment import made, pip

SGLANG = "0.5.23"
TORCH = "torch==2.13.0"
ROUTER = "sglang-router==0.3.2"
ROOT = Path(__file__).parents[2]
PINNED = Path(__file__).parent / "requirements.txt"
#: Not in the file of pinned packages: what pulls CUDA, were its dependencies installed.
BARE = (f"sglang=={SGLANG}", "triton==3.9.0", "nixl==1.5.1", "nixl-cu12==1.5.1", "torchvision==0.28.0", ROUTER)
_STUB = '''"""Stands in for SGLang's kernels: every name is there, calling it raises."""


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*args, **kwargs):
        raise NotImplementedError(f"sgl_kernel.{name} is not installed")

    return missing
'''


def prepare(directory: Path) -> Path:
    """The interpreter of the environment in ``directory``, made unless it is there. Raises ConfigError."""
    return made(directory, (Path(__file__), PINNED), _install)


def _install(python: Path, packages: Path) -> None:
    pip(python, "install", "--no-deps", TORCH)
    pip(python, "install", "--no-deps", "--requirement", str(PINNED))
    pip(python, "install", "--no-deps", *BARE)
    pip(python, "install", "--no-deps", "--editable", str(ROOT))
    patch(packages)


def patch(packages: Path) -> None:
    """Let SGLang be imported without a GPU."""
    stub = packages / "sgl_kernel"
    stub.mkdir(exist_ok=True)
    for module in ("__init__", "mamba"):
        (stub / f"{module}.py").write_text(_STUB)
    vision = packages / "torchvision" / "__init__.py"
    vision.write_text(vision.read_text().replace("    _meta_registrations,\n", ""))
