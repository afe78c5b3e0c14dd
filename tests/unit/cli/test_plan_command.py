"""``kvbaton plan``: who sends what to whom, as a table, as data and as a picture; models by their config alone."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from kvbaton.cli.main import main
from kvbaton.cli.program import FAILED, WRONG
from kvbaton.explain.model import describe
from kvbaton.serving.models import builtin

SVG = "{http://www.w3.org/2000/svg}"
DENSE = {"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 512}
MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 64, "mamba_n_groups": 1, "mamba_d_state": 16, "mamba_d_conv": 4}
GDN = {
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
}
#: name → (config, pools)
FAMILIES = {
    "dense": (DENSE, ["kv", "aux"]),
    "nested": ({"text_config": DENSE}, ["kv", "aux"]),
    "all windows": (DENSE | {"sliding_window": 64}, ["swa", "aux"]),
    "windows that are off": (DENSE | {"sliding_window": 64, "use_sliding_window": False}, ["kv", "aux"]),
    "some windows": (
        DENSE | {"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"] * 2},
        ["kv", "swa", "aux"],
    ),
    "windows by pattern": (DENSE | {"sliding_window": 64, "sliding_window_pattern": 4}, ["kv", "swa", "aux"]),
    "latents": ({"num_hidden_layers": 4, "kv_lora_rank": 512, "qk_rope_head_dim": 64}, ["mla", "aux"]),
    "latents with an indexer": (
        {"num_hidden_layers": 4, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "index_head_dim": 128},
        ["mla", "index", "aux"],
    ),
    "gated delta net": (DENSE | GDN | {"full_attention_interval": 4}, ["kv", "state", "aux"]),
    "mamba by indices": (DENSE | MAMBA2 | {"attn_layer_indices": [1]}, ["kv", "state", "aux"]),
    "mamba in every layer": (DENSE | MAMBA2, ["kv", "state", "aux"]),
    "mamba by letters": (
        DENSE
        | {"hybrid_override_pattern": "M*M-", "mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 2}
        | {"ssm_state_size": 16, "conv_kernel": 4},
        ["kv", "state", "aux"],
    ),
}


def write_model(path: Path, config: dict[str, object]) -> str:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    return str(path)


def plan(capsys, *arguments: str) -> dict:
    assert main(["plan", "--json", *arguments], {}) == 0
    return json.loads(capsys.readouterr().out)


def test_a_table_names_writers_and_bystanders(capsys) -> None:
    assert main(["plan", "--source", "tp=4,pp=2", "--target", "tp=1"], {}) == 0
    text = capsys.readouterr().out
    assert "recall: TP 4, PP 2, page 16, HND -> TP 1, PP 1, page 16, HND" in text
    assert "kv layers 2..3 item 1 of 2" in text
    assert "decode tp0 is written by pp0 tp0, pp0 tp2, pp1 tp0, pp1 tp2" in text
    assert "bystanders: pp0 tp1, pp0 tp3, pp1 tp1, pp1 tp3" in text
    assert "2,048 bytes per token" in text


def test_data_adds_up(capsys) -> None:
    data = plan(capsys, "--source", "tp=2", "--target", "tp=4,page=64", "--tokens", "1000")
    assert data["bystanders"] == []
    assert data["writers"] == {"decode tp0": [0], "decode tp1": [0], "decode tp2": [1], "decode tp3": [1]}
    assert data["bytes"] == sum(flow["bytes"] for flow in data["flows"])
    assert data["descriptors"] == sum(flow["descriptors"] for flow in data["flows"])
    # 2 heads of 32 floats, K and V, 4 layers, each head twice; one piece per layer, tensor, head and page of 16
    assert data["bytes_per_token"] == 2 * 2 * 32 * 4 * 2 * 4
    assert data["descriptors"] == 4 * (4 * 2 * 63 + 1)
    assert data["smallest_piece_bytes"] == 1024


def test_the_interior_order_costs_what_it_costs(capsys) -> None:
    """Unequal TP with tokens outermost: a piece for each token; with heads outermost one for each page."""
    pieces = {
        order: plan(capsys, "--source", f"tp=2,order={order}", "--target", f"tp=1,order={order}")["descriptors"]
        for order in ("NHD", "HND")
    }
    assert pieces["NHD"] - 1 == 16 * (pieces["HND"] - 1)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_config_implies_its_pools(name: str, tmp_path: Path, capsys) -> None:
    config, pools = FAMILIES[name]
    model = write_model(tmp_path / "model", config)
    data = plan(capsys, "--model", model, "--source", "tp=4,pp=2", "--target", "tp=2,page=64")
    assert list(dict.fromkeys(sorted((flow["pool"] for flow in data["flows"]), key=pools.index))) == pools
    if "swa" in pools:  # of 1024 tokens only the last 64
        assert all(flow["bytes"] == 64 * flow["token_bytes"] for flow in data["flows"] if flow["pool"] == "swa")


def test_the_bundled_model_is_what_the_engine_has() -> None:
    config = json.loads((builtin("recall") / "config.json").read_text())
    cache = describe(config, name="recall")
    assert (cache.heads, cache.head_dim, cache.dtype, len(cache.kinds)) == (2, 32, "float32", 4)


@pytest.mark.parametrize("name", [*FAMILIES])
def test_a_picture_shows_every_rank_and_every_line(name: str, tmp_path: Path, capsys) -> None:
    model = write_model(tmp_path / "model", FAMILIES[name][0])
    svg, html = tmp_path / "plan.svg", tmp_path / "plan.html"
    data = plan(
        capsys, "--model", model, "--source", "tp=8,pp=2", "--target", "tp=2", "--svg", str(svg), "--html", str(html)
    )
    root = ElementTree.parse(svg).getroot()
    texts = [text.text for text in root.iter(f"{SVG}text")]
    assert {*data["source"]["ranks"], *data["target"]["ranks"]} <= set(texts)
    assert texts.count("bystander: writes nothing") == len(data["bystanders"])
    lines = {(flow["source"], flow["target"]) for flow in data["flows"]}
    assert len(list(root.iter(f"{SVG}path"))) == len(lines)
    width, height = (float(root.attrib[side]) for side in ("width", "height"))
    for box in root.iter(f"{SVG}rect"):
        if "x" in box.attrib:
            assert 0 <= float(box.attrib["x"]) <= float(box.attrib["x"]) + float(box.attrib["width"]) <= width
            assert 0 <= float(box.attrib["y"]) <= float(box.attrib["y"]) + float(box.attrib["height"]) <= height
    assert "<svg" in html.read_text()
    assert "bytes per token" in html.read_text()


def test_the_picture_in_the_documents_is_todays(tmp_path: Path, capsys) -> None:
    plan(capsys, "--source", "tp=4,pp=2", "--target", "tp=2", "--svg", str(tmp_path / "plan.svg"))
    drawn = (Path(__file__).parents[3] / "docs" / "plan.svg").read_text()
    assert drawn == (tmp_path / "plan.svg").read_text(), (
        "kvbaton plan --source tp=4,pp=2 --target tp=2 --svg docs/plan.svg"
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--source", "tp=3"], "2 items do not divide over 3 ranks"),
        (["--source", "pp=9"], "the model has only 4 layers"),
        (["--source", "tp"], "'tp' in 'tp' is no setting"),
        (["--source", "dp=2"], "is no setting"),
        (["--source", "tp=0"], "is not a positive number"),
        (["--source", "tp=x"], "is not a positive number"),
        (["--source", "tp=4096"], "at most 1024"),
        (["--target", "order=DNH"], "order is one of HND, NHD"),
        (["--target", "fusion=row"], "fusion is one of"),
        (["--model", "nothing"], "no bundled model 'nothing'"),
        (["--svg", "/nowhere/plan.svg"], "/nowhere/plan.svg cannot be written"),
    ],
)
def test_wrong_use_is_named(arguments: list[str], words: str, capsys) -> None:
    assert main(["plan", *arguments], {}) == WRONG
    captured = capsys.readouterr()
    assert words in captured.err
    assert not captured.out


def test_sides_that_do_not_fit_are_refused(capsys) -> None:
    assert main(["plan", "--source", "page=16", "--target", "page=7"], {}) == FAILED
    assert "neither divides the other and they have only 1 tokens" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({}, "config.json has no num_hidden_layers or n_layer"),
        (DENSE | {"num_hidden_layers": "4"}, "num_hidden_layers='4'"),
        (DENSE | {"layer_types": ["ring_attention"] * 4}, "layers of type ring_attention are unknown"),
        (DENSE | {"layer_types": ["full_attention"]}, "1 layer types for num_hidden_layers=4"),
        (DENSE | {"hybrid_override_pattern": "M?M-"}, "unknown layers '?'"),
        (DENSE | {"layer_types": ["mamba"] * 4}, "has no mamba_n_heads or mamba_num_heads"),
        (DENSE | {"dtype": "int3"}, "dtype 'int3' is unknown"),
        ([], "is not an object"),
    ],
)
def test_a_config_that_is_not_understood_is_named(config, words: str, tmp_path: Path, capsys) -> None:
    assert main(["plan", "--model", write_model(tmp_path / "model", config)], {}) == WRONG
    assert words in capsys.readouterr().err


def test_a_config_that_cannot_be_read(tmp_path: Path, capsys) -> None:
    assert main(["plan", "--model", str(tmp_path)], {}) == WRONG
    assert "cannot be read" in capsys.readouterr().err
    (tmp_path / "config.json").write_text("{")
    assert main(["plan", "--model", str(tmp_path)], {}) == WRONG
    assert "cannot be read" in capsys.readouterr().err
