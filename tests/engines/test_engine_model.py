"""Loading, and the model over the paged pool compared with the model by itself."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from engine_kit import EOS, MAX_POSITIONS, VOCABULARY, make_pools, make_prompt
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MistralConfig, Qwen3NextConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from kvbaton.cli.main import main
from kvbaton.cli.program import FAILED
from kvbaton.errors import CapacityError, ConfigError, InternalError
from kvbaton.plan import layout_file
from kvbaton.plan.identity import model_differences
from kvbaton.plan.layout_file import RankLayout
from kvbaton.serving.engine.geometry import CACHE_LAYERS, probe_geometry
from kvbaton.serving.engine.limits import limits_of
from kvbaton.serving.engine.model import LoadedModel, load_model, locate_model
from kvbaton.serving.engine.pool import BlockTable
from kvbaton.serving.engine.prompt import PromptRun, chunk_stop
from kvbaton.serving.engine.request import Request, Sampling
from kvbaton.serving.engine.runner import ModelRunner, Step
from kvbaton.serving.models import builtin


def test_a_model_says_what_it_is(any_model: LoadedModel) -> None:
    geometry = any_model.geometry
    assert geometry.layers == 4
    assert {(tensor.name, tensor.width) for tensor in geometry.paged[0].tensors} == {("k", 16), ("v", 16)}
    assert (geometry.max_positions, geometry.vocab_size, geometry.dtype) == (MAX_POSITIONS, VOCABULARY, "float32")
    assert any_model.eos_tokens == {EOS}
    assert any_model.tokenizer.decode([]) == ""


@pytest.fixture
def copy(model_directories: dict[str, Path], tmp_path: Path) -> Path:
    """A checkpoint to be changed."""
    return Path(shutil.copytree(model_directories["qwen3"], tmp_path / "copy"))


def edit_config(directory: Path, **changes: object) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps(dict(reversed((json.loads(file.read_text()) | changes).items()))))


def fields_that_differ(one: Path, other: Path) -> list[str]:
    ours, theirs = (load_model(str(path)).fingerprint for path in (one, other))
    return [field for field, _, _ in model_differences(ours, theirs)]


def test_a_config_that_another_version_has_saved_again_is_the_same_model(
    model_directories: dict[str, Path], copy: Path
) -> None:
    """It was refused, with two hashes."""
    edit_config(copy, transformers_version="5.99.0", use_cache=False, eos_token_id=3, architectures=["Qwen3Model"])
    config = json.loads((copy / "config.json").read_text())
    theta = config.pop("rope_parameters", {}).get("rope_theta", 10_000.0)
    (copy / "config.json").write_text(json.dumps(config | {"rope_theta": theta}))  # as older versions spell it
    assert fields_that_differ(model_directories["qwen3"], copy) == []


def test_a_config_that_changes_numbers_is_refused_by_the_fields_name(
    model_directories: dict[str, Path], copy: Path
) -> None:
    edit_config(copy, rms_norm_eps=0.5)
    assert fields_that_differ(model_directories["qwen3"], copy) == ["rms_norm_eps"]


@pytest.mark.parametrize(("file", "field"), [("chat_template.jinja", "chat_template"), ("tokenizer.json", "tokenizer")])
def test_another_way_from_text_to_tokens_is_refused_by_name(file: str, field: str, tmp_path: Path) -> None:
    """A template that differed ended as a room of another prompt, without a word of the template."""
    ours = builtin("recall")
    other = Path(shutil.copytree(ours, tmp_path / "other"))
    text = (other / file).read_text()
    if field == "tokenizer":
        rules = json.loads(text)
        rules["added_tokens"][-1]["content"] += "x"
        text = json.dumps(rules)
    (other / file).write_text(text if field == "tokenizer" else text + "{{ 'x' }}")
    assert fields_that_differ(ours, other) == [field]


def test_negated_projections_are_another_model(
    model_directories: dict[str, Path], copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The answers of the model alone stay as they were, its cache is another: a pair of both answered fluently and
    wrong, with HTTP 200. ``check`` said that they are compatible, since files were sampled at their ends."""
    tensors = load_file(copy / "model.safetensors")
    for name, tensor in tensors.items():
        if "layers.0.self_attn.v_proj" in name or "layers.0.self_attn.o_proj" in name:
            tensors[name] = -tensor
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    assert fields_that_differ(model_directories["qwen3"], copy) == ["weights"]
    for side, directory in (("prefill", model_directories["qwen3"]), ("decode", copy)):
        model = load_model(str(directory))
        layout = make_pools(model, pages=8).layout
        (tmp_path / f"{side}.json").write_bytes(layout_file.encode([RankLayout(layout=layout)]))
    assert main(["check", str(tmp_path / "prefill.json"), str(tmp_path / "decode.json")], {}) == FAILED
    said = capsys.readouterr().out
    assert "model.weights" in said
    assert "incompatible: 1 difference" in said


