"""What identifies weights: every bit of every tensor, however they are spread over files; remembered by file."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from kvbaton.errors import ConfigError
from kvbaton.serving.engine import weights
from kvbaton.serving.engine.weights import Hashing, Remembered, weight_files, weights_digest

RANDOM = np.random.default_rng(7)
TENSORS = {
    "embed": RANDOM.standard_normal((64, 16)).astype(np.float32),
    "layers.0.v_proj": RANDOM.standard_normal((16, 16)).astype(np.float16),
    "layers.1.v_proj": RANDOM.standard_normal((16, 16)).astype(np.float16),
    "scale": np.array(3.0, np.float32),
}


@pytest.fixture(autouse=True)
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    directory = tmp_path / "checkpoint"
    directory.mkdir()
    save_file(TENSORS, directory / "model.safetensors", {"format": "pt"})
    return directory


def age(directory: Path) -> None:
    """As if nobody had touched it for a while: what is remembered must be older than the resolution of times."""
    for file in directory.iterdir():
        os.utime(file, (1, 1))


@given(st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_one_flipped_bit_of_any_tensor_is_another_model(checkpoint: Path, data: st.DataObject) -> None:
    file = checkpoint / "model.safetensors"
    save_file(TENSORS, file, {"format": "pt"})
    before = weights_digest(checkpoint)
    content = bytearray(file.read_bytes())
    base = 8 + int.from_bytes(content[:8], "little")
    bit = data.draw(st.integers(0, 8 * (len(content) - base) - 1))
    content[base + bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)
    assert weights_digest(checkpoint) != before


def test_the_same_tensors_in_other_files_are_the_same_model(checkpoint: Path, tmp_path: Path) -> None:
    spread = tmp_path / "spread"
    spread.mkdir()
    names = list(TENSORS)
    for number, part in enumerate((names[3:], names[:1], names[1:3])):
        save_file({name: TENSORS[name] for name in part}, spread / f"model-{number}.safetensors")
    assert weights_digest(spread) == weights_digest(checkpoint)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t | {"scale": t["scale"].reshape(1)},
        lambda t: t | {"layers.0.v_proj": t["layers.0.v_proj"].view(np.int16)},
        lambda t: t | {"layers.0.v_proj": t["layers.1.v_proj"], "layers.1.v_proj": t["layers.0.v_proj"]},
        lambda t: {name: tensor for name, tensor in t.items() if name != "scale"},
    ],
    ids=["shape", "dtype", "swapped", "missing"],
)
def test_name_dtype_and_shape_count(
    checkpoint: Path, change: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]
) -> None:
    before = weights_digest(checkpoint)
    save_file(change(dict(TENSORS)), checkpoint / "model.safetensors")
    assert weights_digest(checkpoint) != before


def test_only_what_is_loaded_counts(checkpoint: Path) -> None:
    before = weights_digest(checkpoint)
    save_file(TENSORS, checkpoint / "consolidated.safetensors")
    assert weights_digest(checkpoint) == before
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "model.safetensors.index.json").write_text('{"weight_map": {"embed": "consolidated.safetensors"}}')
    assert weight_files(checkpoint) == [checkpoint / "consolidated.safetensors"]
    assert weights_digest(checkpoint) == before


def test_what_was_hashed_is_remembered_until_the_file_changes(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "SETTLED_SECONDS", -100.0)
    hashed: list[Path] = []
    real = Hashing.digests
    monkeypatch.setattr(Hashing, "digests", lambda hashing, file: hashed.append(file) or real(hashing, file))
    first = weights_digest(checkpoint)
    assert weights_digest(checkpoint) == first
    assert len(hashed) == 1
    file = checkpoint / "model.safetensors"
    times = file.stat()
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))  # as some copying tools do
    assert weights_digest(checkpoint) != first
    assert len(hashed) == 2
    shutil.copy(file, checkpoint / "again")
    (checkpoint / "again").replace(file)
    weights_digest(checkpoint)
    assert len(hashed) == 3


def test_a_file_that_may_just_be_changing_is_not_remembered(checkpoint: Path) -> None:
    weights_digest(checkpoint)
    assert Remembered.load().of(checkpoint / "model.safetensors") is None


def test_what_is_remembered_may_be_damaged_or_impossible(
    checkpoint: Path, cache_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "SETTLED_SECONDS", -100.0)
    first = weights_digest(checkpoint)
    Remembered.file().write_bytes(b"no msgpack")
    assert weights_digest(checkpoint) == first
    shutil.rmtree(cache_home)
    cache_home.write_text("in the way")
    assert weights_digest(checkpoint) == first


@pytest.mark.parametrize(
    "content",
    [b"", b"123", (1 << 40).to_bytes(8, "little") + b"{}", (2).to_bytes(8, "little") + b"[]"],
    ids=["empty", "short", "long header", "no object"],
)
def test_a_file_that_is_none_is_named(checkpoint: Path, content: bytes) -> None:
    (checkpoint / "model.safetensors").write_bytes(content)
    with pytest.raises(ConfigError, match=r"model\.safetensors is .*fetch the checkpoint again"):
        weights_digest(checkpoint)


def test_a_tensor_outside_of_its_file_is_named(checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ConfigError, match="lies outside of it"):
        weights_digest(checkpoint)


def test_other_formats_are_hashed_whole(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"a" * 1000)
    before = weights_digest(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"a" * 500 + b"b" + b"a" * 499)
    assert weights_digest(tmp_path) != before
