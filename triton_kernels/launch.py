"""Host side: plain tensors and integers in, kernel launches out. No sync, no hidden state."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from permattn.triton_kernels.bwd import delta_kernel, dq_kernel
from permattn.triton_kernels.bwd_dkdv import dkdv_kernel
from permattn.triton_kernels.config import Config, Kernel, padded_head_dim, select_config
from torch import Tensor

LOG2E = 1.4426950408889634
# Lengths stay below it, so that twice a lag fits 32 bits.
LAG_LIMIT = 2**30
# Rows per program of the kernels that touch every token once.
ROW_TILE = 32
# Parts of one launch: each adds two loops to the kernel's code.
MAX_FUSED_PARTS = 4
# Blocks of a multiple of this many slots are never split between lanes of one tile.
WHOLE_BLOCK = 64
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
    """n made odd: Triton compiles anew for 1 and for multiples of 16, and lengths must not."""
    return 2 * n + 1


def band_lags(part: Part) -> tuple[int, int]:
    """(min_lag, max_lag) in 31 bits, which no lag reaches; 0 where the kernel will not look.

    An empty band becomes one that no pair reaches: the kernels may then test its ends one by one.
    """
    low, high = (
        0 if lag is None else min(max(lag, -LAG_LIMIT), LAG_LIMIT - 1)
        for lag in (part.min_lag, part.max_lag)
    )
    if part.min_lag is not None and part.max_lag is not None and low >= high:
        low = LAG_LIMIT - 1
    return low, high


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


def capability_of(device: torch.device) -> int:
    """Compute capability as major * 10 + minor; that of the oldest family for the interpreter."""
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def config_of(kernel: Kernel, q: Tensor, v: Tensor, run: Sequence[Part], unit: int) -> Config:
    """The config of a launch over the parts of `run`."""
    if kernel == "dkdv":
        gathered = any(not p.q_identity or p.block_q % WHOLE_BLOCK for p in run)
    else:
        gathered = any(not p.kv_identity or p.block_kv % WHOLE_BLOCK for p in run)
    return select_config(
        kernel,
        capability=capability_of(q.device),
        element_size=q.element_size(),
        head_dim=q.shape[3],
        head_dim_v=v.shape[3],
        unit=unit,
        gathered=gathered,
    )


def launch_options(config: Config) -> dict[str, int]:
    """Triton's own keywords."""
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    if config.max_registers is not None:
        options["maxnreg"] = config.max_registers
    return options


def fused_runs(parts: Sequence[Part]) -> list[list[Part]]:
    """Parts in order, those that can share one launch together.

    They must share the query order, and a unit of slots (the greatest common divisor of their
    block_q) that fills a tile.
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
            counts = p.kv_token.shape[-1], p.kv_indices.shape[-1], *band_lags(p)
            sizes.append(tuple(odd(n) for n in counts))
            has_lags = p.min_lag is not None, p.max_lag is not None
            parts.append((p.block_q, p.block_kv, p.kv_identity, *has_lags))
        return cls(tuple(tensors), tuple(rows), tuple(sizes), tuple(parts))


@dataclass(frozen=True, eq=False)
class Gradient:
    """What every backward launch of one call shares.

    Args:
        lse, delta: float32 [B, Hq, Sq], contiguous, natural log; delta = sum(out * dout) - dlse.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    lse: Tensor
    delta: Tensor
    scale: float

    @property
    def group(self) -> int:
        return self.q.shape[1] // self.k.shape[1]


def launch_delta(out: Tensor, dout: Tensor, dlse: Tensor) -> Tensor:
    """float32 [B, Hq, Sq]: sum(out * dout) - dlse of every query."""
    batch, heads, num_q_tokens, head_dim_v = out.shape
    delta = torch.empty((batch, heads, num_q_tokens), dtype=torch.float32, device=out.device)
    num_tiles = ceil_div(num_q_tokens, ROW_TILE)
    if delta.numel():
        delta_kernel[(num_tiles * batch * heads,)](
            out,
            dout,
            dlse.contiguous(),
            delta,
            strides(out),
            strides(dout),
            heads,
            num_q_tokens,
            num_tiles,
            DV=head_dim_v,
            BLOCK_M=ROW_TILE,
            BLOCK_DV=padded_head_dim(head_dim_v),
        )
    return delta


def launch_dq(g: Gradient, parts: Sequence[Part]) -> Tensor:
    """dQ. Parts of one query order share a launch; several orders add up in float32."""
    runs = fused_runs(parts)
    carry = len(runs) > 1
    if carry:
        dq = torch.zeros(g.q.shape, dtype=torch.float32, device=g.q.device)
    elif parts[0].q_identity:
        dq = g.q.new_empty(g.q.shape)
    else:
        dq = g.q.new_zeros(g.q.shape)
    if dq.numel():
        for run in runs:
            _launch_dq_run(g, dq, run, carry)
    return dq.to(g.q.dtype)


