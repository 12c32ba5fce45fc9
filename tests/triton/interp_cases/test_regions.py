"""Attention from region to region against float64, with memory and races checked."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from interpreter.memory_checker import untouched_memory
from permattn.backends import triton
from region_cases import CASES, Case, check_case, in_double, run_kernels

SMALL = Case("small", (1, 5, 6), (1, 2, 2), 2, heads=1)
COUNTED = replace(SMALL, name="counted", count_padding=True)
SOFT = replace(SMALL, name="soft", weighted=True, heads=2)


def close_to_the_reference(args):
    want = run_kernels(in_double(args), "reference")
    ours = run_kernels(args)
    for name, value in ours.items():
        torch.testing.assert_close(value.double(), want[name], rtol=1e-4, atol=1e-5)
    return ours


@pytest.mark.parametrize("case", [SMALL, SOFT, COUNTED], ids=str)
def test_places_that_name_no_region_are_hidden_and_never_read_through(case):
    args = case.arguments()
    graph = args.graph.clone()
    regions = args.kv_grid.num_regions
    graph[..., 0, 0], graph[..., 1, 1], graph[..., 2, :] = -1, regions, 2**31 - 1
    graph[..., 3, :] = -(2**31)
    ours = close_to_the_reference(replace(args, graph=graph))
    seen = torch.isfinite(ours["lse"])
    assert bool(seen.any()) and not bool(seen.all())
    for name in ("out", "dq"):
        assert not bool(ours[name][~seen].any()), name


def test_queries_that_see_no_key_never_reach_a_gradient():
    args = SMALL.arguments()
    graph = args.graph.clone()
    graph[..., 2, :] = -1
    args = replace(args, graph=graph)
    clean = run_kernels(args)
    dead = ~torch.isfinite(clean["lse"])
    q = torch.where(dead[..., None], float("nan"), args.q)
    dirty = run_kernels(replace(args, q=q), dead=dead)
    for name, value in clean.items():
        assert torch.equal(value, dirty[name]), name


@pytest.mark.parametrize("padded", [False, True], ids=["hidden", "counted"])
def test_regions_that_nobody_looks_at_are_not_read_and_get_zeros(padded):
    args = replace(SMALL.arguments(), count_padding=padded)
    graph = torch.where(args.graph % 2 == 0, args.graph, args.graph - 1)
    args = replace(args, graph=graph)
    clean = run_kernels(args)
    token = args.kv_grid.token_of_slot().view(args.kv_grid.num_regions, -1)
    unseen = token[1::2].flatten()
    unseen = unseen[unseen >= 0].long()
    k, v = args.k.clone(), args.v.clone()
    for x, bad in ((k, float("nan")), (v, float("inf"))):
        x[0, 0].view(args.kv_grid.num_tokens, -1)[unseen] = bad
    dirty = run_kernels(replace(args, k=k, v=v))
    for name, value in clean.items():
        assert torch.equal(value, dirty[name]), name
    for name in ("dk", "dv"):
        rows = clean[name][0, 0].reshape(args.kv_grid.num_tokens, -1)
        assert not bool(rows[unseen].any()) and bool(rows.any())


def test_two_runs_are_bit_identical_and_leave_their_inputs_alone():
    args = replace(SOFT, heads=1, dtype=torch.bfloat16).arguments()
    before = [x.clone() for x in (args.q, args.k, args.v, args.graph, args.weights)]
    first, second = run_kernels(args), run_kernels(args)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    after = (args.q, args.k, args.v, args.graph, args.weights)
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


def test_all_heads_share_few_launches(checker):
    args = replace(SMALL, size=(1, 4, 4), heads=2, batch=2).arguments()
    before = checker.launches
    triton.attend_regions(args)
    assert checker.launches - before == 1
    run_kernels(args)
    # The forward again; then dQ, the reverse of the graph, dK and dV.
    assert checker.launches - before == 5


def test_no_batch_row_gives_no_result():
    args = replace(SMALL, batch=0).arguments()
    assert all(x.numel() == 0 for x in run_kernels(args).values())


FAR = {
    "rows": ((1, 16, 2), (0, 0, 0, 2**28, 2**20, 1)),
    "columns": ((1, 2, 16), (0, 0, 0, 2**20, 2**28, 1)),
    "channels": ((1, 2, 4), (0, 0, 0, 2**20, 2**24, 2**28)),
}


@pytest.mark.parametrize(("size", "strides"), FAR.values(), ids=list(FAR))
def test_offsets_past_32_bits_are_computed_in_64(size, strides):
    # 8 GiB that are never touched but for the numbers in use.
    near = replace(SMALL, size=size, dtype=torch.bfloat16).arguments()
    with untouched_memory():
        far = torch.empty_strided(near.k.shape, strides, dtype=near.k.dtype)
    assert sum((n - 1) * stride for n, stride in zip(far.shape, strides, strict=True)) > 2**31
    far.copy_(near.k)
    ours, want = run_kernels(replace(near, k=far)), run_kernels(near)
    for name, value in ours.items():
        assert torch.equal(value, want[name]), name


@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_and_gradients_are_within_the_bound(case):
    check_case(case)
