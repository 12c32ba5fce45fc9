"""Backward kernel on the key side: dK and dV over the transposed lists, without atomics."""

import triton
import triton.language as tl
from permattn.triton_kernels.bwd import load_softmax
from permattn.triton_kernels.token_rule import (
    dot_rows,
    head_base,
    head_row,
    lane_slots,
    load_list,
    load_rows,
    load_tokens,
    store_rows,
    tile_slots,
    token_is_visible,
)


@triton.jit
def _dkdv_of_list(
    gradients,
    b_k,
    b_v,
    b_kv_token,
    m_kv,
    p_q,
    p_dout,
    p_lse,
    p_delta,
    p_q_token,
    p_entry,
    num_entries,
    num_q_slots,
    num_q_tokens,
    q_stride,
    dout_stride,
    min_lag,
    max_lag,
    qk_scale,
    BLOCK_Q: tl.constexpr,
    Q_IDENTITY: tl.constexpr,
    HAS_MIN: tl.constexpr,
    HAS_MAX: tl.constexpr,
    IS_FULL: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Adds dS^T Q and P^T dO of one key tile over the query blocks of one list."""
    b_dk, b_dv = gradients
    num_lanes = num_entries * BLOCK_Q
    for i_lane in tl.range(0, num_lanes, BLOCK_N):
        o_slot, m_slot = lane_slots(p_entry, i_lane, num_lanes, num_q_slots, BLOCK_Q, BLOCK_N)
        b_q_token, m_token = load_tokens(p_q_token, o_slot, m_slot, num_q_tokens, Q_IDENTITY)
        b_lse, b_delta, m_q = load_softmax(p_lse, p_delta, b_q_token, m_token)
        if IS_FULL:
            m_visible = m_q[None, :] & m_kv[:, None]
        else:
            m_visible = token_is_visible(
                b_q_token[None, :],
                b_kv_token[:, None],
                m_q[None, :],
                m_kv[:, None],
                min_lag,
                max_lag,
                HAS_MIN,
                HAS_MAX,
            )
        b_q = load_rows(p_q, b_q_token, m_q, q_stride, D, BLOCK_D)
        b_score = dot_rows(b_k, b_q) * qk_scale
        b_p = tl.where(m_visible, tl.math.exp2(b_score - b_lse[None, :]), 0.0)
        b_dout = load_rows(p_dout, b_q_token, m_q, dout_stride, DV, BLOCK_DV)
        b_dv = tl.dot(b_p.to(b_dout.dtype), b_dout, b_dv, input_precision="ieee")
        b_dp = dot_rows(b_v, b_dout)
        b_ds = tl.where(m_visible, b_p * (b_dp - b_delta[None, :]), 0.0)
        b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision="ieee")
    return b_dk, b_dv


@triton.jit(
    do_not_specialize=[
        "num_q_heads",
        "num_kv_heads",
        "i_head_begin",
        "i_head_end",
        "num_q_tokens",
        "num_kv_tokens",
        "num_q_slots",
        "num_kv_slots",
        "capacity",
        "num_tiles",
        "min_lag",
        "max_lag",
    ]
)
def dkdv_kernel(
    p_q,
    p_k,
    p_v,
    p_dout,
    p_lse,
    p_delta,
    p_dk,
    p_dv,
    p_kv_token,
    lists,
    rows,
    q_strides,
    k_strides,
    v_strides,
    dout_strides,
    dk_strides,
    dv_strides,
    num_q_heads,
    num_kv_heads,
    group,
    i_head_begin,
    i_head_end,
    num_q_tokens,
    num_kv_tokens,
    num_q_slots,
    num_kv_slots,
    capacity,
    num_tiles,
    min_lag,
    max_lag,
    scale,
    qk_scale,
    BLOCK_Q: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    Q_IDENTITY: tl.constexpr,
    KV_IDENTITY: tl.constexpr,
    HAS_MIN: tl.constexpr,
    HAS_MAX: tl.constexpr,
    CARRY: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """dK and dV of one key tile of one key head, of one part.

    Args:
        p_dk, p_dv: the results; where CARRY is set, float32 buffers that this launch adds to.
        lists: (q's token_of_slot, and the transposed index: its entries are query blocks).
        rows: `plan_rows` of kv's token_of_slot, then of `lists`.
        i_head_begin, i_head_end: query heads inside the group that this launch serves. All of them
            where they share one key order; else launches follow one another, one head each.
        BLOCK_M, BLOCK_N: keys that stay, queries that stream past.
    """
    i_program = tl.program_id(0)
    i_tile = i_program % num_tiles
    i_head = i_program // num_tiles
    i_b = i_head // num_kv_heads
    i_hkv = i_head % num_kv_heads
    i_first_h = i_hkv * group + i_head_begin

    num_rows = (num_kv_slots + BLOCK_KV - 1) // BLOCK_KV
    i_first, o_kv_slot, m_kv_slot = tile_slots(i_tile, num_kv_slots, BLOCK_KV, BLOCK_M)
    p_kv_token += head_row(i_b, i_first_h, rows[0]) * num_kv_slots
    b_kv_token, m_kv = load_tokens(p_kv_token, o_kv_slot, m_kv_slot, num_kv_tokens, KV_IDENTITY)
    p_k = head_base(p_k, i_b, i_hkv, k_strides)
    p_v = head_base(p_v, i_b, i_hkv, v_strides)
    b_k = load_rows(p_k, b_kv_token, m_kv, k_strides[2], D, BLOCK_D)
    b_v = load_rows(p_v, b_kv_token, m_kv, v_strides[2], DV, BLOCK_DV)
    b_dk = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    b_dv = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)

    for i_in_group in tl.range(i_head_begin, i_head_end):
        i_h = i_hkv * group + i_in_group
        o_row = (i_b * num_q_heads + i_h).to(tl.int64) * num_q_tokens
        p_q_token = lists[0] + head_row(i_b, i_h, rows[1]) * num_q_slots
        p_entry = lists[1] + head_row(i_b, i_h, rows[2]) * capacity
        p_row_offsets = lists[2] + head_row(i_b, i_h, rows[3]) * (num_rows + 1)
        p_num_full = lists[3] + head_row(i_b, i_h, rows[4]) * num_rows
        i_begin, num_full, num_partial = load_list(
            p_row_offsets, p_num_full, i_first // BLOCK_KV, capacity
        )
        p_entry += i_begin
        for is_full in tl.static_range(1, -1, -1):
            b_dk, b_dv = _dkdv_of_list(
                (b_dk, b_dv),
                b_k,
                b_v,
                b_kv_token,
                m_kv,
                head_base(p_q, i_b, i_h, q_strides),
                head_base(p_dout, i_b, i_h, dout_strides),
                p_lse + o_row,
                p_delta + o_row,
                p_q_token,
                p_entry if is_full else p_entry + num_full,
                num_full if is_full else num_partial,
                num_q_slots,
                num_q_tokens,
                q_strides[2],
                dout_strides[2],
                min_lag,
                max_lag,
                qk_scale,
                BLOCK_Q,
                Q_IDENTITY,
                HAS_MIN,
                HAS_MAX,
                is_full,
                D,
                DV,
                BLOCK_N,
                BLOCK_D,
                BLOCK_DV,
            )

    p_dk = head_base(p_dk, i_b, i_hkv, dk_strides)
    p_dv = head_base(p_dv, i_b, i_hkv, dv_strides)
    b_dk = b_dk * scale
    if CARRY:
        b_dk += load_rows(p_dk, b_kv_token, m_kv, dk_strides[2], D, BLOCK_D)
        b_dv += load_rows(p_dv, b_kv_token, m_kv, dv_strides[2], DV, BLOCK_DV)
    store_rows(p_dk, b_kv_token, m_kv, dk_strides[2], b_dk, D, BLOCK_D)
    store_rows(p_dv, b_kv_token, m_kv, dv_strides[2], b_dv, DV, BLOCK_DV)
