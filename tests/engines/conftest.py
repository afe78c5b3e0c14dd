"""Tiny models, made and loaded once per test run."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from engine_kit import LoadedModels, write_model

from kvbaton.serving.engine.model import LoadedModel
from lab.conformance.families import FAMILIES


@pytest.fixture(scope="session")
def model_directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {family: write_model(family, root / family) for family in FAMILIES}


@pytest.fixture(scope="session")
def loaded_models(model_directories: dict[str, Path]) -> LoadedModels:
    return LoadedModels(model_directories)


@pytest.fixture(params=["llama", "qwen3"])
def any_model(request: pytest.FixtureRequest, loaded_models: LoadedModels) -> LoadedModel:
    """Once with each of two dense families."""
    return loaded_models[request.param]


@pytest.fixture(params=sorted(FAMILIES))
def each_family(request: pytest.FixtureRequest, loaded_models: LoadedModels) -> LoadedModel:
    """Once with every family."""
    return loaded_models[request.param]


@pytest.fixture
def model(loaded_models: LoadedModels) -> LoadedModel:
    return loaded_models["qwen3"]


@pytest.fixture(autouse=True)
def no_leaked_schedulers() -> Iterator[None]:
    yield
    leaked = [thread.name for thread in threading.enumerate() if thread.name.startswith("kvbaton-")]
    assert not leaked, f"threads outlive the test: {leaked}"
