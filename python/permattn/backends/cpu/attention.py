"""Attention, row preparation and probes by the native kernels."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from permattn.backends.cpu.library import DTYPES, isa_number, load, why_unusable
from permattn.core.packing import pack_plan
from permattn.core.plan import AttnPlan
from permattn.core.prepare import (
    PrepareArgs,
    Prepared,
    Smoothing,
    empty_prepared,
    smoothing_from_columns,
)
from permattn.core.probe import Masses, ProbeArgs, ProbeProblem, empty_masses
from permattn.core.problem import BwdArgs, FwdArgs, Problem, empty_out, why_not_quantised
from permattn.core.prologue import Prologue, RowTransform, pack_prologue
from permattn.core.quant import QuantSpec, say_once

MAX_HEAD_DIM = 256
# csrc/cpu/kernels.h: kTileLanes.
MAX_PROBE_ROWS = 128
# csrc/cpu/cpu.h: kMaxKeysPerScale.
MAX_KEYS_PER_SCALE = 256
# The numbers of csrc/common/quant.h.
_FORMATS = ("none", "int8", "int4", "fp8")


def why_not(problem: Problem) -> str | None:
    if problem.device_type != "cpu":
        return f"runs on cpu tensors, got {problem.device_type}"
    if problem.dtype not in DTYPES:
        return f"takes float32, bfloat16 and float16, got {problem.dtype}"
    if max(problem.head_dim, problem.head_dim_v) > MAX_HEAD_DIM:
        return f"takes head dims to {MAX_HEAD_DIM}, got {problem.head_dim}, {problem.head_dim_v}"
    return why_not_quantised(problem) or _why_not_these_scales(problem) or why_unusable()


def _why_not_these_scales(problem: Problem) -> str | None:
    quant = problem.quant
    if not quant.is_quantised:
        return None
    if quant.kv_rows_per_scale > MAX_KEYS_PER_SCALE:
        return (
            f"takes at most {MAX_KEYS_PER_SCALE} keys per scale, "
            f"got kv_rows_per_scale={quant.kv_rows_per_scale}"
        )
    return None


def why_not_probe(problem: ProbeProblem) -> str | None:
    if problem.device_type != "cpu":
        return f"runs on cpu tensors, got {problem.device_type}"
    if problem.dtype not in DTYPES:
        return f"takes float32, bfloat16 and float16, got {problem.dtype}"
    if problem.head_dim > MAX_HEAD_DIM:
        return f"takes head dims to {MAX_HEAD_DIM}, got {problem.head_dim}"
    if problem.num_rows > MAX_PROBE_ROWS:
        return f"probes with at most {MAX_PROBE_ROWS} rows, got {problem.num_rows}"
    return why_unusable()


def probe(args: ProbeArgs, *, isa: str | None = None) -> Masses:
    """See `Backend.probe`. Deterministic, whatever the number of threads."""
    load()
    lse, column, square, diagonal = empty_masses(args.q, args.num_coordinates)
    if args.lse is not None:
        lse.copy_(args.lse)
    order, skip = (None if x is None else x.contiguous() for x in (args.order, args.skip))
    torch.ops.permattn_native.cpu_probe.default(
        *(_rows(args.q), args.k, args.first_position.contiguous()),
        *(args.first_coordinate.contiguous(), args.key_range.contiguous(), order, skip),
        *(args.lse is not None, lse, column, square, diagonal.zero_(), isa_number(isa)),
    )
    return lse, column, square, diagonal


def forward(args: FwdArgs, *, isa: str | None = None) -> tuple[Tensor, Tensor]:
    """See `Backend.forward`. `isa` forces one of `available_isas()`, for tests.

    Deterministic, whatever the number of threads.
    """
    load()
    q, k, v = args.q, args.k, args.v
    out = empty_out(q, v)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    tensors, ints = _plan(args.plan)
    if args.plan.quant.is_quantised:
        _say_what_is_emulated(args.plan.quant)
        s = smoothing_of(args, isa=isa)
        torch.ops.permattn_native.cpu_forward_quantised.default(
            *(q, k, v, out, lse, tensors, ints, *_packed(args.prologue)),
            *(s.mean, s.k_factor, s.q_factor, args.scale, isa_number(isa)),
        )
        return out, lse
    if args.prologue is not None:
        q, k = (
            x if t is None else prepare(PrepareArgs(x, transform=t), isa=isa)[0]
            for x, t in ((q, args.prologue.q), (k, args.prologue.k))
        )
    op = torch.ops.permattn_native.cpu_forward.default
    op(q, k, v, out, lse, tensors, ints, args.scale, isa_number(isa))
    return out, lse


def prepare(args: PrepareArgs, *, isa: str | None = None) -> Prepared:
    """See `Backend.prepare`. One reading and one writing of memory."""
    load()
    rows, scales = empty_prepared(args)
    token = None if args.token_of_slot is None else _rows(args.token_of_slot)
    mean, factor = (None if x is None else x.contiguous() for x in (args.mean, args.factor))
    torch.ops.permattn_native.cpu_prepare.default(
        *(args.x, token, *_packed(Prologue(args.transform)), mean, factor),
        *(_FORMATS.index(args.fmt), args.rows_per_scale, args.per_column),
        *(rows, scales, isa_number(isa)),
    )
    return rows, scales


def smoothing_of(args: FwdArgs, *, isa: str | None = None) -> Smoothing:
    """`core.prepare.smoothing_of` in one reading of k, and one of q where columns are balanced."""
    load()
    return smoothing_from_columns(args, functools.partial(_columns, isa=isa))


def _columns(
    x: Tensor, transform: RowTransform | None, seen: Tensor | None, *, isa: str | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum, minimum and maximum of transformed columns, [B, H, D], over the tokens of `seen`."""
    shape = (x.shape[0], x.shape[1], x.shape[3])
    total, low, high = (x.new_empty(shape, dtype=torch.float32) for _ in range(3))
    torch.ops.permattn_native.cpu_column_statistics.default(
        *(x, *_packed(Prologue(transform)), seen, total, low, high, isa_number(isa))
    )
    return total, low, high


