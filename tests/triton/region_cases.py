"""Calls from region to region that the Triton kernels must get right, shared by the interpreter
suite and the GPU suite.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from permattn.backends import attends_regions
from permattn.core.regions import RegionArgs, RegionBwdArgs, RegionGrid, Sizes
from permattn.testing import assert_within, dense_regions
from torch import Tensor

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
NAMES = ("out", "lse", "dq", "dk", "dv", "dweights")


@dataclass(frozen=True)
class Case:
    """One call.

    Args:
        size, kv_size: tokens per axis; kv_* = None: as the queries'.
        graph: "drawn"; "hub" = every row names region 0; "all" = topk is the number of regions.
        layout: "nhwc"; "packed" = parts of one [.., 3, M, D]; "nchw" = channels first.
        lists: batch rows and heads that have a graph (and weights) of their own.
    """

    name: str
    size: Sizes
    box: Sizes
    topk: int = 2
    kv_size: Sizes | None = None
    kv_box: Sizes | None = None
    batch: int = 1
    heads: int = 2
    dim: int = 16
    dim_v: int | None = None
    dtype: torch.dtype = SINGLE
    weighted: bool = False
    count_padding: bool = False
    graph: str = "drawn"
    lists: tuple[int, int] = (1, 1)
    layout: str = "nhwc"
    scale: float = 0.3

    def __str__(self) -> str:
        return self.name

    def arguments(self, device: str = "cpu") -> RegionArgs:
        g = torch.Generator().manual_seed(len(self.name))
        kv_size, kv_box = self.kv_size or self.size, self.kv_box or self.box
        dims = (self.dim, self.dim, self.dim_v or self.dim)
        sizes = (self.size, kv_size, kv_size)
        maps = [
            lay_out(self, (self.batch, *size, self.heads, dim), g, device)
            for size, dim in zip(sizes, dims, strict=True)
        ]
        if self.layout == "packed":
            maps = list(torch.stack(maps, 4).unbind(4))
        q, k, v = (x.permute(0, 4, 1, 2, 3, 5) for x in maps)
        regions = RegionGrid(self.size, self.box).num_regions
        kv_regions = RegionGrid(kv_size, kv_box).num_regions
        score = torch.rand(*self.lists, regions, kv_regions, generator=g)
        topk = kv_regions if self.graph == "all" else self.topk
        graph = score.topk(topk, -1).indices.int()
        if self.graph == "hub":
            graph = torch.zeros_like(graph)
        weights = torch.rand(graph.shape, generator=g) + 0.2 if self.weighted else None
        graph, weights = (None if x is None else x.to(device) for x in (graph, weights))
        facts = (self.box, kv_box, self.count_padding, self.scale)
        return RegionArgs(q, k, v, graph, weights, *facts)


def lay_out(case: Case, shape: tuple[int, ...], g: torch.Generator, device: str) -> Tensor:
    """[B, T, H, W, M, D], drawn."""
    x = torch.randn(shape, generator=g).to(case.dtype).to(device)
    if case.layout == "nchw":
        return x.permute(0, 4, 5, 1, 2, 3).contiguous().permute(0, 3, 4, 5, 1, 2)
    return x


CASES = (
    Case("tiny-regions-packed", (1, 6, 6), (1, 2, 2), 4, dtype=BRAIN, layout="packed"),
    Case("one-token-regions", (1, 3, 4), (1, 1, 1), 5, heads=1, batch=2),
    Case("one-region", (1, 3, 3), (1, 3, 3), 1, heads=1, dtype=HALF),
    Case("six-tokens-nchw", (1, 6, 6), (1, 2, 3), 3, dtype=HALF, layout="nchw", lists=(1, 2)),
    Case("seven-by-eleven", (1, 7, 22), (1, 7, 11), 2, dtype=BRAIN, heads=1, dim=32),
    Case("larger-than-a-tile", (1, 16, 16), (1, 16, 16), 1, heads=1, dtype=BRAIN),
    Case("larger-than-a-tile-float32", (1, 7, 7), (1, 7, 7), 1),
    Case("full-tiles", (1, 16, 8), (1, 8, 8), 2, heads=1, dtype=BRAIN, dim=32),
    Case("cross-map", (1, 4, 6), (1, 2, 3), 3, (1, 6, 10), (1, 3, 2), batch=2, lists=(2, 1)),
    Case("more-queries", (1, 8, 8), (1, 4, 4), 2, (1, 4, 4), (1, 2, 2), heads=1, dtype=HALF),
    Case("hidden-padding", (1, 5, 7), (1, 3, 4), 2, heads=1, dtype=BRAIN, batch=2),
    Case("counted-padding", (1, 5, 7), (1, 3, 4), 3, count_padding=True, lists=(1, 2)),
    Case("counted-padding-nchw", (1, 3, 5), (1, 2, 2), 3, count_padding=True, layout="nchw"),
    Case("soft", (1, 6, 4), (1, 2, 2), 3, weighted=True, dtype=BRAIN, batch=2),
    Case("soft-per-head", (1, 4, 8), (1, 4, 4), 2, weighted=True, lists=(1, 2)),
    Case(
        *("soft-counted", (1, 5, 6), (1, 2, 4), 2),
        weighted=True,
        count_padding=True,
        dtype=HALF,
        heads=1,
    ),
    Case("soft-large", (1, 6, 18), (1, 6, 9), 2, weighted=True, heads=1),
    Case("video", (4, 4, 6), (2, 2, 3), 3, heads=1, dtype=BRAIN, dim=32),
    Case("video-padding", (3, 3, 5), (2, 2, 2), 3, heads=1, count_padding=True),
    Case("frames-meet-an-image", (2, 4, 4), (2, 2, 2), 2, (1, 4, 6), (1, 2, 2), heads=1),
    Case("hub", (1, 6, 6), (1, 2, 2), 1, graph="hub", dtype=BRAIN, heads=1),
    Case("listed-twice", (1, 4, 4), (1, 2, 2), 3, graph="hub", heads=1, weighted=True),
    Case("all-regions", (1, 4, 6), (1, 2, 2), graph="all", batch=2, heads=1, dtype=HALF),
    Case("wide-values", (1, 4, 4), (1, 2, 2), dim=16, dim_v=40, dtype=BRAIN),
    Case("narrow-values-of-80", (1, 4, 4), (1, 4, 4), 1, dim=80, dim_v=24, heads=1, dtype=BRAIN),
    Case("head-dim-200-float32", (1, 4, 4), (1, 2, 4), dim=200, dim_v=72, heads=1),
    Case("head-dim-256", (1, 4, 4), (1, 2, 4), dim=256, heads=1, dtype=HALF),
    Case("negative-scale", (1, 4, 4), (1, 2, 2), scale=-0.4, heads=1),
)


def pulls(args: RegionArgs) -> tuple[Tensor, Tensor]:
    """Fixed random gradients of out and lse."""
    g = torch.Generator().manual_seed(1)
    device, shape = args.q.device, (*args.q.shape[:5], args.v.shape[5])
    dout = torch.randn(shape, generator=g).to(args.q.dtype).to(device)
    dlse = torch.randn(args.q.shape[:5], generator=g).to(device)
    return dout, dlse


def run_kernels(
    args: RegionArgs, backend: str = "triton", dead: Tensor | None = None
) -> dict[str, Tensor]:
    """out, lse, dq, dk, dv and, with weights, dweights, by the functions of a backend.

    Args:
        dead: bool [B, M, T, H, W], queries whose gradient of out is NaN.
    """
    module = attends_regions(backend)
    out, lse = module.attend_regions(args)
    dout, dlse = pulls(args)
    if dead is not None:
        dout = torch.where(dead[..., None], float("nan"), dout)
    dlse = torch.where(lse == float("-inf"), 0.0, dlse.to(lse.dtype))
    call = RegionBwdArgs(args, out, lse, dout.to(out.dtype), dlse)
    results = (out, lse, *module.attend_regions_backward(call))
    return {x: y for x, y in zip(NAMES, results, strict=True) if y is not None}


def in_double(args: RegionArgs) -> RegionArgs:
    weights = None if args.weights is None else args.weights.double()
    maps = {x: getattr(args, x).double() for x in "qkv"}
    return replace(args, **maps, weights=weights)


def run_dense(args: RegionArgs) -> dict[str, Tensor]:
    """The same by `dense_regions`, differentiated."""
    leaves = {x: getattr(args, x).detach().requires_grad_() for x in "qkv"}
    if args.weights is not None:
        leaves["weights"] = args.weights.detach().requires_grad_()
    out, lse = dense_regions(replace(args, **leaves))
    dout, dlse = pulls(args)
    grads = torch.autograd.grad(
        (out, lse), list(leaves.values()), (dout.to(out.dtype), dlse.to(lse.dtype))
    )
    return dict(zip(NAMES, (out.detach(), lse.detach(), *grads), strict=False))


def check_case(case: Case, device: str = "cpu") -> None:
    """Forward, lse and gradients within the float64 bound."""
    args = case.arguments(device)
    ours, plain, exact = run_kernels(args), run_dense(args), run_dense(in_double(args))
    assert set(ours) == set(exact)
    for name, value in ours.items():
        assert value.shape == exact[name].shape, name
        if name == "lse":
            # Products of 16-bit numbers are exact in float32, and so are scores nearly.
            torch.testing.assert_close(value.double(), exact[name], atol=1e-5, rtol=1e-5)
            continue
        size = float(exact[name].abs().max())
        if name == "dweights":
            # Over all pairs of two regions, of both signs: what is left is the smaller part.
            size *= 2
        assert_within(value, plain[name], exact[name], f"{case.name} {name}", cancelled=size)
