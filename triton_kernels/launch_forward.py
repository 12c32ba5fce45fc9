"""Host side of the forward: one launch for all parts that share a query order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from permattn.triton_kernels import launch
from permattn.triton_kernels.config import Config, padded_head_dim, select_quantised_config
from permattn.triton_kernels.fwd import finish_kernel, fwd_kernel
from permattn.triton_kernels.launch import LOG2E, ROW_TILE, Lists, Part
from permattn.triton_kernels.prepare import Prepared
from torch import Tensor

# A matrix instruction for bytes takes 32 of them at a time.
MIN_SMALL_HEAD_DIM = 32


@dataclass(frozen=True, eq=False)
class Small:
    """What is quantised of one part, in its slot order.

    Args:
        q, k, v: of `prepare.launch_prepare`; v as tiles. v is None where P and V are not quantised.
    """

    q: Prepared
    k: Prepared
    v: Prepared | None


@dataclass(frozen=True, eq=False)
class Forward:
    """One call. out [B, Hq, Sq, Dv] and lse (contiguous float32 [B, Hq, Sq]) are filled.

    Args:
        small: per part what is quantised; () = nothing is.
        q_rows, kv_rows: slots that share a scale.
        pv: "none", "int8", "int4", "fp8" or "fp8_bits" (`quantised.quantised_values`).
    """

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor
    parts: Sequence[Part]
    scale: float
    small: Sequence[Small] = ()
    q_rows: int = 0
    kv_rows: int = 0
    pv: str = "none"


def launch_forward(call: Forward) -> None:
    """Only a plan of several query orders keeps its softmax state (float32, token order) in memory
    between launches.
    """
    q, v, out, lse, parts = call.q, call.v, call.out, call.lse, call.parts
    if out.numel() == 0:
        return
    runs = launch.fused_runs(parts)
    carry = len(runs) > 1
    state: tuple[Tensor | None, ...] = (None, None, None)
    if carry:
        acc = torch.zeros(out.shape, dtype=torch.float32, device=q.device)
        state = (acc, torch.full_like(lse, float("-inf")), torch.zeros_like(lse))
    elif not parts[0].q_identity:
        # Tokens in no slot are written by nobody.
        out.zero_()
        lse.fill_(float("-inf"))
    for run in runs:
        _launch_run(call, state, run)
    if carry:
        num_tiles = launch.ceil_div(q.shape[2], ROW_TILE)
        finish_kernel[(num_tiles * q.shape[0] * q.shape[1],)](
            *state,
            out,
            lse,
            launch.strides(out),
            q.shape[1],
            q.shape[2],
            num_tiles,
            DV=v.shape[3],
            BLOCK_M=ROW_TILE,
            BLOCK_DV=padded_head_dim(v.shape[3]),
        )


def _launch_run(call: Forward, state: tuple[Tensor | None, ...], run: Sequence[Part]) -> None:
    q, k, v = call.q, call.k, call.v
    batch, heads, num_q_tokens, head_dim = q.shape
    unit = math.gcd(*(p.block_q for p in run))
    small = [call.small[call.parts.index(p)] for p in run] if call.small else []
    config = _config_of(call, run, unit)
    num_q_slots = run[0].q_token.shape[-1]
    num_tiles = launch.num_tiles_of(num_q_slots, unit, config.block_m)
    if num_tiles == 0:
        return
    lists = Lists.of(run)
    block_d = padded_head_dim(head_dim)
    q_rows, q_scale = q, None
    if small:
        q_rows, q_scale = small[0].q.rows, small[0].q.scale
        block_d = max(MIN_SMALL_HEAD_DIM, block_d)
    fwd_kernel[(num_tiles * batch * heads,)](
        q_rows,
        k,
        v,
        call.out,
        call.lse,
        *state,
        q_scale,
        run[0].q_token,
        lists.tensors,
        tuple(_small_arguments(s, heads, call.pv) for s in small),
        lists.rows,
        lists.sizes,
        launch.strides(q_rows),
        (0, 0, head_dim) if small else launch.strides(k),
        launch.strides(v),
        launch.strides(call.out),
        heads,
        heads // k.shape[1],
        num_q_tokens,
        k.shape[2],
        num_q_slots,
        num_tiles,
        call.scale * LOG2E,
        PARTS=lists.parts,
        NUM_PARTS=len(run),
        UNIT=unit,
        Q_IDENTITY=run[0].q_identity,
        CARRY=state[0] is not None,
        Q_ROWS=call.q_rows,
        KV_ROWS=call.kv_rows,
        PV=call.pv,
        D=head_dim,
        DV=v.shape[3],
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_D=block_d,
        BLOCK_DV=padded_head_dim(v.shape[3]),
        **launch.launch_options(config),
    )


def _config_of(call: Forward, run: Sequence[Part], unit: int) -> Config:
    if not call.small:
        return launch.config_of("fwd", call.q, call.v, run, unit)
    return select_quantised_config(
        capability=launch.capability_of(call.q.device),
        element_size=call.v.element_size(),
        head_dim=call.q.shape[3],
        head_dim_v=call.v.shape[3],
        unit=unit,
        kv_rows=call.kv_rows,
        pv=call.pv,
    )


def _small_arguments(small: Small, heads: int, pv: str) -> tuple:
    k, v = small.k, small.v
    group = launch.odd(heads // k.rows.shape[1])
    if v is None:
        return (k.rows, k.scale, None, None, None, group)
    tiles = v.rows.view(torch.uint8) if pv == "fp8_bits" else v.rows
    return (k.rows, k.scale, tiles, v.scale, v.offset, group)
