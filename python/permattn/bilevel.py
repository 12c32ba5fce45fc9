"""Bi-level routing attention: route regions to regions, then attend inside the routed ones.

    graph, _ = route_regions(q, k, (7, 7), topk=4)
    out = bilevel_routing_attention(q, k, v, graph, (7, 7))

q, k, v are [B, H, W, heads, D] views of whatever lies in memory: channels last, channels first, or
the packed result of one projection. `regional_routing_attention` takes the [B, C, H, W] maps of the
published functional. Source: BiFormer (arXiv 2303.08810), section 3.2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from permattn.backends import resolve
from permattn.core.plan import ceil_div
from permattn.core.regions import (
    RegionArgs,
    RegionGrid,
    RegionProblem,
    RouteProblem,
    region_means,
    top_regions,
)
from permattn.region_ops import (
    check_graph_values,
    region_attention_op,
    register_flop_formulas,
    route_regions_op,
)

__all__ = [
    "PadMode",
    "bilevel_routing_attention",
    "cut_regions",
    "regional_routing_attention",
    "route_regions",
]

# What becomes of cells of a region that lie outside the map: "zero": keys of zeros, as in the
# published functional; "mask": nobody sees them. None: every region must lie inside.
PadMode = Literal["zero", "mask"] | None


def cut_regions(
    size: Sequence[int],
    regions: Sequence[int] | None = None,
    region_size: Sequence[int] | None = None,
    pad_mode: PadMode = None,
    name: str = "regions",
) -> RegionGrid:
    """How a map of (T,) H x W tokens is cut into regions.

    Args:
        size: (H, W) or (T, H, W), tokens.
        regions: regions per axis; the box is H // S under "zero" (there may then be more regions
            than asked for, as in the published functional) and ceil(H / S) under "mask" (there may
            be fewer).
        region_size: tokens of a region per axis, in place of `regions`.
        pad_mode: see `PadMode`.
        name: of `regions`, for error messages.

    Raises:
        ValueError: not exactly one of `regions` and `region_size`; axes that do not fit; regions
            that do not divide the map where pad_mode is None; more regions than tokens.
    """
    if pad_mode not in (None, "zero", "mask"):
        raise ValueError(f"pad_mode: wants None, 'zero' or 'mask', got {pad_mode!r}")
    given = region_size if regions is None else regions
    if given is None or (regions is not None and region_size is not None):
        raise ValueError(f"{name}: give either {name} or its region size, one of them")
    what = name if regions is not None else name.replace("regions", "region_size")
    if len(given) != len(size):
        raise ValueError(f"{what}: wants {len(size)} sizes, one per axis, got {tuple(given)}")
    for n, s in zip(size, given, strict=True):
        if s < 1:
            raise ValueError(f"{what}: wants sizes >= 1, got {tuple(given)}")
        if regions is not None and s > n:
            raise ValueError(
                f"{what}: a map of {tuple(size)} has no {tuple(given)} regions, at most one per "
                "token and axis"
            )
        if pad_mode is None and n % s:
            raise ValueError(
                f"{what}: {tuple(given)} does not divide a map of {tuple(size)}; choose other "
                "sizes, or pad_mode 'mask' or 'zero'"
            )
    if regions is None:
        box = tuple(given)
    elif pad_mode == "mask":
        box = tuple(ceil_div(n, s) for n, s in zip(size, given, strict=True))
    else:
        box = tuple(n // s for n, s in zip(size, given, strict=True))
    one = (1,) * (3 - len(box))
    t, h, w = (*one, *size)
    bt, bh, bw = (*one, *box)
    return RegionGrid((t, h, w), (bt, bh, bw))


def route_regions(
    q: Tensor,
    k: Tensor,
    regions: Sequence[int] | None = None,
    *,
    topk: int,
    region_size: Sequence[int] | None = None,
    kv_regions: Sequence[int] | None = None,
    kv_region_size: Sequence[int] | None = None,
    pad_mode: PadMode = None,
    scale: float = 1.0,
    differentiable: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The `topk` key regions whose mean key is most alike the mean query of each query region.

    Source: BiFormer (arXiv 2303.08810), equations 3 and 4. Equal affinities: lower number first.

    Args:
        q, k: [B, (T,) H, W, heads, D], any strides; k's map may have another size. All heads are
            routed together.
        regions, region_size: how q's map is cut; see `cut_regions`.
        topk: regions that a query region sees.
        kv_regions, kv_region_size: how k's map is cut; None = as q's.
        pad_mode: see `PadMode`; means are over the cells inside the map.
        scale: multiplies the affinities.
        differentiable: affinities carry gradients to q and k (torch operators, no fused routing).
        backend: "auto" or the name of a backend.

    Returns: (graph int32 [B, Rq, topk], affinities float32 (float64 for float64) [B, Rq, topk],
    descending).

    Raises:
        ValueError: shapes or regions that do not fit, topk below 1 or above the key regions.
        TypeError: a dtype that is not floating, or differs.
        NotImplementedError: the named backend cannot run it.

    Invariants: nothing waits for a GPU; two runs are bit-identical.
    """
    _check_maps(("q", q), ("k", k))
    if k.shape[-2] != q.shape[-2]:
        raise ValueError(f"k: wants q's {q.shape[-2]} heads, got {k.shape[-2]}")
    q_grid, kv_grid = _grids(q, k, regions, region_size, kv_regions, kv_region_size, pad_mode)
    _check_topk(topk, kv_grid)
    _check_number("scale", scale)
    q, k = _canonical(q), _canonical(k)
    if differentiable:
        affinity = region_means(q, q_grid) @ region_means(k, kv_grid).mT
        return top_regions(affinity * scale, topk)
    problem = RouteProblem(q.device.type, q.dtype, q.shape[1] * q.shape[5], topk)
    name = resolve(problem, backend)
    _register()
    boxes = (*q_grid.box, *kv_grid.box)
    return route_regions_op(q.detach(), k.detach(), boxes, topk, float(scale), name)


