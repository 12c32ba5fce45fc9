"""Routing through its front door: values within rounding, ties by number, every backend."""

from __future__ import annotations

import pytest
import torch
from permattn import bilevel_routing_attention, route_regions
from permattn.backends import AUTO_ORDER, reasons
from permattn.core.regions import RouteProblem

BACKENDS = [
    name
    for name, why in reasons(RouteProblem("cpu", torch.float32, 64, 4)).items()
    if why is None and name in AUTO_ORDER
]


def affinity_in_double(q, k, box, kv_box):
    """[B, Rq, Rkv] by loops over regions."""

    def means(x, box):
        height, width = x.shape[1:3]
        rows = [
            x[:, y : y + box[0], z : z + box[1]].double().mean((1, 2)).flatten(1)
            for y in range(0, height, box[0])
            for z in range(0, width, box[1])
        ]
        return torch.stack(rows, 1)

    return means(q, box) @ means(k, kv_box).mT


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("size", "box", "kv_size", "kv_box", "topk"),
    [
        ((14, 14), (2, 2), (14, 14), (2, 2), 16),
        ((28, 21), (4, 7), (28, 21), (4, 7), 21),
        ((9, 11), (2, 4), (9, 11), (2, 4), 4),
        ((8, 8), (4, 4), (6, 9), (2, 3), 5),
        ((3, 3), (5, 5), (3, 3), (5, 5), 1),
    ],
    ids=["stage3", "all", "ragged", "cross-map", "one-region"],
)
def test_selected_values_are_the_largest(backend, dtype, size, box, kv_size, kv_box, topk):
    g = torch.Generator().manual_seed(0)
    q = torch.randn(2, *size, 3, 16, generator=g).to(dtype)
    k = torch.randn(2, *kv_size, 3, 16, generator=g).to(dtype)
    call = {"region_size": box, "kv_region_size": kv_box, "pad_mode": "mask", "topk": topk}
    graph, values = route_regions(q, k, **call, scale=0.5, backend=backend)
    exact = affinity_in_double(q, k, box, kv_box) * 0.5
    assert graph.dtype == torch.int32 and values.dtype == torch.float32
    assert all(len(set(row)) == topk for rows in graph.tolist() for row in rows)
    picked = exact.gather(-1, graph.long())
    # A tie within float32's rounding may fall either way: values are compared, not numbers.
    close = {"atol": 2e-6, "rtol": 1e-5}
    torch.testing.assert_close(picked, exact.sort(-1, descending=True).values[..., :topk], **close)
    torch.testing.assert_close(values.double(), picked, **close)
    again = route_regions(q, k, **call, scale=0.5, backend=backend)
    assert torch.equal(graph, again[0]) and torch.equal(values, again[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_affinities_go_by_number(backend):
    q = torch.ones(1, 8, 8, 1, 16)
    graph, values = route_regions(q, q, (4, 4), topk=5, backend=backend)
    assert graph[0].tolist() == [[0, 1, 2, 3, 4]] * 16
    assert torch.equal(values, torch.full_like(values, 16.0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts_give_one_answer(backend):
    x = torch.randn(2, 2 * 3 * 8, 6, 10)
    first = [t.unflatten(1, (3, 8)).permute(0, 3, 4, 1, 2) for t in x.chunk(2, 1)]
    last = [t.contiguous() for t in first]
    video = [t[:, None] for t in last]
    want = route_regions(*last, (3, 5), topk=4, backend="reference")[1]
    for maps, regions in ((first, (3, 5)), (last, (3, 5)), (video, (1, 3, 5))):
        values = route_regions(*maps, regions, topk=4, backend=backend)[1]
        torch.testing.assert_close(values, want, atol=1e-5, rtol=1e-5)


def test_differentiable_routing_reaches_the_maps():
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 4, 4, 1, 4, dtype=torch.float64, generator=g) for _ in range(3))

    def soft(q, k):
        graph, values = route_regions(q, k, (2, 2), topk=2, differentiable=True)
        weights = torch.softmax(values, -1)
        return bilevel_routing_attention(q, k, v, graph, (2, 2), weights=weights)

    assert torch.autograd.gradcheck(soft, (q.requires_grad_(), k.requires_grad_()))
    plain = route_regions(q, k, (2, 2), topk=2)
    assert not plain[1].requires_grad
    traced = route_regions(q, k, (2, 2), topk=2, differentiable=True)
    assert torch.equal(plain[0], traced[0])
    torch.testing.assert_close(plain[1], traced[1].detach())


def test_the_operator_keeps_torchs_rules():
    q = torch.randn(2, 2, 1, 4, 6, 8)
    for backend in BACKENDS:
        torch.library.opcheck(
            torch.ops.permattn.route_regions, (q, q, [1, 2, 2, 1, 2, 3], 2, 1.0, backend)
        )


X = torch.zeros(1, 4, 6, 2, 8)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"topk": 0}, ValueError, "topk: wants 1 to 4"),
        ({"topk": 5}, ValueError, "topk: wants 1 to 4, the number of key regions"),
        ({"topk": True}, ValueError, "topk: wants"),
        ({"k": X[..., :1, :]}, ValueError, "k: wants q's 2 heads, got 1"),
        ({"k": X.half()}, TypeError, "k: wants q's dtype"),
        ({"regions": (3, 2)}, ValueError, "does not divide"),
        ({"regions": (5, 2), "pad_mode": "zero"}, ValueError, "has no"),
        ({"kv_regions": (2, 4)}, ValueError, "kv_regions: .* does not divide"),
        ({"scale": float("inf")}, ValueError, "scale: wants a finite number"),
        ({"backend": "nobody"}, ValueError, "backend: wants one of"),
    ],
    ids=lambda x: ",".join(x) if isinstance(x, dict) else "",
)
def test_bad_input_is_named(change, error, message):
    given = {"q": X, "k": X, "regions": (2, 2), "topk": 2} | change
    with pytest.raises(error, match=message):
        route_regions(given.pop("q"), given.pop("k"), **given)
