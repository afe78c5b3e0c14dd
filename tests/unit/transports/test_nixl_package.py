"""Which NIXL package is taken: stub packages on disk, imported as the real ones are."""

from __future__ import annotations

import importlib
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvbaton.errors import ConfigError
from kvbaton.transports import nixl_package

#: What the meta package does when it is imported: it stands in for the wheel that fits the CUDA of torch.
META = """
import importlib, sys
sys.modules["nixl._api"] = importlib.import_module("{wheel}._api")
"""

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Makes an environment without site packages and puts stub packages into it: ``install("nixl_cu13")``."""
    library = Path(sysconfig.get_paths()["stdlib"])
    monkeypatch.setattr(sys, "path", [str(tmp_path), str(library), str(library / "lib-dynload")])
    for name in [name for name in sys.modules if name.partition(".")[0] in nixl_package.PACKAGES]:
        monkeypatch.delitem(sys.modules, name)

    def put(name: str, *, init: str = "", api: str = "") -> None:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(init)
        (tmp_path / name / "_api.py").write_text(api)
        importlib.invalidate_caches()

    yield put
    for name in [name for name in sys.modules if name.partition(".")[0] in nixl_package.PACKAGES]:
        del sys.modules[name]


@pytest.mark.parametrize("wheel", ["nixl_cu12", "nixl_cu13"])
def test_the_wheel_that_is_installed_is_taken(install: Install, wheel: str) -> None:
    install(wheel)
    assert nixl_package.load().__name__ == f"{wheel}._api"


def test_with_one_wheel_the_meta_package_is_not_asked(install: Install) -> None:
    """It would import torch to learn what can be one thing only."""
    install("nixl_cu13")
    install("nixl", init="raise RuntimeError('imported')")
    assert nixl_package.load().__name__ == "nixl_cu13._api"


def test_between_two_wheels_the_meta_package_chooses(install: Install) -> None:
    install("nixl_cu12")
    install("nixl_cu13")
    install("nixl", init=META.format(wheel="nixl_cu13"))
    assert nixl_package.load().__name__ == "nixl_cu13._api"


def test_the_meta_package_alone_is_taken_too(install: Install) -> None:
    """A build from source has no other name."""
    install("nixl")
    assert nixl_package.load().__name__ == "nixl._api"


def test_where_the_meta_package_finds_nothing_the_first_wheel_that_can_be_imported_is_taken(install: Install) -> None:
    install("nixl_cu12", api="import libcudart_12_is_missing")
    install("nixl_cu13")
    install("nixl", init="raise ImportError('detected CUDA 14 but nixl-cu14 is not installed')")
    assert nixl_package.load().__name__ == "nixl_cu13._api"


@pytest.mark.usefixtures("install")
def test_without_any_the_error_says_what_to_install() -> None:
    with pytest.raises(ConfigError, match=r"NIXL is not installed: pip install 'kvbaton\[cu12\]' for CUDA 12"):
        nixl_package.load()


def test_what_is_installed_but_broken_is_named_with_its_reason(install: Install) -> None:
    install("nixl_cu12", api="raise ImportError('libucp.so.0: cannot open shared object file')")
    with pytest.raises(ConfigError, match=r"nixl_cu12: libucp\.so\.0: cannot open .*'kvbaton\[cu13\]'"):
        nixl_package.load()
