"""Tiny models, made and loaded once per test run."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from engine_kit import FAMILIES, write_model

from kvbaton.engine.model import LoadedModel, load_model


@pytest.fixture(scope="session")
def model_directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: write_model(family, tmp_path_factory.mktemp(family)) for family in FAMILIES}


@pytest.fixture(scope="session")
def loaded_models(model_directories: dict[str, Path]) -> dict[str, LoadedModel]:
    return {family: load_model(str(path), threads=1) for family, path in model_directories.items()}


@pytest.fixture(params=sorted(FAMILIES))
def any_model(request: pytest.FixtureRequest, loaded_models: dict[str, LoadedModel]) -> LoadedModel:
    """Once with each family."""
    return loaded_models[request.param]


@pytest.fixture
def model(loaded_models: dict[str, LoadedModel]) -> LoadedModel:
    return loaded_models["qwen3"]


@pytest.fixture(autouse=True)
def no_leaked_schedulers() -> Iterator[None]:
    yield
    leaked = [thread.name for thread in threading.enumerate() if thread.name.startswith("kvbaton-")]
    assert not leaked, f"threads outlive the test: {leaked}"
