"""Triton kernels on CUDA devices: forward, log-sum-exp and deterministic gradients."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from permattn.core.plan import AttnPlan
from permattn.core.probe import Masses, ProbeArgs, ProbeProblem
from permattn.core.problem import BwdArgs, FwdArgs, Problem, empty_out

if TYPE_CHECKING:
    from permattn.triton_kernels.launch import Part

NAME = "triton"
MAX_HEAD_DIM = 256
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Both are settled once, here: a look-up inside why_not would break fullgraph compilation. Triton
# itself reads the variable when it is imported; under it, kernels run on CPU tensors, for tests.
_SPEC = importlib.util.find_spec("triton")
# A folder of that name on the path, without code, has no origin.
_INSTALLED = _SPEC is not None and _SPEC.origin is not None
_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


def why_not(problem: Problem) -> str | None:
    why = _why_no_kernels(problem.device_type, problem.dtype)
    if why is not None:
        return why
    if max(problem.head_dim, problem.head_dim_v) > MAX_HEAD_DIM:
        dims = f"D = {problem.head_dim}, Dv = {problem.head_dim_v}"
        return f"head dims go up to {MAX_HEAD_DIM}, got {dims}"
    if problem.quant.is_quantised:
        return "does not quantise"
    return _why_not_this_device(problem.device_type)


def _why_no_kernels(device_type: str, dtype: torch.dtype) -> str | None:
    if not _INSTALLED:
        return "triton is not installed (pip install 'permattn[triton]')"
    if device_type != "cuda" and not (_INTERPRETED and device_type == "cpu"):
        return f"needs a CUDA device, got {device_type}"
    if dtype not in DTYPES:
        return f"computes in bfloat16, float16 or float32, got {dtype}"
    return None


def _why_not_this_device(device_type: str) -> str | None:
    if device_type == "cuda":
        major, minor = torch.cuda.get_device_capability()
        if major < 8:
            return f"needs compute capability 8.0 or newer, got {major}.{minor}"
    return None


def why_not_probe(problem: ProbeProblem) -> str | None:
    why = _why_no_kernels(problem.device_type, problem.dtype)
    if why is not None:
        return why
    if problem.head_dim > MAX_HEAD_DIM:
        return f"head dims go up to {MAX_HEAD_DIM}, got D = {problem.head_dim}"
    return _why_not_this_device(problem.device_type)


def probe(args: ProbeArgs) -> Masses:
    with _on_device_of(args.q):
        return probe_kernels(args)


def probe_kernels(args: ProbeArgs) -> Masses:
    """Launches a probe, as many rows at a time as the kernels take."""
    from permattn.triton_kernels.probe import MAX_ROWS, launch_probe

    q = args.q if args.q.stride(-1) == 1 else args.q.contiguous()
    order, skip = (None if x is None else x.contiguous() for x in (args.order, args.skip))
    key_range = args.key_range.contiguous()
    found = []
    for i in range(0, q.shape[2], MAX_ROWS):
        # A batch row without probe rows stays one.
        position = torch.where(args.first_position < 0, -1, args.first_position + i)
        lse = None if args.lse is None else args.lse[:, :, i : i + MAX_ROWS].contiguous()
        found.append(
            launch_probe(
                *(q[:, :, i : i + MAX_ROWS], args.k, position, args.first_coordinate + i),
                *(key_range, order, skip, lse, q.shape[2]),
            )
        )
    lses, columns, squares, diagonals = zip(*found, strict=True)
    # cat also copies a given lse, which an operator must not return.
    column, square, diagonal = (
        functools.reduce(torch.add, parts) for parts in (columns, squares, diagonals)
    )
    return torch.cat(lses, 2), column, square, diagonal


def forward(args: FwdArgs) -> tuple[Tensor, Tensor]:
    out = empty_out(args.q, args.v)
    lse = torch.empty(args.q.shape[:3], dtype=torch.float32, device=args.q.device)
    with _on_device_of(args.q):
        forward_kernels(args, out, lse)
    return out, lse


def backward(args: BwdArgs) -> tuple[Tensor, Tensor, Tensor]:
    with _on_device_of(args.q):
        return backward_kernels(args)


def forward_kernels(args: FwdArgs, out: Tensor, lse: Tensor) -> None:
    """Launches the forward of a call into out [B, Hq, Sq, Dv] and lse [B, Hq, Sq]."""
    from permattn.triton_kernels.launch import launch_forward

    launch_forward(args.q, args.k, args.v, out, lse, kernel_parts(args.plan), args.scale)


def backward_kernels(args: BwdArgs) -> tuple[Tensor, Tensor, Tensor]:
    """Launches the backward of a call; lists are transposed on the device, without a sync."""
    from permattn.triton_kernels.launch import Gradient, launch_delta, launch_dkdv, launch_dq

    parts = kernel_parts(args.plan)
    transposed = []
    for part in args.plan.parts:
        index = part.index.transpose(part.num_kv_blocks)
        transposed.append((index.kv_indices, index.row_offsets, index.kv_num_full))
    delta = launch_delta(args.out, args.dout, args.dlse)
    lse = args.lse.contiguous()
    shared = Gradient(args.q, args.k, args.v, args.dout, lse, delta, args.scale)
    dq = launch_dq(shared, parts)
    dk, dv = launch_dkdv(shared, parts, transposed)
    return dq, dk, dv


def kernel_parts(plan: AttnPlan) -> list[Part]:
    """The plan as the kernels read it; broadcast axes stay one row long."""
    from permattn.triton_kernels.launch import Part, compact

    return [
        Part(
            q_token=compact(part.q_perm.token_of_slot),
            kv_token=compact(part.kv_perm.token_of_slot),
            kv_indices=compact(part.index.kv_indices),
            row_offsets=compact(part.index.row_offsets),
            kv_num_full=compact(part.index.kv_num_full),
            block_q=part.index.block_q,
            block_kv=part.index.block_kv,
            q_identity=part.q_perm.is_identity,
            kv_identity=part.kv_perm.is_identity,
            group=group,
            min_lag=part.band.min_lag,
            max_lag=part.band.max_lag,
        )
        for part, group in zip(plan.parts, plan.q_groups(), strict=True)
    ]


def _on_device_of(x: Tensor) -> contextlib.AbstractContextManager:
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
