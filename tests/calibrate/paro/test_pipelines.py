"""Calibration of real diffusers classes: guidance, text, padding, and the plan put to use."""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Any

import permattn as pa
import pytest
import torch
from permattn.calibrate.paro import (
    MeasureOptions,
    SelectOptions,
    calibrate,
    check_plan,
    measure,
    measure_runs,
)
from permattn.models.diffusion import describe, observe

pytest.importorskip("diffusers")
pipelines = importlib.import_module("models.diffusion.pipelines")
tiny = importlib.import_module("models.diffusion.tiny")

OPTIONS = MeasureOptions(block=(16, 16))
EMBEDDED = {
    "prompt": None,
    "prompt_embeds": pipelines._embedding(0),
    "negative_prompt_embeds": pipelines._embedding(1),
}
CALL: dict[str, Any] = {
    "height": 64,
    "width": 96,
    "num_frames": 13,
    "num_inference_steps": 3,
    "guidance_scale": 3.0,
}


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module", params=["wan", "cogvideox"])
def pipe(request) -> Any:
    return quiet(getattr(pipelines, f"{request.param}_pipeline")(tiny.build(request.param)))


def test_a_calibrated_plan_runs_and_half_the_blocks_keep_more_than_half(pipe):
    plan = calibrate(pipe, [EMBEDDED], density=0.5, measuring=OPTIONS, **CALL)
    facts = describe(pipe)
    assert (plan.num_layers, plan.num_heads) == (facts.num_layers, facts.num_heads)
    assert plan.text == facts.text and plan.origin.fingerprint == facts.fingerprint
    assert plan.origin.num_steps == 3 and plan.origin.scheduler == type(pipe.scheduler).__name__
    assert plan.origin.text_tokens == (tiny.NUM_TEXT if plan.text != "none" else 0)
    assert float(plan.recall.mean()) > 0.5
    with pa.apply_paro(pipe, plan):
        pipe(**EMBEDDED, **CALL, output_type="latent")


def test_two_calls_give_the_same_plan(pipe):
    first, second = (
        calibrate(pipe, [EMBEDDED], density=0.4, measuring=OPTIONS, **CALL) for _ in range(2)
    )
    assert torch.equal(first.packed_masks, second.packed_masks)
    assert torch.equal(first.recall, second.recall) and first.origin == second.origin


def test_cond_and_uncond_are_samples_of_one_step(pipe):
    both = measure(pipe, [EMBEDDED], replace(OPTIONS, bins="per_step"), **CALL)
    assert both.means.shape[0] == 3 and both.num_steps == 3
    counts = {cell.count for cell in both.means._cells.values()}
    assert counts == {2}


def test_a_full_plan_is_exact_and_a_foreign_one_is_refused(pipe):
    found = measure(pipe, [EMBEDDED], replace(OPTIONS, bins="shared"), **CALL)
    check = check_plan(pipe, EMBEDDED, found.plan(SelectOptions(density=1.0)), **CALL)
    assert float(check.error.max()) < 1e-4
    plan = found.plan(SelectOptions(density=0.5))
    with pytest.raises(ValueError, match="plan: was made for a grid"):
        check_plan(pipe, EMBEDDED, plan, **{**CALL, "width": 64})
    other = replace(plan, origin=replace(plan.origin, head_dim=7), validate=False)
    with pytest.raises(ValueError, match="head_dim = 7"):
        check_plan(pipe, EMBEDDED, other, **CALL)


def test_another_resolution_in_the_second_prompt_is_refused(pipe):
    prompts = [EMBEDDED, {**EMBEDDED, "width": 64}]
    with pytest.raises(ValueError, match=r"prompts\[1\]: runs on a grid of"):
        calibrate(pipe, prompts, measuring=OPTIONS, **CALL)


@pytest.mark.parametrize("name", ["hunyuan_video", "flux", "ltx", "qwen_image"])
def test_every_family_is_measured_without_a_pipeline(name):
    """The core takes any run; padded text is seen by nobody, so its mass goes nowhere."""
    case = tiny.build(name)
    facts = describe(case.model)

    def run(number, on_seen):
        with observe(case.model, on_seen):
            case.run()

    found = measure_runs(run, 1, facts, OPTIONS)
    assert found.grid == case.grid
    heads = [found.means.mean(0, layer).sum((-2, -1)) for layer in range(facts.num_layers)]
    vision = torch.stack(heads) / (case.grid[0] * case.grid[1] * case.grid[2])
    assert float(vision.max()) <= 1 + 1e-5
    assert (float(vision.min()) < 0.999) == (found.text_tokens > 0)
    plan = found.plan(SelectOptions(density=0.5))
    assert float(plan.recall.min()) > 0.4


def test_native_cells_make_the_order_of_the_tokens_a_candidate():
    case = tiny.build("wan")
    cells = torch.randperm(
        case.grid[0] * case.grid[1] * case.grid[2], generator=torch.Generator().manual_seed(0)
    )

    def run(number, on_seen):
        with observe(case.model, on_seen):
            case.run()

    options = replace(OPTIONS, native_cells=cells)
    found = measure_runs(run, 1, describe(case.model), options)
    plan = found.plan(SelectOptions(density=0.5))
    assert plan.native_cells is not None and int(plan.axis_orders.max()) <= 6
    # Tokens come in raster order in truth, so the native order suits heads that orders of
    # shuffled cells do not.
    assert bool((plan.axis_orders == 6).any())


def test_an_empty_head_sees_text_alone():
    case = tiny.build("cogvideox")
    pipe = quiet(pipelines.cogvideox_pipeline(case))
    selection = SelectOptions(empty_below=1.0)
    plan = calibrate(pipe, [EMBEDDED], density=0.5, measuring=OPTIONS, selection=selection, **CALL)
    assert bool(plan.empty_heads.all()) and int(plan.num_blocks.sum()) == 0
    assert 0.0 < float(plan.recall.mean()) < 0.9
