"""Native routing: every instruction set against float64, and the order of the selected exactly."""

import math

import pytest
import torch
from permattn import testing
from permattn.backends import cpu
from permattn.backends.cpu import routing
from permattn.backends.reference import regions as reference
from permattn.core.regions import RouteArgs, RouteProblem, region_means, top_regions

pytestmark = pytest.mark.skipif(not cpu.available_isas(), reason=f"{cpu.load()}")

# Routing is in float32 everywhere: wider products of other numbers add no kernels.
ISAS = [isa for isa in cpu.available_isas() if isa in ("portable", "avx2", "avx512")]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
dtype_id = {"ids": lambda x: str(x).removeprefix("torch.")}
by_isa_and_dtype = pytest.mark.parametrize(
    ("isa", "dtype"), [(i, d) for i in ISAS for d in DTYPES], **dtype_id
)

# Sizes and boxes as (T, H, W), of queries and of keys.
MAPS = {
    "stage3": ((1, 14, 14), (1, 2, 2), (1, 14, 14), (1, 2, 2)),
    "rectangular": ((1, 12, 35), (1, 4, 7), (1, 12, 35), (1, 4, 7)),
    "boxes-hang-over": ((1, 9, 23), (1, 4, 9), (1, 9, 23), (1, 4, 9)),
    "video": ((5, 6, 10), (2, 3, 5), (5, 6, 10), (2, 3, 5)),
    "cross-map": ((1, 8, 18), (1, 4, 3), (3, 7, 40), (2, 3, 4)),
    "one-token-boxes": ((1, 5, 17), (1, 1, 1), (1, 5, 17), (1, 1, 1)),
    "longer-than-a-chain": ((2, 70, 37), (2, 70, 37), (1, 40, 100), (1, 40, 50)),
}


def inputs(sizes, dtype=torch.float32, *, batch=2, heads=2, dim=24, seed=0):
    """Maps [B, M, T, H, W, D] whose means are neither zero nor alike."""
    g = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(batch, *size, heads, dim, generator=g) + 0.5)
        .to(dtype)
        .permute(0, 4, 1, 2, 3, 5)
        for size in sizes
    ]


