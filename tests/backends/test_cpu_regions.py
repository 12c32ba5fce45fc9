"""Attention from region to region on the native CPU kernels, on every instruction set."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

import pytest
import torch
from permattn.backends import cpu, reference
from permattn.core.regions import RegionArgs, RegionBwdArgs, RegionGrid, RegionProblem, Sizes
from permattn.testing import assert_within, dense_regions
from torch import Tensor

pytestmark = pytest.mark.skipif(not cpu.available_isas(), reason=f"{cpu.load()}")

SINGLE, BRAIN, HALF = torch.float32, torch.bfloat16, torch.float16
# Those with products of bytes, and tiles, add nothing here.
ISAS = tuple(i for i in cpu.available_isas() if i in ("portable", "avx2", "avx512", "avx512_bf16"))
# With bf16 products in the forward, the other dtypes run on kernels that are tested already.
KERNELS = [(i, d) for i in ISAS for d in (SINGLE, BRAIN, HALF) if i != "avx512_bf16" or d == BRAIN]


@dataclass(frozen=True)
class Case:
    """One call.

    Args:
        side, box: regions and tokens of a region per axis; `kv_side`, `kv_box` of another map.
        cut: tokens that both maps lack at their far edges.
        topk: 0 = all regions.
        graph: "random", "hub" (all look at region 1), "permutation" or "repeats".
        layout: "packed" (views of one tensor), "nhwc" or "nchw".
    """

    name: str
    side: Sizes = (1, 3, 4)
    box: Sizes = (1, 2, 2)
    kv_side: Sizes | None = None
    kv_box: Sizes | None = None
    cut: int = 0
    count_padding: bool = False
    topk: int = 4
    dim: int = 32
    dim_v: int | None = None
    heads: int = 2
    batch: int = 1
    graph: str = "random"
    per_head: bool = False
    weighted: bool = False
    layout: str = "packed"
    scale: float = 0.3

    def __str__(self) -> str:
        return self.name


CASES = (
    # One to sixteen tokens, by the heads that share a vector: 8, 8, 4, 2 and 1 of them.
    Case("eight-heads", side=(1, 7, 7), topk=16, heads=8, batch=2),
    Case("one-token-regions", side=(1, 8, 8), box=(1, 1, 1), topk=16, dim=16, heads=8),
    Case("twelve-heads", topk=0, heads=12, dim=16),
    Case("six-heads", box=(1, 4, 4), topk=1, heads=6),
    Case("one-head", heads=1, dim=64),
    Case("one-region", side=(1, 1, 1), box=(1, 7, 7), topk=1, dim=96),
    Case("several-panels-and-chunks", side=(1, 2, 2), box=(1, 13, 21), topk=2, heads=1, dim=16),
    Case("sixteen-by-sixteen", side=(1, 2, 2), box=(1, 16, 16), topk=1, heads=1),
    Case("chunks-cut-regions", side=(1, 3, 3), box=(1, 7, 11), topk=4, heads=1, dim=16),
    Case("odd-keys", side=(1, 3, 3), box=(1, 4, 6), kv_box=(1, 3, 3), topk=3, batch=2),
    Case("pooled-keys", box=(1, 4, 4), kv_box=(1, 1, 2), topk=5, heads=4, layout="nhwc"),
    Case("cross-map", side=(1, 2, 2), box=(1, 3, 3), kv_side=(1, 4, 5), topk=7, heads=4),
    Case("wide-values", dim=16, dim_v=96, heads=4),
    Case("narrow-odd-widths", dim=33, dim_v=7, heads=4, topk=3),
    Case("hub", graph="hub", heads=4),
    Case("permutation", graph="permutation", box=(1, 4, 4), heads=4, layout="nchw"),
    Case("a-region-twice", graph="repeats", topk=3),
    Case("per-head-graphs", per_head=True, heads=8, batch=2, dim=16),
    Case("weights", weighted=True, heads=8, batch=2),
    Case("weights-of-large-regions", weighted=True, side=(1, 2, 2), box=(1, 9, 9), topk=2),
    Case("weights-per-head", weighted=True, per_head=True, heads=4, scale=-0.3),
    Case("hidden-padding", box=(1, 3, 5), cut=2, heads=4),
    Case("counted-padding", box=(1, 3, 5), cut=2, count_padding=True, heads=4, layout="nchw"),
    Case("counted-padding-weighted", box=(1, 3, 3), cut=2, count_padding=True, weighted=True),
    Case("video", side=(2, 2, 3), box=(2, 3, 2), cut=1, topk=5, heads=4, layout="nchw"),
    Case("negative-scale", scale=-0.4, heads=8, topk=0),
)


def size_of(side: Sizes, box: Sizes, cut: int) -> list[int]:
    return [max(1, s * b - (cut if b > 1 else 0)) for s, b in zip(side, box, strict=True)]


def draw(case: Case, dtype: torch.dtype = SINGLE) -> RegionArgs:
    g = torch.Generator().manual_seed(len(case.name))
    kv_side, kv_box = case.kv_side or case.side, case.kv_box or case.box
    wide = case.dim_v or case.dim
    sides = ((case.side, case.box), (kv_side, kv_box), (kv_side, kv_box))
    sizes = [size_of(*x, case.cut) for x in sides]
    shapes = [(case.batch, *s, case.heads) for s in sizes]
    maps = [
        torch.randn(*shape, d, generator=g).to(dtype)
        for shape, d in zip(shapes, (case.dim, case.dim, wide), strict=True)
    ]
    if case.layout == "packed":
        # Odd offsets and rows that begin nowhere in particular.
        maps = [torch.nn.functional.pad(x.flatten(-2), (3, 2)) for x in maps]
        maps = [x[..., 3:-2].unflatten(-1, (case.heads, -1)) for x in maps]
    maps = [x.permute(0, 4, 1, 2, 3, 5) for x in maps]
    if case.layout == "nchw":
        maps = [x.permute(0, 1, 5, 2, 3, 4).contiguous().permute(0, 1, 3, 4, 5, 2) for x in maps]
    regions = RegionGrid(sizes[0], case.box).num_regions
    kv_regions = RegionGrid(sizes[1], kv_box).num_regions
    score = torch.rand(
        case.batch, case.heads if case.per_head else 1, regions, kv_regions, generator=g
    )
    graph = score.topk(case.topk or kv_regions, -1).indices
    if case.graph == "hub":
        graph = torch.ones_like(graph[..., :1])
    elif case.graph == "permutation":
        graph = score[..., 0, :].argsort(-1)[..., None]
    elif case.graph == "repeats":
        graph = graph[..., :2][..., [0, 1, 0]]
    weights = torch.rand(graph.shape, generator=g) + 0.2 if case.weighted else None
    boxes = (case.box, kv_box, case.count_padding, case.scale)
    return RegionArgs(*maps, graph.int().contiguous(), weights, *boxes)


def gradients_of(args: RegionArgs, dtype: torch.dtype) -> dict[str, Tensor]:
    """out, lse and all gradients of dense attention in a dtype, by autograd."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in (args.q, args.k, args.v)]
    weights = args.weights
    if weights is not None:
        weights = weights.to(torch.promote_types(dtype, SINGLE)).requires_grad_()
        leaves.append(weights)
    run = dataclasses.replace(args, q=leaves[0], k=leaves[1], v=leaves[2], weights=weights)
    out, lse = dense_regions(run)
    dout, dlse = output_gradients(args)
    grads = torch.autograd.grad((out, lse), leaves, (dout.to(out.dtype), dlse.to(lse.dtype)))
    names = ("out", "lse", "dq", "dk", "dv", "dweights")
    found = zip(names, (out, lse, *grads), strict=False)
    return {name: x.detach() for name, x in found}


