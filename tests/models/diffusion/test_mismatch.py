"""Bad input: one clear error, or one warning and exact dense attention."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.attention_processor import AttnProcessor2_0
from permattn.core import QuantSpec
from permattn.models.diffusion import apply_paro, observe
from permattn.paro_file import save_paro
from permattn.patterns.paro import ParoPlan
from torch import nn

from .pipelines import run, wan_pipeline
from .tiny import Case, plan_for


def other_origin(case: Case, **fields: Any) -> ParoPlan:
    plan = plan_for(case)
    return replace(plan, origin=replace(plan.origin, **fields), validate=True)


def fewer(case: Case, layers: slice, heads: slice) -> ParoPlan:
    plan = plan_for(case)
    return plan_for(
        case,
        axis_orders=plan.axis_orders[layers, heads],
        packed_masks=plan.packed_masks[:, layers, heads],
        empty_heads=plan.empty_heads[layers, heads],
    )


UNFIT: dict[str, tuple[Callable[[Case], ParoPlan], str]] = {
    "layers": (
        lambda case: fewer(case, slice(1), slice(None)),
        "number of layers: the plan was made for 1, got 2",
    ),
    "heads": (
        lambda case: fewer(case, slice(None), slice(3)),
        "number of heads: the plan was made for 3, got 4",
    ),
    "head-dim": (
        lambda case: other_origin(case, head_dim=64),
        "head_dim: the plan was made for 64, got 12",
    ),
    "class": (
        lambda case: other_origin(case, model_class="CogVideoXTransformer3DModel"),
        "the plan was made for CogVideoXTransformer3DModel, got WanTransformer3DModel",
    ),
    "text": (
        lambda case: plan_for(case, text="prefix"),
        "place of the text: the plan was made for prefix, got none",
    ),
}
AT_THE_CALL: dict[str, tuple[Callable[[Case], ParoPlan], str]] = {
    "grid": (
        lambda case: plan_for(case, grid=(4, 6, 4)),
        r"grid: the plan was made for \(4, 6, 4\) tokens .* got \(4, 4, 6\)",
    ),
    "steps": (
        lambda case: plan_for(case, num_steps=30),
        "num_inference_steps: the plan was made for 30, got 4; pass match_steps=False",
    ),
}


@pytest.mark.parametrize("what", list(UNFIT))
def test_a_plan_for_another_model_is_refused(what: str, case_of):
    case = case_of("wan")
    make, message = UNFIT[what]
    with pytest.raises(ValueError, match=message):
        apply_paro(case.model, make(case))
    assert not case.model._forward_pre_hooks


@pytest.mark.parametrize("what", list(AT_THE_CALL))
def test_a_plan_for_another_call_is_refused_at_it(what: str, case_of):
    case = case_of("wan")
    make, message = AT_THE_CALL[what]
    pipe = wan_pipeline(case)
    with apply_paro(pipe, make(case)), pytest.raises(ValueError, match=message):
        run(pipe)


@pytest.mark.parametrize("what", [*UNFIT, *AT_THE_CALL])
def test_or_it_runs_dense_and_says_so_once(what: str, case_of):
    case = case_of("wan")
    make, _ = (UNFIT | AT_THE_CALL)[what]
    pipe = wan_pipeline(case)
    want = run(pipe)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with apply_paro(pipe, make(case), on_mismatch="dense") as handle:
            got = run(pipe)
            run(pipe)
    assert torch.equal(got, want)
    assert len([w for w in caught if "runs dense" in str(w.message)]) == 1
    assert handle.stats["sparse"] == 0
    assert sum(handle.stats["dense"].values()) == 32


def test_match_steps_false_goes_by_noise_level(case_of):
    case = case_of("wan")
    pipe = wan_pipeline(case)
    with apply_paro(pipe, plan_for(case, num_steps=30), match_steps=False) as handle:
        run(pipe)
    assert handle.stats == {"sparse": 16, "dense": {}}


def test_other_weights_warn(own_case):
    case = own_case("wan")
    plan = plan_for(case)
    with torch.no_grad():
        case.model.blocks[0].attn1.to_q.weight += 0.01
    with pytest.warns(UserWarning, match="calibrated on other weights"):
        handle = apply_paro(case.model, plan)
    case.run()
    assert handle.stats["sparse"] == 2


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"dense_layers": [2]}, ValueError, "dense_layers: wants numbers from 0 to 1, got 2"),
        ({"dense_layers": ["1"]}, TypeError, "dense_layers: wants integers, got '1'"),
        ({"dense_first_steps": -1}, ValueError, "dense_first_steps: wants >= 0, got -1"),
        ({"dense_first_steps": 0.3}, TypeError, "dense_first_steps: wants an integer, got 0.3"),
        ({"on_mismatch": "warn"}, ValueError, "on_mismatch: wants 'raise' or 'dense'"),
        ({"match_steps": 1}, TypeError, "match_steps: wants True or False, got 1"),
        ({"backend": "cuda9"}, ValueError, "backend: wants one of .* got 'cuda9'"),
        ({"quant": 8}, TypeError, "quant: wants a QuantSpec, a name or None, got int"),
        ({"quant": "int2"}, ValueError, "quant: wants 'none' or one of"),
        ({"quant": "int8"}, ValueError, "must divide the plan's blocks of 16, got 64"),
        ({"quant": QuantSpec("int8")}, ValueError, "must divide the plan's blocks of 16, got 64"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_bad_options(arguments: dict, error: type, message: str, case_of):
    case = case_of("wan")
    with pytest.raises(error, match=message):
        apply_paro(case.model, plan_for(case), **arguments)


def test_bad_plans_and_models(case_of, tmp_path):
    case = case_of("wan")
    plan = plan_for(case)
    with pytest.raises(FileNotFoundError):
        apply_paro(case.model, tmp_path / "nothing.paro")
    with pytest.raises(TypeError, match="plan: wants a ParoPlan or a path, got int"):
        apply_paro(case.model, 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"plan: wants names out of \['transformer'\]"):
        apply_paro(case.model, {"unet": plan})
    with pytest.raises(TypeError, match="wants a diffusers pipeline with a transformer"):
        apply_paro("wan", plan)
    with pytest.raises(ValueError, match=r"transformer: wants one of .*WanTransformer3DModel"):
        apply_paro(nn.Linear(2, 2), plan)
    with pytest.raises(ValueError, match="component: wants one of"):
        next(observe(wan_pipeline(case), print, component="unet").gen)
    save_paro(plan, tmp_path / "plan.paro")
    with apply_paro(case.model, tmp_path / "plan.paro") as handle:
        case.run()
    assert handle.stats["sparse"] == 2


def test_twice_is_refused(case_of):
    case = case_of("wan")
    with apply_paro(case.model, plan_for(case)):
        with pytest.raises(ValueError, match="in use by permattn already"):
            apply_paro(case.model, plan_for(case))
        with pytest.raises(ValueError, match="in use by permattn already"), observe(case.model, id):
            pass
        case.run()
    apply_paro(case.model, plan_for(case)).remove()


def test_unknown_processors_are_refused(own_case):
    case = own_case("wan")
    case.model.blocks[1].attn1.set_processor(AttnProcessor2_0())
    with pytest.raises(ValueError, match=r"processors WanAttnProcessor .*got AttnProcessor2_0"):
        apply_paro(case.model, plan_for(case))
    assert not case.model._forward_pre_hooks


def test_tokens_that_are_no_grid_are_refused(case_of):
    case = case_of("qwen_image")
    two = [[(1, 4, 12), (1, 4, 12)]] * 2
    with apply_paro(case.model, plan_for(case)), pytest.raises(ValueError, match="one image"):
        case.run(img_shapes=two)
    flux = case_of("flux")
    shuffled = flux.inputs["img_ids"].flip(0)
    with apply_paro(flux.model, plan_for(flux)), pytest.raises(ValueError, match="raster order"):
        flux.run(img_ids=shuffled)
    with observe(flux.model, id), pytest.raises(ValueError, match="raster order"):
        flux.run(img_ids=shuffled)


def test_subclasses_are_of_the_family(case_of):
    case = case_of("flux")

    class Tuned(FluxTransformer2DModel):
        pass

    tuned = Tuned(**case.model.config)
    tuned.load_state_dict(case.model.state_dict())
    own = Case(tuned.eval(), case.inputs, case.grid, case.num_text)
    with apply_paro(tuned, plan_for(own, density=1.0)):
        assert (own.run() - case.run()).abs().max() <= 1e-5


def test_copies_are_refused_while_applied(own_case):
    import copy

    case = own_case("wan")
    with (
        apply_paro(case.model, plan_for(case)),
        pytest.raises(TypeError, match="cannot be pickled or deep-copied"),
    ):
        copy.deepcopy(case.model)
    copy.deepcopy(case.model)


def test_without_diffusers_one_line_says_what_to_install():
    code = (
        "import sys; sys.modules['diffusers'] = None\n"
        "import permattn.models.diffusion as d\n"
        "try: d.apply_paro\n"
        "except ImportError as e: print(e)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "pip install 'permattn[diffusers]'" in done.stdout