def test_what_does_not_exist_is_a_config_error(tmp_path: Path, model_directories: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match="no bundled model"):
        load_model("nonesuch")
    with pytest.raises(ConfigError, match="no directory"):
        load_model(str(tmp_path / "missing"))
    with pytest.raises(ConfigError, match=r"config\.json"):
        load_model(str(tmp_path))
    with pytest.raises(ConfigError, match="dtype"):
        load_model(str(model_directories["qwen3"]), dtype="int4")
    with pytest.raises(ConfigError, match="threads"):
        load_model(str(model_directories["qwen3"]), threads=0)
    (tmp_path / "config.json").write_text('{"model_type": "nobody"}')
    with pytest.raises(ConfigError, match="does not load"):
        load_model(str(tmp_path))


def test_a_directory_wins_over_a_bundled_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "recall").mkdir()
    monkeypatch.chdir(tmp_path)
    assert locate_model("recall") == (tmp_path / "recall").resolve()


SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    ("config", "forget", "says"),
    [
        (MistralConfig(**SMALL, sliding_window=16), DynamicSlidingWindowLayer, "DynamicSlidingWindowLayer"),
        (Qwen3NextConfig(**SMALL, layer_types=["linear_attention", "full_attention"]), DynamicLayer, "DynamicLayer"),
    ],
)
def test_an_unknown_cache_layer_is_refused_by_name(
    config: object, forget: type, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(config)
    monkeypatch.delitem(CACHE_LAYERS, forget)
    with pytest.raises(ConfigError, match=f"needs cache layers of kind {says};"):
        probe_geometry(network, "float32")


@pytest.mark.parametrize("order", ["HND", "NHD"])
def test_chunks_compute_what_one_pass_computes(any_model: LoadedModel, order: str) -> None:
    pools = make_pools(any_model, order=order)
    runner, prompt = ModelRunner(any_model, pools), make_prompt(90)
    run = PromptRun(prompt, pools.allocate(90))
    while not run.finished:
        logits = run.advance(runner, 40, pools.page_size)
        with torch.inference_mode():
            expected = any_model.network(input_ids=torch.tensor([prompt[: run.computed]])).logits[:, -1]
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_a_batch_computes_what_single_requests_compute(any_model: LoadedModel) -> None:
    pools = make_pools(any_model)
    runner = ModelRunner(any_model, pools)
    steps = []
    for i, length in enumerate((1, 15, 16, 17, 100)):
        prompt, block_table = make_prompt(length, i), pools.allocate(length + 1)
        runner.prefill_chunk(prompt, 0, block_table)
        steps.append(Step(i, length, block_table))
    together = runner.decode(steps)
    for step, row in zip(steps, together, strict=True):
        torch.testing.assert_close(runner.decode([step])[0], row, rtol=1e-4, atol=1e-4)


def test_bfloat16_runs(model_directories: dict[str, Path]) -> None:
    model = load_model(str(model_directories["qwen3"]), dtype="bfloat16")
    pools = make_pools(model)
    assert pools.layout.pool("kv").dtype == "bfloat16"
    assert pools.layout.pool("kv").planes[0].item_bytes == 32
    logits = ModelRunner(model, pools).prefill_chunk((1, 2, 3), 0, pools.allocate(3))
    assert logits.shape == (1, VOCABULARY)


def test_what_torch_raises_is_an_internal_error(model: LoadedModel) -> None:
    with pytest.raises(InternalError, match="the model failed"):
        ModelRunner(model, make_pools(model)).prefill_chunk((VOCABULARY + 1,), 0, BlockTable((0,)))


def test_chunks_end_on_pages() -> None:
    assert [chunk_stop(start, 100, 32, 16) for start in (0, 32, 64, 96)] == [32, 64, 96, 100]
    assert chunk_stop(0, 100, 40, 16) == 32
    assert chunk_stop(0, 100, 5, 16) == 16
    assert chunk_stop(0, 9, 5, 16) == 9


def ask(prompt: tuple[int, ...] = (1, 2), **sampling: object) -> Request:
    return Request(request_id="r", prompt_tokens=prompt, sampling=Sampling(**sampling))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (ask(()), "prompt"),
        (ask((1, VOCABULARY)), "prompt"),
        (ask((-1,)), "prompt"),
        (ask(max_tokens=0), "max_tokens"),
        (ask(temperature=-0.1), "temperature"),
        (ask(temperature=float("nan")), "temperature"),
        (ask(temperature=float("inf")), "temperature"),
        (ask(top_p=0.0), "top_p"),
        (ask(top_p=1.1), "top_p"),
        (ask(top_p=float("nan")), "top_p"),
        (ask(stop=("",)), "stop"),
        (ask(stop=("a",) * 17), "stop"),
        (ask(choices=0), "n"),
        (ask(choices=17), "n"),
        (ask(logprobs=True, top_logprobs=21), "top_logprobs"),
        (ask(logprobs=True, top_logprobs=-1), "top_logprobs"),
        (ask(top_logprobs=1), "top_logprobs"),
    ],
)
def test_a_wrong_request_names_its_field(model: LoadedModel, request_: Request, field: str) -> None:
    with pytest.raises(ConfigError, match=f"^{field}: "):
        limits_of(model, make_pools(model)).validate(request_)


