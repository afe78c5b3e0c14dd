"""A causal language model from disk: weights, tokenizer, cache geometry, and what identifies it.

Rules: whatever the name given (a directory, a bundled model, a hub id), it becomes a local directory first. Its weights
are identified while they load (see ``weights``), so that two ranks agree exactly when their tensors agree. What the
model caches is probed on the whole network, before it is cut for this rank. A directory is data: its weights are
safetensors, never a pickle, and code that it brings runs only where the operator has said so.

This file must not know of pools, schedulers or peers.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from kvbaton.errors import ConfigError
from kvbaton.plan import identity
from kvbaton.serving.engine.geometry import DTYPES, Geometry, probe_geometry
from kvbaton.serving.engine.request import Sampling
from kvbaton.serving.engine.shard import RankShard
from kvbaton.serving.engine.threads import aside, use_threads
from kvbaton.serving.engine.weights import weights_digest
from kvbaton.serving.models import builtin

#: Fields of a config that change no number of a cache, or are given to a server by other means.
NOT_NUMBERS = frozenset(
    {
        *("architectures", "dtype", "torch_dtype", "transformers_version", "tokenizer_class", "problem_type"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "id2label", "label2id"),
        *("output_attentions", "output_hidden_states", "output_router_logits", "return_dict", "use_cache"),
        *("attention_dropout", "hidden_dropout", "resid_pdrop", "initializer_range", "router_aux_loss_coef"),
    }
)
HUB_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")
CODE_FILES = ("*.py",)


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedModel:
    """A model that is ready to run, or the ``shard`` of one; ``geometry`` is that of the whole model. ``tokenizer`` is
    None where the directory has none (text is then empty). ``fingerprint`` is the ``model`` of its layouts."""

    name: str
    path: Path
    network: Any
    tokenizer: Any
    geometry: Geometry
    fingerprint: str
    eos_tokens: frozenset[int]
    shard: RankShard = field(default_factory=RankShard)

    def ends_of(self, sampling: Sampling) -> frozenset[int]:
        """The tokens that end an answer to such a request."""
        return frozenset(sampling.stop_token_ids) | (frozenset() if sampling.ignore_eos else self.eos_tokens)

    def __repr__(self) -> str:
        return f"LoadedModel({self.name} {self.geometry})"


def check_device(device: str) -> None:
    """Raises ConfigError for one that this machine, or this build of torch, does not have."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch sees no CUDA device here; use --device cpu, or a CUDA build of torch")


def read_config(name: str, *, trust_remote_code: bool = False) -> Any:
    """The config of the model called ``name``, without its weights; None where only :func:`load_model` can say what is
    wrong with it. Raises ConfigError for a model that is not found."""
    path = locate_model(name, trust_remote_code=trust_remote_code)
    try:
        return AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=trust_remote_code)
    except Exception:  # noqa: BLE001 - transformers has no common base
        return None


