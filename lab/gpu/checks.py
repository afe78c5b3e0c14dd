"""The checks by name, and how each is run: in a process of its own, so that a broken device ends one of them only."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import msgspec
import torch

from kvbaton.errors import KVBatonError
from kvbaton.transports import nixl_package
from lab.gpu.engine import check_engine, check_layers
from lab.gpu.kernels import check_kernels
from lab.gpu.pool import Device
from lab.gpu.transfer import check_broken_fence, check_transfer, check_unequal

#: Of all checks: what is lent for eight minutes has reported by then.
TOTAL_SECONDS = 460.0
#: Test files with tests that need a GPU.
GPU_TESTS = ("tests/unit/test_staging.py",)
#: Pages of a pool: 512 MiB, of which half are moved; for a dry run on the host 16 MiB.
PAGES: dict[Device, int] = {"cuda": 1024, "cpu": 32}


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """``seconds``: after which it is killed."""

    run: Callable[[Device], dict[str, object]]
    seconds: float


class Result(msgspec.Struct, kw_only=True, omit_defaults=True):
    check: str
    ok: bool
    seconds: float = 0.0
    figures: dict[str, object] = {}
    error: str = ""


def describe(device: Device) -> dict[str, object]:
    """What runs here."""
    nixl_package.load()
    found: dict[str, object] = {"python": platform.python_version(), "torch": str(torch.__version__), "device": device}
    for package in ("nixl-cu12", "nixl-cu13", "transformers"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if device == "cuda":
        found["gpu"] = torch.cuda.get_device_name(0)
        found["cuda"] = torch.version.cuda
    return found


def device_tests(device: Device) -> dict[str, object]:
    """The tests that are skipped where there is no GPU."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", *GPU_TESTS]
    done = subprocess.run(command, capture_output=True, check=False)
    last = done.stdout.decode(errors="replace").strip().splitlines()[-1:] or [done.stderr.decode(errors="replace")]
    if done.returncode or (device == "cuda" and "skipped" in last[0]):
        raise KVBatonError(last[0][-1000:])
    return {"pytest": last[0]}


CHECKS: dict[str, Check] = {
    "environment": Check(run=describe, seconds=60),
    "vram-to-vram": Check(run=lambda device: check_transfer(device, device, PAGES[device]), seconds=60),
    "dram-to-vram": Check(run=lambda device: check_transfer("cpu", device, PAGES[device]), seconds=60),
    "vram-to-dram": Check(run=lambda device: check_transfer(device, "cpu", PAGES[device]), seconds=60),
    "kernels": Check(run=lambda device: check_kernels(device, PAGES[device]), seconds=60),
    "unequal-tp": Check(run=lambda device: check_unequal(device, PAGES[device]), seconds=90),
    "broken-fence": Check(run=check_broken_fence, seconds=60),
    "tests": Check(run=device_tests, seconds=60),
    "engine": Check(run=check_engine, seconds=100),
    "layers": Check(run=check_layers, seconds=100),
}


def run_here(name: str, device: Device) -> Result:
    """One check, in this process."""
    start = time.perf_counter()
    try:
        figures = CHECKS[name].run(device)
    except Exception as error:  # noqa: BLE001 - torch and CUDA have no common base; the report names it
        return Result(check=name, ok=False, error=f"{type(error).__name__}: {error}")
    return Result(check=name, ok=True, seconds=time.perf_counter() - start, figures=figures)


def run_apart(names: list[str], device: Device) -> Iterator[Result]:
    """Each check in a process of its own, all within TOTAL_SECONDS."""
    end = time.monotonic() + TOTAL_SECONDS
    for name in names:
        seconds = min(CHECKS[name].seconds, end - time.monotonic())
        if seconds <= 0:
            yield Result(check=name, ok=False, error=f"not run: {TOTAL_SECONDS:g} s were over")
            continue
        command = [sys.executable, "-m", "lab", "gpu", "--device", device, "--only", name]
        try:
            done = subprocess.run(command, capture_output=True, timeout=seconds, check=False)
        except subprocess.TimeoutExpired:
            yield Result(check=name, ok=False, error=f"did not end within {seconds:g} s")
            continue
        lines = done.stdout.splitlines()
        try:
            yield msgspec.json.decode(lines[-1] if lines else b"", type=Result)
        except msgspec.DecodeError:
            errors = done.stderr.decode(errors="replace")[-1000:]
            yield Result(check=name, ok=False, error=f"ended with {done.returncode}: {errors}")
