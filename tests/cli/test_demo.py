"""The demo, end to end on a small model; and every way in which it refuses."""

from __future__ import annotations

import json
import types
from dataclasses import replace

import numpy as np
import pytest
import torch
from permattn import cli
from permattn.cli.demo import run, video
from permattn.cli.demo.circuits import Grid, Sizes
from permattn.cli.demo.constructed import build
from permattn.cli.demo.subject import patches_of
from PIL import Image

SIZES = Sizes(
    mlp=256, layers=2, heads=4, kv_heads=2, vocab=256, vision_hidden=64, vision_depth=2, num_spots=4
)


@pytest.fixture(autouse=True)
def small_model(monkeypatch):
    monkeypatch.setattr(run, "SIZES", SIZES)


@pytest.fixture(scope="module")
def clip_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip") / "own.mp4"
    video.encode(path, num_frames=24, width=224, height=112)
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One whole run: (exit code, folder)."""
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "SIZES", SIZES)
        code = cli.main(["demo", "--tokens", "1300", "--rounds", "1", "--out", str(folder)])
    return code, folder


def refusal(argv, tmp_path, capsys) -> str:
    """Runs a demo that must refuse, and returns its one line."""
    out = tmp_path / "out"
    assert cli.main(["demo", "--tokens", "300", "--out", str(out), *argv]) == 2
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("permattn: ")]
    assert len(lines) == 1
    assert not out.exists() or list(out.iterdir()) == []
    return lines[0]


def test_it_writes_all_three_files_and_nothing_else(finished):
    code, folder = finished
    assert code == 0
    assert {x.name for x in folder.iterdir()} == {"demo.png", "demo.json", "demo.mp4"}
    width, height = Image.open(folder / "demo.png").size
    assert width > 1000 and height > width
    assert video.aspect_of(folder / "demo.mp4") == 2.0


def test_its_numbers_hang_together(finished):
    report = json.loads((finished[1] / "demo.json").read_text())
    assert report["visual_tokens"] >= 1300 and report["tokens"] > report["visual_tokens"]
    assert "constructed" in report["note"] and "meaningless" in report["note"]
    assert 0 < report["density"] <= 1.2 and len(report["density_per_layer"]) == SIZES.layers
    assert report["stats"]["dense"] == 0 and report["stats"]["sparse"] == SIZES.layers
    for kind in ("median_dense", "median_sparse"):
        times = report[kind]
        assert 0 < times["attention"] < times["prefill"] < times["first_token"]
        assert times["peak_bytes"] > 2**20
    assert report["median_dense"]["plan"] == 0 < report["median_sparse"]["plan"]
    speedup = report["median_dense"]["attention"] / report["median_sparse"]["attention"]
    assert report["speedup"]["attention"] == pytest.approx(speedup)


def test_errors_are_small_and_not_zero(finished):
    report = json.loads((finished[1] / "demo.json").read_text())
    for name in ("attention_error", "hidden_error", "hidden_error_last"):
        assert 0 < report[name] < 0.2
    assert report["top1"] > 0.7
    for head in report["heads"]:
        assert 0.8 < head["recall"] <= 1.0 and 0 < head["density"] < 1.2


def test_json_is_alone_on_stdout_and_a_given_video_is_used(clip_file, tmp_path, capsys):
    argv = ["demo", "--video", str(clip_file), "--tokens", "300", "--frames", "8", "--json"]
    argv += ["--rounds", "1", "--dtype", "fp32", "--backend", "reference", "--out", str(tmp_path)]
    assert cli.main(argv) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["backend"] == "reference" and report["dtype"] == "fp32"
    assert "8 frames of a 224x112" in report["video"]
    assert report["visual_tokens"] >= 300
    # A video that was given is not copied.
    assert {x.name for x in tmp_path.iterdir()} == {"demo.png", "demo.json"}


def test_missing_video(tmp_path, capsys):
    line = refusal(["--video", str(tmp_path / "none.mp4")], tmp_path, capsys)
    assert "no such file" in line


def test_corrupt_video(tmp_path, capsys):
    path = tmp_path / "bad.mp4"
    path.write_bytes(b"\0" * 5000)
    assert "cannot be decoded" in refusal(["--video", str(path)], tmp_path, capsys)


def test_out_is_a_file(tmp_path, capsys):
    path = tmp_path / "file"
    path.write_text("")
    assert cli.main(["demo", "--out", str(path)]) == 2
    assert "--out" in capsys.readouterr().err


def test_too_few_tokens_for_a_plan(tmp_path, capsys):
    line = refusal(["--tokens", "64", "--frames", "4"], tmp_path, capsys)
    assert "ran dense" in line and "--tokens" in line


@pytest.mark.parametrize("moment", ["encode", "measure", "draw"])
def test_ctrl_c_leaves_no_files(moment, monkeypatch, tmp_path, capsys):
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    place = {
        "encode": (video, "_crop"),
        "measure": (run.Meter, "run"),
        "draw": (run.picture, "draw_head"),
    }[moment]
    monkeypatch.setattr(*place, interrupt)
    assert cli.main(["demo", "--tokens", "300", "--rounds", "1", "--out", str(tmp_path)]) == 130
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().err.endswith("permattn: interrupted\n")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A folder that from_pretrained reads: the constructed model, saved."""
    folder = tmp_path_factory.mktemp("checkpoint")
    frames = np.zeros((4, 112, 224, 3), np.uint8)
    made = build(
        Grid(2, 4, 8), *patches_of(frames, 14), sizes=replace(SIZES, layers=1), dtype=torch.float32
    )
    made.model.save_pretrained(folder)
    return folder


