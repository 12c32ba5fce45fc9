"""`permattn calibrate paro` and `permattn report --paro`, end to end; and how they refuse."""

from __future__ import annotations

import json

import pytest
import torch
from permattn import cli
from permattn.calibrate.paro import MeasureOptions, SelectOptions, check_plan, measure
from permattn.calibrate.paro.pipelines import check_prompts
from permattn.cli.calibrate.paro import parse_block, parse_steps
from permattn.cli.calibrate.paro_sheet import heads_to_draw
from permattn.cli.errors import UserError
from permattn.cli.paro_subject import PipeOptions, load_pipe
from permattn.paro_file import load_paro
from PIL import Image

pytest.importorskip("diffusers")

SIZE = ["--frames", "4", "--height", "64", "--width", "96", "--steps", "2", "--dtype", "fp32"]
CALIBRATE = ["calibrate", "paro", *SIZE, "--block", "16", "--density", "0.4"]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    """One whole calibration: its folder."""
    folder = tmp_path_factory.mktemp("paro")
    argv = ["--out", str(folder / "out"), "--resume", str(folder / "state")]
    assert cli.main([*CALIBRATE, *argv]) == 0
    return folder


def refusal(argv, tmp_path, capsys) -> str:
    """Runs a command that must refuse, and returns its one line."""
    assert cli.main([*argv, "--out", str(tmp_path / "out")]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "Traceback" not in captured.err
    lines = [x for x in captured.err.splitlines() if x.startswith("permattn: ")]
    assert len(lines) == 1
    return lines[0]


def test_it_writes_plan_numbers_and_picture(calibrated):
    out = calibrated / "out"
    assert {p.name for p in out.iterdir()} == {"plan.paro", "report.json", "report.png"}
    plan = load_paro(out / "plan.paro")
    assert plan.grid == (4, 4, 6) and plan.block == (16, 16) and plan.recall is not None
    assert abs(float(plan.density().mean()) - 0.4) < 0.02
    assert plan.origin.model_class == "WanTransformer3DModel" and plan.origin.fingerprint
    report = json.loads((out / "report.json").read_text())
    assert "Constructed weights" in report["note"]
    assert report["plan_bytes"] == (out / "plan.paro").stat().st_size
    assert len(report["layers"]) == plan.num_layers
    assert sum(report["orders"].values()) == plan.num_layers * plan.num_heads
    for row in report["layers"]:
        assert 0.0 < row["recall"] <= 1.0 and row["error"] >= 0.0
        assert row["free_density"] <= row["density"]
    width, height = Image.open(out / "report.png").size
    assert width > 1500 and height > 1500


def test_resumed_it_writes_the_same_plan_as_json_alone(calibrated, tmp_path, capsys):
    argv = ["--out", str(tmp_path), "--resume", str(calibrated / "state"), "--json"]
    assert cli.main([*CALIBRATE, *argv, "--plan-out", str(tmp_path / "x.paro")]) == 0
    captured = json.loads(capsys.readouterr().out)
    assert captured["plan"].endswith("x.paro")
    a, b = load_paro(calibrated / "out" / "plan.paro"), load_paro(tmp_path / "x.paro")
    assert torch.equal(a.packed_masks, b.packed_masks) and a.origin == b.origin


def test_another_search_does_not_use_the_folder(calibrated, tmp_path, capsys):
    argv = [*CALIBRATE, "--resume", str(calibrated / "state"), "--metric", "paper"]
    assert "made by a search with metric" in refusal(argv, tmp_path, capsys)


def test_a_report_from_the_file_alone(calibrated, tmp_path, capsys):
    plan = str(calibrated / "out" / "plan.paro")
    assert cli.main(["report", "--paro", plan, "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "axis orders" in out and "--model measures it again" in out
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["error"] is None and report["recall"] > 0.5
    assert Image.open(tmp_path / "report.png").size[0] > 1500


def test_a_report_measured_again_agrees_with_the_calibration(calibrated, tmp_path, capsys):
    plan = str(calibrated / "out" / "plan.paro")
    argv = ["--model", "constructed", "--steps", "2", "--dtype", "fp32", "--json"]
    assert cli.main(["report", "--paro", plan, *argv, "--out", str(tmp_path)]) == 0
    measured = json.loads(capsys.readouterr().out)
    before = json.loads((calibrated / "out" / "report.json").read_text())
    assert measured["recall"] == pytest.approx(before["recall"], abs=1e-4)
    assert measured["error"] == pytest.approx(before["error"], abs=1e-4)


def test_a_plan_of_full_density_errs_by_rounding(calibrated):
    options = PipeOptions(None, steps=2, height=64, width=96, frames=4)
    subject = load_pipe(options, device=torch.device("cpu"), dtype=torch.float32)
    found = measure(subject.pipe, subject.prompts, MeasureOptions(block=(16, 16), bins="shared"))
    half, whole = (found.plan(SelectOptions(density=d)) for d in (0.5, 1.0))
    check = check_plan(subject.pipe, subject.prompts[0], whole, maps=heads_to_draw(half))
    assert float(check.error.max()) < 1e-4 and float(check.recall.min()) > 0.9999
    assert len(check.maps) == 3
    for head in check.maps:
        torch.testing.assert_close(head.before.sum(), head.after.sum(), rtol=1e-4, atol=0)
        assert bool(head.mask.all())
    # The plan's own recall is the mean over all samples; a run at half density has about as much.
    measured = check_plan(subject.pipe, subject.prompts[0], half, num_steps=9).recall
    torch.testing.assert_close(measured, half.recall.mean(0), rtol=0, atol=1e-3)


REFUSED = {
    "density": (["--density", "0"], "density: wants a share"),
    "metric": (["--metric", "area"], "metric: wants one of"),
    "scope": (["--scope", "planet"], "scope: wants one of"),
    "bins": (["--bins", "weekly"], "bins: wants one of"),
    "many-bins": (["--bins", "9"], "bins: wants at most one per sampled step, 2, got 9"),
    "small-block": (["--block", "8"], "block: wants two sizes of at least 16"),
    "block-text": (["--block", "wide"], "--block: wants SIZE or QUERIESxKEYS"),
    "steps-text": (["--sampled-steps", "a"], "--sampled-steps: wants"),
    "steps-range": (["--sampled-steps", "0,7"], "sampled_steps: wants numbers from 0 to 2, got 7"),
    "recall": (["--min-recall", "0.9999", "--density", "0.2"], "min_recall: layer"),
    "prompt": (["--prompt", "a dog"], "--prompt: the constructed model takes no text"),
    "no-prompt": (["--model", "nowhere"], "--prompt: wants at least one text for --model"),
    "samples": (["--model", "x", "--prompt", "a", "--samples", "2"], "--samples: counts videos"),
    "height": (["--height", "72"], "--height: wants a multiple of 16"),
    "dtype": (["--dtype", "int3"], "--dtype: wants"),
    "backend": (["--backend", "fast"], "--backend: wants"),
    "model": (["--model", "no/such-model-here", "--prompt", "a"], "does not load"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_one_line(name, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    change, text = REFUSED[name]
    assert text in refusal([*CALIBRATE, *change], tmp_path, capsys)


def test_reports_refuse_what_is_no_plan(calibrated, tmp_path, capsys):
    report = ["report", "--paro"]
    assert "no such file" in refusal([*report, str(tmp_path / "none")], tmp_path, capsys)
    damaged = tmp_path / "damaged.paro"
    damaged.write_bytes((calibrated / "out" / "plan.paro").read_bytes()[:200])
    assert "damaged.paro" in refusal([*report, str(damaged)], tmp_path, capsys)
    plan = str(calibrated / "out" / "plan.paro")
    argv = [*report, plan, "--layers", "0"]
    assert "does not go with" in refusal(argv, tmp_path, capsys)
    assert "belong to --paro" in refusal(["report", "--steps", "3"], tmp_path, capsys)


def test_ctrl_c_ends_in_one_line_and_leaves_no_plan(tmp_path, capsys, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("permattn.cli.calibrate.paro.measure", interrupted)
    assert cli.main([*CALIBRATE, "--out", str(tmp_path)]) == 130
    assert "permattn: interrupted" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_texts_are_parsed():
    assert parse_block("64") == (64, 64) and parse_block("64x128") == (64, 128)
    assert parse_steps(None) is None and parse_steps("8") == 8 and parse_steps("0, 4") == (0, 4)
    for text in ("", "x64", "64x"):
        with pytest.raises(UserError):
            parse_block(text)


def test_prompts_are_texts_or_mappings():
    calls = check_prompts(["a", {"prompt_embeds": 1, "height": 2}], {"height": 1})
    assert calls == [{"height": 1, "prompt": "a"}, {"height": 2, "prompt_embeds": 1}]
    with pytest.raises(ValueError, match="prompts: wants at least one"):
        check_prompts([], {})
    with pytest.raises(TypeError, match="prompts: wants a list"):
        check_prompts("a dog", {})
    with pytest.raises(TypeError, match=r"prompts\[1\]: wants a text or a mapping"):
        check_prompts(["a", 3], {})  # type: ignore[list-item]