def bilevel_routing_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    region_graph: Tensor,
    regions: Sequence[int] | None = None,
    *,
    region_size: Sequence[int] | None = None,
    kv_regions: Sequence[int] | None = None,
    kv_region_size: Sequence[int] | None = None,
    pad_mode: PadMode = None,
    weights: Tensor | None = None,
    lepe: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    check_graph: bool = True,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of every token to the tokens of the regions that its own region is routed to.

    Source: BiFormer (arXiv 2303.08810), equations 5 and 6. Nothing is gathered: a kernel reads q,
    k and v where they lie.

    Args:
        q: [B, (T,) H, W, heads, D], floating, any strides: for instance a part of
            `qkv.unflatten(-1, (3, heads, D))`, or `x.unflatten(1, (heads, D)).movedim((1, 2), (-2,
            -1))` of a channels-first map.
        k: [B, (Tk,) Hk, Wk, heads, D]: q's map, a pooled one, or any other.
        v: [B, (Tk,) Hk, Wk, heads, Dv].
        region_graph: integer [B or 1, Rq, topk], or [B or 1, heads or 1, Rq, topk] for a graph per
            head: key regions in raster order. A region that stands in a row twice counts twice.
        regions, region_size: how q's map is cut; see `cut_regions`.
        kv_regions, kv_region_size: how k's map is cut; None = as q's.
        pad_mode: see `PadMode`.
        weights: float [B or 1, Rq, topk] or [B or 1, heads or 1, Rq, topk]: soft routing: keys and
            values of a routed region times its weight (section 1.3 of the released code's router).
        lepe: [B, (T,) H, W, heads, Dv], added to the result: a positional term made from v.
        scale: multiplies q . k; None = 1 / sqrt(D). Released models use the whole width,
            (heads * D) ** -0.5.
        return_lse: also return the log-sum-exp of the scores.
        check_graph: on a GPU, look for key regions that are not there, which waits for the device;
            without, or under compilation, such a region is hidden. On a CPU the check is always on.
        backend: "auto", "cuda", "triton", "cpu" or "reference". A named backend never falls back.

    Returns: [B, (T,) H, W, heads, Dv] in q's dtype (the autocast dtype under autocast); with
    return_lse also lse [B, (T,) H, W, heads], natural log, float32 (float64 for float64).

    Raises:
        ValueError: shapes, devices, regions or graph values that do not fit; names the argument.
        TypeError: a dtype that is not floating, or differs between q, k and v.
        NotImplementedError: no backend (or not the named one) can run it; lists why.

    Invariants: differentiable in q, k, v, weights and lepe, once. Inputs are never modified. Two
    runs are bit-identical, gradients too.
    """
    q, k, v = _autocast(q, k, v)
    _check_maps(("q", q), ("k", k), ("v", v))
    if k.shape[-2] != q.shape[-2] or v.shape[:-1] != k.shape[:-1]:
        raise ValueError(
            f"k, v: want q's {q.shape[-2]} heads and one map, got {list(k.shape)} and "
            f"{list(v.shape)}"
        )
    q_grid, kv_grid = _grids(q, k, regions, region_size, kv_regions, kv_region_size, pad_mode)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    _check_number("scale", scale)
    graph = _per_head("region_graph", region_graph, q, q_grid)
    if check_graph and graph.is_cuda and not torch.compiler.is_compiling():
        check_graph_values(graph.cpu(), kv_grid.num_regions)
    if weights is not None:
        weights = _check_weights(weights, graph, q, q_grid)
    if lepe is not None and lepe.shape != (*q.shape[:-1], v.shape[-1]):
        want = [*q.shape[:-1], v.shape[-1]]
        raise ValueError(f"lepe: wants {want}, got {list(lepe.shape)}")
    problem = RegionProblem(q.device.type, q.dtype, q.shape[-1], v.shape[-1])
    name = resolve(problem, backend)
    _register()
    flat = q.dim() == 5
    args = RegionArgs(
        *(_canonical(q), _canonical(k), _canonical(v), graph, weights),
        *(q_grid.box, kv_grid.box, pad_mode == "zero", float(scale)),
    )
    out, lse = _attend(args, name)
    out, lse = out.permute(0, 2, 3, 4, 1, 5), lse.permute(0, 2, 3, 4, 1)
    if flat:
        out, lse = out.squeeze(1), lse.squeeze(1)
    if lepe is not None:
        out = out + lepe.to(out.dtype)
    return (out, lse) if return_lse else out


def regional_routing_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    region_graph: Tensor,
    region_size: Sequence[int],
    kv_region_size: Sequence[int] | None = None,
    auto_pad: bool = True,
    *,
    num_heads: int | None = None,
    need_attn: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """The published functional `regional_routing_attention_torch`, with its arguments.

    Source: the released code of BiFormer, `ops/torch/rrsda.py`. Deviations: the attention matrix,
    which is what made it run out of memory, is returned only on request; the graph may have any
    integer dtype.

    Args:
        query: [B, C, H, W], heads are contiguous slices of C; any strides.
        key: [B, C, Hk, Wk].
        value: [B, Cv, Hk, Wk].
        scale: multiplies q . k.
        region_graph: integer [B, heads, Rq, topk], or [B, Rq, topk] for one graph for all heads.
        region_size: (h, w) of a query region.
        kv_region_size: (h, w) of a key region; None = region_size.
        auto_pad: cells outside the map are keys of zeros; False: regions must divide the map.
        num_heads: None = the heads of the graph.
        need_attn: also return the probabilities; computed apart, with torch operators.
        backend: see `bilevel_routing_attention`.

    Returns: (out [B, Cv, H, W], attn [B, heads, Rq, h * w, topk * hk * wk] or None).

    Raises, Invariants: see `bilevel_routing_attention`.
    """
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.dim() != 4:
            raise ValueError(f"{name}: wants [B, C, H, W], got shape {list(x.shape)}")
    if num_heads is None:
        if region_graph.dim() != 4:
            raise ValueError(
                "num_heads: wanted beside a graph without heads, got region_graph of shape "
                f"{list(region_graph.shape)}"
            )
        num_heads = region_graph.shape[1]
    for name, x in (("query", query), ("key", key), ("value", value)):
        if num_heads < 1 or x.shape[1] % num_heads:
            raise ValueError(f"{name}: {x.shape[1]} channels do not split into {num_heads} heads")
    q, k, v = (x.unflatten(1, (num_heads, -1)).permute(0, 3, 4, 1, 2) for x in (query, key, value))
    pad_mode: PadMode = "zero" if auto_pad else None
    out = bilevel_routing_attention(
        *(q, k, v, region_graph),
        region_size=region_size,
        kv_region_size=region_size if kv_region_size is None else kv_region_size,
        pad_mode=pad_mode,
        scale=scale,
        backend=backend,
    )
    assert isinstance(out, Tensor)
    attn = None
    if need_attn:
        grids = _grids(q, k, None, region_size, None, kv_region_size, pad_mode)
        attn = _probabilities(q, k, region_graph, grids, scale)
    return out.permute(0, 3, 4, 1, 2).flatten(1, 2), attn


def _attend(args: RegionArgs, name: str) -> tuple[Tensor, Tensor]:
    boxes = (*args.q_box, *args.kv_box)
    return region_attention_op(
        *(args.q, args.k, args.v, args.graph, args.weights),
        *(boxes, args.count_padding, args.scale, name),
    )


def _probabilities(
    q: Tensor, k: Tensor, region_graph: Tensor, grids: tuple[RegionGrid, RegionGrid], scale: float
) -> Tensor:
    """[B, heads, Rq, n, topk * nk], with torch operators: for pictures, at the size of pictures."""
    rows = []
    for x, grid in zip((_canonical(q), _canonical(k)), grids, strict=True):
        token = grid.token_of_slot(x.device)
        x = x.flatten(2, 4)[:, :, token.clamp_min(0).long()]
        rows.append(torch.where((token >= 0)[:, None], x, 0.0).unflatten(2, (grid.num_regions, -1)))
    batch, heads = rows[0].shape[:2]
    graph = region_graph if region_graph.dim() == 4 else region_graph[:, None]
    graph = graph.long().expand(batch, heads, -1, -1)
    b = torch.arange(batch, device=q.device)[:, None, None, None]
    m = torch.arange(heads, device=q.device)[:, None, None]
    keys = rows[1][b, m, graph].flatten(3, 4)
    return torch.softmax((rows[0] @ keys.mT) * scale, -1)


def _register() -> None:
    if not torch.compiler.is_compiling():
        register_flop_formulas()


def _canonical(x: Tensor) -> Tensor:
    """[B, (T,) H, W, heads, D] as the view [B, heads, T, H, W, D]."""
    x = x.unsqueeze(1) if x.dim() == 5 else x
    return x.permute(0, 4, 1, 2, 3, 5)


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    device = tensors[0].device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        return tuple(
            x.to(dtype) if x.dtype.is_floating_point and x.dtype != torch.float64 else x
            for x in tensors
        )
    return tensors


def _grids(
    q: Tensor,
    k: Tensor,
    regions: Sequence[int] | None,
    region_size: Sequence[int] | None,
    kv_regions: Sequence[int] | None,
    kv_region_size: Sequence[int] | None,
    pad_mode: PadMode,
) -> tuple[RegionGrid, RegionGrid]:
    q_grid = cut_regions(q.shape[1:-2], regions, region_size, pad_mode)
    if kv_regions is None and kv_region_size is None:
        kv_regions, kv_region_size = regions, region_size
    kv_grid = cut_regions(k.shape[1:-2], kv_regions, kv_region_size, pad_mode, name="kv_regions")
    return q_grid, kv_grid


def _check_maps(*named: tuple[str, Tensor]) -> None:
    first = named[0][1]
    for name, x in named:
        if x.dim() not in (5, 6):
            raise ValueError(
                f"{name}: wants [B, H, W, heads, D] or [B, T, H, W, heads, D], got shape "
                f"{list(x.shape)}"
            )
        if not x.dtype.is_floating_point:
            raise TypeError(f"{name}: wants a floating dtype, got {x.dtype}")
        if x.dtype != first.dtype:
            raise TypeError(f"{name}: wants q's dtype {first.dtype}, got {x.dtype}")
        if x.device != first.device:
            raise ValueError(f"{name}: wants q's device {first.device}, got {x.device}")
        if x.dim() != first.dim() or x.shape[0] != first.shape[0]:
            raise ValueError(
                f"{name}: wants q's axes and batch size {first.shape[0]}, got {list(x.shape)} "
                f"beside {list(first.shape)}"
            )
        if name != "v" and x.shape[-1] != first.shape[-1]:
            raise ValueError(f"{name}: wants q's head dim {first.shape[-1]}, got {x.shape[-1]}")
        if min(x.shape[1:]) < 1:
            raise ValueError(f"{name}: wants sizes >= 1, got shape {list(x.shape)}")


def _check_topk(topk: int, kv_grid: RegionGrid) -> None:
    if isinstance(topk, bool) or topk < 1 or topk > kv_grid.num_regions:
        raise ValueError(
            f"topk: wants 1 to {kv_grid.num_regions}, the number of key regions "
            f"{kv_grid.counts}, got {topk}"
        )


def _check_number(name: str, value: float) -> None:
    # Not math.isfinite, which torch.compile cannot trace over a symbolic number.
    if not -math.inf < value < math.inf:
        raise ValueError(f"{name}: wants a finite number, got {value}")


def _per_head(name: str, x: Tensor, q: Tensor, q_grid: RegionGrid) -> Tensor:
    """A graph as int32 [B or 1, heads or 1, Rq, topk], contiguous."""
    if x.is_floating_point() or x.dtype == torch.bool or x.is_complex():
        raise TypeError(f"{name}: wants an integer dtype, got {x.dtype}")
    if x.device != q.device:
        raise ValueError(f"{name}: wants q's device {q.device}, got {x.device}")
    full = x[:, None] if x.dim() == 3 else x
    batch, heads = q.shape[0], q.shape[-2]
    if (
        full.dim() != 4
        or full.shape[0] not in (1, batch)
        or full.shape[1] not in (1, heads)
        or full.shape[2] != q_grid.num_regions
        or full.shape[3] < 1
    ):
        raise ValueError(
            f"{name}: wants [{batch} or 1, {q_grid.num_regions}, topk] or [{batch} or 1, {heads} "
            f"or 1, {q_grid.num_regions}, topk] for {q_grid.counts} query regions, got "
            f"{list(x.shape)}"
        )
    # Values that do not fit must not wrap into ones that do.
    top = torch.iinfo(torch.int32).max
    if full.dtype == torch.int64:
        full = full.clamp(-1, top)
    full = full.int()
    return full.contiguous()


def _check_weights(weights: Tensor, graph: Tensor, q: Tensor, q_grid: RegionGrid) -> Tensor:
    if not weights.dtype.is_floating_point:
        raise TypeError(f"weights: wants a floating dtype, got {weights.dtype}")
    if weights.device != q.device:
        raise ValueError(f"weights: wants q's device {q.device}, got {weights.device}")
    full = weights[:, None] if weights.dim() == 3 else weights
    want = (q_grid.num_regions, graph.shape[3])
    if (
        full.dim() != 4
        or full.shape[0] not in (1, q.shape[0])
        or full.shape[1] not in (1, q.shape[-2])
        or full.shape[2:] != want
    ):
        raise ValueError(
            f"weights: wants [B or 1, {want[0]}, {want[1]}], or with an axis of heads behind B, "
            f"as the graph, got {list(weights.shape)}"
        )
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return full.to(dtype).contiguous()