def args_of(name, dtype=torch.float32, *, topk=None, scale=0.25, **kwargs):
    size, box, kv_size, kv_box = MAPS[name]
    q, k = inputs((size, kv_size), dtype, **kwargs)
    num_kv = math.prod(-(-n // b) for n, b in zip(kv_size, kv_box, strict=True))
    return RouteArgs(q, k, box, kv_box, min(num_kv, 5) if topk is None else topk, scale)


def affinity(args, dtype):
    mean_q = region_means(args.q.to(dtype), args.q_grid)
    mean_k = region_means(args.k.to(dtype), args.kv_grid)
    return (mean_q @ mean_k.mT) * args.scale


def check(args, isa=None):
    """Values are within the bound; a tie within it may fall either way."""
    graph, values = routing.route(args, isa=isa)
    shape = (args.q.shape[0], args.q_grid.num_regions, args.topk)
    assert graph.shape == values.shape == shape
    assert graph.dtype == torch.int32 and values.dtype == torch.float32
    exact, plain = affinity(args, torch.float64), affinity(args, torch.float32)
    assert all(len(set(row)) == args.topk for row in graph.flatten(0, 1).tolist())
    picked = graph.long()
    testing.assert_within(values, plain.gather(-1, picked), exact.gather(-1, picked), "values")
    best, plain_best = (
        x.sort(-1, descending=True).values[..., : args.topk] for x in (exact, plain)
    )
    testing.assert_within(values, plain_best, best, "the largest")
    assert (values.diff(dim=-1) <= 0).all()


@pytest.mark.parametrize("name", MAPS)
@by_isa_and_dtype
def test_values_match_float64(isa, dtype, name):
    check(args_of(name, dtype), isa)


@pytest.mark.parametrize(("heads", "dim"), [(1, 1), (5, 1), (1, 64), (3, 33), (2, 150)])
@pytest.mark.parametrize("isa", ISAS)
def test_any_number_of_channels(isa, heads, dim):
    check(args_of("boxes-hang-over", heads=heads, dim=dim), isa)


# A map of one token a region and one channel: affinities are the products as they are.
def route_of(q_values, k_values, topk, isa, scale=1.0):
    q, k = (torch.tensor(x).view(1, 1, 1, 1, -1, 1) for x in (q_values, k_values))
    return routing.route(RouteArgs(q, k, (1, 1, 1), (1, 1, 1), topk, scale), isa=isa)


@pytest.mark.parametrize("regions", [1, 3, 16, 17, 49, 100, 600])
@pytest.mark.parametrize("isa", ISAS)
def test_equal_affinities_go_by_number_for_every_topk(isa, regions):
    """Whole numbers: products are exact, many are equal, and the order is torch's to the last."""
    g = torch.Generator().manual_seed(regions)
    k_values = torch.randint(-4, 5, (regions,), generator=g).float()
    q_values = [1.0, -2.0, 0.0]
    want_graph, want = top_regions(torch.tensor(q_values)[:, None] * k_values, regions)
    every = {*range(1, min(regions, 20) + 1), regions // 2 or 1, regions}
    for topk in sorted(every):
        graph, values = route_of(q_values, k_values.tolist(), topk, isa)
        assert torch.equal(graph[0], want_graph[:, :topk])
        assert torch.equal(values[0], want[:, :topk])


@pytest.mark.parametrize("topk", [1, 4, 16, 700])
@pytest.mark.parametrize("isa", ISAS)
def test_all_equal_rows(isa, topk):
    """More candidates than are counted: rows that are sorted keep the same order."""
    graph, values = route_of([1.0, 0.0], [2.0] * 700, topk, isa)
    assert graph[0].tolist() == [list(range(topk))] * 2
    assert values[0, :, 0].tolist() == [2.0, 0.0]


@pytest.mark.parametrize("copies", [1, 200])
@pytest.mark.parametrize("isa", ISAS)
def test_nan_is_the_largest_and_zeros_are_equal(isa, copies):
    inf, nan = float("inf"), float("nan")
    row = torch.tensor([-1.0, 0.0, nan, -0.0, inf, 1e-30, -inf, -nan, 3.0] * copies)
    want, values = top_regions(row, len(row))
    for topk in (1, 3, 9, len(row)):
        graph, got = route_of([1.0], row.tolist(), topk, isa)
        assert torch.equal(graph[0, 0], want[:topk])
        assert torch.equal(got[0, 0].nan_to_num(7.0), values[:topk].nan_to_num(7.0))


@pytest.mark.parametrize("scale", [0.0, -1.5])
def test_scales_that_turn_or_flatten_the_order(scale):
    k_values = [1.0, 3.0, -2.0, 0.5]
    want = top_regions(torch.tensor(k_values) * scale, 4)
    graph, values = route_of([1.0], k_values, 4, None, scale)
    assert torch.equal(graph[0, 0], want[0]) and torch.equal(values[0, 0], want[1])


LAYOUTS = {
    "packed": lambda x: x.permute(0, 2, 3, 4, 1, 5).repeat(1, 1, 1, 1, 1, 3)[..., :24],
    "heads-apart": lambda x: x.contiguous(),
    "channels-first": lambda x: x.permute(0, 1, 5, 2, 3, 4).contiguous(),
    "columns-first": lambda x: x.permute(0, 1, 5, 2, 4, 3).contiguous(),
    "every-second": lambda x: x.repeat_interleave(2, 5).repeat_interleave(2, 4),
    "batch-last": lambda x: x.permute(1, 2, 3, 4, 5, 0).contiguous(),
}
BACK = {
    "packed": lambda x: x.permute(0, 4, 1, 2, 3, 5),
    "heads-apart": lambda x: x,
    "channels-first": lambda x: x.permute(0, 1, 3, 4, 5, 2),
    "columns-first": lambda x: x.permute(0, 1, 3, 5, 4, 2),
    "every-second": lambda x: x[:, :, :, :, ::2, ::2],
    "batch-last": lambda x: x.permute(5, 0, 1, 2, 3, 4),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@by_isa_and_dtype
def test_any_strides(isa, dtype, layout):
    args = args_of("boxes-hang-over", dtype)
    q, k = (BACK[layout](LAYOUTS[layout](x)) for x in (args.q, args.k))
    assert torch.equal(q, args.q) and q.stride() != args.q.stride()
    check(RouteArgs(q, k, args.q_box, args.kv_box, args.topk, args.scale), isa)


def test_expanded_batches_give_equal_rows():
    args = args_of("video", batch=1)
    q = args.q.expand(3, -1, -1, -1, -1, -1)
    k = args.k.expand(3, -1, -1, -1, -1, -1)
    found = routing.route(RouteArgs(q, k, args.q_box, args.kv_box, args.topk, args.scale))
    for x, one in zip(found, routing.route(args), strict=True):
        assert torch.equal(x, one.expand_as(x))


def test_cells_outside_the_map_and_between_the_rows_are_not_read():
    buffer = torch.full((2, 3, 12, 30, 2, 40), float("nan"))
    view = buffer[:, 1:2, 1:10, 3:26, :, 5:29]
    view.copy_(args_of("boxes-hang-over").q.permute(0, 2, 3, 4, 1, 5))
    q = view.permute(0, 4, 1, 2, 3, 5)
    args = RouteArgs(q, q, (1, 4, 9), (1, 4, 9), 9, 1.0)
    assert torch.isfinite(routing.route(args)[1]).all()
    check(args)


@pytest.mark.parametrize("name", ["stage3", "cross-map", "longer-than-a-chain"])
@pytest.mark.parametrize("first", [False, True], ids=["channels-last", "channels-first"])
def test_bits_do_not_depend_on_the_threads(name, first):
    args = args_of(name, batch=6, heads=4, dim=32)
    if first:
        q, k = (BACK["channels-first"](LAYOUTS["channels-first"](x)) for x in (args.q, args.k))
        args = RouteArgs(q, k, args.q_box, args.kv_box, args.topk, args.scale)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3, 3):
            torch.set_num_threads(threads)
            found.append(routing.route(args))
    finally:
        torch.set_num_threads(before)
    for graph, values in found[1:]:
        assert torch.equal(graph, found[0][0]) and torch.equal(values, found[0][1])


def test_a_batch_of_none():
    args = args_of("cross-map", batch=0)
    for ours, theirs in zip(routing.route(args), reference.route(args), strict=True):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype


@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        (RouteProblem("cpu", torch.bfloat16, 64, 4), None),
        (RouteProblem("cpu", torch.float64, 64, 4), "takes float32, bfloat16 and float16"),
        (RouteProblem("cuda", torch.float32, 64, 4), "runs on cpu tensors, got cuda"),
    ],
    ids=["can", "dtype", "device"],
)
def test_why_not(problem, reason):
    why = routing.why_not_route(problem)
    assert why is None if reason is None else reason in why


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"topk": 10}, "topk: wants 1 to 9, got 10"),
        ({"boxes": [1, 4, 9, 0, 4, 9]}, "k: wants sizes of at least 1"),
        ({"boxes": [1, 4, 9]}, "boxes: wants 6 sizes"),
        ({"graph": torch.empty(2, 9, 4, dtype=torch.int32)}, "graph: wrong dtype or shape"),
        ({"values": torch.empty(2, 9, 5).double()}, "values: wrong dtype or shape"),
    ],
    ids=["topk", "box", "boxes", "graph", "values"],
)
def test_the_operator_checks_what_keeps_it_inside_its_memory(change, message):
    args = args_of("boxes-hang-over")
    given = {
        "boxes": [*args.q_box, *args.kv_box],
        "topk": 5,
        "scale": 1.0,
        "graph": torch.empty(2, 9, 5, dtype=torch.int32),
        "values": torch.empty(2, 9, 5),
    } | change
    with pytest.raises(RuntimeError, match=message):
        torch.ops.permattn_native.cpu_route(args.q, args.k, *given.values(), -1)
