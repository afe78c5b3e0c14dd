"""Model directories that hold programs: nothing of them runs, and the error says what was refused."""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from refusals import refused

import kvbaton
from kvbaton.errors import ConfigError
from kvbaton.serving.engine.model import load_model

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_hidden_layers": 1,
    "vocab_size": 32,
}


class Payload:
    """Unpickled, it makes a directory."""

    def __init__(self, trace: Path) -> None:
        self._trace = trace

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self._trace),)


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """What exists when somebody's program has run."""
    return tmp_path / "it-has-run"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    made = tmp_path / "model"
    made.mkdir()
    (made / "config.json").write_text(json.dumps(CONFIG))
    return made


@pytest.mark.parametrize("form", ["zip", "legacy", "plain"])
def test_pickled_weights_are_refused(directory: Path, trace: Path, form: str) -> None:
    weights = directory / "pytorch_model.bin"
    if form == "plain":
        weights.write_bytes(pickle.dumps(Payload(trace)))
    else:
        torch.save({"x": Payload(trace)}, weights, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(ConfigError, match=r"model\.safetensors|safetensors") as caught:
        load_model(str(directory))
    assert "pytorch_model.bin" in str(caught.value) + str(caught.value.hint)
    assert not trace.exists()


def test_honest_pickled_weights_are_refused_too(directory: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    network = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in CONFIG.items() if k != "model_type"}))
    torch.save(network.state_dict(), directory / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="safetensors"):
        load_model(str(directory))


CODE = """
import os
os.mkdir({trace!r})
from transformers import LlamaConfig, LlamaForCausalLM
class EvilConfig(LlamaConfig):
    model_type = "evil"
class EvilModel(LlamaForCausalLM):
    config_class = EvilConfig
"""


@pytest.fixture
def with_code(directory: Path, trace: Path) -> Path:
    """A directory whose config names classes in a file of its own."""
    auto_map = {"AutoConfig": "modeling_evil.EvilConfig", "AutoModelForCausalLM": "modeling_evil.EvilModel"}
    (directory / "config.json").write_text(json.dumps({**CONFIG, "model_type": "evil", "auto_map": auto_map}))
    (directory / "modeling_evil.py").write_text(CODE.format(trace=str(trace)))
    return directory


@pytest.fixture
def yes(monkeypatch: pytest.MonkeyPatch) -> None:
    """An operator who would say yes to every question."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 8))


@pytest.mark.usefixtures("yes")
def test_a_directory_with_code_is_refused_and_nobody_is_asked(
    with_code: Path, trace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(capsys, "--model", str(with_code), "--port", "0")
    assert not trace.exists()
    assert "[y/N]" not in said
    assert "--trust-remote-code" in said


def test_code_runs_where_the_operator_says_so(with_code: Path, trace: Path) -> None:
    """In a process of its own, which it is free to change."""
    command = [sys.executable, "-m", "kvbaton.cli.main", "serve", "--model", str(with_code), "--port", "0"]
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(kvbaton.__file__).parents[1]),
        "HF_MODULES_CACHE": str(with_code.parent / "modules"),
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        [*command, "--trust-remote-code"], capture_output=True, text=True, env=environment, check=False, timeout=60
    )
    assert trace.exists(), done
    assert done.returncode == 2, done  # there are no weights
    assert "Traceback" not in done.stderr


@pytest.mark.usefixtures("yes")
def test_a_tokenizer_with_code_is_refused(directory: Path, trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    LlamaForCausalLM(LlamaConfig(**{k: v for k, v in CONFIG.items() if k != "model_type"})).save_pretrained(directory)
    auto_map = {"AutoTokenizer": ["tokenization_evil.Evil", None]}
    config = {"tokenizer_class": "Evil", "auto_map": auto_map}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "tokenization_evil.py").write_text(CODE.format(trace=str(trace)))
    said = refused(capsys, "--model", str(directory), "--port", "0")
    assert not trace.exists()
    assert "--trust-remote-code" in said
