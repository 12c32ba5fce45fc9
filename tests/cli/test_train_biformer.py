"""`permattn train-biformer`: its data, its rivals, learning, going on after any end, refusals."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from permattn import cli
from permattn.cli.train_biformer import checkpoint
from permattn.cli.train_biformer import run as command
from permattn.cli.train_biformer.attention import DenseAttention, GatherRoutingAttention
from permattn.cli.train_biformer.network import build
from permattn.cli.train_biformer.photographs import (
    PHOTOS,
    TRAIN_BANDS,
    VALIDATION_BAND,
    PhotoCrops,
    load_photographs,
)
from permattn.cli.train_biformer.routed import routes_of
from permattn.cli.train_biformer.settings import KINDS, Settings, regions_of
from permattn.cli.train_biformer.trainer import Trainer, learning_rate
from permattn.models.vision import BiLevelRoutingAttention
from PIL import Image

TINY = {"depths": (1, 1, 1, 1), "dims": (16, 32, 32, 64), "head_dim": 16, "per_photo": 2}
FILES = {"checkpoint.pt", "train.json", "curves.png", "regions.png"}


@pytest.fixture(scope="module")
def photos():
    return load_photographs()


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """The command trains a network of seconds."""
    full = command.settings_of
    monkeypatch.setattr(command, "settings_of", lambda options: replace(full(options), **TINY))


def settings(**changes) -> Settings:
    given = {"kinds": ("ours",), "steps": 4, "size": 64, "regions": 4, "topks": (1, 4, 8)}
    return Settings(**{**given, "batch": 8, **TINY, **changes})


def argv(out, *more) -> list[str]:
    given = ["--steps", "4", "--size", "64", "--batch", "4", "--save-every", "3"]
    return ["train-biformer", *given, "--out", str(out), *more]


def refusal(words, capsys) -> str:
    """Runs a command that must refuse, and returns its one line."""
    assert cli.main(words) == 2
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("permattn: ")]
    assert len(lines) == 1
    return lines[0]


def same(a, b) -> bool:
    """Equal to the bit, tensors inside dicts and lists too."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def without_times(state: dict) -> dict:
    return {
        kind: {name: x for name, x in kept.items() if name != "seconds"}
        for kind, kept in state["runs"].items()
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """All four runs, not interrupted: the folder."""
    folder = tmp_path_factory.mktemp("train")
    full = command.settings_of
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "settings_of", lambda options: replace(full(options), **TINY))
        assert cli.main(argv(folder)) == 0
    return folder


def test_no_pixel_is_in_training_and_in_validation(photos):
    crops = PhotoCrops(photos, 64)
    draw = torch.Generator().manual_seed(0)
    for label, photo in enumerate(photos):
        height, width = photo.shape[1:]
        seen = torch.zeros(2, max(height, width), dtype=torch.bool)
        for bands, row in ((TRAIN_BANDS, 0), ((VALIDATION_BAND,), 1)):
            for band in bands * 60:
                box = crops.box(label, band, draw)
                assert 0 <= box.top <= height - box.side and 0 <= box.left <= width - box.side
                start = box.left if width >= height else box.top
                seen[row, start : start + box.side] = True
        trained, validated = (row.nonzero().flatten() for row in seen)
        assert (trained[:, None] - validated).abs().min() >= 0.02 * max(height, width)


def test_the_middle_of_a_photograph_is_of_validation(photos):
    crops = PhotoCrops(photos, 64)
    image, pixels = crops.validation_view(PHOTOS.index("retina.jpg"), 0.5)
    longest = max(photos[PHOTOS.index("retina.jpg")].shape)
    assert image.shape == (3, 64, 64) and pixels.shape[1] == pixels.shape[2]
    assert pixels.shape[1] <= (VALIDATION_BAND[1] - VALIDATION_BAND[0]) * longest


def test_batches_follow_from_seed_and_step_alone(photos):
    crops = PhotoCrops(photos, 64)
    images, labels = crops.batch(0, 5, 6)
    again, labels_again = crops.batch(0, 5, 6)
    assert torch.equal(images, again) and torch.equal(labels, labels_again)
    assert images.shape == (6, 3, 64, 64) and float(images.abs().max()) <= 0.55 / 0.25 + 1e-5
    assert not torch.equal(images, crops.batch(0, 6, 6)[0])
    assert not torch.equal(images, crops.batch(1, 5, 6)[0])
    held, labels = crops.validation(2)
    assert torch.equal(held, crops.validation(2)[0])
    assert torch.bincount(labels).tolist() == [2] * len(PHOTOS)


