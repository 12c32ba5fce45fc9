"""Attention from region to region by the native kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from permattn.backends.cpu.attention import MAX_HEAD_DIM
from permattn.backends.cpu.library import DTYPES, isa_number, load, why_unusable
from permattn.core.regions import (
    RegionArgs,
    RegionBwdArgs,
    RegionGradients,
    RegionProblem,
    empty_region_out,
)


def why_not_regions(problem: RegionProblem) -> str | None:
    if problem.device_type != "cpu":
        return f"runs on cpu tensors, got {problem.device_type}"
    if problem.dtype not in DTYPES:
        return f"takes float32, bfloat16 and float16, got {problem.dtype}"
    if max(problem.head_dim, problem.head_dim_v) > MAX_HEAD_DIM:
        return f"takes head dims to {MAX_HEAD_DIM}, got {problem.head_dim}, {problem.head_dim_v}"
    return why_unusable()


def attend_regions(args: RegionArgs, *, isa: str | None = None) -> tuple[Tensor, Tensor]:
    """See `RegionBackend.attend_regions`. `isa` forces one of `available_isas()`, for tests.

    Deterministic, whatever the number of threads. Nothing is as large as the listed keys: a thread
    packs keys and values of one group of heads at a time.
    """
    load()
    q = args.q
    out = empty_region_out(q, args.v)
    lse = q.new_empty(q.shape[:5], dtype=torch.float32)
    torch.ops.permattn_native.cpu_attend_regions.default(
        *(q, args.k, args.v, args.graph, args.weights, out, lse),
        *([*args.q_box, *args.kv_box], args.count_padding, args.scale, isa_number(isa)),
    )
    return out, lse


def attend_regions_backward(b: RegionBwdArgs, *, isa: str | None = None) -> RegionGradients:
    """See `RegionBackend.attend_regions_backward`. Products are in float32.

    Deterministic, whatever the number of threads. A thread sums the gradients of keys and values of
    one group of heads at a time, in float32.
    """
    load()
    args = b.args
    q, k, v, weights = args.q, args.k, args.v, args.weights
    dq, dk, dv = (empty_region_out(x, x) for x in (q, k, v))
    dweights = None
    if weights is not None:
        dweights = weights.new_zeros(*q.shape[:2], *weights.shape[2:])
    torch.ops.permattn_native.cpu_attend_regions_backward.default(
        *(q, k, v, args.graph, weights, b.out, b.lse.contiguous(), b.dout, b.dlse.contiguous()),
        *(dq, dk, dv, dweights, [*args.q_box, *args.kv_box]),
        *(args.count_padding, args.scale, isa_number(isa)),
    )
    if weights is not None and dweights is not None:
        dweights = dweights.sum_to_size(weights.shape)
    return dq, dk, dv, dweights
