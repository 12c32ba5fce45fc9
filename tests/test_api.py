"""What the public calls accept, refuse and promise."""

import permattn as pa
import pytest
import torch
import torch.nn.functional as F
from permattn.backends import AUTO_ORDER, reasons, resolve
from permattn.core import Problem
from permattn.testing import random_plan
from torch.nn.attention.bias import causal_lower_right


def make(sq=8, skv=8, hq=4, hkv=2, d=16, dv=16, b=2, dtype=torch.float32):
    return (
        torch.randn(b, hq, sq, d, dtype=dtype),
        torch.randn(b, hkv, skv, d, dtype=dtype),
        torch.randn(b, hkv, skv, dv, dtype=dtype),
    )


q8, k8, v8 = make()
BAD = {
    "q-3d": ((q8[0], k8, v8), {}, ValueError, r"q: wants 4 axes .* got shape \[4, 8, 16\]"),
    "integer": ((q8.int(), k8, v8), {}, TypeError, "q: wants a floating dtype, got torch.int32"),
    "dtype": ((q8, k8.half(), v8), {}, TypeError, "k: wants q's dtype torch.float32, got"),
    "device": ((q8, k8.to("meta"), v8), {}, ValueError, "k: wants q's device cpu, got meta"),
    "batch": ((q8, k8[:1], v8), {}, ValueError, "k: wants q's batch size 2, got 1"),
    "head-dim": ((q8, k8[..., :8], v8), {}, ValueError, "k: wants q's head dim 16, got 8"),
    "v-length": ((q8, k8, v8[:, :, :7]), {}, ValueError, "v: wants k's heads and length"),
    "groups": ((q8[:, :3], k8, v8), {}, ValueError, "Hq % Hkv must be 0, got Hq = 3, Hkv = 2"),
    "nan-scale": ((q8, k8, v8), {"scale": float("nan")}, ValueError, "scale: wants a finite"),
    "inf-scale": ((q8, k8, v8), {"scale": float("inf")}, ValueError, "scale: wants a finite"),
    "text-scale": ((q8, k8, v8), {"scale": "1"}, TypeError, "scale: wants a float or None"),
    "no-backend": ((q8, k8, v8), {"backend": "cuda9"}, ValueError, "backend: wants one of"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    tensors, options, error, match = BAD[case]
    with pytest.raises(error, match=match):
        pa.sparse_attention(*tensors, pa.plan_dense(8, 8, causal=True), **options)


@pytest.mark.parametrize(
    ("plan", "match"),
    [
        (lambda: pa.plan_dense(9, 8, causal=True), "plan: made for Sq = 9, got q of length 8"),
        (lambda: pa.plan_dense(8, 9, causal=True), "plan: made for Skv = 9, got k of length 8"),
        (lambda: random_plan(8, 8, heads=3), r"head axis must be 1 or 4, got 3"),
        (lambda: random_plan(8, 8, batch=3), r"batch axis must be 1 or 2, got 3"),
        (lambda: random_plan(8, 8).to("meta"), r"plan: lies on meta, q on cpu"),
    ],
    ids=["sq", "skv", "heads", "batch", "device"],
)
def test_a_plan_for_something_else_is_named(plan, match):
    with pytest.raises(ValueError, match=match):
        pa.sparse_attention(q8, k8, v8, plan())


def test_a_plan_is_wanted():
    with pytest.raises(TypeError, match="plan: wants an AttnPlan, got Tensor"):
        pa.sparse_attention(q8, k8, v8, torch.ones(8, 8))


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(("sq", "skv"), [(0, 0), (0, 5), (5, 0)])
def test_empty_tensors_have_a_defined_result(sq, skv, backend):
    q, k, v = (x.requires_grad_() for x in make(sq, skv))
    plan = pa.plan_dense(sq, skv, causal=False)
    out, lse = pa.sparse_attention_with_lse(q, k, v, plan, backend=backend)
    assert out.shape == (2, 4, sq, 16) and (out == 0).all()
    assert lse.shape == (2, 4, sq) and (lse == float("-inf")).all()
    out.sum().backward()
    assert q.grad.shape == q.shape and k.grad.shape == k.shape


def test_an_explicit_backend_never_falls_back_and_lists_why():
    problem = Problem("cpu", torch.float32, 4, 2, 16, 16, ((64, 64),))
    assert set(reasons(problem)) == set(AUTO_ORDER)
    assert resolve(problem, "auto") in AUTO_ORDER
    quant = pa.QuantSpec(qk="int8")
    quantised = Problem(
        "cpu", torch.float32, 4, 2, 16, 16, ((64, 64),), quant=quant, needs_grad=True
    )
    with pytest.raises(
        NotImplementedError, match=r"triton: .*cpu: .*reference: .* has no gradients"
    ):
        resolve(quantised, "auto")
    with pytest.raises(NotImplementedError, match="'reference' cannot run this problem"):
        resolve(quantised, "reference")


SDPA = {
    "plain": ((2, 4, 9, 16), (2, 4, 9, 16), {}),
    "causal": ((2, 4, 9, 16), (2, 4, 9, 16), {"is_causal": True}),
    "causal-upper-left-more-keys": ((2, 4, 5, 16), (2, 4, 9, 16), {"is_causal": True}),
    "causal-upper-left-more-queries": ((2, 4, 9, 16), (2, 4, 5, 16), {"is_causal": True}),
    "scale": ((2, 4, 9, 16), (2, 4, 9, 16), {"scale": 0.7}),
    "gqa": ((2, 4, 9, 16), (2, 2, 9, 16), {"enable_gqa": True, "is_causal": True}),
    "two-axes": ((9, 16), (7, 16), {}),
    "three-axes": ((4, 9, 16), (4, 7, 16), {}),
    "five-axes": ((2, 3, 4, 9, 16), (2, 3, 4, 7, 16), {"is_causal": True}),
    "broadcast-leading": ((2, 1, 9, 16), (2, 1, 7, 16), {}),
    "broadcast-batch": ((2, 4, 9, 16), (1, 4, 7, 16), {}),
    "broadcast-query-heads": ((2, 1, 9, 16), (2, 4, 7, 16), {"is_causal": True}),
    "gqa-three-axes": ((4, 9, 16), (2, 9, 16), {"enable_gqa": True}),
    "gqa-five-axes": ((2, 3, 4, 9, 16), (2, 3, 2, 9, 16), {"enable_gqa": True}),
    "gqa-broadcast-batch": ((1, 4, 9, 16), (2, 2, 9, 16), {"enable_gqa": True}),
    "bool-mask": ((2, 4, 9, 16), (2, 4, 7, 16), {"attn_mask": "bool"}),
    "float-mask": ((2, 4, 9, 16), (2, 4, 7, 16), {"attn_mask": "float"}),
    "masked-out-row": ((2, 4, 9, 16), (2, 4, 7, 16), {"attn_mask": "dead"}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("case", SDPA)
def test_sdpa_means_what_torch_means(case, dtype):
    q_shape, k_shape, options = SDPA[case]
    torch.manual_seed(0)
    q, k, v = (torch.randn(s, dtype=dtype) for s in (q_shape, k_shape, k_shape))
    options = dict(options)
    kind = options.get("attn_mask")
    if kind:
        mask = torch.rand(q_shape[-2], k_shape[-2]) < 0.6
        mask[:, 0] = True
        if kind == "dead":
            mask[3] = False
        options["attn_mask"] = torch.randn(mask.shape, dtype=dtype) if kind == "float" else mask
    want = F.scaled_dot_product_attention(q, k, v, **options)
    got = pa.scaled_dot_product_attention(q, k, v, **options)
    assert got.shape == want.shape and got.dtype == want.dtype
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"dropout_p": 0.1}, NotImplementedError, "dropout_p: only 0.0 is supported, got 0.1"),
        ({"attn_mask": True, "is_causal": True}, ValueError, "is_causal"),
        ({"attn_mask": True, "pattern": "plan"}, NotImplementedError, "combined with a pattern"),
        ({"attn_mask": True, "backend": "reference"}, NotImplementedError, "arbitrary attn_mask"),
        ({"is_causal": True, "pattern": "plan"}, ValueError, "its own causality"),
        (
            {"enable_gqa": False, "gqa": True},
            ValueError,
            r"must broadcast .heads apart only with enable_gqa=True",
        ),
    ],
    ids=["dropout", "mask-causal", "mask-pattern", "mask-backend", "plan-causal", "gqa"],
)
def test_sdpa_refuses_what_it_cannot_mean(options, error, match):
    q = torch.randn(1, 4, 8, 16)
    options = dict(options)
    k = q[:, :2] if options.pop("gqa", False) else q
    if options.get("attn_mask"):
        options["attn_mask"] = torch.ones(8, 8, dtype=torch.bool)
    if options.get("pattern"):
        options["pattern"] = pa.plan_dense(8, 8, causal=True)
    with pytest.raises(error, match=match):
        pa.scaled_dot_product_attention(q, k, k, **options)


def test_sdpa_takes_a_plan_or_a_function():
    q = torch.randn(1, 2, 40, 16)
    plan = pa.plan_a_shape(40, sink=4, local=8)
    want = pa.sparse_attention(q, q, q, plan)
    assert torch.equal(pa.scaled_dot_product_attention(q, q, q, pattern=plan), want)

    def pattern(q, k, *, is_causal):
        assert is_causal
        return pa.plan_a_shape(q.shape[2], sink=4, local=8)

    got = pa.scaled_dot_product_attention(q, q, q, is_causal=True, pattern=pattern)
    assert torch.equal(got, want)


def test_lower_right_is_explicit():
    q, k = torch.randn(1, 2, 30, 16), torch.randn(1, 2, 100, 16)
    plan = pa.plan_dense(30, 100, causal=True, lower_right=True, block_q=16, block_kv=16)
    want = F.scaled_dot_product_attention(q, k, k, attn_mask=causal_lower_right(30, 100))
    torch.testing.assert_close(pa.sparse_attention(q, k, k, plan), want, atol=1e-5, rtol=1e-5)