@functools.cache
def oracles(case: Case, dtype: torch.dtype) -> tuple[RegionArgs, dict, dict]:
    """A call, float64's results and plain torch's."""
    args = draw(case, dtype)
    return args, gradients_of(args, torch.float64), gradients_of(args, dtype)


def output_gradients(args: RegionArgs) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    shape = args.q.shape[:5]
    dout = torch.randn(*shape, args.v.shape[5], generator=g).to(args.q.dtype)
    return dout, torch.randn(shape, generator=g)


def run(args: RegionArgs, isa: str | None = None) -> dict[str, Tensor]:
    out, lse = cpu.attend_regions(args, isa=isa)
    dout, dlse = output_gradients(args)
    dlse = torch.where(lse == float("-inf"), 0.0, dlse)
    grads = cpu.attend_regions_backward(RegionBwdArgs(args, out, lse, dout, dlse), isa=isa)
    names = ("out", "lse", "dq", "dk", "dv", "dweights")
    return {n: x for n, x in zip(names, (out, lse, *grads), strict=True) if x is not None}


@pytest.mark.parametrize(
    ("isa", "dtype"), KERNELS, ids=[f"{i}-{str(d).removeprefix('torch.')}" for i, d in KERNELS]
)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_dense_attention(case, isa, dtype):
    args, exact, plain = oracles(case, dtype)
    ours = run(args, isa)
    assert ours.keys() == exact.keys()
    for what, x in ours.items():
        if what == "lse":
            # Products of 16-bit numbers are exact in float32, and so are scores nearly.
            torch.testing.assert_close(x.double(), exact[what], atol=1e-5, rtol=1e-5)
            continue
        size = float(exact[what].abs().max())
        assert_within(x, plain[what], exact[what], f"{isa} {what}", cancelled=size)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [SINGLE, BRAIN], ids=["fp32", "bf16"])
