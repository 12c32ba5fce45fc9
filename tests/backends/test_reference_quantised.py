"""The quantised reference against an independent, dense computation of the same numbers."""

from __future__ import annotations

import permattn as pa
import pytest
import torch
from permattn import testing
from permattn.core import AttnPlan, QuantSpec
from permattn.core.quant import FORMATS
from permattn.patterns.dense import plan_dense
from torch import Tensor


def grouped(x: Tensor, order: list[int], rows: int, fmt: str, per_column: bool) -> Tensor:
    """One head's rows after quantising and back, in float64 and token order: a loop over groups."""
    out = torch.zeros_like(x, dtype=torch.float64)
    form = FORMATS[fmt]
    for first in range(0, len(order), rows):
        token = [t for t in order[first : first + rows] if t >= 0]
        if not token:
            continue
        group = x[token].double()
        high = group.abs().amax(0 if per_column else None)
        scaled = group * torch.where(high > 0, form.high / high, 0.0)
        number = scaled.round() if fmt != "fp8" else scaled.float().to(form.dtype).double()
        out[token] = number * high / form.high
    return out


def dense(q: Tensor, k: Tensor, v: Tensor, plan: AttnPlan, scale: float) -> Tensor:
    """Quantised attention of a plan, pair by pair in float64: walks every list in Python."""
    quant, heads = plan.quant, q.shape[1]
    group = heads // k.shape[1]
    out = torch.zeros(*q.shape[:3], v.shape[3], dtype=torch.float64)
    for h in range(heads):
        keys, values = k[0, h // group], v[0, h // group]
        if quant.smooth_k:
            held = torch.zeros(keys.shape[0], dtype=torch.bool)
            for part in plan.parts:
                for row in part.kv_perm.token_of_slot.expand(1, heads, -1)[0]:
                    held[row[row >= 0].long()] = True
            keys = keys - keys[held].mean(0)
        blocks: dict[int, list[tuple[Tensor, Tensor]]] = {i: [] for i in range(q.shape[2])}
        for part in plan.parts:
            index = part.index
            q_order = part.q_perm.token_of_slot.expand(1, heads, -1)[0, h].tolist()
            kv_order = part.kv_perm.token_of_slot.expand(1, heads, -1)[0, h].tolist()
            q_hat, k_hat, v_hat = q[0, h].double(), keys.double(), values.double()
            if quant.qk != "none":
                q_hat = grouped(q[0, h], q_order, quant.q_rows_per_scale, quant.qk, False)
                k_hat = grouped(keys, kv_order, quant.kv_rows_per_scale, quant.qk, False)
            if quant.pv != "none":
                v_hat = grouped(values, kv_order, quant.kv_rows_per_scale, quant.pv, True)
            offsets = index.row_offsets.expand(1, heads, -1)[0, h].tolist()
            listed = index.kv_indices.expand(1, heads, -1)[0, h].tolist()
            full = index.kv_num_full.expand(1, heads, -1)[0, h].tolist()
            for i in range(index.num_q_blocks):
                for token in q_order[i * index.block_q : (i + 1) * index.block_q]:
                    for n, entry in enumerate(range(offsets[i], offsets[i + 1])):
                        first = listed[entry] * index.block_kv
                        for at in range(first, first + index.block_kv, quant.kv_rows_per_scale):
                            seen = [
                                t
                                for t in kv_order[at : at + quant.kv_rows_per_scale]
                                if token >= 0 and t >= 0 and (n < full[i] or sees(part, token, t))
                            ]
                            if seen:
                                score = k_hat[seen] @ q_hat[token] * scale
                                blocks[token].append((score, v_hat[seen]))
        for token, found in blocks.items():
            total, acc = 0.0, torch.zeros(v.shape[3], dtype=torch.float64)
            highest = max((s.max().item() for s, _ in found), default=0.0)
            for score, value in found:
                p = torch.exp(score - score.max())
                if quant.pv != "none":
                    form = FORMATS[quant.pv]
                    p = p * form.p_high
                    p = p.round() if quant.pv != "fp8" else p.float().to(form.dtype).double()
                    p = p / form.p_high
                weight = torch.exp(score.max() - highest)
                total += float(weight * p.sum())
                acc += weight * (p @ value)
            out[0, h, token] = acc / total if total else acc
    return out


def sees(part, q_token: int, kv_token: int) -> bool:
    lag, band = q_token - kv_token, part.band
    low = band.min_lag is None or lag >= band.min_lag
    return low and (band.max_lag is None or lag < band.max_lag)


SPECS = {
    "int8": QuantSpec("int8", q_rows_per_scale=8, kv_rows_per_scale=8),
    "int8-smooth": QuantSpec("int8", q_rows_per_scale=4, kv_rows_per_scale=8, smooth_k=True),
    "int8-int8": QuantSpec("int8", "int8", q_rows_per_scale=8, kv_rows_per_scale=8),
    "int8-fp8": QuantSpec("int8", "fp8", q_rows_per_scale=8, kv_rows_per_scale=4),
    "int4-int4": QuantSpec("int4", "int4", q_rows_per_scale=2, kv_rows_per_scale=8, smooth_k=True),
    "none-int8": QuantSpec("none", "int8", q_rows_per_scale=8, kv_rows_per_scale=8),
}


def banded_plan(seed: int) -> AttnPlan:
    """Orders with holes and a causal band; more keys than queries."""
    band = pa.TokenBand(min_lag=-8, max_lag=30)
    shape = {"heads": 4, "block_q": 8, "block_kv": 8}
    return testing.random_plan(37, 45, **shape, band=band, permuted=True, holes=5, seed=seed)


def text_plan(seed: int) -> AttnPlan:
    """Two parts under one softmax: vision keys in an order of each head, text keys."""
    mask = torch.rand(4, 4, 4, generator=torch.Generator().manual_seed(seed)) < 0.6
    orders = torch.tensor([0, 2, 4, 5])
    return pa.plan_paro(pa.TokenGrid(5, 2, 5, 3), orders, mask, num_tokens=35, block=(8, 8))


@pytest.mark.parametrize("name", list(SPECS))
@pytest.mark.parametrize("make", [banded_plan, text_plan], ids=["band", "text"])
def test_equals_a_walk_over_every_pair(name, make):
    plan = make(3)
    plan = AttnPlan(plan.parts, SPECS[name])
    generator = torch.Generator().manual_seed(7)
    q = torch.randn(1, 4, plan.num_q_tokens, 16, generator=generator)
    k, v = (torch.randn(1, 2, plan.num_kv_tokens, 16, generator=generator) for _ in range(2))
    want = dense(q, k, v, plan, 0.25)
    got = pa.sparse_attention(q, k, v, plan, scale=0.25, backend="reference")
    # A score that lies next to a tie may round the other way: one step of one P.
    step = 0.0 if SPECS[name].pv == "none" else 1 / FORMATS[SPECS[name].pv].p_high
    torch.testing.assert_close(got.double(), want, atol=2e-6 + step * 0.5, rtol=1e-5)
    assert (got.double() - want).abs().median() < 1e-6


@pytest.mark.parametrize("spec", [QuantSpec("int8", smooth_k=True), QuantSpec("int8", "int8")])
def test_lse_is_that_of_the_keys_as_given(spec):
    q, k, v = (torch.randn(1, 2, 64, 32) for _ in range(3))
    k = k + 5 * torch.randn(32)
    base = plan_dense(64, 64, causal=False, block_q=64, block_kv=64)
    _, exact = pa.sparse_attention_with_lse(q, k, v, base, backend="reference")
    _, lse = pa.sparse_attention_with_lse(q, k, v, AttnPlan(base.parts, spec), backend="reference")
    bound = 0.05 if spec.smooth_k else 0.3
    assert (lse - exact).abs().max() < bound


@pytest.mark.parametrize("smooth_k", [False, True])
def test_smoothing_takes_the_cost_of_a_common_offset(smooth_k):
    q, v = torch.randn(1, 2, 64, 32), torch.randn(1, 2, 64, 32)
    k = torch.randn(1, 2, 64, 32) + 20 * torch.randn(32)
    base = plan_dense(64, 64, causal=False, block_q=64, block_kv=64)
    exact = pa.sparse_attention(q, k, v, base, backend="reference")
    plan = AttnPlan(base.parts, QuantSpec("int8", smooth_k=smooth_k))
    error = (pa.sparse_attention(q, k, v, plan, backend="reference") - exact).norm() / exact.norm()
    assert (error < 0.02) == smooth_k


@pytest.mark.parametrize("balance", [False, True])
def test_balancing_takes_the_cost_of_an_outlier_channel(balance):
    q, k, v = (torch.randn(1, 2, 64, 32) for _ in range(3))
    q[..., 3] *= 30
    k[..., 3] /= 30
    base = plan_dense(64, 64, causal=False, block_q=64, block_kv=64)
    exact = pa.sparse_attention(q, k, v, base, backend="reference")
    plan = AttnPlan(base.parts, QuantSpec("int8", balance=balance))
    error = (pa.sparse_attention(q, k, v, plan, backend="reference") - exact).norm() / exact.norm()
    assert (error < 0.02) == balance


@pytest.mark.parametrize("spec", [QuantSpec("int8"), QuantSpec("int8", "int8", smooth_k=True)])
def test_holes_are_not_read(spec):
    perm = testing.random_permutation(40, keep=0.7, holes=9)
    index = pa.BlockIndex.from_block_mask(torch.ones(5, 5, dtype=torch.bool), 8, 8)
    part = pa.AttnPart(perm, perm, index, pa.TokenBand())
    plan = AttnPlan(
        (part,), QuantSpec(spec.qk, spec.pv, 8, 8, smooth_k=spec.smooth_k), validate=False
    )
    q, k, v = (torch.randn(1, 2, 40, 16) for _ in range(3))
    gone = (perm.slot_of_token[0, 0] < 0).nonzero()[:, 0]
    assert len(gone)
    want = pa.sparse_attention(q, k, v, plan, backend="reference")
    for x in (q, k, v):
        x[:, :, gone] = float("nan")
    got = pa.sparse_attention(q, k, v, plan, backend="reference")
    assert torch.equal(got, want) and (got[:, :, gone] == 0).all()


def test_gradients_are_refused():
    q = torch.randn(1, 2, 64, 16, requires_grad=True)
    plan = AttnPlan(
        plan_dense(64, 64, causal=False, block_q=64, block_kv=64).parts, QuantSpec("int8")
    )
    with pytest.raises(NotImplementedError, match="quantised attention has no gradients"):
        pa.sparse_attention(q, q, q, plan, backend="reference")
