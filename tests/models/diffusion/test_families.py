"""Every family: dense stays exact, sparse is what bits and orders say, models are restored."""

from __future__ import annotations

import diffusers
import pytest
import torch
from permattn.core import QuantSpec, TokenGrid
from permattn.models.diffusion import apply_paro, describe, observe
from permattn.models.diffusion.families import family_of
from permattn.testing import assert_within

from .reference import masked_sdpa
from .tiny import BUILDERS, HEADS, NUM_TEXT, fill, plan_for, wan

FAMILIES = pytest.mark.parametrize("name", list(BUILDERS))
TEXT = {"cogvideox": "prefix", "flux": "prefix", "qwen_image": "prefix", "hunyuan_video": "suffix"}


@FAMILIES
def test_observing_changes_nothing_and_sees_every_layer(name: str, case_of):
    case = case_of(name)
    want = case.run()
    seen = []
    with observe(case.model, seen.append):
        got = case.run()
    assert torch.equal(got, want)
    assert [x.layer for x in seen] == [0, 1]
    start = NUM_TEXT if TEXT.get(name) == "prefix" else 0
    for x in seen:
        assert x.grid == TokenGrid(start, *case.grid)
        assert x.num_tokens == 96 + case.num_text
        assert x.q.shape == x.k.shape == x.v.shape == (2, HEADS, x.num_tokens, x.q.shape[3])
        assert x.sigma == pytest.approx(0.9)
        assert (x.step, x.num_steps, x.context) == (0, None, None)


@pytest.mark.parametrize(
    ("name", "rows"), [("hunyuan_video", [8, 5]), ("qwen_image", [6, 8]), ("flux", None)]
)
def test_padded_text_is_known(name: str, rows: list[int] | None, case_of):
    case, seen = case_of(name), []
    with observe(case.model, seen.append):
        case.run()
    for x in seen:
        assert (None if x.text_visible is None else x.text_visible.sum(1).tolist()) == rows


@FAMILIES
def test_facts(name: str, case_of):
    model = case_of(name).model
    facts = describe(model)
    assert facts.model_class == type(model).__name__
    assert (facts.num_layers, facts.num_heads) == (2, HEADS)
    assert facts.head_dim == model.config.attention_head_dim
    assert facts.text == TEXT.get(name, "none")
    assert facts.fingerprint == describe(model).fingerprint != ""


@FAMILIES
def test_all_true_masks_are_dense(name: str, case_of):
    case = case_of(name)
    want = case.run()
    with apply_paro(case.model, plan_for(case, density=1.0)) as handle:
        got = case.run()
    # Two layers of attention, each within float32 rounding of torch's.
    assert (got - want).abs().max() <= 1e-5
    assert handle.stats == {"sparse": 2, "dense": {}}


@pytest.mark.parametrize("bin", [0, 1])
@FAMILIES
def test_sparse_is_what_bits_and_orders_say(name: str, bin: int, case_of, monkeypatch):
    case = case_of(name)
    plan = plan_for(case)
    timestep = case.inputs["timestep"] * (1.0, 0.25)[bin]
    dense = case.run(timestep=timestep)
    made = {}
    for exact in (False, True):
        sdpa, layers = masked_sdpa(case, plan, bin, exact=exact)
        with monkeypatch.context() as patch:
            patch.setattr(torch.nn.functional, "scaled_dot_product_attention", sdpa)
            made[exact] = case.run(timestep=timestep)
        assert layers == [0, 1]
    with apply_paro(case.model, plan):
        got = case.run(timestep=timestep)
    assert_within(got, made[False], made[True], name)
    assert (got - dense).abs().max() > 1e-3


@FAMILIES
def test_removing_restores_everything(name: str, case_of):
    case = case_of(name)
    want = case.run()
    model = case.model
    processors, fields = dict(model.attn_processors), dict(model.__dict__)
    modules = {m: set(m.__dict__) for m in model.modules()}
    handle = apply_paro(model, plan_for(case))
    case.run()
    handle.remove()
    handle.remove()
    assert all(model.attn_processors[k] is processors[k] for k in processors)
    assert {m: set(m.__dict__) for m in model.modules()} == modules
    assert model.__dict__.keys() == fields.keys()
    assert not model._forward_pre_hooks
    assert torch.equal(case.run(), want)


