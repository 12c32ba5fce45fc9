"""Routing, and the reverse of a graph, against the reference, with memory and races checked."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from permattn.backends import reference, triton
from permattn.core.regions import RouteArgs, reverse_graph
from permattn.triton_kernels import route
from permattn.triton_kernels.regions_reverse import launch_reverse_graph
from region_cases import Case


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
    args = routing(Case("ties", (1, 6, 8), (1, 2, 2), heads=1), 12)
    graph, values = triton.route(replace(args, q=torch.zeros_like(args.q)))
    assert torch.equal(graph[0, 3], torch.arange(12, dtype=torch.int32))
    assert not bool(values.any())


def test_zeros_of_both_signs_are_equal():
    # Products that vanish keep their sign.
    tiny = torch.tensor([-1e-30, 1e-30, -1e-30, 1e-30]).view(1, 4, 1)
    graph, values = route.launch_route(torch.ones(1, 1, 1), tiny, 4, 1e-30)
    assert graph.flatten().tolist() == [0, 1, 2, 3] and not bool(values.any())


@pytest.mark.parametrize("regions", [3, 70, 300], ids=str)
def test_rows_are_ordered_as_a_stable_sort_orders_them(regions):
    g = torch.Generator().manual_seed(regions)
    want = torch.randint(-3, 4, (1, 5, regions), generator=g).float()
    want[0, 1, :2] = torch.tensor([-0.0, float("inf")])
    want[0, 2, 1] = float("-inf")
    want[0, 3, 2] = float("nan")
    # A mean of one channel beside one key mean of 1 would spread NaN; so rows go in one by one.
    for row in want[0]:
        graph, values = route.launch_route(
            torch.ones(1, 1, 1), row[None, :, None].contiguous(), 3, 1.0
        )
        order = row.sort(descending=True, stable=True)
        assert torch.equal(graph[0, 0], order.indices[:3].int())
        torch.testing.assert_close(values[0, 0], order.values[:3], equal_nan=True)


def test_more_key_regions_than_a_program_keeps_are_sorted(monkeypatch):
    monkeypatch.setattr(route, "MAX_KEY_REGIONS", 8)
    args = routing(Case("many", (1, 2, 4), (1, 2, 2), 1, (1, 3, 4), (1, 1, 1), heads=1), 3)
    assert args.kv_grid.num_regions > 8
    graph, values = triton.route(args)
    want, want_values = reference.route(args)
    assert torch.equal(graph, want)
    torch.testing.assert_close(values, want_values)