def _packed(prologue: Prologue | None) -> tuple[list[Tensor], list[int], list[float]]:
    """A prologue in flat form, its tensors contiguous float32."""
    if prologue is None:
        return [], [], []
    tensors, ints, floats = pack_prologue(prologue)
    return [x.to(torch.float32).contiguous() for x in tensors], ints, floats


def _say_what_is_emulated(quant: QuantSpec) -> None:
    if "int4" in (quant.qk, quant.pv):
        say_once("int4 runs as int8 on this CPU: the numbers are int4's, the speed is not")
    if quant.pv == "fp8":
        say_once("fp8 runs in wider floats on this CPU: the numbers are fp8's, the speed is not")


def backward(args: BwdArgs, *, isa: str | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """See `Backend.backward`. Deterministic: every sum has one order. Products are in float32."""
    load()
    q, k, v = args.q, args.k, args.v
    tensors, ints = _plan(args.plan)
    transposed = []
    for part in args.plan.parts:
        index = part.index.transpose(part.num_kv_blocks)
        transposed += [index.kv_indices, index.row_offsets, index.kv_num_full]
    dq, dk, dv = (x.new_zeros(x.shape, dtype=torch.float32) for x in (q, k, v))
    op = torch.ops.permattn_native.cpu_backward.default
    op(
        *(q, k, v, _rows(args.out), args.lse.contiguous(), _rows(args.dout)),
        *(args.dlse.contiguous(), dq, dk, dv),
        *(tensors, [_rows(x) for x in transposed], ints, args.scale, isa_number(isa)),
    )
    return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype)


def _plan(plan: AttnPlan) -> tuple[list[Tensor], list[int]]:
    tensors, ints = pack_plan(plan)
    return [_rows(x) for x in tensors], ints


def _rows(x: Tensor) -> Tensor:
    """x with a last stride of 1."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()
