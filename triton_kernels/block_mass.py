"""Block masses: the softmax of sampled query blocks, summed over one key block after the other."""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from permattn.triton_kernels import launch
from permattn.triton_kernels.config import MIN_TILE, next_power_of_2, padded_head_dim
from permattn.triton_kernels.token_rule import (
    dot_rows,
    head_base,
    head_row,
    load_rows,
    load_tokens,
)
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)
# A block is one tile: what a program keeps in registers.
MAX_BLOCK = 128
# Key blocks per program: enough to hide the start of one, few enough to fill a device.
SPLIT = 16
# Elements of a tile of scores per warp.
ELEMENTS_PER_WARP = 1024


@dataclass(frozen=True, eq=False)
class Masses:
    """One measurement: what is read, and what is filled.

    Args:
        q_token, kv_token: int32 [Bx, Hx, slots], contiguous.
        q_blocks: int32 [n], contiguous.
        lse: float32 [B, Hq, Sq], contiguous, natural log.
        sums, maxima, small: float32 [B, Hq, n, nk]; the last two are not written where eps is None.
    """

    q: Tensor
    k: Tensor
    q_token: Tensor
    kv_token: Tensor
    q_blocks: Tensor
    lse: Tensor
    block_q: int
    block_kv: int
    scale: float
    eps: float | None
    sums: Tensor
    maxima: Tensor
    small: Tensor


@triton.jit
def _block_tokens(
    p_token, i_block, i_inside, num_slots, num_tokens, BLOCK: tl.constexpr, TILE: tl.constexpr
):
    """Tokens of TILE of a block's slots, and which of them exist; none of a block that does not."""
    o_inside = i_inside + tl.arange(0, TILE)
    o_slot = i_block * BLOCK + o_inside
    m_slot = (o_inside < BLOCK) & (o_slot >= 0) & (o_slot < num_slots)
    return load_tokens(p_token, o_slot, m_slot, num_tokens, False)


@triton.jit(
    do_not_specialize=[
        "num_q_heads",
        "num_q_tokens",
        "num_kv_tokens",
        "num_q_slots",
        "num_kv_slots",
        "num_q_blocks",
        "num_kv_blocks",
        "num_splits",
    ]
)
def block_mass_kernel(
    p_q,
    p_k,
    p_q_token,
    p_kv_token,
    p_q_blocks,
    p_lse,
    p_sums,
    p_maxima,
    p_small,
    q_strides,
    k_strides,
    q_rows,
    kv_rows,
    num_q_heads,
    group,
    num_q_tokens,
    num_kv_tokens,
    num_q_slots,
    num_kv_slots,
    num_q_blocks,
    num_kv_blocks,
    num_splits,
    qk_scale,
    eps,
    D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    KV_BLOCKS: tl.constexpr,
):
    """One sampled query block against KV_BLOCKS key blocks. Neighbours read the same keys."""
    i_program = tl.program_id(0)
    i_n = i_program % num_q_blocks
    i_split = i_program // num_q_blocks % num_splits
    i_head = i_program // num_q_blocks // num_splits
    i_b, i_h = i_head // num_q_heads, i_head % num_q_heads

    p_q_token += head_row(i_b, i_h, q_rows) * num_q_slots
    p_kv_token += head_row(i_b, i_h, kv_rows) * num_kv_slots
    i_block = tl.load(p_q_blocks + i_n)
    # A number out of range (unchecked on a device) is a block of holes.
    m_block = (i_block >= 0) & (i_block < (num_q_slots + BLOCK_Q - 1) // BLOCK_Q)
    i_block = tl.where(m_block, i_block, -1)
    b_q_token, m_q = _block_tokens(
        p_q_token, i_block, 0, num_q_slots, num_q_tokens, BLOCK_Q, BLOCK_M
    )
    p_lse += i_head.to(tl.int64) * num_q_tokens
    b_lse = tl.load(p_lse + b_q_token, mask=m_q, other=float("-inf"))
    m_q = m_q & (b_lse != float("-inf"))
    b_lse = tl.where(m_q, b_lse * LOG2E, 0.0)
    p_q = head_base(p_q, i_b, i_h, q_strides)
    p_k = head_base(p_k, i_b, i_h // group, k_strides)
    b_q = load_rows(p_q, b_q_token, m_q, q_strides[2], D, BLOCK_D)

    o_block = (i_head.to(tl.int64) * num_q_blocks + i_n) * num_kv_blocks
    i_first = i_split * KV_BLOCKS
    for i_kv in tl.range(i_first, tl.minimum(i_first + KV_BLOCKS, num_kv_blocks)):
        b_sum = tl.zeros([BLOCK_M], tl.float32)
        b_high = tl.zeros([BLOCK_M], tl.float32)
        b_small = tl.zeros([BLOCK_M], tl.int32)
        for i_inside in tl.static_range(0, BLOCK_KV, BLOCK_N):
            b_kv_token, m_kv = _block_tokens(
                p_kv_token, i_kv, i_inside, num_kv_slots, num_kv_tokens, BLOCK_KV, BLOCK_N
            )
            b_k = load_rows(p_k, b_kv_token, m_kv, k_strides[2], D, BLOCK_D)
            b_score = dot_rows(b_q, b_k) * qk_scale - b_lse[:, None]
            m_pair = m_q[:, None] & m_kv[None, :]
            b_p = tl.where(m_pair, tl.math.exp2(b_score), 0.0)
            b_sum += tl.sum(b_p, 1)
            if eps is not None:
                b_high = tl.maximum(b_high, tl.max(b_p, 1))
                b_small += tl.sum((m_pair & (b_p < eps)).to(tl.int32), 1)
        tl.store(p_sums + o_block + i_kv, tl.sum(b_sum, 0))
        if eps is not None:
            tl.store(p_maxima + o_block + i_kv, tl.max(b_high, 0))
            tl.store(p_small + o_block + i_kv, tl.sum(b_small, 0).to(tl.float32))


def launch_block_mass(m: Masses) -> None:
    """Fills the blocks of a measurement; every one is written by one program."""
    batch, heads, num_q_tokens, dim = m.q.shape
    num_q_blocks, num_kv_blocks = m.sums.shape[2:]
    num_splits = launch.ceil_div(num_kv_blocks, SPLIT)
    if m.sums.numel() == 0:
        return
    block_m, block_n = (max(MIN_TILE, next_power_of_2(x)) for x in (m.block_q, m.block_kv))
    warps, stages = min(8, max(4, block_m * block_n // ELEMENTS_PER_WARP)), 2
    if m.q.element_size() == 4 or dim > 128:
        # Whole rows of both sides live in registers, where there are no matrix instructions.
        block_n, warps, stages = MIN_TILE, 8, 1
    block_mass_kernel[(num_q_blocks * num_splits * batch * heads,)](
        *(m.q, m.k, m.q_token, m.kv_token, m.q_blocks, m.lse, m.sums, m.maxima, m.small),
        launch.strides(m.q),
        launch.strides(m.k),
        launch.plan_rows(m.q_token),
        launch.plan_rows(m.kv_token),
        heads,
        heads // m.k.shape[1],
        num_q_tokens,
        m.k.shape[2],
        m.q_token.shape[-1],
        m.kv_token.shape[-1],
        num_q_blocks,
        num_kv_blocks,
        num_splits,
        m.scale * LOG2E.value,
        m.eps,
        D=dim,
        BLOCK_Q=m.block_q,
        BLOCK_KV=m.block_kv,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_D=padded_head_dim(dim),
        KV_BLOCKS=SPLIT,
        num_warps=warps,
        num_stages=stages,
    )
