"""The config file: what it holds, what it refuses, and whether it fits the model."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from permattn.models import PrefillConfig, patch
from permattn.models import config as config_module
from permattn.models.families import known_families
from permattn.patterns.mminference import HeadPattern

from .checks import logits, patched
from .exact import plan_everything

FULL = {
    "format": 1,
    "base_model": "Qwen/Qwen2.5-VL-7B-Instruct",
    "model_type": "qwen2_5_vl",
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "min_q_len": 8192,
    "dense_layers": [0],
    "default": {"pattern": "a_shape", "sink": 128, "local": 4096},
    "layers": {"1": {"heads": [{"pattern": "grid", "strides": ["frame", 12]}] * 4}},
}


def test_round_trip(tmp_path):
    config = PrefillConfig.load(FULL)
    config.to_json(tmp_path / "config.json")
    assert PrefillConfig.load(tmp_path / "config.json") == config
    assert json.loads((tmp_path / "config.json").read_text())["format"] == 1
    assert config.layers[1].heads[0] == HeadPattern("grid", strides=("frame", 12))
    assert config.default == HeadPattern("a_shape", sink=128, local=4096)


NESTED = {
    "default": {"pattern": "grid", "coverage": 0.9, "strides": [3, "row"]},
    "layers": {
        "0": {
            "heads": [
                {},
                {"pattern": "block_sparse", "blocks": 7},
                {"boundary": "q", "when": {"text": {"pattern": "dense"}, "audio": {}}},
                {
                    "pattern": "a_shape",
                    "boundary": "2d",
                    "when": {"text,vision": {"pattern": "vertical_slash", "slash": 3}},
                },
            ]
        }
    },
}


def test_round_trip_of_boundaries(tmp_path):
    """Defaults are left out at every level."""
    config = PrefillConfig.load(NESTED)
    config.to_json(tmp_path / "config.json")
    assert json.loads((tmp_path / "config.json").read_text()) == {"format": 1, **NESTED}
    assert PrefillConfig.load(tmp_path / "config.json") == config
    pair = config.layers[0].heads[3]
    assert pair.between("text", "vision") == HeadPattern("vertical_slash", slash=3)
    assert pair.between("text", "text").pattern == "a_shape"
    assert config.layers[0].heads[2].between("text", "vision") == HeadPattern("dense")


@pytest.mark.parametrize(
    ("when", "message"),
    [
        ({"text": {"loacl": 3}}, r"default: when.text: unknown keys \['loacl'\]; wants"),
        ({"text": {"local": 0}}, "HeadPattern.local"),
        ({"text": {"pattern": "spiral"}}, "default.when.text.pattern: .*'spiral'"),
        ({"text": {"boundary": "q"}}, "without a boundary"),
        ({"text": 3}, "default.when.text: .* got 3"),
        ({"text,vision": {}}, "wants '<modality>'"),
        (5, "default.when: .* got 5"),
    ],
    ids=["key", "value", "name", "boundary", "type", "pair", "no-mapping"],
)
def test_refuses_inside_a_boundary(when, message):
    with pytest.raises(ValueError, match=message) as error:
        PrefillConfig.load({"default": {"boundary": "q", "when": when}})
    assert "\n" not in str(error.value)


def test_shipped(case_of, tmp_path, monkeypatch):
    model = case_of("qwen2_5_vl").model
    PrefillConfig.load({"model_type": "qwen2_5_vl", "min_q_len": 77}).to_json(
        tmp_path / "qwen2_5_vl.json"
    )
    monkeypatch.setattr(config_module, "_SHIPPED_FOLDER", tmp_path)
    assert config_module.shipped_configs() == ("qwen2_5_vl",)
    with patch(model, "shipped") as handle:
        assert handle.config.min_q_len == 77
    with pytest.raises(
        ValueError, match=r"none is shipped for model_type 'llava', only for \['qwen2_5_vl'\]"
    ):
        PrefillConfig.load("shipped", "llava")


def test_shipped_files_are_valid():
    for name in config_module.shipped_configs():
        config = PrefillConfig.load("shipped", name)
        assert config.model_type == name
        assert config.base_model, f"{name} says what it was made on"
        assert name in known_families()


def test_page_shows_a_config_that_loads():
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```json\n(.*?)```", page, flags=re.DOTALL)
    config = PrefillConfig.load(json.loads(block))
    assert [head.pattern for head in config.layers[2].heads] == ["grid", "a_shape"]


def test_heads_of_a_layer():
    config = PrefillConfig.load({**FULL, "num_layers": 4})
    assert config.heads_of(0, 4) == (HeadPattern("dense"),) * 4
    assert config.heads_of(1, 4) == config.layers[1].heads
    assert config.heads_of(2, 4) == (config.default,) * 4
    assert PrefillConfig.load(None).heads_of(7, 2) == (HeadPattern("auto"),) * 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "format: Input should be 1, got 2"),
        ({"blocks": 64}, "blocks: Extra inputs"),
        ({"heads_per_pass": 0}, "heads_per_pass: .* got 0"),
        ({"min_q_len": "long"}, "min_q_len: .* got 'long'"),
        ({"default": {"pattern": "spiral"}}, "default.*'spiral'"),
        ({"default": {"stride": 4}}, r"default.*unknown keys \['stride'\]"),
        ({"default": {"local": 0}}, "HeadPattern.local"),
        ({"layers": {"1": {"heads": [{}] * 3}}}, "wants num_heads = 4 patterns, got 3"),
        ({"layers": {"1": {"heads": [{}] * 4, "budget": 1}}}, "budget: Extra inputs"),
        ({"layers": {"first": {"heads": []}}}, "layers.first"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else None,
)
def test_refuses(change, message):
    with pytest.raises(ValueError, match=message) as error:
        PrefillConfig.load({**FULL, **change})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read: No such file"),
        ("{", "not a JSON file"),
        ("[1]", "top level: Input should be a valid dictionary"),
    ],
    ids=["missing", "damaged", "list"],
)
def test_refuses_file(tmp_path: Path, text, message):
    path = tmp_path / "config.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        PrefillConfig.load(str(path))
    assert str(path) in str(error.value)


def test_refuses_type():
    with pytest.raises(TypeError, match="config: wants a PrefillConfig, dict, path or None"):
        PrefillConfig.load(3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "qwen3_vl"}, "config.model_type: made for 'qwen3_vl', got .* 'qwen2_5_vl'"),
        ({"num_layers": 28}, "config.num_layers: made for 28, got a model with 2"),
        ({"num_heads": 5, "layers": {}}, "config.num_heads: made for 5, got a model with 4"),
        ({"num_kv_heads": 4}, "config.num_kv_heads: made for 4, got a model with 2"),
        ({"heads_per_pass": 1}, "config.heads_per_pass: wants at least the 2 query heads"),
        ({"dense_layers": [2]}, "names layer 2, got a model with layers 0..1"),
        (
            {"num_heads": None, "layers": {"1": {"heads": [{}]}}},
            "got 1 patterns, the model wants 4",
        ),
    ],
    ids=[
        "model_type",
        "num_layers",
        "num_heads",
        "num_kv_heads",
        "heads_per_pass",
        "dense_layers",
        "heads",
    ],
)
def test_config_of_another_model(case_of, change, message):
    model = case_of("qwen2_5_vl").model
    with pytest.raises(ValueError, match=message):
        patch(model, {**FULL, **change})
    patch(model, FULL).unpatch()


def test_layer_without_softmax(case_of):
    model = case_of("qwen3_5").model
    config = {"layers": {"2": {"heads": [{}] * 4}}}
    with pytest.raises(ValueError, match=r"layers.2: softmax attention is in layers \[1, 3\] only"):
        patch(model, config)


def test_a_dense_head_with_a_sparse_modality_is_not_dense(case_of):
    case = case_of("qwen2_5_vl")
    head = {"pattern": "dense", "boundary": "q", "when": {"vision": {"pattern": "a_shape"}}}
    with patch(case.model, {"min_q_len": 2, "default": head}, backend="reference") as handle:
        logits(case)
        assert handle.stats["sparse"] == 2 and not handle.stats["dense"]
    head = {"pattern": "dense", "boundary": "q", "when": {"vision": {"pattern": "dense"}}}
    with patch(case.model, {"min_q_len": 2, "default": head}, backend="reference") as handle:
        logits(case)
        assert handle.stats["dense_reasons"] == {"dense layer (config)": 2}


def test_layers_and_lengths_that_stay_dense(case_of):
    case = case_of("qwen2_5_vl")
    with patched(case.model, dense_layers=[0]) as handle:
        logits(case)
        assert handle.stats["sparse"] == 1
        assert handle.stats["dense_reasons"] == {"dense layer (config)": 1}
    with patched(case.model, min_q_len=4096) as handle:
        logits(case)
        assert handle.stats["dense_reasons"] == {"q_len below min_q_len": 2}


def test_heads_reach_the_planner(case_of):
    case = case_of("qwen2_5_vl")
    seen = []

    def planner(q, k, rows, heads, **pads):
        seen.append(tuple(heads))
        return plan_everything(q, k, rows, heads, **pads)

    heads = [{"pattern": "a_shape", "sink": n} for n in range(4)]
    config = {"min_q_len": 2, "layers": {"1": {"heads": heads}}}
    with patch(case.model, config, planner=planner):
        logits(case)
    assert [[head.pattern for head in layer] for layer in seen] == [["auto"] * 4, ["a_shape"] * 4]
    assert [head.sink for head in seen[1]] == [0, 1, 2, 3]
