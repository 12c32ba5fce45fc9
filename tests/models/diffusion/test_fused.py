"""Norm and rotation left to the backend: the same numbers as the stock processors to rounding."""

from __future__ import annotations

import pytest
import torch
from permattn.core import QuantSpec
from permattn.models.diffusion import apply_paro, fused, observe
from permattn.models.diffusion.families import family_of
from permattn.testing import assert_within
from torch._dynamo.testing import CompileCounter

from .tiny import Case, plan_for

# Of two layers, those that the fused way takes: text in double blocks has norms of its own.
NORMS = {
    "wan": ["rms"] * 2,
    "cogvideox": ["layer"] * 2,
    "flux": ["rms"],
    "hunyuan_video": ["rms"],
}
FUSED = pytest.mark.parametrize("name", list(NORMS))


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """The norm of every call that went the fused way."""
    found: list[str] = []
    real = fused.attend_raw

    def attend_raw(attention, q, k, v, form, mask=None):
        found.append(form.norm)
        return real(attention, q, k, v, form, mask)

    monkeypatch.setattr(fused, "attend_raw", attend_raw)
    return found


@pytest.fixture
def stock(monkeypatch):
    """A run of the wrapped stock processors."""

    def run(case: Case, plan, **options):
        with monkeypatch.context() as patch:
            patch.setattr(fused, "_FUSED", {})
            with apply_paro(case.model, plan, **options):
                return case.run()

    return run


@FUSED
def test_the_fused_way_is_the_stock_way(name: str, case_of, stock, calls):
    case = case_of(name)
    plan = plan_for(case)
    want = stock(case, plan)
    assert not calls
    with apply_paro(case.model, plan):
        got = case.run()
    assert calls == NORMS[name]
    assert (got - want).abs().max() <= 1e-5


@FUSED
def test_in_bfloat16_it_is_no_further_from_the_truth(name: str, own_case, stock, calls):
    case = own_case(name)
    plan = plan_for(case)
    exact = stock(case, plan)
    case.model.to(torch.bfloat16)
    case.inputs = {
        k: x.bfloat16() if torch.is_tensor(x) and x.is_floating_point() else x
        for k, x in case.inputs.items()
    }
    # The same bits in another dtype are other weights.
    with pytest.warns(UserWarning, match="other weights"):
        plain = stock(case, plan)
    with pytest.warns(UserWarning, match="other weights"), apply_paro(case.model, plan):
        got = case.run()
    assert calls == NORMS[name]
    assert_within(got.float(), plain.float(), exact.double(), name)


@FUSED
def test_quantised(name: str, case_of, stock, calls):
    case = case_of(name)
    plan = plan_for(case)
    quant = QuantSpec("int8", q_rows_per_scale=16, kv_rows_per_scale=16, smooth_k=True)
    want = stock(case, plan, quant=quant)
    with apply_paro(case.model, plan, quant=quant):
        got = case.run()
    assert calls == NORMS[name]
    # A rounding of q or k may fall to the other side: one level of 127 in a few of them.
    assert (got - want).norm() <= 2e-3 * want.norm()


# diffusers cannot fuse HunyuanVideo's.
@pytest.mark.parametrize("name", ["wan", "cogvideox", "flux"])
def test_fused_projections_too(name: str, own_case, stock, calls):
    case = own_case(name)
    plan = plan_for(case)
    want = stock(case, plan)
    case.model.fuse_qkv_projections()
    with apply_paro(case.model, plan):
        got = case.run()
    assert calls == NORMS[name]
    assert (got - want).abs().max() <= 1e-5


@FUSED
def test_dense_steps_and_observers_get_the_stock_way(name: str, case_of, calls):
    case = case_of(name)
    dense = case.run()
    with apply_paro(case.model, plan_for(case), dense_first_steps=1):
        assert torch.equal(case.run(), dense)
    with observe(case.model, id):
        assert torch.equal(case.run(), dense)
    with apply_paro(case.model, plan_for(case)) as handle:
        handle.on_attention = lambda x: None
        case.run()
    assert not calls


@FUSED
def test_compiled_blocks_decide_at_run_time(name: str, own_case, stock):
    case = own_case(name)
    plan = plan_for(case)
    want, dense = stock(case, plan), case.run()
    torch._dynamo.reset()
    counter = CompileCounter()
    blocks = family_of(case.model).blocks
    for block in (block for listed in blocks for block in getattr(case.model, listed)):
        block.compile(backend=counter, fullgraph=True)
    with apply_paro(case.model, plan) as handle:
        assert (case.run() - want).abs().max() <= 1e-5
        seen = []
        handle.on_attention = seen.append
        assert (case.run() - want).abs().max() <= 1e-5
        assert [x.layer for x in seen] == [0, 1]
    # Double and single blocks are two graphs; so are CogVideoX's first block, which is handed a
    # slice, and its others, permattn or not.
    assert counter.frame_count == (1 if name == "wan" else 2)
    with apply_paro(case.model, plan, dense_layers=[0, 1]):
        assert (case.run() - dense).abs().max() <= 1e-5
    torch._dynamo.reset()
