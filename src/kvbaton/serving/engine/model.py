"""A causal language model from disk: weights, tokenizer, cache geometry and a fingerprint of all of it.

Rules: whatever the name given (a directory, a bundled model, a hub id), it becomes a local directory first, and the
fingerprint is taken over that directory, so that two ranks agree on it exactly when their files agree. What the model
caches is probed on the whole network, before it is cut for this rank.

This file must not know of pools, schedulers or peers.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from kvbaton.errors import ConfigError
from kvbaton.serving.engine.geometry import DTYPES, Geometry, probe_geometry
from kvbaton.serving.engine.shard import Shard
from kvbaton.serving.models import builtin

#: Bytes hashed at the head and at the tail of a weight file: the header of safetensors lies in the head.
FINGERPRINT_BYTES = 1 << 16
WEIGHT_SUFFIXES = (".safetensors", ".bin")
HUB_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedModel:
    """A model that is ready to run, or the ``shard`` of one; ``geometry`` is that of the whole model. ``tokenizer`` is
    None where the directory has none (text is then empty)."""

    name: str
    path: Path
    network: Any
    tokenizer: Any
    geometry: Geometry
    fingerprint: str
    eos_tokens: frozenset[int]
    shard: Shard = field(default_factory=Shard)

    def __repr__(self) -> str:
        return f"LoadedModel({self.name} {self.fingerprint[:12]} {self.geometry})"


def load_model(
    name: str, *, dtype: str = "float32", device: str = "cpu", threads: int | None = None, attention: str | None = None
) -> LoadedModel:
    """Load the model called ``name``: a local directory, a bundled name, or a hub id.

    ``threads`` sets torch's intra-operation threads for the whole process; ``attention`` None leaves the implementation
    to transformers. Raises ConfigError.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is unknown, use one of {', '.join(DTYPES)}")
    if threads is not None:
        use_threads(threads)
    path = locate_model(name)
    if not (path / "config.json").is_file():
        raise ConfigError(f"{path} holds no config.json; give the directory that save_pretrained() wrote")
    transformers_logging.disable_progress_bar()
    try:
        network = AutoModelForCausalLM.from_pretrained(
            path, dtype=DTYPES[dtype], attn_implementation=attention, local_files_only=True
        )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise ConfigError(f"the model in {path} does not load: {error}") from error
    network = network.to(device).eval()
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    tokenizer = _load_tokenizer(path)
    return LoadedModel(
        name=name,
        path=path,
        network=network,
        tokenizer=tokenizer,
        geometry=probe_geometry(network, dtype),
        fingerprint=fingerprint(path),
        eos_tokens=_eos_tokens(network, tokenizer),
    )


def use_threads(threads: int) -> None:
    """Set torch's intra-operation threads for the whole process. Raises ConfigError."""
    if threads < 1:
        raise ConfigError(f"threads={threads} must be at least 1")
    torch.set_num_threads(threads)


def locate_model(name: str) -> Path:
    """The local directory of the model called ``name``; a hub id is downloaded, unless it is in the local cache."""
    directory = Path(name).expanduser()
    if directory.is_dir():
        return directory.resolve()
    try:
        return builtin(name)
    except ValueError as error:
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith("."):
            raise ConfigError(f"model {name!r} is no directory, no hub id (owner/name), and {error}") from error
    return _download(name)


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download  # only a hub id needs it

    try:
        return Path(snapshot_download(name, allow_patterns=list(HUB_FILES)))
    except (OSError, ValueError) as error:  # the hub's errors and requests' derive from these
        raise ConfigError(
            f"model {name!r} is no local directory and cannot be fetched from the hub: {error}",
            hint="download it where there is a network and give its directory",
        ) from error


def _load_tokenizer(path: Path) -> Any:
    if not any((path / file).is_file() for file in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")):
        return None
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ConfigError(f"the tokenizer in {path} does not load: {error}") from error


def _eos_tokens(network: Any, tokenizer: Any) -> frozenset[int]:
    """Every token that ends an answer, by the model's own generation config; the tokenizer's word where it has none."""
    for source in (getattr(network, "generation_config", None), network.config.get_text_config(decoder=True)):
        found = getattr(source, "eos_token_id", None)
        if found is not None:
            return frozenset(found if isinstance(found, (list, tuple)) else [found])
    found = getattr(tokenizer, "eos_token_id", None)
    return frozenset() if found is None else frozenset([found])


def fingerprint(path: Path) -> str:
    """Hex digest over the model's config (values, not spelling) and its weight files (name, size, head, tail)."""
    digest = hashlib.blake2b(digest_size=16)
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    digest.update(json.dumps(config, sort_keys=True).encode())
    for file in sorted(path.iterdir()):
        if file.suffix not in WEIGHT_SUFFIXES:
            continue
        size = file.stat().st_size
        digest.update(f"\0{file.name}\0{size}\0".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(FINGERPRINT_BYTES))
            stream.seek(max(0, size - FINGERPRINT_BYTES))
            digest.update(stream.read(FINGERPRINT_BYTES))
    return digest.hexdigest()
