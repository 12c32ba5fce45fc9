"""Attention from region to region, and routing, in plain torch; a few regions at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from permattn.core.problem import lse_dtype
from permattn.core.regions import (
    RegionArgs,
    RegionBwdArgs,
    RegionGradients,
    RegionGrid,
    RegionProblem,
    RouteArgs,
    RouteProblem,
    empty_region_out,
    region_means,
    top_regions,
)

# Entries of the largest tensor of one chunk of regions.
_CHUNK = 1 << 22


def why_not_regions(problem: RegionProblem) -> str | None:
    if not problem.dtype.is_floating_point:
        return f"needs a floating dtype, got {problem.dtype}"
    return None


def why_not_route(problem: RouteProblem) -> str | None:
    if not problem.dtype.is_floating_point:
        return f"needs a floating dtype, got {problem.dtype}"
    return None


def route(args: RouteArgs) -> tuple[Tensor, Tensor]:
    """See `RegionBackend.route`."""
    mean_q, mean_k = region_means(args.q, args.q_grid), region_means(args.k, args.kv_grid)
    graph, values = top_regions((mean_q @ mean_k.mT) * args.scale, args.topk)
    return graph.contiguous(), values.contiguous()


def attend_regions(args: RegionArgs) -> tuple[Tensor, Tensor]:
    """See `RegionBackend.attend_regions`. float32 inside, float64 for float64 inputs."""
    x = _Rows.of(args)
    out = x.q.new_empty(*x.q.shape[:4], args.v.shape[5])
    lse = x.q.new_empty(x.q.shape[:4])
    for chunk in _chunks(args, x):
        score = chunk.score(chunk.q @ chunk.k.mT)
        lse[:, :, chunk.here] = torch.logsumexp(score, -1)
        # A row that sees nothing has lse = -inf.
        p = (score - _finite(lse[:, :, chunk.here])[..., None]).exp()
        out[:, :, chunk.here] = (p * chunk.weight) @ chunk.v
    grid = args.q_grid
    put = empty_region_out(args.q, args.v)
    put.copy_(_to_map(out, grid))
    return put, _to_map(lse[..., None], grid)[..., 0].to(lse_dtype(args.q)).contiguous()


def attend_regions_backward(b: RegionBwdArgs) -> RegionGradients:
    """See `RegionBackend.attend_regions_backward`."""
    args = b.args
    x = _Rows.of(args)
    dtype, grid = x.q.dtype, args.q_grid
    dout = _to_rows(b.dout.to(dtype), grid)
    dot = (b.dout.to(dtype) * b.out.to(dtype)).sum(-1, keepdim=True) - b.dlse.to(dtype)[..., None]
    delta, lse = _to_rows(dot, grid), _to_rows(b.lse.to(dtype)[..., None], grid)
    dq, dk, dv = (torch.zeros_like(rows) for rows in (x.q, x.k, x.v))
    dweights = None
    if args.weights is not None:
        shape = (*x.q.shape[:3], args.graph.shape[3])
        dweights = x.q.new_zeros(shape)
    for chunk in _chunks(args, x):
        here = chunk.here
        dot_qk, dot_gv = chunk.q @ chunk.k.mT, dout[:, :, here] @ chunk.v.mT
        p = (chunk.score(dot_qk) - _finite(lse[:, :, here])).exp()
        p = torch.where(lse[:, :, here] > float("-inf"), p, 0.0)
        dscore = p * (chunk.weight * dot_gv - delta[:, :, here])
        scaled = dscore * chunk.weight * args.scale
        dq[:, :, here] = scaled @ chunk.k
        _add_regions(dk, chunk.graph, scaled.mT @ chunk.q)
        _add_regions(dv, chunk.graph, (p * chunk.weight).mT @ dout[:, :, here])
        if dweights is not None:
            each = (dscore * dot_qk * args.scale + p * dot_gv).sum(-2)
            dweights[:, :, here] = each.unflatten(-1, (args.graph.shape[3], -1)).sum(-1)
    grids = (grid, args.kv_grid, args.kv_grid)
    of = (args.q, args.k, args.v)
    maps = [_to_map(d, g).to(o.dtype) for d, g, o in zip((dq, dk, dv), grids, of, strict=True)]
    if dweights is not None and args.weights is not None:
        dweights = dweights.sum_to_size(args.weights.shape).to(args.weights.dtype)
    return maps[0], maps[1], maps[2], dweights


@dataclass(frozen=True, eq=False)
class _Rows:
    """q [B, M, Rq, n, D], k [B, M, Rkv, nk, D], v [B, M, Rkv, nk, Dv], and which keys are seen."""

    q: Tensor
    k: Tensor
    v: Tensor
    seen: Tensor  # bool [Rkv, nk]

    @classmethod
    def of(cls, args: RegionArgs) -> _Rows:
        dtype = torch.promote_types(args.q.dtype, torch.float32)
        grid = args.kv_grid
        seen = (grid.token_of_slot(args.q.device) >= 0) | args.count_padding
        return cls(
            _to_rows(args.q.to(dtype), args.q_grid),
            _to_rows(args.k.to(dtype), grid),
            _to_rows(args.v.to(dtype), grid),
            seen.view(grid.num_regions, -1),
        )


@dataclass(frozen=True, eq=False)
class _Chunk:
    """Some regions c: q [B, M, c, n, D], k and v [B, M, c, topk * nk, D or Dv]."""

    here: slice
    graph: Tensor  # int64 [B, M, c, topk]; Rkv = names no region
    q: Tensor
    k: Tensor
    v: Tensor
    seen: Tensor  # bool [B, M, c, 1, topk * nk]
    weight: Tensor | float  # [Bx, Mx, c, 1, topk * nk]
    scale: float

    def score(self, dot: Tensor) -> Tensor:
        return torch.where(self.seen, dot * self.weight * self.scale, float("-inf"))


def _chunks(args: RegionArgs, x: _Rows) -> Iterator[_Chunk]:
    batch, heads, regions, n, dim = x.q.shape
    if batch == 0:
        return
    num_kv, nk = x.k.shape[2:4]
    topk = args.graph.shape[3]
    graph = args.graph.long().expand(batch, heads, -1, -1)
    inside = (graph >= 0) & (graph < num_kv)
    graph = graph.clamp(0, max(num_kv - 1, 0))
    widest = max(n, dim, args.v.shape[5])
    step = max(1, _CHUNK // max(1, batch * heads * topk * nk * widest))
    b = torch.arange(batch, device=graph.device)[:, None, None, None]
    m = torch.arange(heads, device=graph.device)[:, None, None]
    for first in range(0, regions, step):
        here = slice(first, first + step)
        at = graph[:, :, here]
        seen = (x.seen[at] & inside[:, :, here, :, None]).flatten(-2)[..., None, :]
        weight: Tensor | float = 1.0
        if args.weights is not None:
            weight = args.weights[:, :, here].to(x.q.dtype)
            weight = weight.repeat_interleave(nk, -1)[..., None, :]
        keys, values = x.k[b, m, at].flatten(3, 4), x.v[b, m, at].flatten(3, 4)
        named = torch.where(inside[:, :, here], at, num_kv)
        yield _Chunk(here, named, x.q[:, :, here], keys, values, seen, weight, args.scale)


def _add_regions(total: Tensor, graph: Tensor, rows: Tensor) -> None:
    """total[graph[c, s]] += rows[c, s * nk : (s + 1) * nk] of every (b, m), in one fixed order."""
    batch, heads, num_kv, nk, dim = total.shape
    rows = rows.unflatten(3, (-1, nk)).reshape(batch, heads, -1, nk * dim)
    graph = graph.flatten(2)
    # A place that names no region adds zeros.
    rows = rows * (graph < num_kv)[..., None]
    graph = graph.clamp_max(num_kv - 1)
    flat = total.view(batch, heads, num_kv, nk * dim)
    if total.is_cuda:
        # With accumulate, index_put sorts; scatter_add would use atomics.
        b = torch.arange(batch, device=graph.device)[:, None, None]
        m = torch.arange(heads, device=graph.device)[:, None]
        flat.index_put_((b, m, graph), rows, accumulate=True)
    else:
        flat.scatter_add_(2, graph[..., None].expand_as(rows), rows)


def _to_rows(x: Tensor, grid: RegionGrid) -> Tensor:
    """[B, M, T, H, W, D] -> [B, M, R, n, D]; zeros outside the map."""
    token = grid.token_of_slot(x.device)
    rows = x.flatten(2, 4)[:, :, token.clamp_min(0).long()]
    if grid.hangs_over:
        rows = torch.where((token >= 0)[:, None], rows, 0.0)
    return rows.unflatten(2, (grid.num_regions, -1))


def _to_map(rows: Tensor, grid: RegionGrid) -> Tensor:
    """The inverse of `_to_rows`."""
    token = grid.token_of_slot(rows.device).long()
    batch, heads, *_, dim = rows.shape
    x = rows.new_empty(batch, heads, grid.num_tokens + 1, dim)
    # Cells outside the map all go to the row behind it.
    x[:, :, torch.where(token < 0, grid.num_tokens, token)] = rows.flatten(2, 3)
    return x[:, :, : grid.num_tokens].unflatten(2, grid.size)


def _finite(lse: Tensor) -> Tensor:
    return torch.where(lse == float("-inf"), 0.0, lse)