def test_regions_that_are_not_there_are_hidden(isa, dtype):
    args = draw(CASES[0], dtype)
    graph = args.graph.clone()
    graph[:, :, 5] = torch.tensor([-1, 49, 2**31 - 1, -(2**31)]).repeat(4)
    graph[:, :, 6, 3:] = -7
    graph[:, :, 7, ::2] = 1 << 20
    damaged = dataclasses.replace(args, graph=graph)
    ours = run(damaged, isa)
    out, lse = reference.attend_regions(damaged)
    dout, dlse = output_gradients(args)
    dlse = torch.where(lse == float("-inf"), 0.0, dlse)
    grads = reference.attend_regions_backward(RegionBwdArgs(damaged, out, lse, dout, dlse))
    assert (lse == float("-inf")).sum() == 2 * 8 * 4
    assert torch.equal(ours["lse"] == float("-inf"), lse == float("-inf"))
    tolerance = {"atol": 2e-5, "rtol": 2e-5} if dtype == SINGLE else {"atol": 3e-2, "rtol": 2e-2}
    for name, want in zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *grads), strict=False):
        torch.testing.assert_close(ours[name], want, **tolerance)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    "name", ["one-head", "weights", "hidden-padding", "several-panels-and-chunks"]
)
def test_threads_and_runs_change_no_bit(name, isa):
    # Few heads are cut into runs of regions, dQ apart from dK and dV; many are not.
    args = draw(next(c for c in CASES if c.name == name), BRAIN)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            found.append(run(args, isa))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        for what, x in found[0].items():
            assert torch.equal(x, other[what]), what


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("box", [(1, 2, 2), (1, 5, 5), (1, 9, 9)], ids=["n4", "n25", "n81"])
@pytest.mark.parametrize("layout", ["packed", "nchw"])
def test_a_region_that_nobody_looks_at_is_not_read_and_gets_zeros(layout, box, isa):
    case = Case("seen", side=(1, 3, 3), box=box, topk=2, heads=4, layout=layout)
    args = draw(case)
    graph = torch.tensor([1, 7], dtype=torch.int32).expand(1, 1, 9, 2).contiguous()
    args = dataclasses.replace(args, graph=graph)
    clean = run(args, isa)
    slot = args.kv_grid.token_of_slot().view(9, -1)
    unseen = slot[[0, 2, 3, 4, 5, 6, 8]].flatten().long()
    w = args.k.shape[4]
    poisoned = {}
    for name in ("k", "v"):
        x = getattr(args, name).clone(memory_format=torch.preserve_format)
        x[:, :, 0, unseen // w, unseen % w] = float("nan")
        poisoned[name] = x
    found = run(dataclasses.replace(args, **poisoned), isa)
    for what, x in found.items():
        assert torch.equal(x, clean[what]), what
    for what in ("dk", "dv"):
        assert (found[what][:, :, 0, unseen // w, unseen % w] == 0).all(), what


@pytest.mark.parametrize("isa", ISAS)
def test_nan_of_a_key_reaches_those_who_see_it_and_no_others(isa):
    case = Case("nan", side=(1, 3, 3), box=(1, 2, 2), heads=8, graph="permutation")
    args = draw(case)
    args.k[0, 3, 0, 0, 0, 5] = float("nan")
    out, _ = cpu.attend_regions(args, isa=isa)
    looks = int((args.graph[0, 0, :, 0] == 0).nonzero())
    token = args.q_grid.token_of_slot().view(9, 4)[looks].long()
    w = args.q.shape[4]
    bad = torch.isnan(out)
    assert bad[0, 3, 0, token // w, token % w].all()
    assert bad.sum() == 4 * args.v.shape[5]


def test_results_lie_as_promised():
    for layout in ("packed", "nchw"):
        args = draw(Case("layout", layout=layout))
        found = run(args)
        channels = 5 if layout == "packed" else 4
        for what in ("out", "dq", "dk", "dv"):
            assert found[what].stride(channels) == 1, what


@pytest.mark.parametrize("batch", [0, 2])
def test_empty_batches_and_heads_of_nobody(batch):
    args = draw(Case("empty", batch=2))
    args = dataclasses.replace(
        args, **{n: getattr(args, n)[:batch] for n in ("q", "k", "v", "graph")}
    )
    found = run(args)
    assert found["out"].shape[0] == batch and found["dk"].shape == args.k.shape


def test_broadcast_batches_and_expanded_maps():
    args = draw(Case("broadcast", batch=1, heads=4, weighted=True))
    wide = {n: getattr(args, n).expand(3, -1, -1, -1, -1, -1) for n in ("q", "k", "v")}
    many = dataclasses.replace(args, **wide)
    found, one = run(many), run(args)
    assert torch.equal(found["out"], one["out"].expand_as(found["out"]))
    assert found["dweights"].shape == args.weights.shape
    exact = gradients_of(many, torch.float64)
    assert_within(
        found["dweights"],
        gradients_of(many, SINGLE)["dweights"],
        exact["dweights"],
        "dweights",
        cancelled=float(exact["dweights"].abs().max()),
    )


@pytest.mark.parametrize(
    ("problem", "why"),
    [
        (RegionProblem("cuda", SINGLE, 32, 32), "runs on cpu tensors, got cuda"),
        (RegionProblem("cpu", torch.float64, 32, 32), "takes float32, bfloat16 and float16"),
        (RegionProblem("cpu", SINGLE, 257, 32), "takes head dims to 256, got 257, 32"),
        (RegionProblem("cpu", BRAIN, 256, 1), None),
    ],
    ids=["device", "dtype", "width", "fits"],
)
def test_says_why_not(problem, why):
    found = cpu.why_not_regions(problem)
    assert found is None if why is None else found is not None and why in found


def bad_calls():
    args = draw(CASES[0])
    yield "graph-dtype", {"graph": args.graph.long()}, "int32"
    yield "graph-shape", {"graph": args.graph[:, :, :-1].contiguous()}, "graph: wants contiguous"
    yield "graph-strides", {"graph": args.graph.mT.contiguous().mT}, "graph: wants contiguous"
    yield "k-width", {"k": args.k[..., :-1]}, "k: wants size 32 of axis 5"
    yield "v-map", {"v": args.v[:, :, :, :-1]}, "v: wants size 14 of axis 3"
    yield "v-dtype", {"v": args.v.half()}, "v: wants 6 axes of q's dtype"
    yield "box", {"q_box": (1, 0, 2)}, "boxes: wants 1 or more"
    yield "weights", {"weights": args.graph.double()}, "weights: wants float32"


@pytest.mark.parametrize(
    ("change", "message"), [pytest.param(*x[1:], id=x[0]) for x in bad_calls()]
)
def test_the_operator_refuses_what_would_leave_its_memory(change, message):
    with pytest.raises(RuntimeError, match=message):
        cpu.attend_regions(dataclasses.replace(draw(CASES[0]), **change))
