"""Attention from region to region, and routing, under the interpreter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from interpreter.memory_checker import untouched_memory
from permattn.backends import reference, triton
from permattn.core.regions import RegionGrid, RouteArgs, reverse_graph
from permattn.triton_kernels.regions_reverse import launch_reverse_graph
from permattn.triton_kernels.route import launch_route
from region_cases import CASES, Case, check_case, in_double, run_kernels

SMALL = Case("small", (1, 5, 6), (1, 2, 2), 2, heads=1)
SOFT = replace(SMALL, name="soft", weighted=True, heads=2)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_and_gradients_are_within_the_bound(case):
    check_case(case)


def close_to_the_reference(args):
    want = run_kernels(in_double(args), "reference")
    ours = run_kernels(args)
    for name, value in ours.items():
        torch.testing.assert_close(value.double(), want[name], rtol=1e-4, atol=1e-5)
    return ours


@pytest.mark.parametrize("case", [SMALL, SOFT], ids=str)
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
    dirty = run_kernels(replace(args, q=torch.where(dead[..., None], float("nan"), args.q)))
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
    args = replace(SOFT, dtype=torch.bfloat16).arguments()
    before = [x.clone() for x in (args.q, args.k, args.v, args.graph, args.weights)]
    first, second = run_kernels(args), run_kernels(args)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    after = (args.q, args.k, args.v, args.graph, args.weights)
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


def test_all_heads_share_few_launches(checker):
    args = replace(SMALL, heads=3, batch=2).arguments()
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


@pytest.mark.parametrize(
    ("shape", "regions"), [((2, 3, 5, 3), 7), ((1, 1, 40, 30), 9), ((1, 2, 1, 1), 1)], ids=str
)
def test_the_reverse_of_a_graph_is_the_oracles(shape, regions):
    g = torch.Generator().manual_seed(0)
    graph = torch.randint(-2, regions + 2, shape, generator=g, dtype=torch.int32)
    ours, want = launch_reverse_graph(graph, regions), reverse_graph(graph, regions)
    assert all(torch.equal(x, y) for x, y in zip(ours, want, strict=True))


def routing(case: Case, topk: int) -> RouteArgs:
    args = case.arguments()
    return RouteArgs(args.q, args.k, args.q_box, args.kv_box, topk, 0.7)


ROUTED = (
    (Case("tiny", (1, 6, 6), (1, 2, 2), batch=2, dtype=torch.bfloat16, layout="packed"), 4),
    (Case("over-the-edge", (1, 5, 7), (1, 3, 2), heads=3, dim=24, layout="nchw"), 3),
    (Case("large", (1, 10, 14), (1, 7, 10), heads=1, dtype=torch.float16), 4),
    (Case("video", (3, 4, 4), (2, 2, 3), heads=1, dim=40), 8),
    (Case("cross", (1, 4, 4), (1, 2, 2), 2, (1, 9, 6), (1, 1, 3)), 18),
)


@pytest.mark.parametrize(("case", "topk"), ROUTED, ids=str)
def test_routes_are_the_references(case, topk):
    args = routing(case, topk)
    graph, values = triton.route(args)
    exact = replace(args, q=args.q.double(), k=args.k.double())
    want, want_values = reference.route(exact)
    assert graph.dtype == torch.int32 and values.dtype == torch.float32
    assert torch.equal(graph.sort(-1).values, graph.sort(-1).values.unique_consecutive(dim=-1))
    # Affinities that lie closer than float32 can tell may change places.
    torch.testing.assert_close(values.double(), want_values, rtol=1e-5, atol=1e-5)
    assert float((graph != want).double().mean()) < 0.05
    again = triton.route(args)
    assert torch.equal(graph, again[0]) and torch.equal(values, again[1])


def test_equal_affinities_go_by_the_lower_number():
    args = routing(replace(SMALL, size=(1, 6, 8)), 12)
    graph, values = triton.route(replace(args, q=torch.zeros_like(args.q)))
    assert torch.equal(graph[0, 3], torch.arange(12, dtype=torch.int32))
    assert not bool(values.any())


@pytest.mark.parametrize("regions", [3, 70, 300], ids=str)
def test_rows_are_ordered_as_a_stable_sort_orders_them(regions):
    g = torch.Generator().manual_seed(regions)
    want = torch.randint(-3, 4, (1, 5, regions), generator=g).float()
    want[0, 1, :2] = torch.tensor([-0.0, float("inf")])
    want[0, 2, 1] = float("-inf")
    want[0, 3, 2] = float("nan")
    # A mean of one channel beside one key mean of 1 would spread NaN; so rows go in one by one.
    for row in want[0]:
        graph, values = launch_route(torch.ones(1, 1, 1), row[None, :, None].contiguous(), 3, 1.0)
        order = row.sort(descending=True, stable=True)
        assert torch.equal(graph[0, 0], order.indices[:3].int())
        torch.testing.assert_close(values[0, 0], order.values[:3], equal_nan=True)


def test_more_key_regions_than_a_program_keeps_are_sorted():
    args = routing(Case("many", (1, 2, 2), (1, 2, 2), 1, (1, 1, 1100), (1, 1, 1), heads=1), 3)
    assert RegionGrid((1, 1, 1100), (1, 1, 1)).num_regions > 1024
    graph, values = triton.route(args)
    want, want_values = reference.route(args)
    assert torch.equal(graph, want)
    torch.testing.assert_close(values, want_values)
