"""`permattn calibrate` and `permattn report`, end to end on a small model; and how they refuse."""

from __future__ import annotations

import json

import pytest
from permattn import cli
from permattn.cli import prompts
from permattn.cli.calibrate.run import parse_budget, parse_layers
from permattn.cli.demo import video
from permattn.cli.demo.circuits import Sizes
from permattn.cli.errors import UserError
from permattn.models import PrefillConfig
from PIL import Image

SIZES = Sizes(
    mlp=128, layers=2, heads=4, kv_heads=2, vocab=256, vision_hidden=64, vision_depth=1, num_spots=2
)
SMALL = ["--tokens", "1300", "--dtype", "fp32"]
SEARCH = [
    *["calibrate", "mminference", *SMALL, "--density", "0.7", "--rounds", "1"],
    *["--candidate", "a_shape 128+1024", "--candidate", "auto"],
]


@pytest.fixture(autouse=True)
def small_model(monkeypatch):
    monkeypatch.setattr(prompts, "SIZES", SIZES)


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """One whole search: its folder."""
    folder = tmp_path_factory.mktemp("calibrate")
    argv = ["--out", str(folder / "out"), "--resume", str(folder / "state"), "--samples", "2"]
    argv += ["--default-out", str(folder / "default.json")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prompts, "SIZES", SIZES)
        assert cli.main([*SEARCH, *argv]) == 0
    return folder


