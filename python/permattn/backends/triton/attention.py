"""Attention over plans: forward, also over INT8 and FP8, and deterministic gradients; probes."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from permattn.backends.triton.device import (
    on_device_of,
    why_no_kernels,
    why_not_this_device,
)
from permattn.core.block_mass import BlockMassArgs, BlockMassProblem, Blocks, empty_blocks
from permattn.core.permutation import Permutation
from permattn.core.plan import AttnPlan
from permattn.core.prepare import PrepareArgs, Prepared, smoothing_of
from permattn.core.probe import Masses, ProbeArgs, ProbeProblem, probe_by_rows
from permattn.core.problem import BwdArgs, FwdArgs, Problem, empty_out, why_not_quantised
from permattn.core.prologue import Prologue, RowTransform
from permattn.core.quant import say_once

if TYPE_CHECKING:
    from permattn.triton_kernels.launch import Part
    from permattn.triton_kernels.launch_forward import Small
    from permattn.triton_kernels.prepare import Rows, Transform

MAX_HEAD_DIM = 256
# A group's rows stay in registers while it is quantised.
MAX_ROWS_PER_SCALE = 128
# A block of block masses is a tile.
MAX_MASS_BLOCK = 128
# Where P is quantised, a group of keys is a tile, which a matrix instruction takes.
TILE_ROWS = (16, 32, 64, 128)


def why_not(problem: Problem) -> str | None:
    why = why_no_kernels(problem.device_type, problem.dtype)
    if why is not None:
        return why
    if max(problem.head_dim, problem.head_dim_v) > MAX_HEAD_DIM:
        dims = f"D = {problem.head_dim}, Dv = {problem.head_dim_v}"
        return f"head dims go up to {MAX_HEAD_DIM}, got {dims}"
    why = why_not_quantised(problem) or _why_not_these_scales(problem)
    return why or why_not_this_device(problem.device_type)


def _why_not_these_scales(problem: Problem) -> str | None:
    quant = problem.quant
    if not quant.is_quantised:
        return None
    for name in ("q_rows_per_scale", "kv_rows_per_scale"):
        rows = getattr(quant, name)
        if rows > MAX_ROWS_PER_SCALE:
            return f"takes {name} up to {MAX_ROWS_PER_SCALE}, got {rows}"
    if quant.pv != "none" and quant.kv_rows_per_scale not in TILE_ROWS:
        rows = quant.kv_rows_per_scale
        return f"with pv = {quant.pv!r}, takes kv_rows_per_scale of {TILE_ROWS}, got {rows}"
    return None


def why_not_probe(problem: ProbeProblem) -> str | None:
    why = why_no_kernels(problem.device_type, problem.dtype)
    if why is not None:
        return why
    if problem.head_dim > MAX_HEAD_DIM:
        return f"head dims go up to {MAX_HEAD_DIM}, got D = {problem.head_dim}"
    return why_not_this_device(problem.device_type)


def probe(args: ProbeArgs) -> Masses:
    with on_device_of(args.q):
        return probe_kernels(args)


def probe_kernels(args: ProbeArgs) -> Masses:
    """Launches a probe, as many rows at a time as the kernels take."""
    from permattn.triton_kernels.probe import MAX_ROWS, launch_probe

    def launch(piece: ProbeArgs, all_rows: int) -> Masses:
        p = piece
        axis = p.first_position, p.first_coordinate, p.key_range, p.order
        return launch_probe(p.q, p.k, *axis, p.skip, p.lse, all_rows)

    q = args.q if args.q.stride(-1) == 1 else args.q.contiguous()
    return probe_by_rows(replace(args, q=q), MAX_ROWS, launch)


def why_not_block_mass(problem: BlockMassProblem) -> str | None:
    why = why_no_kernels(problem.device_type, problem.dtype)
    if why is not None:
        return why
    if problem.head_dim > MAX_HEAD_DIM:
        return f"head dims go up to {MAX_HEAD_DIM}, got D = {problem.head_dim}"
    if max(problem.block_q, problem.block_kv) > MAX_MASS_BLOCK:
        return f"takes blocks up to {MAX_MASS_BLOCK}, got {problem.block_q} x {problem.block_kv}"
    return why_not_this_device(problem.device_type)


def block_mass(args: BlockMassArgs) -> Blocks:
    with on_device_of(args.q):
        return block_mass_kernels(args)


def block_mass_kernels(args: BlockMassArgs) -> Blocks:
    """Launches a measurement."""
    from permattn.triton_kernels.block_mass import Masses, launch_block_mass
    from permattn.triton_kernels.launch import compact

    found = empty_blocks(args.q, args.q_blocks.shape[0], args.num_kv_blocks, args.eps)
    q_token, kv_token = compact(args.token_of_q_slot), compact(args.token_of_kv_slot)
    launch_block_mass(
        Masses(
            *(args.q, args.k, q_token, kv_token, args.q_blocks.contiguous()),
            *(args.lse.contiguous(), args.block_q, args.block_kv, args.scale, args.eps, *found),
        )
    )
    return found


def forward(args: FwdArgs) -> tuple[Tensor, Tensor]:
    out = empty_out(args.q, args.v)
    lse = torch.empty(args.q.shape[:3], dtype=torch.float32, device=args.q.device)
    with on_device_of(args.q):
        forward_kernels(args, out, lse)
    return out, lse


def backward(args: BwdArgs) -> tuple[Tensor, Tensor, Tensor]:
    with on_device_of(args.q):
        return backward_kernels(args)


def prepare(args: PrepareArgs) -> Prepared:
    from permattn.triton_kernels.prepare import launch_prepare

    with on_device_of(args.x):
        made = launch_prepare(_rows(args))
    scale = made.scale
    return made.rows, args.x.new_empty(0, dtype=torch.float32) if scale is None else scale


def _rows(args: PrepareArgs) -> Rows:
    from permattn.triton_kernels.launch import compact
    from permattn.triton_kernels.prepare import NO_TRANSFORM, Rows

    def dense(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.contiguous()

    token = args.token_of_slot
    return Rows(
        args.x,
        None if token is None else compact(token),
        args.num_heads,
        NO_TRANSFORM if args.transform is None else _transform(args.transform),
        dense(args.mean),
        dense(args.factor),
        args.fmt,
        args.rows_per_scale,
        args.per_column,
    )


def _transform(t: RowTransform) -> Transform:
    from permattn.triton_kernels.prepare import Transform

    tensors = (None if x is None else x.contiguous() for x in (t.weight, t.bias, t.cos, t.sin))
    weight, bias, cos, sin = tensors
    return Transform(
        *(t.norm, weight, bias, t.eps, t.across_heads, cos, sin, t.rope_start, t.interleaved)
    )


def forward_kernels(args: FwdArgs, out: Tensor, lse: Tensor) -> None:
    """Launches the forward of a call into out [B, Hq, Sq, Dv] and lse [B, Hq, Sq]."""
    from permattn.triton_kernels.launch_forward import Forward, launch_forward

    if args.plan.quant.is_quantised:
        _forward_quantised(args, out, lse)
        return
    prologue = args.prologue or Prologue()
    q, k = (
        x if t is None else prepare(PrepareArgs(x, transform=t))[0]
        for x, t in ((args.q, prologue.q), (args.k, prologue.k))
    )
    launch_forward(Forward(q, k, args.v, out, lse, kernel_parts(args.plan), args.scale))


def _forward_quantised(args: FwdArgs, out: Tensor, lse: Tensor) -> None:
    """Quantises per part, in its order; parts of one order share what is made."""
    from permattn.triton_kernels.launch_forward import Forward, launch_forward
    from permattn.triton_kernels.prepare import has_fp8

    quant = args.plan.quant
    pv: str = quant.pv
    if "int4" in (quant.qk, quant.pv):
        say_once("triton: INT4 values are multiplied as INT8")
    if pv == "fp8" and not has_fp8(args.q.device):
        say_once("triton: FP8 values are multiplied as float16 before compute capability 8.9")
        pv = "fp8_bits"
    parts = kernel_parts(args.plan)
    small, dots = _small_parts(args)
    call = Forward(
        *(args.q, args.k, args.v, out, lse, parts, args.scale, small),
        *(quant.q_rows_per_scale, quant.kv_rows_per_scale, pv),
    )
    launch_forward(call)
    if dots is not None:
        # Smoothing moved every score of a query by one number, which the softmax did not see.
        lse.add_(dots, alpha=args.scale)


def _small_parts(args: FwdArgs) -> tuple[list[Small], Tensor | None]:
    """What is quantised of every part, and [B, Hq, Sq] what smoothing took from q's scores."""
    from permattn.triton_kernels.launch_forward import Small
    from permattn.triton_kernels.prepare import Prepared as Made
    from permattn.triton_kernels.prepare import launch_prepare

    quant, prologue = args.plan.quant, args.prologue or Prologue()
    smoothing = smoothing_of(args)
    q_rows, kv_rows = quant.q_rows_per_scale, quant.kv_rows_per_scale
    dots = None
    if smoothing.mean is not None:
        dots = args.q.new_zeros(args.q.shape[:3], dtype=torch.float32)
    made: dict[tuple, Made] = {}

    def prepared(x: Tensor, perm: Permutation, *facts: Any, **more: Any) -> Made:
        token = perm.token_of_slot
        key = (id(x), token.data_ptr(), token.shape, token.stride())
        if key not in made:
            order = None if perm.is_identity else token
            made[key] = launch_prepare(replace(_rows(PrepareArgs(x, order, *facts)), **more))
        return made[key]

    small = []
    for part in args.plan.parts:
        q_facts = (prologue.q, None, smoothing.q_factor, quant.qk, q_rows)
        q = prepared(args.q, part.q_perm, *q_facts, against=smoothing.mean, dots=dots)
        k_facts = (prologue.k, smoothing.mean, smoothing.k_factor, quant.qk, kv_rows)
        k = prepared(args.k, part.kv_perm, *k_facts)
        v = None
        if quant.pv != "none":
            v_facts = (None, None, None, quant.pv, kv_rows, True)
            offsets = quant.pv == "int8"
            v = prepared(args.v, part.kv_perm, *v_facts, tiles=True, offsets=offsets)
        small.append(Small(q, k, v))
    return small, dots


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
