"""The Triton kernels on a real GPU; skips, and says so, where there is none."""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from permattn import sparse_attention, sparse_attention_with_lse
from permattn.backends import reference, triton
from permattn.block_mass import block_mass
from permattn.core import AttnPlan, QuantSpec
from permattn.core.prepare import PrepareArgs
from permattn.core.problem import FwdArgs
from permattn.core.regions import RegionArgs, RegionBwdArgs, RouteArgs
from permattn.patterns.dense import plan_dense
from permattn.testing import (
    assert_within,
    poison_unseen,
    random_permutation,
    random_plan,
    split_plan,
    visible_pairs,
)

sys.path.insert(0, str(Path(__file__).parents[1] / "triton"))
cases = importlib.import_module("kernel_cases")
quantised = importlib.import_module("quantised_cases")
regions = importlib.import_module("region_cases")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.fixture(autouse=True)
def full_precision():
    """Plain torch must not use TF32 where it stands for float32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def randn(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g).to(dtype).cuda()


@pytest.mark.parametrize("case", cases.CASES, ids=str)
def test_forward_and_gradients_are_within_the_bound(case):
    cases.check_case(case, "cuda")


LONG = {
    "dense-causal": lambda: plan_dense(2000, 2000, causal=True),
    "random-blocks": lambda: random_plan(2000, 2100, heads=4, density=0.3, block_kv=128),
    "permuted": lambda: random_plan(1500, 1500, heads=4, density=0.3, permuted=True, holes=9),
    "three-parts": lambda: split_plan(1500, 1600, heads=4, window=200),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda x: str(x).removeprefix("torch."))
@pytest.mark.parametrize("dim", [64, 128], ids=lambda d: f"d{d}")
@pytest.mark.parametrize("plan", LONG.values(), ids=list(LONG))
def test_long_inputs_agree_with_the_reference(plan, dim, dtype):
    plan = plan().to("cuda")
    q = randn(1, 4, plan.num_q_tokens, dim, dtype=dtype)
    k, v = (randn(1, 2, plan.num_kv_tokens, dim, dtype=dtype, seed=i) for i in (1, 2))
    dout = randn(1, 4, plan.num_q_tokens, dim, dtype=dtype, seed=3)
    dlse = torch.zeros(q.shape[:3], device="cuda")
    tensors = [q, k, v, dout, dlse]
    ours = cases.run_kernels(plan, tensors, dim**-0.5)
    wide = [x.double() for x in tensors]
    exact = cases.run_kernels(plan, wide, dim**-0.5, "reference")
    plain, _ = cases.expected(plan.to("cpu"), tensors, dim**-0.5)
    for name, value in ours.items():
        assert_within(value, plain[name], exact[name], name)


def test_what_no_query_sees_never_reaches_a_result():
    plan = random_plan(500, 500, heads=2, density=0.1, permuted=True, band=cases.WINDOW)
    seen = (visible_pairs(plan, 1, 2).amax((1, 2))[:, None] > 0).cuda()
    plan = plan.to("cuda")
    q, k, v = (randn(1, h, 500, 64, dtype=torch.bfloat16, seed=h) for h in (2, 1, 1))
    tensors = [q, k, v, torch.randn_like(q), torch.zeros(q.shape[:3], device="cuda")]
    clean = cases.run_kernels(plan, tensors, 0.1)
    tensors[1:3] = [poison_unseen(k, seen), poison_unseen(v, seen)]
    dirty = cases.run_kernels(plan, tensors, 0.1)
    for name, value in clean.items():
        assert torch.equal(value, dirty[name]), name


def test_two_runs_are_bit_identical():
    plan = split_plan(1000, 1000, heads=4).to("cuda")
    q, k, v = (randn(2, h, 1000, 64, dtype=torch.bfloat16, seed=h) for h in (4, 2, 2))
    tensors = [q, k, v, torch.randn_like(q), torch.zeros(q.shape[:3], device="cuda")]
    first, second = (cases.run_kernels(plan, tensors, 0.1) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize(
    "plan",
    [plan_dense(512, 512, causal=True), split_plan(512, 512, heads=4)],
    ids=["one-launch", "several-launches"],
)
def test_forward_is_captured_in_a_graph(plan):
    plan = plan.to("cuda")
    q, k, v = (randn(1, h, 512, 64, dtype=torch.bfloat16, seed=h) for h in (4, 2, 2))
    sparse_attention(q, k, v, plan, backend="triton")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = sparse_attention_with_lse(q, k, v, plan, backend="triton")
    q.copy_(randn(1, 4, 512, 64, dtype=torch.bfloat16, seed=9))
    graph.replay()
    want, want_lse = sparse_attention_with_lse(q, k, v, plan, backend="triton")
    assert torch.equal(out, want)
    assert torch.equal(lse, want_lse)


@pytest.mark.filterwarnings("ignore:triton")
@pytest.mark.parametrize("case", quantised.CASES, ids=str)
def test_quantised_forward_is_what_the_reference_means(case):
    quantised.check_case(case, "cuda")


@pytest.mark.filterwarnings("ignore:triton")
@pytest.mark.parametrize("pv", ["none", "int8", "int4", "fp8"])
@pytest.mark.parametrize("qk", ["int8", "int4"])
@pytest.mark.parametrize("rows", [32, 64, 128])
def test_long_quantised_inputs_agree_with_the_reference(qk, pv, rows):
    plan = random_plan(1500, 1500, heads=4, block_q=128, block_kv=128, density=0.3, permuted=True)
    spec = QuantSpec(qk, pv, rows, rows, smooth_k=True)
    q, k, v = (randn(1, h, 1500, 128, dtype=torch.bfloat16, seed=h).cpu() for h in (4, 2, 2))
    args = FwdArgs(q, k, v, AttnPlan(plan.parts, spec), 128**-0.5)
    quantised.check(quantised.run(args, "cuda"), args, f"{qk} {pv} {rows}")


@pytest.mark.parametrize("fmt", ["int8", "int4", "fp8"])
@pytest.mark.parametrize("per_column", [False, True], ids=["group", "column"])
def test_numbers_equal_the_oracle(fmt, per_column):
    x = torch.randn(2, 3, 500, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    order = random_permutation(500, heads=3, holes=9).token_of_slot
    facts = (None, None, None, fmt, 64, per_column)
    want, want_scale = reference.prepare(PrepareArgs(x, order, *facts))
    ours, scale = triton.prepare(PrepareArgs(x.cuda(), order.cuda(), *facts))
    assert torch.equal(ours.float().cpu(), want.float()) and torch.equal(scale.cpu(), want_scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda x: str(x).removeprefix("torch."))
def test_block_masses_are_the_references(dtype):
    q, k = (randn(1, 4, 700, 64, dtype=dtype, seed=i) for i in (1, 2))
    order = random_permutation(700, heads=4).token_of_slot.cuda()
    lse = (q.float() @ k.float().mT * 0.125).logsumexp(-1)
    facts = {"q_blocks": torch.tensor([0, 5], dtype=torch.int32, device="cuda"), "lse": lse}
    facts |= {"token_of_q_slot": order, "token_of_kv_slot": order, "block": (64, 64)}
    ours = block_mass(q, k, **facts, eps=1e-3, backend="triton")
    want = block_mass(q.double(), k.double(), **facts, eps=1e-3, backend="reference")
    torch.testing.assert_close(ours.sums, want.sums, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.maxima, want.maxima, rtol=1e-4, atol=1e-6)
    assert float((ours.small - want.small).abs().max()) <= 4


@pytest.mark.parametrize("case", regions.CASES, ids=str)
def test_regions_are_within_the_bound(case):
    regions.check_case(case, "cuda")


def stage(side: int, dtype: torch.dtype, **facts) -> RegionArgs:
    """7 x 7 regions of side x side tokens, of which each looks at 64 keys, at four heads of 32."""
    size = (1, 7 * side, 7 * side)
    facts = {"layout": "packed", "dtype": dtype, "heads": 4, "dim": 32, "batch": 4, **facts}
    topk = max(1, 64 // side**2)
    case = regions.Case("stage", size, (1, side, side), topk, lists=(4, 1), **facts)
    return case.arguments("cuda")


@pytest.mark.parametrize("weighted", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda x: str(x).removeprefix("torch."))
@pytest.mark.parametrize("side", [8, 4, 2], ids=["stage1", "stage2", "stage3"])
def test_stages_agree_with_the_reference_and_runs_are_bit_identical(side, dtype, weighted):
    args = stage(side, dtype, weighted=weighted)
    ours, again = regions.run_kernels(args), regions.run_kernels(args)
    plain = regions.run_dense(args)
    exact = regions.run_kernels(regions.in_double(args), "reference")
    for name, value in ours.items():
        assert torch.equal(value, again[name]), name
        if name == "lse":
            torch.testing.assert_close(value.double(), exact[name], atol=1e-5, rtol=1e-5)
            continue
        size = float(exact[name].abs().max())
        assert_within(value, plain[name], exact[name], name, cancelled=size)


def test_regions_out_of_range_are_hidden_on_a_gpu():
    args = stage(4, torch.float32)
    graph = args.graph.clone()
    graph[:, :, 3], graph[:, :, 5, 1] = 49, -1
    args = replace(args, graph=graph)
    ours, want = (regions.run_kernels(x, y) for x, y in ((args, "triton"), (args, "reference")))
    for name, value in ours.items():
        torch.testing.assert_close(value, want[name], rtol=1e-4, atol=1e-4)


def test_routing_and_regions_are_captured_in_a_graph():
    args = stage(4, torch.bfloat16)

    def step():
        found, _ = triton.route(RouteArgs(args.q, args.k, args.q_box, args.kv_box, 4, 1.0))
        call = replace(args, graph=found[:, None])
        out, lse = triton.attend_regions(call)
        return out, *triton.attend_regions_backward(RegionBwdArgs(call, out, lse, out, lse))[:3]

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    args.q.copy_(torch.randn_like(args.q))
    graph.replay()
    assert all(torch.equal(x, y) for x, y in zip(captured, step(), strict=True))


@pytest.mark.parametrize("side", [8, 2], ids=["stage1", "stage3"])
def test_routes_are_the_references(side):
    args = stage(side, torch.bfloat16)
    call = RouteArgs(args.q, args.k, args.q_box, args.kv_box, 16, 0.5)
    found, values = triton.route(call)
    exact = replace(call, q=args.q.double(), k=args.k.double())
    want, want_values = reference.route(exact)
    # Affinities that lie closer than float32 can tell may change places.
    torch.testing.assert_close(values.double(), want_values, rtol=1e-5, atol=1e-5)
    assert float((found != want).double().mean()) < 0.02


def test_auto_takes_triton_on_a_gpu():
    """In float32, for which there are no kernels in CUDA C++."""
    plan = plan_dense(64, 64, causal=True, device="cuda")
    q, k, v = (randn(1, 2, 64, 64, dtype=torch.float32, seed=i) for i in range(3))
    chosen = sparse_attention(q, k, v, plan)
    assert torch.equal(chosen, sparse_attention(q, k, v, plan, backend="triton"))


def test_offsets_past_32_bits():
    tokens = 2**25 + 64
    if torch.cuda.mem_get_info()[0] < 3 * tokens * 128:
        pytest.skip("wants 13 GB of free GPU memory")
    # The last keys of a tensor of more than 2^31 elements; the rest is listed nowhere.
    k = torch.zeros(1, 1, tokens, 64, dtype=torch.bfloat16, device="cuda")
    k[:, :, -64:] = randn(1, 1, 64, 64, dtype=torch.bfloat16)
    part = plan_dense(64, tokens, causal=False, block_q=64, block_kv=64).parts[0]
    index = part.index
    last = torch.full_like(index.kv_indices[..., :1], index.capacity - 1)
    ends = torch.tensor([[[0, 1]]], dtype=torch.int32)
    lists = type(index)(last, ends, torch.zeros_like(ends[..., :1]), 64, 64)
    plan = type(plan_dense(1, 1, causal=False))(
        (type(part)(part.q_perm, part.kv_perm, lists, part.band),)
    ).to("cuda")
    q = randn(1, 1, 64, 64, dtype=torch.bfloat16, seed=5)
    out = sparse_attention(q, k, k, plan, backend="triton")
    near = plan_dense(64, 64, causal=False, block_q=64, block_kv=64, device="cuda")
    want = sparse_attention(q, k[:, :, -64:], k[:, :, -64:], near, backend="triton")
    assert torch.equal(out, want)