def refusal(argv, tmp_path, capsys) -> str:
    """Runs a command that must refuse, and returns its one line."""
    assert cli.main([*argv, "--out", str(tmp_path / "out")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = [x for x in captured.err.splitlines() if x.startswith("permattn: ")]
    assert len(lines) == 1 and "Traceback" not in captured.err
    return lines[0]


def test_it_writes_config_numbers_and_picture(searched):
    assert {p.name for p in (searched / "out").iterdir()} == {
        "config.json",
        "report.json",
        "report.png",
    }
    config = PrefillConfig.from_json(searched / "out" / "config.json")
    assert config.num_layers == 2 and config.num_heads == 4 and len(config.layers) == 2
    assert "constructed weights, not a released checkpoint" in config.base_model
    assert "2 prompts of" in config.base_model
    report = json.loads((searched / "out" / "report.json").read_text())
    assert len(report["heads"]) == 8 and len(report["samples"]) == 2
    assert {h["name"] for h in report["heads"]} <= {"a_shape 128+1024", "auto"}
    assert report["shared"]["mean_errors"].keys() == {"a_shape 128+1024", "auto"}
    width, height = Image.open(searched / "out" / "report.png").size
    assert width > 1500 and height > 700


def test_the_default_fits_any_size(searched):
    default = PrefillConfig.from_json(searched / "default.json")
    assert default.num_heads is None and not default.layers
    assert default.model_type == "qwen2_5_vl"


def test_resume_prints_the_same_as_json_alone(searched, tmp_path, capsys):
    argv = ["--out", str(tmp_path), "--resume", str(searched / "state"), "--samples", "2"]
    assert cli.main([*SEARCH, *argv, "--json", "--config-out", str(tmp_path / "c" / "x.json")]) == 2
    assert "--config-out" in capsys.readouterr().err
    config = tmp_path / "mine.json"
    assert cli.main([*SEARCH, *argv, "--json", "--config-out", str(config)]) == 0
    report = json.loads(capsys.readouterr().out)
    before = json.loads((searched / "out" / "report.json").read_text())
    assert report["heads"] == before["heads"]
    assert PrefillConfig.from_json(config) == PrefillConfig.from_json(
        searched / "out" / "config.json"
    )


def test_ctrl_c_keeps_what_was_measured(tmp_path, monkeypatch, capsys):
    from permattn.cli.calibrate import run

    seen = []

    def interrupt(self, stage: str, done: float) -> None:
        seen.append(done)
        if done > 0.6:
            raise KeyboardInterrupt

    monkeypatch.setattr(run._Bars, "__call__", interrupt)
    argv = ["--out", str(tmp_path / "out"), "--resume", str(tmp_path / "state")]
    assert cli.main([*SEARCH, *argv]) == 130
    assert capsys.readouterr().err.endswith("permattn: interrupted\n")
    names = sorted(p.name for p in (tmp_path / "state").iterdir())
    assert names == ["arguments.json", "heads-sample0-layer0.json", "made0.mp4"]
    assert list((tmp_path / "out").iterdir()) == []


def test_a_report_of_the_config(searched, tmp_path, capsys):
    argv = ["report", *SMALL, "--out", str(tmp_path), "--layers", "1"]
    assert cli.main([*argv, "--config", str(searched / "out" / "config.json")]) == 0
    text = capsys.readouterr().out
    assert "output error" in text and "recall" in text and "report.png" in text
    report = json.loads((tmp_path / "report.json").read_text())
    found = {(h["layer"], h["head"]): h for h in report["heads"]}
    assert sorted(found) == [(1, h) for h in range(4)]
    for head in json.loads((searched / "out" / "report.json").read_text())["heads"]:
        if head["layer"] == 1:
            mine = found[1, head["head"]]
            assert mine["pattern"] == head["pattern"]
            assert 0.0 <= mine["error"] < 1.0 and 0.0 < mine["recall"] <= 1.0 + 1e-6
    assert {p.name for p in tmp_path.iterdir()} == {"report.json", "report.png"}
    width, height = Image.open(tmp_path / "report.png").size
    assert height > width > 1500


BAD = {
    "budget-text": (["--budget", "many"], "SINK+LOCAL"),
    "budget-over-length": (["--budget", "1024+4096"], "holds all of the"),
    "density": (["--density", "1.5"], "density in"),
    "layers-text": (["--layers", "a-b"], "--layers"),
    "layers-missing": (["--density", "0.7", "--layers", "7"], "layers: wants some of 0, 1"),
    "candidate": (["--density", "0.7", "--candidate", "fancy"], "fancy"),
    "video": (["--density", "0.7", "--video", "none.mp4"], "no such file"),
    "constructed": (["--model", "constructed:gpt2"], "constructed are qwen2_5_vl"),
    "device": (["--device", "cuda:99"], "CUDA devices"),
    "backend": (["--backend", "cudnn"], "--backend"),
}


@pytest.mark.parametrize("argv, hint", BAD.values(), ids=BAD.keys())
def test_bad_input_of_calibrate(argv, hint, tmp_path, capsys):
    line = refusal(["calibrate", "mminference", "--tokens", "300", *argv], tmp_path, capsys)
    assert hint in line


def test_a_state_of_another_search(searched, tmp_path, capsys):
    line = refusal([*SEARCH, "--resume", str(searched / "state")], tmp_path, capsys)
    assert "made by a search with samples" in line and "another folder" in line


def test_a_corrupt_video(tmp_path, capsys):
    path = tmp_path / "bad.mp4"
    path.write_bytes(b"\0" * 5000)
    argv = ["calibrate", "mminference", "--density", "0.5", "--video", str(path)]
    assert "cannot be decoded" in refusal(argv, tmp_path, capsys)


def test_a_folder_without_a_checkpoint(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    argv = ["calibrate", "mminference", "--density", "0.5", "--model", str(tmp_path / "empty")]
    assert "no readable checkpoint" in refusal(argv, tmp_path, capsys)


def test_an_unknown_family(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    line = refusal(["report", "--model", str(tmp_path)], tmp_path, capsys)
    assert "'bert'" in line


def test_samples_need_videos(tmp_path, capsys):
    path = tmp_path / "own.mp4"
    video.encode(path, num_frames=8, width=64, height=64)
    argv = ["calibrate", "mminference", "--video", str(path), "--samples", "3"]
    assert "one sample per --video" in refusal(argv, tmp_path, capsys)


REPORT_BAD = {
    "config-missing": (["--config", "none.json"], "cannot be read"),
    "layers": (["--layers", "x"], "--layers"),
    "dtype": (["--dtype", "int3"], "bf16, fp16 or fp32"),
}


@pytest.mark.parametrize("argv, hint", REPORT_BAD.values(), ids=REPORT_BAD.keys())
def test_bad_input_of_report(argv, hint, tmp_path, capsys):
    assert hint in refusal(["report", "--tokens", "300", *argv], tmp_path, capsys)


def test_a_config_for_another_model(tmp_path, capsys):
    PrefillConfig(num_heads=12).to_json(tmp_path / "c.json")
    argv = ["report", *SMALL, "--config", str(tmp_path / "c.json")]
    assert "num_heads" in refusal(argv, tmp_path, capsys)


def test_another_class_can_be_constructed(tmp_path, capsys):
    argv = [*SEARCH, "--model", "constructed:qwen2_vl", "--layers", "0", "--out", str(tmp_path)]
    assert cli.main([*argv, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model_class"] == "Qwen2VLForConditionalGeneration"
    made_on = PrefillConfig.from_json(tmp_path / "config.json").base_model
    assert "constructed weights" in made_on


@pytest.mark.parametrize(
    "model, pixels",
    [
        (None, "pixel_values_videos"),
        ("constructed:qwen3_vl", "pixel_values_videos"),
        ("constructed:internvl", "pixel_values"),
    ],
    ids=["default", "qwen3_vl", "internvl"],
)
def test_made_videos_differ_and_share_the_model(model, pixels):
    from permattn.cli.prompts import PromptOptions, prepare, progress_bar
    from rich.console import Console
    from torch import device, float32

    options = PromptOptions(model, (), 2, 300, None)
    with progress_bar(Console(quiet=True)) as progress:
        first, second = prepare(options, progress, device=device("cpu"), dtype=float32)
    assert first.model is second.model
    a, b = (s.inputs[pixels] for s in (first, second))
    assert a.shape == b.shape and not bool((a == b).all())


@pytest.mark.parametrize(
    "text, layers", [("0", (0,)), ("0,4-6", (0, 4, 5, 6)), (None, None)], ids=str
)
def test_layer_ranges(text, layers):
    assert parse_layers(text) == layers


def test_budget_text():
    assert parse_budget("128+512", None).local == 512
    with pytest.raises(UserError, match="SINK"):
        parse_budget("128", 0.1)