def _launch_dq_run(g: Gradient, dq: Tensor, run: Sequence[Part], carry: bool) -> None:
    batch, heads, num_q_tokens, head_dim = g.q.shape
    head_dim_v = g.v.shape[3]
    unit = math.gcd(*(p.block_q for p in run))
    config = config_of("dq", g.q, g.v, run, unit)
    num_q_slots = run[0].q_token.shape[-1]
    num_tiles = num_tiles_of(num_q_slots, unit, config.block_m)
    if num_tiles == 0:
        return
    lists = Lists.of(run)
    dq_kernel[(num_tiles * batch * heads,)](
        g.q,
        g.k,
        g.v,
        g.dout,
        g.lse,
        g.delta,
        dq,
        run[0].q_token,
        lists.tensors,
        lists.rows,
        lists.sizes,
        strides(g.q),
        strides(g.k),
        strides(g.v),
        strides(g.dout),
        strides(dq),
        heads,
        g.group,
        num_q_tokens,
        g.k.shape[2],
        num_q_slots,
        num_tiles,
        g.scale,
        g.scale * LOG2E,
        PARTS=lists.parts,
        NUM_PARTS=len(run),
        UNIT=unit,
        Q_IDENTITY=run[0].q_identity,
        CARRY=carry,
        D=head_dim,
        DV=head_dim_v,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_D=padded_head_dim(head_dim),
        BLOCK_DV=padded_head_dim(head_dim_v),
        **launch_options(config),
    )


def launch_dkdv(
    g: Gradient, parts: Sequence[Part], transposed: Sequence[tuple[Tensor, Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """dK and dV in k's and v's dtype, deterministic.

    Every launch owns each key row once, so there are no atomics. Launches of several parts, or of
    the heads of a group whose key orders differ, follow one another and add up in float32.

    Args:
        transposed: per part (query blocks, row_offsets, num_full) of `BlockIndex.transpose`.
    """
    calls = []
    for part, lists in zip(parts, transposed, strict=True):
        shared = part.kv_token.shape[1] == 1 or g.group == 1
        ranges = [(0, g.group)] if shared else [(i, i + 1) for i in range(g.group)]
        calls += [(part, lists, heads) for heads in ranges]
    carry = len(calls) > 1
    dtype = torch.float32 if carry else g.k.dtype
    make = torch.zeros if carry or not parts[0].kv_identity else torch.empty
    dk = make(g.k.shape, dtype=dtype, device=g.k.device)
    dv = make(g.v.shape, dtype=dtype, device=g.v.device)
    if dk.numel():
        for part, lists, heads in calls:
            _launch_dkdv_part(g, dk, dv, part, lists, heads, carry)
    return dk.to(g.k.dtype), dv.to(g.v.dtype)


def _launch_dkdv_part(
    g: Gradient,
    dk: Tensor,
    dv: Tensor,
    part: Part,
    lists: tuple[Tensor, Tensor, Tensor],
    heads: tuple[int, int],
    carry: bool,
) -> None:
    batch, num_kv_heads, num_kv_tokens, head_dim = g.k.shape
    head_dim_v = g.v.shape[3]
    config = config_of("dkdv", g.q, g.v, [part], part.block_kv)
    num_kv_slots = part.kv_token.shape[-1]
    num_tiles = num_tiles_of(num_kv_slots, part.block_kv, config.block_m)
    if num_tiles == 0:
        return
    tensors = (part.q_token, *(compact(x) for x in lists))
    dkdv_kernel[(num_tiles * batch * num_kv_heads,)](
        g.q,
        g.k,
        g.v,
        g.dout,
        g.lse,
        g.delta,
        dk,
        dv,
        part.kv_token,
        tensors,
        (plan_rows(part.kv_token), *(plan_rows(x) for x in tensors)),
        strides(g.q),
        strides(g.k),
        strides(g.v),
        strides(g.dout),
        strides(dk),
        strides(dv),
        g.q.shape[1],
        num_kv_heads,
        g.group,
        *heads,
        g.q.shape[2],
        num_kv_tokens,
        part.q_token.shape[-1],
        num_kv_slots,
        lists[0].shape[-1],
        num_tiles,
        *band_lags(part),
        g.scale,
        g.scale * LOG2E,
        BLOCK_Q=part.block_q,
        BLOCK_KV=part.block_kv,
        Q_IDENTITY=part.q_identity,
        KV_IDENTITY=part.kv_identity,
        HAS_MIN=part.min_lag is not None,
        HAS_MAX=part.max_lag is not None,
        CARRY=carry,
        D=head_dim,
        DV=head_dim_v,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_D=padded_head_dim(head_dim),
        BLOCK_DV=padded_head_dim(head_dim_v),
        **launch_options(config),
    )