@pytest.mark.parametrize("topk", [1, 4, 9])
def test_gather_and_ours_are_one_function(topk):
    torch.manual_seed(0)
    ours = BiLevelRoutingAttention(32, 2, n_win=3, topk=topk, backend="reference").double()
    gather = GatherRoutingAttention(32, 2, 3, topk).double()
    gather.load_state_dict(ours.state_dict())
    x = torch.randn(2, 6, 9, 32, dtype=torch.float64, requires_grad=True)
    dout = torch.randn(2, 6, 9, 32, dtype=torch.float64)
    found = []
    for module in (ours, gather):
        out = module(x)
        grads = torch.autograd.grad(out, [x, *module.parameters()], dout)
        names = ["x", *(name for name, _ in module.named_parameters())]
        found.append({"out": out, **dict(zip(names, grads, strict=True))})
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=1e-10, atol=1e-12)


def test_gather_of_all_regions_is_dense():
    torch.manual_seed(0)
    gather = GatherRoutingAttention(32, 2, 2, 4).double()
    dense = DenseAttention(32, 2).double()
    dense.load_state_dict(gather.state_dict())
    x = torch.randn(2, 4, 6, 32, dtype=torch.float64)
    torch.testing.assert_close(gather(x), dense(x), rtol=1e-10, atol=1e-12)


def test_all_kinds_begin_with_the_same_weights():
    states = {kind: build(kind, settings(), 16).state_dict() for kind in KINDS}
    assert same(states["ours"], states["dense"]) and same(states["ours"], states["gather"])
    assert not same(states["ours"], states["nudged"])
    assert not same(states["ours"], build("ours", settings(seed=1), 16).state_dict())
    for name, weight in states["ours"].items():
        torch.testing.assert_close(states["nudged"][name], weight, rtol=2.4e-7, atol=0)


def test_it_learns(photos):
    trainer = Trainer(settings(steps=40, batch=16, peak_rate=4e-3), PhotoCrops(photos, 64))
    for _ in range(40):
        trainer.advance()
    losses = trainer.runs[0].losses
    # Guessing costs log(16) = 2.77; the mean of ten batches is good to about 0.05.
    assert sum(losses[-10:]) / 10 < 2.5 < sum(losses[:5]) / 5
    # Chance is one in sixteen.
    assert trainer.runs[0].evaluations[-1].accuracy > 0.2


def test_the_rate_warms_up_and_falls():
    s = settings(steps=100)
    rates = [learning_rate(step, s) for step in range(100)]
    assert rates[0] == pytest.approx(s.peak_rate / 10) and rates[9] == pytest.approx(s.peak_rate)
    assert rates[99] == pytest.approx(s.final_rate)
    assert all(a < b for a, b in pairwise(rates[:10]))
    assert all(a > b for a, b in pairwise(rates[10:]))


def test_routes_are_those_of_the_regions_means(photos):
    model = build("ours", settings(), 16)
    image = PhotoCrops(photos, 64).validation(1)[0][0]
    seen = {}
    first = model.stages[0][0].attn
    hook = first.register_forward_pre_hook(lambda _, x: seen.update(x=x[0]))
    routes = routes_of(model, image)
    hook.remove()
    assert [(r.stage, r.counts, r.topk) for r in routes] == [
        *((1, (4, 4), 1), (2, (4, 4), 4), (3, (4, 4), 8))
    ]
    q, k, _ = first.qkv(seen["x"]).chunk(3, -1)
    q, k = (x.unflatten(2, (4, 4)).unflatten(1, (4, 4)).mean((2, 4)).flatten(1, 2) for x in (q, k))
    assert torch.equal(routes[0].graph, (q @ k.mT)[0].argmax(-1, keepdim=True))
    for route in routes:
        torch.testing.assert_close(route.weights.sum(-1), torch.ones(16))
        assert bool((route.weights.diff(dim=-1) <= 1e-6).all())
    assert model.training and routes[0].region_at(0.99, 0.3) == 7


def test_it_writes_checkpoint_numbers_and_pictures_and_nothing_else(whole):
    assert {x.name for x in whole.iterdir()} == FILES
    for name in ("curves.png", "regions.png"):
        width, height = Image.open(whole / name).size
        assert width > 1200 and height > 800


def test_its_numbers_hang_together(whole):
    report = json.loads((whole / "train.json").read_text())
    assert [row["kind"] for row in report["runs"]] == list(KINDS)
    by_kind = {row["kind"]: row for row in report["runs"]}
    for row in report["runs"]:
        assert len(row["losses"]) == row["steps"] == 4
        assert row["evaluations"][-1]["step"] == 4
        assert row["time_over_ours"] == pytest.approx(
            row["seconds_per_step"] / by_kind["ours"]["seconds_per_step"]
        )
    # One function, one seed: until rounding has grown, one curve.
    gap = report["loss_gap_to_ours"]
    assert gap["gather"]["first_step"] < 1e-5 and gap["gather"]["largest"] < 1e-2
    assert gap["nudged"]["largest"] < 1e-2
    assert report["chance"] == 1 / 16 and report["validation_crops"] == 32


