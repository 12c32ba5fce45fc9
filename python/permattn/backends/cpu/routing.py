"""Routing from regions to regions by the native kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from permattn.backends.cpu.library import DTYPES, isa_number, load, why_unusable
from permattn.core.regions import RouteArgs, RouteProblem


def why_not_route(problem: RouteProblem) -> str | None:
    if problem.device_type != "cpu":
        return f"runs on cpu tensors, got {problem.device_type}"
    if problem.dtype not in DTYPES:
        return f"takes float32, bfloat16 and float16, got {problem.dtype}"
    return why_unusable()


def route(args: RouteArgs, *, isa: str | None = None) -> tuple[Tensor, Tensor]:
    """See `RegionBackend.route`. `isa` forces one of `available_isas()`, for tests.

    One reading of q and k in any layout. Deterministic, whatever the number of threads: sums are
    in float32, in an order that the shapes alone decide.
    """
    load()
    shape = (args.q.shape[0], args.q_grid.num_regions, args.topk)
    graph = args.q.new_empty(shape, dtype=torch.int32)
    values = args.q.new_empty(shape, dtype=torch.float32)
    torch.ops.permattn_native.cpu_route.default(
        *(args.q, args.k, [*args.q_box, *args.kv_box], args.topk, args.scale),
        *(graph, values, isa_number(isa)),
    )
    return graph, values