class Processor:
    """What the demo asks of a Qwen2.5-VL processor, without a tokenizer."""

    def apply_chat_template(self, messages, add_generation_prompt):
        assert messages[0]["content"][0] == {"type": "video"} and add_generation_prompt
        return "text"

    def __call__(self, text, videos, return_tensors):
        pixels, thw = patches_of(videos[0].permute(0, 2, 3, 1).numpy(), 14)
        ids = torch.tensor([[1, 70, 71, 5, *[4] * (len(pixels) // 4), 6, 80, 81, 82]])
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "mm_token_type_ids": 2 * (ids == 4).int(),
            "pixel_values_videos": pixels,
            "video_grid_thw": thw,
        }


def processors(make):
    return types.SimpleNamespace(from_pretrained=lambda name: make())


def test_a_checkpoint_runs(checkpoint, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("transformers.AutoProcessor", processors(Processor))
    argv = ["demo", "--model", str(checkpoint), "--tokens", "300", "--rounds", "1", "--json"]
    assert cli.main([*argv, "--out", str(tmp_path)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert str(checkpoint) in report["note"] and report["stats"]["sparse"] == 1
    assert report["visual_tokens"] >= 300 and len(report["heads"]) == SIZES.heads


def test_missing_checkpoint(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    line = refusal(["--model", str(tmp_path / "empty")], tmp_path, capsys)
    assert "no readable checkpoint" in line and "hub id" in line


def test_unknown_family(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    line = refusal(["--model", str(tmp_path)], tmp_path, capsys)
    assert "'bert'" in line and "qwen2_5_vl" in line


def test_damaged_weights(checkpoint, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("transformers.AutoProcessor", processors(Processor))
    (tmp_path / "config.json").write_text((checkpoint / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes(b"not weights")
    line = refusal(["--model", str(tmp_path)], tmp_path, capsys)
    assert "cannot be loaded" in line


def test_a_processor_that_refuses(checkpoint, monkeypatch, tmp_path, capsys):
    def refuse():
        raise ImportError("it needs\ntorchvision")

    monkeypatch.setattr("transformers.AutoProcessor", processors(refuse))
    line = refusal(["--model", str(checkpoint)], tmp_path, capsys)
    assert "it needs torchvision" in line
