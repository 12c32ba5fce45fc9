"""Bi-level routing attention through its front door, against dense attention, on every backend."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from permattn import bilevel_routing_attention, regional_routing_attention, route_regions
from permattn.backends import AUTO_ORDER, reasons
from permattn.bilevel import cut_regions
from permattn.core import modes
from permattn.core.regions import RegionArgs, RegionProblem
from permattn.testing import assert_within, dense_regions
from torch import Tensor

HALF, BRAIN, SINGLE, DOUBLE = torch.float16, torch.bfloat16, torch.float32, torch.float64


@dataclass(frozen=True)
class Case:
    """One call. `side` and `kv_side` are regions per axis, `box` and `kv_box` tokens per region.

    Args:
        cut: tokens that the map lacks at its far edges, so that the last regions hang over.
        graph: "random", "hub" (all look at region 0), "permutation" (k = 1), "all" (k = R).
        layout: how q, k and v lie in memory.
    """

    name: str
    side: tuple[int, ...] = (7, 7)
    box: tuple[int, ...] = (2, 2)
    topk: int = 4
    dim: int = 32
    dim_v: int | None = None
    heads: int = 2
    batch: int = 2
    kv_side: tuple[int, ...] | None = None
    kv_box: tuple[int, ...] | None = None
    cut: int = 0
    pad_mode: str | None = None
    graph: str = "random"
    per_head: bool = False
    weighted: bool = False
    layout: str = "packed"

    def __str__(self) -> str:
        return self.name


CASES = (
    Case("stage1", box=(8, 8), topk=1, batch=1),
    Case("stage2", box=(4, 4), topk=4, heads=4, batch=1),
    Case("stage3", box=(2, 2), topk=16, heads=8, batch=1),
    Case("one-token-regions", box=(1, 1), topk=16, dim=16),
    Case("one-region", side=(1, 1), box=(7, 11), topk=1, dim=64, heads=1),
    Case("two-by-two", side=(2, 2), box=(13, 21), topk=1, dim=16, heads=1, batch=1),
    Case("all-regions", side=(2, 2), box=(7, 7), graph="all", dim=96),
    Case("odd-boxes", side=(8, 8), box=(4, 6), topk=4, dim=16, heads=1, batch=1),
    Case("big-boxes", side=(2, 2), box=(16, 16), topk=2, heads=1, batch=1),
    Case("sixteen-sides", side=(16, 16), box=(1, 2), topk=4, dim=16, heads=1),
    Case("many-heads", side=(2, 2), box=(4, 4), topk=2, heads=12, dim=16),
    Case("wide-values", box=(2, 2), dim=16, dim_v=64),
    Case("narrow-values", box=(4, 4), side=(2, 2), topk=2, dim=64, dim_v=16, layout="nhwc"),
    Case("hub", graph="hub", topk=1, box=(2, 2)),
    Case("permutation", graph="permutation", topk=1, box=(4, 4), layout="nchw"),
    Case("per-head-graphs", per_head=True, heads=8, dim=16, side=(4, 4)),
    Case("soft", weighted=True, box=(2, 2), topk=16, side=(5, 5)),
    Case("soft-per-head", weighted=True, per_head=True, side=(2, 2), box=(7, 7), topk=2),
    Case("pooled-keys", box=(4, 4), kv_side=(7, 7), kv_box=(2, 2), topk=4),
    Case("cross-map", side=(2, 3), box=(4, 4), kv_side=(3, 5), kv_box=(3, 2), topk=4),
    Case("mask", side=(3, 4), box=(3, 5), cut=1, pad_mode="mask", topk=3),
    Case("zero", side=(3, 4), box=(3, 5), cut=1, pad_mode="zero", topk=3),
    Case("zero-soft", side=(3, 3), box=(2, 2), cut=1, pad_mode="zero", topk=2, weighted=True),
    Case("nchw", layout="nchw", topk=4),
    Case("nchw-mask", side=(3, 3), box=(5, 5), cut=2, pad_mode="mask", topk=2, layout="nchw"),
    Case("video", side=(2, 3, 2), box=(2, 2, 3), topk=4),
    Case("video-mask", side=(2, 2, 2), box=(3, 2, 4), cut=1, pad_mode="mask", topk=3),
    Case("strided-batch", layout="sliced", topk=4),
    Case("broadcast-graph", graph="random", batch=3, side=(3, 3), topk=2),
)


def draw(case: Case, dtype: torch.dtype) -> tuple[list[Tensor], Tensor, Tensor | None]:
    """q, k, v as [B, (T,) H, W, heads, D] views, a graph and weights."""
    g = torch.Generator().manual_seed(len(case.name))
    kv_side, kv_box = case.kv_side or case.side, case.kv_box or case.box
    maps = []
    for side, box, dim in (
        (case.side, case.box, case.dim),
        (kv_side, kv_box, case.dim),
        (kv_side, kv_box, case.dim_v or case.dim),
    ):
        size = [s * b - case.cut for s, b in zip(side, box, strict=True)]
        maps.append(lay_out(case, (case.batch, *size, case.heads, dim), g, dtype))
    if case.layout == "packed" and len({x.shape for x in maps}) == 1:
        maps = list(torch.stack(maps, -3).unbind(-3))
    regions, kv_regions = (torch.tensor(s).prod().item() for s in (case.side, kv_side))
    lead = (1 if case.name == "broadcast-graph" else case.batch,)
    lead += (case.heads,) if case.per_head else ()
    score = torch.rand(*lead, regions, kv_regions, generator=g)
    topk = kv_regions if case.graph == "all" else case.topk
    graph = score.topk(topk, -1).indices
    if case.graph == "hub":
        graph = torch.zeros_like(graph)
    if case.graph == "permutation":
        graph = score[..., 0, :].argsort(-1)[..., None]
    weights = None
    if case.weighted:
        weights = torch.rand(graph.shape, generator=g) + 0.2
        weights = weights.to(DOUBLE if dtype == DOUBLE else SINGLE)
    return maps, graph, weights


def lay_out(case: Case, shape: tuple[int, ...], g: torch.Generator, dtype: torch.dtype) -> Tensor:
    x = torch.randn(shape, generator=g).to(dtype)
    if case.layout == "nchw":
        axes = range(1, x.dim() - 2)
        first = x.permute(0, -2, -1, *axes).contiguous()
        return first.permute(0, *range(3, x.dim()), 1, 2)
    if case.layout == "sliced":
        return torch.stack([x, torch.full_like(x, float("nan"))], 1).flatten(0, 1)[::2]
    return x


def call(case: Case, maps: list[Tensor], graph: Tensor, weights: Tensor | None, backend: str):
    return bilevel_routing_attention(
        *(*maps, graph),
        region_size=case.box,
        kv_region_size=case.kv_box or case.box,
        pad_mode=case.pad_mode,
        weights=weights,
        scale=0.31,
        return_lse=True,
        backend=backend,
    )


def oracle(case: Case, maps: list[Tensor], graph: Tensor, weights: Tensor | None):
    """As `call`, by `dense_regions`."""
    flat = maps[0].dim() == 5
    axes = [x.unsqueeze(1) if flat else x for x in maps]
    boxes = [(1,) * (3 - len(b)) + tuple(b) for b in (case.box, case.kv_box or case.box)]
    lists = [x if x is None or x.dim() == 4 else x[:, None] for x in (graph.int(), weights)]
    args = RegionArgs(
        *(x.permute(0, 4, 1, 2, 3, 5) for x in axes),
        *(lists[0], lists[1], *boxes, case.pad_mode == "zero", 0.31),
    )
    out, lse = dense_regions(args)
    out, lse = out.permute(0, 2, 3, 4, 1, 5), lse.permute(0, 2, 3, 4, 1)
    return (out.squeeze(1), lse.squeeze(1)) if flat else (out, lse)


def backends_of(dtype: torch.dtype) -> list[str]:
    why = reasons(RegionProblem("cpu", dtype, 32, 32))
    return [name for name in AUTO_ORDER if why[name] is None]


def with_gradients(run, case, maps, graph, weights, *rest):
    """out, lse and the gradients of maps and weights under fixed random gradients of both."""
    leaves = [x.detach().requires_grad_() for x in maps]
    soft = None if weights is None else weights.detach().clone().requires_grad_()
    out, lse = run(case, leaves, graph, soft, *rest)
    g = torch.Generator().manual_seed(1)
    dout, dlse = (torch.randn(x.shape, generator=g).to(x.dtype) for x in (out, lse))
    wanted = leaves if soft is None else [*leaves, soft]
    grads = torch.autograd.grad((out, lse), wanted, (dout, dlse))
    names = ("out", "lse", "dq", "dk", "dv", "dweights")
    return {n: x.detach() for n, x in zip(names, (out, lse, *grads), strict=False)}


def in_double(maps, weights):
    return [x.double() for x in maps], None if weights is None else weights.double()


DTYPES = {"fp32": SINGLE, "bf16": BRAIN, "fp64": DOUBLE, "fp16": HALF}
IN_HALF = ("stage3", "soft", "zero", "nchw", "odd-boxes")


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        pytest.param(case, dtype, id=f"{case}-{name}")
        for case in CASES
        for name, dtype in DTYPES.items()
        if dtype != HALF or case.name in IN_HALF
    ],
)
def test_equals_dense_attention(case, dtype):
    maps, graph, weights = draw(case, dtype)
    exact_maps, exact_weights = in_double(maps, weights)
    exact = with_gradients(oracle, case, exact_maps, graph, exact_weights)
    plain = with_gradients(oracle, case, maps, graph, weights)
    for backend in backends_of(dtype):
        ours = with_gradients(call, case, maps, graph, weights, backend)
        again = with_gradients(call, case, maps, graph, weights, backend)
        for what, x in ours.items():
            assert torch.equal(x, again[what]), f"{backend} {what}: two runs differ"
            if dtype == DOUBLE:
                torch.testing.assert_close(x, exact[what], atol=1e-11, rtol=1e-11)
            elif what == "lse":
                # Products of 16-bit numbers are exact in float32, and so are scores nearly.
                torch.testing.assert_close(x.double(), exact[what], atol=1e-5, rtol=1e-5)
            else:
                size = float(exact[what].abs().max())
                assert_within(x, plain[what], exact[what], f"{backend} {what}", cancelled=size)


@pytest.mark.parametrize("backend", backends_of(SINGLE))
def test_a_region_that_nobody_looks_at_is_not_read_and_gets_zeros(backend):
    q, k, v = (torch.randn(2, 8, 8, 2, 16) for _ in range(3))
    graph = torch.zeros(2, 16, 2, dtype=torch.int32)
    graph[..., 1] = 5
    unseen = torch.ones(16, dtype=torch.bool)
    unseen[[0, 5]] = False
    cells = unseen.view(4, 4).repeat_interleave(2, 0).repeat_interleave(2, 1)
    want = bilevel_routing_attention(q, k, v, graph, (4, 4), backend=backend)
    k[:, cells], v[:, cells] = float("nan"), float("inf")
    k.requires_grad_(), v.requires_grad_()
    out = bilevel_routing_attention(q, k, v, graph, (4, 4), backend=backend)
    out.sum().backward()
    assert torch.equal(out, want)
    for x in (k, v):
        assert torch.equal(x.grad[:, cells], torch.zeros_like(x.grad[:, cells]))
        assert bool(torch.isfinite(x.grad).all()) and bool((x.grad[:, ~cells] != 0).any())


@pytest.mark.parametrize("backend", backends_of(SINGLE))
def test_a_region_listed_twice_counts_twice(backend):
    q, k, v = (torch.randn(1, 4, 4, 1, 16) for _ in range(3))
    graph = torch.tensor([[[1, 1, 2]] * 4])
    out = bilevel_routing_attention(q, k, v, graph, (2, 2), backend=backend)

    def cells(x, r):
        return x[0, 2 * (r // 2) :][:2, 2 * (r % 2) :][:, :2].reshape(4, 16)

    keys = torch.cat([cells(k, r) for r in (1, 1, 2)])
    values = torch.cat([cells(v, r) for r in (1, 1, 2)])
    want = torch.softmax(q.reshape(16, 16) @ keys.T / 4, -1) @ values
    torch.testing.assert_close(out.view(16, 16), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", backends_of(SINGLE))
def test_inputs_stay_as_they_are_and_lepe_is_added(backend):
    q, k, v, lepe = (torch.randn(1, 4, 4, 2, 16) for _ in range(4))
    graph = torch.randint(0, 4, (1, 4, 2))
    before = [x.clone() for x in (q, k, v, lepe, graph)]
    plain = bilevel_routing_attention(q, k, v, graph, (2, 2), backend=backend)
    out = bilevel_routing_attention(q, k, v, graph, (2, 2), lepe=lepe, backend=backend)
    assert torch.equal(out, plain + lepe)
    for x, y in zip((q, k, v, lepe, graph), before, strict=True):
        assert torch.equal(x, y)


def test_gradcheck_of_maps_and_weights():
    g = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, 3, 4, 2, 3, dtype=DOUBLE, generator=g, requires_grad=True) for _ in range(3)
    )
    weights = torch.rand(1, 4, 2, dtype=DOUBLE, generator=g, requires_grad=True)
    graph = torch.rand(1, 4, 4, generator=g).topk(2, -1).indices

    for pad_mode in ("mask", "zero"):

        def run(q, k, v, weights, pad_mode=pad_mode):
            return bilevel_routing_attention(
                *(q, k, v, graph),
                region_size=(2, 2),
                pad_mode=pad_mode,
                weights=weights,
                return_lse=True,
            )

        assert torch.autograd.gradcheck(run, (q, k, v, weights))


def test_the_operator_keeps_torchs_rules():
    q, k, v = (torch.randn(1, 2, 1, 4, 4, 8, requires_grad=True) for _ in range(3))
    graph = torch.randint(0, 4, (1, 1, 4, 2), dtype=torch.int32)
    weights = torch.rand(1, 1, 4, 2, requires_grad=True)
    rest = ([1, 2, 2, 1, 2, 2], False, 0.5)
    for backend in backends_of(SINGLE):
        torch.library.opcheck(
            torch.ops.permattn.region_attention, (q, k, v, graph, weights, *rest, backend)
        )
        torch.library.opcheck(
            torch.ops.permattn.region_attention,
            (
                *(
                    x.permute(0, 1, 5, 2, 3, 4).contiguous().permute(0, 1, 3, 4, 5, 2)
                    for x in (q, k, v)
                ),
                graph,
                None,
                *rest,
                backend,
            ),
        )


def test_compiles_as_one_graph_for_all_sizes():
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()

    def run(q, k, v):
        graph, _ = route_regions(q, k, (2, 2), topk=2, pad_mode="mask")
        return bilevel_routing_attention(q, k, v, graph, (2, 2), pad_mode="mask")

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend=counter)
    # Unlike all other sizes: torch takes equal sizes for one symbol.
    for batch, height, width in ((3, 6, 8), (5, 10, 12), (4, 7, 9)):
        maps = [torch.randn(batch, height, width, 2, 16) for _ in range(3)]
        torch.testing.assert_close(compiled(*maps), run(*maps))
    assert counter.frame_count == 1


def test_a_wrong_graph_is_refused_under_compilation_too():
    q = torch.randn(1, 4, 4, 2, 16)
    graph = torch.full((1, 4, 1), 4)
    compiled = torch.compile(
        lambda g: bilevel_routing_attention(q, q, q, g, (2, 2)), fullgraph=True, backend="aot_eager"
    )
    with pytest.raises(ValueError, match="region_graph: wants key regions from 0 to 3, got 4"):
        compiled(graph)


def test_autocast_runs_in_its_dtype():
    q, k, v = (torch.randn(1, 4, 4, 2, 16) for _ in range(3))
    graph = torch.randint(0, 4, (1, 4, 2))
    with torch.autocast("cpu", dtype=BRAIN):
        out = bilevel_routing_attention(q, k, v, graph, (2, 2))
    assert out.dtype == BRAIN
    want = bilevel_routing_attention(*(x.to(BRAIN) for x in (q, k, v)), graph, (2, 2))
    assert torch.equal(out, want)


def test_empty_batch():
    q = torch.randn(0, 4, 4, 2, 16, requires_grad=True)
    graph, _ = route_regions(q, q, (2, 2), topk=2)
    out = bilevel_routing_attention(q, q, q, graph, (2, 2))
    out.sum().backward()
    assert out.shape == q.shape and q.grad is not None


@pytest.mark.parametrize("sizes", [((8, 6), (2, 2)), ((7, 9), (2, 3)), ((1, 1), (1, 1))], ids=str)
@pytest.mark.parametrize("per_head", [True, False], ids=["per-head", "shared"])
def test_the_published_functional(sizes, per_head):
    (height, width), box = sizes
    heads, dim = 3, 4
    query, key, value = (torch.randn(2, heads * dim, height, width) for _ in range(3))
    regions = -(-height // box[0]) * -(-width // box[1])
    graph = torch.rand(2, heads if per_head else 1, regions, regions).topk(min(2, regions)).indices
    out, attn = regional_routing_attention(
        *(query, key, value, 0.3, graph if per_head else graph[:, 0], box),
        num_heads=None if per_head else heads,
        need_attn=True,
    )
    want_out, want_attn = published(query, key, value, 0.3, graph.expand(-1, heads, -1, -1), box)
    torch.testing.assert_close(out, want_out, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(attn, want_attn, atol=1e-5, rtol=1e-5)
    assert out.shape == query.shape
    without = regional_routing_attention(query, key, value, 0.3, graph, box, num_heads=heads)
    assert without[1] is None and torch.equal(without[0], out)


def published(query, key, value, scale, graph, box):
    """The released algorithm: pad by zeros, gather, softmax, put back, cut."""
    height, width = query.shape[-2:]
    heads, (h, w) = graph.shape[1], box

    def rows(x):
        x = torch.nn.functional.pad(x, (0, -width % w, 0, -height % h))
        x = x.unflatten(1, (heads, -1)).unflatten(-1, (-1, w)).unflatten(-3, (-1, h))
        return x.permute(0, 1, 3, 5, 4, 6, 2).flatten(4, 5).flatten(2, 3)

    q, k, v = rows(query), rows(key), rows(value)
    b = torch.arange(len(q))[:, None, None, None]
    m = torch.arange(heads)[:, None, None]
    attn = torch.softmax((q * scale) @ k[b, m, graph].flatten(3, 4).mT, -1)
    out = attn @ v[b, m, graph].flatten(3, 4)
    nh, nw = -(-height // h), -(-width // w)
    out = out.unflatten(3, (h, w)).unflatten(2, (nh, nw)).permute(0, 1, 6, 2, 4, 3, 5)
    return out.flatten(5, 6).flatten(3, 4).flatten(1, 2)[..., :height, :width], attn


Q = torch.zeros(2, 6, 8, 2, 4)
GRAPH = torch.zeros(2, 12, 2, dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": Q[0]}, ValueError, r"q: wants \[B, H, W, heads, D\]"),
        ({"q": Q.long()}, TypeError, "q: wants a floating dtype, got torch.int64"),
        ({"k": Q.double()}, TypeError, "k: wants q's dtype torch.float32"),
        ({"k": Q[..., :3]}, ValueError, "k: wants q's head dim 4, got 3"),
        ({"k": Q[..., :1, :], "v": Q[..., :1, :]}, ValueError, "want q's 2 heads"),
        ({"v": Q[:, :4]}, ValueError, "one map"),
        ({"v": Q[:1]}, ValueError, "batch size 2"),
        ({"graph": GRAPH + 12}, ValueError, "key regions from 0 to 11, got 12"),
        ({"graph": GRAPH - 1}, ValueError, "key regions from 0 to 11, got -1"),
        ({"graph": GRAPH.long() + 2**32}, ValueError, "key regions from 0 to 11, got 2147483647"),
        ({"graph": GRAPH.float()}, TypeError, "region_graph: wants an integer dtype"),
        (
            {"graph": GRAPH[:, :11]},
            ValueError,
            r"region_graph: wants .* 12, topk.*got \[2, 11, 2\]",
        ),
        ({"graph": GRAPH[..., :0]}, ValueError, "region_graph: wants"),
        ({"regions": (4, 4)}, ValueError, r"regions: \(4, 4\) does not divide a map of \(6, 8\)"),
        ({"regions": (7, 4), "pad_mode": "mask"}, ValueError, r"has no \(7, 4\) regions"),
        ({"regions": (3, 0)}, ValueError, "regions: wants sizes >= 1"),
        ({"regions": (3, 4, 1)}, ValueError, "regions: wants 2 sizes"),
        ({"regions": None}, ValueError, "give either regions or its region size"),
        ({"region_size": (2, 2)}, ValueError, "give either regions or its region size"),
        ({"pad_mode": "reflect"}, ValueError, "pad_mode: wants None, 'zero' or 'mask'"),
        ({"weights": torch.ones(2, 12, 3)}, ValueError, "weights: wants"),
        ({"weights": torch.ones(2, 12, 2).int()}, TypeError, "weights: wants a floating dtype"),
        ({"lepe": Q[..., :3]}, ValueError, r"lepe: wants \[2, 6, 8, 2, 4\]"),
        ({"scale": float("nan")}, ValueError, "scale: wants a finite number"),
        ({"backend": "tpu"}, ValueError, "backend: wants one of"),
        ({"backend": "triton"}, NotImplementedError, "backend 'triton' cannot run this problem"),
    ],
    ids=lambda x: ",".join(x) if isinstance(x, dict) else "",
)
def test_bad_input_is_named(change, error, message):
    given = {"q": Q, "k": Q, "v": Q, "graph": GRAPH, "regions": (3, 4)} | change
    args = [given.pop(name) for name in ("q", "k", "v", "graph")]
    with pytest.raises(error, match=message):
        bilevel_routing_attention(*args, **given)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": Q}, "query: wants"),
        ({"graph": GRAPH}, "num_heads: wanted beside a graph without heads"),
        ({"graph": GRAPH, "num_heads": 3}, "query: 8 channels do not split into 3 heads"),
        ({"auto_pad": False, "region_size": (4, 4)}, "does not divide"),
    ],
    ids=["axes", "heads", "channels", "no-padding"],
)
def test_bad_input_of_the_published_functional(change, message):
    x = torch.zeros(2, 8, 6, 8)
    graph = change.pop("graph", GRAPH[:, None].expand(-1, 2, -1, -1))
    given = {"region_size": (2, 2)} | change
    with pytest.raises(ValueError, match=message):
        regional_routing_attention(given.pop("query", x), x, x, 0.5, graph, **given)


@pytest.mark.parametrize(
    ("size", "regions", "pad_mode", "box", "counts"),
    [
        ((56, 56), (7, 7), None, (8, 8), (7, 7)),
        ((50, 50), (16, 16), "zero", (3, 3), (17, 17)),
        ((28, 28), (8, 8), "zero", (3, 3), (10, 10)),
        ((14, 14), (8, 8), "zero", (1, 1), (14, 14)),
        ((50, 50), (16, 16), "mask", (4, 4), (13, 13)),
        ((9, 14), (8, 8), "mask", (2, 2), (5, 7)),
    ],
    ids=str,
)
def test_how_maps_are_cut(size, regions, pad_mode, box, counts):
    grid = cut_regions(size, regions, pad_mode=pad_mode)
    assert (grid.box, grid.counts) == ((1, *box), (1, *counts))


def test_a_counter_that_counts_before_the_first_call_counts_it(monkeypatch):
    from torch.utils.flop_counter import FlopCounterMode, flop_registry

    q = torch.randn(2, 8, 8, 2, 16, requires_grad=True)
    # As in a process that has not called anything before.
    monkeypatch.setattr(modes, "_offered", set())
    for op in [op for op in flop_registry if "permattn" in str(op)]:
        monkeypatch.delitem(flop_registry, op)
    with FlopCounterMode(display=False) as counter:
        graph, _ = route_regions(q, q, (4, 4), topk=3)
        routing = counter.get_total_flops()
        out = bilevel_routing_attention(q, q, q, graph, (4, 4))
        forward = counter.get_total_flops() - routing
        out.sum().backward()
        backward = counter.get_total_flops() - routing - forward
    pairs = 2 * 2 * 64 * 3 * 4
    assert routing == 2 * 2 * 16 * 16 * 32
    assert forward == 2 * pairs * 32 and backward == 2 * pairs * 5 * 16
