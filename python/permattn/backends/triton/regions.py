"""Attention from region to region: forward and deterministic gradients; routing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from permattn.backends.triton.device import on_device_of, why_no_kernels, why_not_this_device
from permattn.core.regions import (
    RegionArgs,
    RegionBwdArgs,
    RegionGradients,
    RegionProblem,
    RouteArgs,
    RouteProblem,
    empty_region_out,
    reverse_graph,
    top_regions,
)

if TYPE_CHECKING:
    from permattn.triton_kernels.regions_launch import Regions

MAX_HEAD_DIM = 256
# Places of a graph that the kernel which reverses it looks at, in all; beyond, a sort is cheaper.
MAX_REVERSE_WORK = 2**27


def why_not_regions(problem: RegionProblem) -> str | None:
    why = why_no_kernels(problem.device_type, problem.dtype)
    if why is not None:
        return why
    if max(problem.head_dim, problem.head_dim_v) > MAX_HEAD_DIM:
        dims = f"D = {problem.head_dim}, Dv = {problem.head_dim_v}"
        return f"head dims go up to {MAX_HEAD_DIM}, got {dims}"
    return why_not_this_device(problem.device_type)


def attend_regions(args: RegionArgs) -> tuple[Tensor, Tensor]:
    """See `RegionBackend.attend_regions`."""
    out = empty_region_out(args.q, args.v)
    lse = torch.empty(args.q.shape[:5], dtype=torch.float32, device=args.q.device)
    with on_device_of(args.q):
        region_forward_kernels(args, out, lse)
    return out, lse


def region_forward_kernels(args: RegionArgs, out: Tensor, lse: Tensor) -> None:
    """Launches the forward of a call into out [B, M, T, H, W, Dv] and lse [B, M, T, H, W]."""
    from permattn.triton_kernels.regions_launch import launch_region_forward

    launch_region_forward(_regions(args), out, lse)


def attend_regions_backward(args: RegionBwdArgs) -> RegionGradients:
    """See `RegionBackend.attend_regions_backward`. Two runs are bit-identical."""
    with on_device_of(args.args.q):
        return region_backward_kernels(args)


def region_backward_kernels(b: RegionBwdArgs) -> RegionGradients:
    """Launches the backward of a call; the graph is reversed on the device, without a sync."""
    from permattn.triton_kernels.regions_launch import RegionGradient, launch_region_backward

    args, regions = b.args, _regions(b.args)
    dq, dk, dv = (empty_region_out(x, x) for x in (args.q, args.k, args.v))
    gradient = RegionGradient(
        *(b.out, b.dout, b.lse.contiguous(), b.dlse.contiguous()), *(dq, dk, dv)
    )
    reverse = None
    if args.graph.numel() * regions.num_kv_regions > MAX_REVERSE_WORK:
        reverse = reverse_graph(args.graph, regions.num_kv_regions)
    dweights = launch_region_backward(regions, gradient, reverse)
    if dweights is not None and args.weights is not None:
        dweights = dweights.sum(3).sum_to_size(args.weights.shape)
    return dq, dk, dv, dweights


def why_not_route(problem: RouteProblem) -> str | None:
    why = why_no_kernels(problem.device_type, problem.dtype)
    return why or why_not_this_device(problem.device_type)


def route(args: RouteArgs) -> tuple[Tensor, Tensor]:
    """See `RegionBackend.route`."""
    with on_device_of(args.q):
        return route_kernels(args)


def route_kernels(args: RouteArgs) -> tuple[Tensor, Tensor]:
    """Launches a routing. More key regions than a program can keep are multiplied and sorted by
    torch.
    """
    from permattn.triton_kernels.route import (
        MAX_KEY_REGIONS,
        launch_region_mean,
        launch_route,
    )

    mean_q = launch_region_mean(args.q, args.q_box)
    mean_k = launch_region_mean(args.k, args.kv_box)
    if mean_k.shape[1] > MAX_KEY_REGIONS:
        graph, values = top_regions((mean_q @ mean_k.mT) * args.scale, args.topk)
        return graph.contiguous(), values.contiguous()
    return launch_route(mean_q, mean_k, args.topk, args.scale)


def _regions(args: RegionArgs) -> Regions:
    from permattn.triton_kernels.regions_launch import Regions

    return Regions(
        *(args.q, args.k, args.v, args.graph, args.weights),
        *(args.q_box, args.kv_box, args.count_padding, args.scale),
    )