def load_model(
    name: str,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    threads: int | None = None,
    attention: str | None = None,
    trust_remote_code: bool = False,
) -> LoadedModel:
    """Load the model called ``name``: a local directory, a bundled name, or a hub id.

    ``threads`` sets torch's intra-operation threads for the whole process; ``attention`` None leaves the implementation
    to transformers; ``trust_remote_code`` runs what the directory brings. Raises ConfigError.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is unknown, use one of {', '.join(DTYPES)}")
    if threads is not None:
        use_threads(threads)
    return aside(partial(_load_model, name, dtype, device, attention, trust_remote_code=trust_remote_code))


def _load_model(name: str, dtype: str, device: str, attention: str | None, *, trust_remote_code: bool) -> LoadedModel:
    path = locate_model(name, trust_remote_code=trust_remote_code)
    if not (path / "config.json").is_file():
        raise ConfigError(f"{path} holds no config.json; give the directory that save_pretrained() wrote")
    transformers_logging.disable_progress_bar()
    with ThreadPoolExecutor(1, "kvbaton-weights") as beside:  # both read the same pages of the files
        weights = beside.submit(weights_digest, path)
        try:
            network = AutoModelForCausalLM.from_pretrained(
                path,
                dtype=DTYPES[dtype],
                attn_implementation=attention,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=trust_remote_code,
            )
        except Exception as error:
            raise _refusal("model", path, error) from error
    network = network.to(device).eval()
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    tokenizer = _load_tokenizer(path, trust_remote_code=trust_remote_code)
    return LoadedModel(
        name=name,
        path=path,
        network=network,
        tokenizer=tokenizer,
        geometry=probe_geometry(network, dtype),
        fingerprint=identity.encode(
            {"weights": weights.result(), **_text_identity(tokenizer), **_numbers(network.config)}
        ),
        eos_tokens=_eos_tokens(network, tokenizer),
    )


def locate_model(name: str, *, trust_remote_code: bool = False) -> Path:
    """The local directory of the model called ``name``; a hub id is downloaded, unless it is in the local cache: its
    code only where it is trusted."""
    directory = Path(name).expanduser()
    if directory.is_dir():
        return directory.resolve()
    try:
        return builtin(name)
    except ValueError as error:
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith("."):
            raise ConfigError(f"model {name!r} is no directory, no hub id (owner/name), and {error}") from error
    return _download(name, [*HUB_FILES, *CODE_FILES] if trust_remote_code else list(HUB_FILES))


def _download(name: str, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download  # only a hub id needs it

    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (OSError, ValueError) as error:  # the hub's errors and requests' derive from these
        raise ConfigError(
            f"model {name!r} is no local directory and cannot be fetched from the hub: {error}",
            hint="download it where there is a network and give its directory",
        ) from error


def _load_tokenizer(path: Path, *, trust_remote_code: bool) -> Any:
    if not any((path / file).is_file() for file in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")):
        return None
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise _refusal("tokenizer", path, error) from error


def _text_identity(tokenizer: Any) -> dict[str, object]:
    """What makes tokens of text: two sides that differ here prefill other prompts than they decode."""
    if tokenizer is None:
        return {}
    fast = getattr(tokenizer, "backend_tokenizer", None)
    rules = fast.to_str() if fast is not None else sorted(tokenizer.get_vocab().items())
    template = getattr(tokenizer, "chat_template", None)
    return {"tokenizer": _digest(rules), "chat_template": _digest(template) if template else ""}


def _digest(value: object) -> str:
    return hashlib.sha256(msgspec.json.encode(value)).hexdigest()[:16]


def _refusal(what: str, path: Path, error: Exception) -> ConfigError:
    """Why the model or tokenizer in a directory is not loaded."""
    if "trust_remote_code" in str(error):
        return ConfigError(
            f"the {what} in {path} brings code of its own, which is not run",
            hint="read that code; --trust-remote-code runs it",
        )
    pickles = sorted(file.name for file in path.glob("*.bin"))
    if what == "model" and pickles and not any(path.glob("*.safetensors")):
        return ConfigError(
            f"the model in {path} has no safetensors; {pickles[0]} is a pickle, which may hold code, and is not read",
            hint="load it where that does no harm, and save it again with save_pretrained()",
        )
    return ConfigError(f"the {what} in {path} does not load: {error}")


def _eos_tokens(network: Any, tokenizer: Any) -> frozenset[int]:
    """Every token that ends an answer, by the model's own generation config; the tokenizer's word where it has none."""
    for source in (getattr(network, "generation_config", None), network.config.get_text_config(decoder=True)):
        found = getattr(source, "eos_token_id", None)
        if found is not None:
            return frozenset(found if isinstance(found, (list, tuple)) else [found])
    found = getattr(tokenizer, "eos_token_id", None)
    return frozenset() if found is None else frozenset([found])


def _numbers(config: Any) -> dict[str, object]:
    """What of a config changes the numbers in a cache, flat, with the defaults that its class fills in."""
    return dict(_flat("", config.get_text_config(decoder=True).to_dict()))


def _flat(prefix: str, fields: dict[str, Any]) -> Iterator[tuple[str, object]]:
    for name, value in fields.items():
        if name in NOT_NUMBERS or name.startswith("_"):
            continue
        if isinstance(value, dict):
            yield from _flat(f"{prefix}{name}.", {str(key): inner for key, inner in value.items()})
        else:
            yield f"{prefix}{name}", value
