"""The PARO demo, end to end on a small model; its heads; and every way in which it refuses."""

from __future__ import annotations

import builtins
import json

import pytest
import torch
from permattn import cli
from permattn.cli.demo_paro import run as command
from permattn.cli.demo_paro.constructed import Sizes, kind_of
from permattn.cli.demo_paro.heads import KINDS, frequencies, kernel_weights
from permattn.cli.demo_paro.latents import decode, encode, film
from permattn.cli.demo_paro.pipeline import build_demo_pipeline
from permattn.cli.demo_paro.quality import compare
from permattn.cli.demo_paro.runs import Variant, run
from permattn.core.axis_order import AXIS_ORDERS, cells_in_order
from permattn.models.diffusion import observe
from permattn.patterns.paro import ParoOrigin, ParoPlan, pack_bits
from PIL import Image

# Two layers leave room for six heads at least.
SIZES = Sizes(layers=2, kinds=KINDS[:6], ffn=128)
GRID = (5, 6, 10)


@pytest.fixture(scope="module")
def made():
    return build_demo_pipeline(GRID, steps=2, sizes=SIZES, dtype=torch.float32)


@pytest.fixture(scope="module")
def dense(made):
    return run(made.pipe, made.call(), Variant(), None)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One whole run: (exit code, folder)."""
    folder = tmp_path_factory.mktemp("paro")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "SIZES", SIZES)
        code = cli.main(
            [
                *("demo", "--paro", "--tokens", "300", "--steps", "2", "--density", "0.5,0.3"),
                *("--precision", "bf16,int8+int8,int4", "--out", str(folder)),
            ]
        )
    return code, folder


def refusal(argv, tmp_path, capsys) -> str:
    """Runs a demo that must refuse, and returns its one line."""
    out = tmp_path / "out"
    assert cli.main(["demo", "--paro", "--out", str(out), *argv]) == 2
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("permattn: ")]
    assert len(lines) == 1
    assert not out.exists()
    return lines[0]


def test_it_writes_picture_numbers_and_plans_and_nothing_else(finished):
    code, folder = finished
    assert code == 0
    plans = {"wan-50.paro", "wan-30.paro", "wan-30-fhw.paro"}
    assert {x.name for x in folder.iterdir()} == {"demo-paro.png", "demo-paro.json", *plans}
    width, height = Image.open(folder / "demo-paro.png").size
    assert width > 1500 and height > 1000


def test_its_numbers_hang_together(finished):
    report = json.loads((finished[1] / "demo-paro.json").read_text())
    assert "Constructed weights, not trained" in report["note"]
    assert report["tokens"] == torch.tensor(report["grid"]).prod() >= 300
    assert len(report["runs"]) == 2 * 3 + 1
    assert [r["ordered"] for r in report["runs"]].count(False) == 1
    dense = report["dense"]
    assert dense["runs"] == 2 and len(dense["step_ms_per_step"]) == 2 * report["steps"]
    for row in report["runs"]:
        assert row["calls"] == {"sparse": SIZES.layers * report["steps"], "dense": {}}
        assert 0 < row["attention_ms"] < row["step_ms"]
        assert row["attention_speedup"] == pytest.approx(
            dense["attention_ms"] / row["attention_ms"]
        )
        assert row["psnr"] > 20 and 0.5 < row["ssim"] <= 1 and 0.9 < row["cosine"] <= 1.000001
        size = finished[1] / f"wan-{100 * row['density']:g}{'' if row['ordered'] else '-fhw'}.paro"
        assert row["plan_bytes"] == size.stat().st_size
    by_name = {r["name"]: r for r in report["runs"]}
    assert by_name["50% bf16"]["psnr"] > by_name["30% int4"]["psnr"]
    assert by_name["30% bf16, not reordered"]["precision"] == "bf16"
    for head in report["heads"]:
        assert head["order"] in (*AXIS_ORDERS, "native") and 0 < head["kept"] <= 1


def test_all_blocks_give_the_dense_video(made, dense):
    blocks = -(-made.num_tokens // 64)
    mask = torch.ones(1, SIZES.layers, len(SIZES.kinds), blocks, blocks, dtype=torch.bool)
    shape = (SIZES.layers, len(SIZES.kinds))
    orders = torch.arange(shape[0] * shape[1]).view(shape) % 6
    plan = ParoPlan(
        grid=made.grid,
        text="none",
        axis_orders=orders.to(torch.uint8),
        packed_masks=pack_bits(mask),
        sigma_edges=(),
        empty_heads=torch.zeros(shape, dtype=torch.bool),
        origin=ParoOrigin("WanTransformer3DModel", 64, 2),
    )
    whole = run(made.pipe, made.call(), Variant(1.0, "fp32"), plan)
    assert whole.stats == {"sparse": 2 * SIZES.layers, "dense": {}}
    error = (whole.latents - dense.latents).norm() / dense.latents.norm()
    assert float(error) < 1e-4
    assert compare(whole.frames, whole.latents, dense.frames, dense.latents).psnr > 60


def test_the_model_denoises(made, dense):
    clean = made.clean()
    noisy = made.call()["latents"]
    scale = (noisy * clean).sum() / noisy.square().sum()
    before = (decode(noisy * scale) - decode(clean)).square().mean()
    after = (dense.frames - decode(clean)).square().mean()
    assert float(after) < 0.6 * float(before)


def test_runs_repeat_bit_by_bit(made, dense):
    again = run(made.pipe, made.call(), Variant(), None)
    assert torch.equal(again.latents, dense.latents)


@pytest.mark.parametrize("head", range(len(SIZES.kinds)), ids=lambda n: kind_of(SIZES, 0, n).name)
def test_heads_attend_along_their_axes(made, head):
    """Mean distance of attention per axis follows the widths that the head was built with."""
    seen = {}

    def keep(found):
        if found.layer == 0:
            seen.setdefault("map", torch.softmax(found.q[0] @ found.k[0].mT / 8, -1))

    with observe(made.pipe, keep), torch.no_grad():
        made.pipe(**made.call())
    places = torch.stack(
        torch.meshgrid(*(torch.arange(n) for n in made.grid), indexing="ij"), -1
    ).view(-1, 3)
    distance = (places[:, None] - places).abs().float()
    for axis, (width, size) in enumerate(zip(kind_of(SIZES, 0, head).widths, GRID, strict=True)):
        mean = float((seen["map"][head] * distance[..., axis]).sum(-1).mean())
        even = float(distance[..., axis].mean())
        if width <= 0.7:
            assert mean < 0.45 * even
        elif width >= size:
            assert mean > 0.55 * even


@pytest.mark.parametrize("width", [0.6, 1.1, 2.5, 6.0])
@pytest.mark.parametrize("axis", range(3), ids="FHW")
def test_kernels_follow_a_gaussian(axis, width):
    weights = kernel_weights(axis, width)
    assert bool((weights >= 0).all())
    near = torch.tensor([0.5, 1.0, 1.5], dtype=torch.double) * width
    fall = (weights * (1 - torch.cos(near[:, None] * frequencies(axis)))).sum(-1)
    torch.testing.assert_close(fall, (near / width) ** 2 / 2, rtol=0.35, atol=0.1)
    far = torch.arange(3 * width, 20.0, dtype=torch.double)[:, None]
    assert float((weights * (1 - torch.cos(far * frequencies(axis)))).sum(-1).min()) > 2.5


def test_latents_keep_what_a_video_looks_like():
    video = film(0, 2, 64, 96)
    latents = encode(video)
    assert latents.shape == (1, 16, 2, 8, 12)
    assert float((decode(latents) - video).square().mean().sqrt()) < 0.08
    torch.testing.assert_close(encode(decode(0.2 * latents)), 0.2 * latents, rtol=0, atol=1e-5)


def test_quality_of_the_same_video_is_exact():
    frames = film(1, 2, 32, 48)
    same = compare(frames, frames, frames, frames)
    assert same.psnr is None and same.ssim == pytest.approx(1) and same.cosine == pytest.approx(1)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--density", "0"], "--density 0: wants shares in (0, 1]"),
        (["--density", "0.5,1.5"], "--density 0.5,1.5: wants"),
        (["--density", "half"], "--density half: wants"),
        (["--precision", "int3"], "'int3' is unknown"),
        (["--precision", "fp16"], "the model runs in bf16"),
        (["--tokens", "100"], "--tokens 100: wants at least 256"),
        (["--device", "tpu"], "--device"),
        (["--dtype", "int8"], "--dtype"),
        (["--backend", "magic"], "--backend"),
        (["--video", "x.mp4"], "--paro brings its own"),
        (["--model", "x"], "--paro brings its own"),
    ],
    ids=lambda x: "_".join(x) if isinstance(x, list) else None,
)
def test_bad_input_is_one_line(argv, said, tmp_path, capsys):
    assert said in refusal(argv, tmp_path, capsys)


def test_a_missing_diffusers_says_what_to_install(tmp_path, capsys, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "diffusers":
            raise ImportError("No module named 'diffusers'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    assert "pip install 'permattn[cli]'" in refusal([], tmp_path, capsys)


def test_its_options_need_paro(capsys):
    assert cli.main(["demo", "--density", "0.3"]) == 2
    assert "--density 0.3: only with --paro" in capsys.readouterr().err


def test_an_interrupt_leaves_nothing(tmp_path, capsys, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "_measure", interrupted)
    out = tmp_path / "out"
    assert cli.main(["demo", "--paro", "--tokens", "300", "--out", str(out)]) == 130
    assert list(out.iterdir()) == []


@pytest.mark.parametrize(
    ("tokens", "frames", "want"), [(8000, None, (13, 19, 33)), (300, None, (6, 5, 10))]
)
def test_grids_hold_at_least_the_tokens(tokens, frames, want):
    grid = command.choose_grid(tokens, frames)
    assert grid == want and torch.tensor(grid).prod() >= tokens
    assert cells_in_order(grid, torch.tensor(3)).unique().numel() == torch.tensor(grid).prod()
