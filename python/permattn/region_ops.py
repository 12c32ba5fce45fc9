"""The torch.compile wall of regions: operator schemas, fake kernels, autograd, FLOP formulas."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from permattn.backends import attends_regions
from permattn.core.modes import offer_flop_formulas, without_autocast
from permattn.core.problem import lse_dtype
from permattn.core.regions import (
    RegionArgs,
    RegionBwdArgs,
    RegionGrid,
    RouteArgs,
    Sizes,
    empty_region_out,
)


@torch.library.custom_op("permattn::region_attention", mutates_args=())
def region_attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    graph: Tensor,
    weights: Tensor | None,
    boxes: Sequence[int],
    count_padding: bool,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    args = _args(q, k, v, graph, weights, boxes, count_padding, scale)
    check_graph_values(graph, args.kv_grid.num_regions)
    with without_autocast(q):
        return attends_regions(backend).attend_regions(args)


@region_attention_op.register_fake
def _(q, k, v, graph, weights, boxes, count_padding, scale, backend):
    return empty_region_out(q, v), q.new_empty(q.shape[:5], dtype=lse_dtype(q))


@torch.library.custom_op("permattn::region_attention_backward", mutates_args=())
def region_attention_backward_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor,
    graph: Tensor,
    weights: Tensor | None,
    boxes: Sequence[int],
    count_padding: bool,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    args = _args(q, k, v, graph, weights, boxes, count_padding, scale)
    dlse = torch.where(lse == float("-inf"), 0.0, dlse)
    call = RegionBwdArgs(args, out, lse, dout, dlse)
    with without_autocast(q):
        dq, dk, dv, dweights = attends_regions(backend).attend_regions_backward(call)
    # An operator returns tensors only: without weights, one without elements.
    dweights = q.new_empty(0) if dweights is None else dweights
    return _as(dq, q), _as(dk, k), _as(dv, v), dweights.contiguous()


@region_attention_backward_op.register_fake
def _(q, k, v, out, lse, dout, dlse, graph, weights, boxes, count_padding, scale, backend):
    dweights = q.new_empty(0) if weights is None else weights.new_empty(weights.shape)
    return _empty_as(q), _empty_as(k), _empty_as(v), dweights


def _empty_as(x: Tensor) -> Tensor:
    """Channels last in memory; channels first where x's last axis is strided."""
    return empty_region_out(x, x)


def _as(dx: Tensor, x: Tensor) -> Tensor:
    """A gradient in the memory order that `_empty_as` promises."""
    want = _empty_as(x)
    return dx if dx.stride() == want.stride() else want.copy_(dx)


def _args(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    graph: Tensor,
    weights: Tensor | None,
    boxes: Sequence[int],
    count_padding: bool,
    scale: float,
) -> RegionArgs:
    q_box: Sizes = (boxes[0], boxes[1], boxes[2])
    kv_box: Sizes = (boxes[3], boxes[4], boxes[5])
    return RegionArgs(q, k, v, graph, weights, q_box, kv_box, count_padding, scale)


def check_graph_values(graph: Tensor, num_kv_regions: int) -> None:
    """Raises ValueError where a graph on the CPU names a region that is not there.

    Here and not in front of the operator, so that compiled calls are checked, too. On a GPU it
    would wait for the device: kernels there hide such a region.
    """
    if graph.device.type != "cpu" or not graph.numel():
        return
    low, high = (int(x) for x in torch.aminmax(graph))
    if low < 0 or high >= num_kv_regions:
        bad = low if low < 0 else high
        raise ValueError(
            f"region_graph: wants key regions from 0 to {num_kv_regions - 1}, got {bad}"
        )


def _setup_context(ctx, inputs, output):
    q, k, v, graph, weights, boxes, count_padding, scale, backend = inputs
    out, lse = output
    ctx.save_for_backward(q, k, v, out, lse, graph, weights)
    ctx.rest = (boxes, count_padding, scale, backend)


def _backward(ctx, dout, dlse):
    q, k, v, out, lse, graph, weights = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    dlse = torch.zeros_like(lse) if dlse is None else dlse
    dq, dk, dv, dweights = region_attention_backward_op(
        q, k, v, out, lse, dout, dlse, graph, weights, *ctx.rest
    )
    return dq, dk, dv, None, None if weights is None else dweights, None, None, None, None


region_attention_op.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op("permattn::route_regions", mutates_args=())
def route_regions_op(
    q: Tensor,
    k: Tensor,
    boxes: Sequence[int],
    topk: int,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    q_box, kv_box = (boxes[0], boxes[1], boxes[2]), (boxes[3], boxes[4], boxes[5])
    with without_autocast(q):
        return attends_regions(backend).route(RouteArgs(q, k, q_box, kv_box, topk, scale))


@route_regions_op.register_fake
def _(q, k, boxes, topk, scale, backend):
    regions = RegionGrid(q.shape[2:5], (boxes[0], boxes[1], boxes[2])).num_regions
    shape = (q.shape[0], regions, topk)
    return q.new_empty(shape, dtype=torch.int32), q.new_empty(shape, dtype=lse_dtype(q))


def _pairs(q, k, graph, boxes) -> int:
    """(query, key) pairs of all batch rows and heads, cells outside the map among them."""
    n, nk = boxes[0] * boxes[1] * boxes[2], boxes[3] * boxes[4] * boxes[5]
    return q.shape[0] * q.shape[1] * graph.shape[2] * n * graph.shape[3] * nk


def _forward_flops(q, k, v, graph, weights, boxes, *args, out_val=None, **kwargs) -> int:
    return 2 * _pairs(q, k, graph, boxes) * (q.shape[5] + v.shape[5])


def _backward_flops(
    q, k, v, out, lse, dout, dlse, graph, weights, boxes, *args, out_val=None, **kwargs
) -> int:
    return 2 * _pairs(q, k, graph, boxes) * (3 * q.shape[5] + 2 * v.shape[5])


def _route_flops(q, k, boxes, *args, out_val=None, **kwargs) -> int:
    rq = RegionGrid(q.shape[2:5], tuple(boxes[:3])).num_regions
    rkv = RegionGrid(k.shape[2:5], tuple(boxes[3:])).num_regions
    return 2 * q.shape[0] * rq * rkv * q.shape[1] * q.shape[5]


def register_flop_formulas() -> None:
    """Tells torch's FLOP counter what the operators cost; see `offer_flop_formulas`."""
    ops = torch.ops.permattn
    offer_flop_formulas(
        {
            ops.region_attention: _forward_flops,
            ops.region_attention_backward: _backward_flops,
            ops.route_regions: _route_flops,
        }
    )