@pytest.mark.parametrize(
    "quant",
    [
        QuantSpec("int8", q_rows_per_scale=16, kv_rows_per_scale=16, smooth_k=True),
        QuantSpec("int8", "int8", q_rows_per_scale=16, kv_rows_per_scale=16),
    ],
    ids=["int8", "int8-int8"],
)
@pytest.mark.parametrize("name", ["wan", "hunyuan_video"])
def test_quantised_attention_is_near(name: str, quant: QuantSpec, case_of):
    case = case_of(name)
    plan = plan_for(case)
    with apply_paro(case.model, plan):
        want = case.run()
    with apply_paro(case.model, plan, quant=quant) as handle:
        got = case.run()
    assert handle.stats["sparse"] == 2
    error = (got - want).norm() / want.norm()
    assert 0 < error < 0.02


@pytest.mark.parametrize("name", ["wan", "flux"])
def test_inference_mode(name: str, case_of):
    case = case_of(name)
    plan = plan_for(case)
    with apply_paro(case.model, plan):
        want = case.run()
        with torch.inference_mode():
            fresh = {k: x.clone() if torch.is_tensor(x) else x for k, x in case.inputs.items()}
            for _ in range(2):
                assert torch.equal(case.run(**fresh), want)


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", ["wan", "cogvideox", "qwen_image"])
def test_autocast(name: str, compiled: bool, own_case):
    case = own_case(name)
    with apply_paro(case.model, plan_for(case)):
        want = case.run()
    with torch.autocast("cpu", torch.bfloat16):
        dense = case.run()
        plan = plan_for(case)
        whole = plan_for(case, density=1.0)
        if compiled:
            torch._dynamo.reset()
            for block in case.model.get_submodule(family_of(case.model).blocks[0]):
                block.compile(backend="eager")
        with apply_paro(case.model, whole):
            near_dense = case.run()
        with apply_paro(case.model, plan) as handle:
            near = case.run()
    torch._dynamo.reset()
    assert handle.stats == {"sparse": 2, "dense": {}}
    # A few roundings to 8 bits in each of two layers.
    assert (near_dense - dense).norm() <= 0.02 * dense.norm()
    assert (near - want).norm() <= 0.02 * want.norm()


def test_gradients_flow(case_of):
    case = case_of("wan")
    with apply_paro(case.model, plan_for(case, density=1.0)):
        x = case.inputs["hidden_states"].clone().requires_grad_()
        case.model(**(case.inputs | {"hidden_states": x}), return_dict=False)[0].sum().backward()
    assert x.grad is not None
    y = case.inputs["hidden_states"].clone().requires_grad_()
    case.model(**(case.inputs | {"hidden_states": y}), return_dict=False)[0].sum().backward()
    case.model.zero_grad()
    assert (x.grad - y.grad).abs().max() <= 1e-4 * y.grad.abs().max()


@pytest.mark.parametrize("name", ["vace", "skyreels"])
def test_relatives_of_wan(name: str):
    torch.manual_seed(0)
    shared = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": HEADS,
        "attention_head_dim": 12,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 16,
        "freq_dim": 16,
        "ffn_dim": 32,
        "num_layers": 2,
        "rope_max_seq_len": 32,
    }
    case = wan()
    if name == "vace":
        case.model = diffusers.WanVACETransformer3DModel(
            **shared, vace_layers=[0, 1], vace_in_channels=6
        )
        case.inputs["control_hidden_states"] = torch.randn(2, 6, 4, 8, 12)
    else:
        case.model = diffusers.SkyReelsV2Transformer3DModel(**shared)
    fill(case.model)
    dense = case.run()
    with apply_paro(case.model, plan_for(case, density=1.0)) as handle:
        whole = case.run()
    with apply_paro(case.model, plan_for(case)):
        sparse = case.run()
    assert (whole - dense).abs().max() <= 1e-5
    assert (sparse - dense).abs().max() > 1e-3
    assert handle.stats == {"sparse": 2, "dense": {}}