def test_an_interrupted_training_goes_on_to_the_same_bits(whole, tmp_path, monkeypatch, capsys):
    advance = Trainer.advance

    def interrupted(self):
        advance(self)
        if self.step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Trainer, "advance", interrupted)
    assert cli.main(argv(tmp_path)) == 130
    assert "interrupted" in capsys.readouterr().err
    assert {x.name for x in tmp_path.iterdir()} == {"checkpoint.pt"}
    kept = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert kept["step"] == 2
    monkeypatch.setattr(Trainer, "advance", advance)
    assert cli.main(argv(tmp_path, "--resume", "--no-picture")) == 0
    ended, want = (
        torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (tmp_path, whole)
    )
    assert ended["step"] == want["step"] == 4
    assert same(without_times(ended), without_times(want))
    assert {x.name for x in tmp_path.iterdir()} == {"checkpoint.pt", "train.json"}


def test_a_finished_training_is_shown_again(tmp_path, monkeypatch, capsys):
    words = argv(tmp_path, "--attention", "gather", "--json")
    assert cli.main(words) == 0
    first = json.loads(capsys.readouterr().out)
    # Without ours there are no routes to draw.
    assert {x.name for x in tmp_path.iterdir()} == FILES - {"regions.png"}
    monkeypatch.setattr(Trainer, "advance", lambda self: pytest.fail("it is at its end"))
    assert cli.main([*words, "--resume"]) == 0
    assert json.loads(capsys.readouterr().out) == first


def test_a_damaged_write_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    s = settings()
    checkpoint.save(tmp_path, s, {"step": 1, "runs": {}})

    def broken(content, path):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(command.UserError, match="cannot be written"):
        checkpoint.save(tmp_path, s, {"step": 2, "runs": {}})
    assert checkpoint.load(tmp_path, s)["step"] == 1
    assert {x.name for x in tmp_path.iterdir()} == {"checkpoint.pt"}


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--seed", "3"], "of other settings: seed 0 where 3 is asked for"),
        (["--batch", "5", "--size", "128"], "size 64 where 128 is asked for, batch 4 where 5"),
        (["--attention", "ours"], "kinds ['dense', 'gather', 'ours', 'nudged'] where ['ours']"),
    ],
    ids=["seed", "sizes", "kinds"],
)
def test_a_foreign_checkpoint_is_refused(whole, more, said, capsys):
    before = (whole / "checkpoint.pt").read_bytes()
    assert said in refusal(argv(whole, "--resume", *more), capsys)
    assert (whole / "checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"not a checkpoint", "damaged, or not a checkpoint"),
        ({"model": {}}, "no checkpoint of train-biformer"),
        (None, "has no checkpoint.pt"),
    ],
    ids=["garbage", "other", "missing"],
)
def test_what_is_no_checkpoint_is_refused(content, said, tmp_path, capsys):
    path = tmp_path / "checkpoint.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    assert said in refusal(argv(tmp_path, "--resume"), capsys)


def test_a_checkpoint_is_not_overwritten(whole, capsys):
    before = (whole / "checkpoint.pt").read_bytes()
    assert "add --resume to go on" in refusal(argv(whole), capsys)
    assert (whole / "checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--steps", "1"], "--steps 1: wants at least 2"),
        (["--batch", "1"], "--batch 1: wants at least 2"),
        (["--size", "100"], "--size 100: wants a multiple of 112"),
        (["--size", "0"], "--size 0: wants"),
        (["--save-every", "0"], "--save-every 0: wants at least 1"),
        (["--attention", "magic"], "--attention: wants ours, gather, dense or all, got 'magic'"),
        (["--device", "tpu"], "--device"),
        (["--backend", "magic"], "--backend: wants auto"),
        (["--seed", "-1"], "--seed"),
    ],
    ids=lambda x: "_".join(x) if isinstance(x, list) else None,
)
def test_bad_input_is_one_line(more, said, tmp_path, capsys):
    out = tmp_path / "out"
    line = refusal(argv(out, *more), capsys)
    assert said in line
    assert not out.exists()


@pytest.mark.parametrize(("size", "want"), [(112, 7), (64, 4), (224, 7), (448, 7), (128, 4)])
def test_sizes_choose_the_regions(size, want):
    regions, topks = regions_of(size)
    assert regions == want and max(topks) < regions**2 and (size // 16) % regions == 0