def test_what_never_fits_is_a_capacity_error(model: LoadedModel) -> None:
    limits = limits_of(model, make_pools(model, pages=4))
    limits.validate(ask((1,) * 60, max_tokens=5))
    with pytest.raises(CapacityError, match="whole pool has 64"):
        limits.validate(ask((1,) * 60, max_tokens=6))
    with pytest.raises(CapacityError, match="512 positions"):
        limits_of(model, make_pools(model)).validate(ask((1,) * 500, max_tokens=13))
    limits.validate(ask((1,) * 40, max_tokens=9, choices=2))  # two pages of the prompt for both, one each
    with pytest.raises(CapacityError, match=r"^n: 3 answers .* room for 2 at once"):
        limits.validate(ask((1,) * 40, max_tokens=9, choices=3))
    limits.validate(ask((1,) * 64, max_tokens=1, choices=16))
    prompt_only = limits_of(model, make_pools(model, pages=4), keeps_answer=False)
    prompt_only.validate(ask((1,) * 60, max_tokens=100, choices=16))
    with pytest.raises(ConfigError, match=r"^bootstrap_room: "):
        limits_of(model, make_pools(model), needs_room=True).validate(ask())
    for room in (-1, 1 << 63):
        request = Request(request_id="r", prompt_tokens=(1,), room=room)
        with pytest.raises(ConfigError, match=r"^bootstrap_room: "):
            limits_of(model, make_pools(model), needs_room=True).validate(request)
