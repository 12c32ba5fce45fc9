"""Host side: plain tensors and integers in, kernel launches out. No device sync, no hidden state."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from permattn.triton_kernels.config import padded_head_dim, select_config
from permattn.triton_kernels.fwd import finish_kernel, fwd_kernel

LOG2E = 1.4426950408889634
FINISH_TILE = 64
# Parts of one launch: each adds two loops to the kernel's code.
MAX_FUSED_PARTS = 4
# A smaller common unit would leave rows of the tile idle; then parts are launched one by one.
MIN_FUSED_UNIT = 64


@dataclass(frozen=True, eq=False)
class Part:
    """One part of a plan as a kernel reads it.

    Args:
        q_token, kv_token: int32 [Bx, Hx, num_slots], token of slot.
        kv_indices, row_offsets, kv_num_full: the key-block lists (see core.block_index).
        group: parts with equal numbers share the query order.
        min_lag, max_lag: the band; None = no bound.
    """

    q_token: Tensor
    kv_token: Tensor
    kv_indices: Tensor
    row_offsets: Tensor
    kv_num_full: Tensor
    block_q: int
    block_kv: int
    q_identity: bool
    kv_identity: bool
    group: int
    min_lag: int | None
    max_lag: int | None


def odd(n: int) -> int:
    """n as an odd number: Triton compiles anew for 1 and for multiples of 16, and lengths must not."""
    return 2 * n + 1


def clamp_lag(lag: int | None) -> int:
    """A bound that fits 31 bits as well: |q_token - kv_token| never gets there."""
    return 0 if lag is None else min(max(lag, -(2**30)), 2**30 - 1)


def plan_rows(x: Tensor) -> tuple[int, int]:
    """(per batch row, per head) steps in rows of a contiguous [Bx, Hx, n] tensor; 0 = broadcast."""
    bx, hx, _ = x.shape
    return (hx if bx > 1 else 0), (1 if hx > 1 else 0)


def compact(x: Tensor) -> Tensor:
    """Contiguous; an axis expanded by stride 0 is cut to the one row that it has."""
    if x.stride(0) == 0 and x.shape[0] > 1:
        x = x[:1]
    if x.stride(1) == 0 and x.shape[1] > 1:
        x = x[:, :1]
    return x.contiguous()


def strides(x: Tensor) -> tuple[int, int, int]:
    return x.stride()[:3]


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def num_tiles_of(num_slots: int, unit: int, tile: int) -> int:
    """Tiles that cover all slots when none crosses a unit (see `tile_slots`)."""
    return ceil_div(num_slots, unit) * ceil_div(unit, tile)


def fused_runs(parts: Sequence[Part]) -> list[list[Part]]:
    """Parts in order, those that can share one launch together.

    They must share the query order, and a unit of slots (the greatest common divisor of their block_q)
    that fills a tile.
    """
    runs: list[list[Part]] = []
    for part in sorted(parts, key=lambda p: p.group):
        if runs and part.group == runs[-1][0].group and len(runs[-1]) < MAX_FUSED_PARTS:
            blocks = [p.block_q for p in (*runs[-1], part)]
            if math.gcd(*blocks) >= min(MIN_FUSED_UNIT, *blocks):
                runs[-1].append(part)
                continue
        runs.append([part])
    return runs


@dataclass(frozen=True, eq=False)
class Lists:
    """The plan arguments of one launch, in the form that every kernel takes."""

    tensors: tuple[tuple[Tensor, ...], ...]
    rows: tuple[tuple[int, int], ...]
    sizes: tuple[tuple[int, ...], ...]
    parts: tuple[tuple[int, int, bool, bool, bool], ...]

    @classmethod
    def of(cls, run: Sequence[Part]) -> Lists:
        tensors, rows, sizes, parts = [], [plan_rows(run[0].q_token)], [], []
        for p in run:
            four = (p.kv_token, p.kv_indices, p.row_offsets, p.kv_num_full)
            tensors.append(four)
            rows += [plan_rows(x) for x in four]
            lags = clamp_lag(p.min_lag), clamp_lag(p.max_lag)
            counts = p.kv_token.shape[-1], p.kv_indices.shape[-1], *lags
            sizes.append(tuple(odd(n) for n in counts))
            has_lags = p.min_lag is not None, p.max_lag is not None
            parts.append((p.block_q, p.block_kv, p.kv_identity, *has_lags))
        return cls(tuple(tensors), tuple(rows), tuple(sizes), tuple(parts))


def launch_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    parts: Sequence[Part],
    scale: float,
) -> None:
    """Fills out [B, Hq, Sq, Dv] and lse [B, Hq, Sq] (contiguous float32, natural log).

    One launch serves all parts that share a query order; only a plan of several orders keeps its softmax
    state (float32, token order) in memory between launches.
    """
    if out.numel() == 0:
        return
    runs = fused_runs(parts)
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
        _launch_run(q, k, v, out, lse, state, run, scale)
    if carry:
        num_tiles = ceil_div(q.shape[2], FINISH_TILE)
        finish_kernel[(num_tiles * q.shape[0] * q.shape[1],)](
            *state,
            out,
            lse,
            strides(out),
            q.shape[1],
            q.shape[2],
            num_tiles,
            DV=v.shape[3],
            BLOCK_M=FINISH_TILE,
            BLOCK_DV=padded_head_dim(v.shape[3]),
        )


def _launch_run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    state: tuple[Tensor | None, ...],
    run: Sequence[Part],
    scale: float,
) -> None:
    batch, heads, num_q_tokens, head_dim = q.shape
    unit = math.gcd(*(p.block_q for p in run))
    config = select_config(
        "fwd",
        element_size=q.element_size(),
        head_dim=head_dim,
        head_dim_v=v.shape[3],
        unit=unit,
    )
    num_q_slots = run[0].q_token.shape[-1]
    num_tiles = num_tiles_of(num_q_slots, unit, config.block_m)
    if num_tiles == 0:
        return
    lists = Lists.of(run)
    fwd_kernel[(num_tiles * batch * heads,)](
        q,
        k,
        v,
        out,
        lse,
        *state,
        run[0].q_token,
        lists.tensors,
        lists.rows,
        lists.sizes,
        strides(q),
        strides(k),
        strides(v),
        strides(out),
        heads,
        heads // k.shape[1],
        num_q_tokens,
        k.shape[2],
        num_q_slots,
        num_tiles,
        scale * LOG2E,
        PARTS=lists.parts,
        NUM_PARTS=len(run),
        UNIT=unit,
        Q_IDENTITY=run[0].q_identity,
        CARRY=state[0] is not None,
        D=head_dim,
        DV=v.shape[3],
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_D=padded_head_dim(head_dim),
        BLOCK_DV=padded_head_dim(v.shape[3]),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
