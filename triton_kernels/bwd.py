"""Backward kernels on the query side: delta, and dQ over the same lists as the forward."""

import triton
import triton.language as tl
from permattn.triton_kernels.token_rule import (
    dot_rows,
    from_odd,
    head_base,
    head_row,
    lane_slots,
    load_list,
    load_rows,
    load_tokens,
    row_is_seen,
    store_rows,
    tile_slots,
    token_is_visible,
    token_range,
)

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_softmax(p_lse, p_delta, b_token, m_token):
    """(lse in base 2, delta, mask) of query rows; the mask drops rows that saw no key."""
    b_lse = tl.load(p_lse + b_token, mask=m_token, other=float("-inf"))
    m_alive = m_token & (b_lse != float("-inf"))
    b_delta = tl.load(p_delta + b_token, mask=m_alive, other=0.0)
    return tl.where(m_alive, b_lse * LOG2E, 0.0), b_delta, m_alive


@triton.jit(do_not_specialize=["num_q_heads", "num_q_tokens", "num_tiles"])
def delta_kernel(
    p_out,
    p_dout,
    p_dlse,
    p_delta,
    out_strides,
    dout_strides,
    num_q_heads,
    num_q_tokens,
    num_tiles,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """delta = sum(out * dout) - dlse, in token order: what the softmax subtracts from dP."""
    i_program = tl.program_id(0)
    i_head = i_program // num_tiles
    i_b = i_head // num_q_heads
    i_h = i_head % num_q_heads
    b_token = (i_program % num_tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_token = b_token < num_q_tokens
    p_out = head_base(p_out, i_b, i_h, out_strides)
    p_dout = head_base(p_dout, i_b, i_h, dout_strides)
    o_row = i_head.to(tl.int64) * num_q_tokens
    b_out = load_rows(p_out, b_token, m_token, out_strides[2], DV, BLOCK_DV).to(tl.float32)
    b_dout = load_rows(p_dout, b_token, m_token, dout_strides[2], DV, BLOCK_DV).to(tl.float32)
    b_dlse = tl.load(p_dlse + o_row + b_token, mask=m_token, other=0.0)
    b_delta = tl.sum(b_out * b_dout, 1) - b_dlse
    tl.store(p_delta + o_row + b_token, b_delta, mask=m_token)


@triton.jit
def _dq_of_list(
    b_dq,
    b_q,
    b_dout,
    b_lse,
    b_delta,
    b_q_token,
    m_q,
    q_low,
    q_high,
    p_k,
    p_v,
    p_kv_token,
    p_entry,
    num_entries,
    num_kv_slots,
    num_kv_tokens,
    k_stride,
    v_stride,
    min_lag,
    max_lag,
    qk_scale,
    BLOCK_KV: tl.constexpr,
    KV_IDENTITY: tl.constexpr,
    HAS_MIN: tl.constexpr,
    HAS_MAX: tl.constexpr,
    IS_FULL: tl.constexpr,
    Q_IDENTITY: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Adds dS K of one query tile over the entries of one list."""
    # Looking at every pair before the loads would carry the pairs through all stages of a pipeline.
    PAIRWISE: tl.constexpr = not IS_FULL and HAS_MIN and HAS_MAX and not Q_IDENTITY
    num_lanes = num_entries * BLOCK_KV
    for i_lane in tl.range(0, num_lanes, BLOCK_N, num_stages=1 if PAIRWISE else None):
        o_slot, m_slot = lane_slots(p_entry, i_lane, num_lanes, num_kv_slots, BLOCK_KV, BLOCK_N)
        b_kv_token, m_kv = load_tokens(p_kv_token, o_slot, m_slot, num_kv_tokens, KV_IDENTITY)
        if IS_FULL:
            m_visible = m_kv[None, :]
            m_row = m_kv
        else:
            m_visible = token_is_visible(
                b_q_token[:, None],
                b_kv_token[None, :],
                m_q[:, None],
                m_kv[None, :],
                min_lag,
                max_lag,
                HAS_MIN,
                HAS_MAX,
            )
            m_row = row_is_seen(
                m_visible,
                b_kv_token,
                m_kv,
                q_low,
                q_high,
                min_lag,
                max_lag,
                HAS_MIN,
                HAS_MAX,
                Q_IDENTITY,
            )
        b_k = load_rows(p_k, b_kv_token, m_row, k_stride, D, BLOCK_D)
        b_v = load_rows(p_v, b_kv_token, m_row, v_stride, DV, BLOCK_DV)
        b_score = dot_rows(b_q, b_k) * qk_scale
        b_p = tl.math.exp2(b_score - b_lse[:, None])
        b_dp = dot_rows(b_dout, b_v)
        b_ds = tl.where(m_visible, b_p * (b_dp - b_delta[:, None]), 0.0)
        b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision="ieee")
    return b_dq


@triton.jit(
    do_not_specialize=["num_q_heads", "num_q_tokens", "num_kv_tokens", "num_q_slots", "num_tiles"]
)
def dq_kernel(
    p_q,
    p_k,
    p_v,
    p_dout,
    p_lse,
    p_delta,
    p_dq,
    p_q_token,
    lists,
    rows,
    sizes,
    q_strides,
    k_strides,
    v_strides,
    dout_strides,
    dq_strides,
    num_q_heads,
    group,
    num_q_tokens,
    num_kv_tokens,
    num_q_slots,
    num_tiles,
    scale,
    qk_scale,
    PARTS: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    UNIT: tl.constexpr,
    Q_IDENTITY: tl.constexpr,
    CARRY: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """dQ of one query tile of one head; arguments as in `fwd_kernel`.

    Args:
        p_dq: the result; where CARRY is set, a float32 buffer that this launch adds to.
    """
    i_program = tl.program_id(0)
    i_head = i_program // num_tiles
    i_tile = num_tiles - 1 - i_program % num_tiles
    i_b = i_head // num_q_heads
    i_h = i_head % num_q_heads
    i_hkv = i_h // group

    i_first, o_q_slot, m_q_slot = tile_slots(i_tile, num_q_slots, UNIT, BLOCK_M)
    p_q_token += head_row(i_b, i_h, rows[0]) * num_q_slots
    b_q_token, m_token = load_tokens(p_q_token, o_q_slot, m_q_slot, num_q_tokens, Q_IDENTITY)
    o_row = i_head.to(tl.int64) * num_q_tokens
    b_lse, b_delta, m_q = load_softmax(p_lse + o_row, p_delta + o_row, b_q_token, m_token)
    p_q = head_base(p_q, i_b, i_h, q_strides)
    p_k = head_base(p_k, i_b, i_hkv, k_strides)
    p_v = head_base(p_v, i_b, i_hkv, v_strides)
    p_dout = head_base(p_dout, i_b, i_h, dout_strides)
    p_dq = head_base(p_dq, i_b, i_h, dq_strides)
    b_q = load_rows(p_q, b_q_token, m_q, q_strides[2], D, BLOCK_D)
    b_dout = load_rows(p_dout, b_q_token, m_q, dout_strides[2], DV, BLOCK_DV)
    b_dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    q_low, q_high = token_range(b_q_token, m_q)
    for n in tl.static_range(NUM_PARTS):
        num_kv_slots, capacity = from_odd(sizes[n][0]), from_odd(sizes[n][1])
        num_rows = (num_q_slots + PARTS[n][0] - 1) // PARTS[n][0]
        p_kv_token = lists[n][0] + head_row(i_b, i_h, rows[1 + 4 * n]) * num_kv_slots
        p_entry = lists[n][1] + head_row(i_b, i_h, rows[2 + 4 * n]) * capacity
        p_row_offsets = lists[n][2] + head_row(i_b, i_h, rows[3 + 4 * n]) * (num_rows + 1)
        p_num_full = lists[n][3] + head_row(i_b, i_h, rows[4 + 4 * n]) * num_rows
        i_begin, num_full, num_partial = load_list(
            p_row_offsets, p_num_full, i_first // PARTS[n][0], capacity
        )
        p_entry += i_begin
        for is_full in tl.static_range(1, -1, -1):
            b_dq = _dq_of_list(
                b_dq,
                b_q,
                b_dout,
                b_lse,
                b_delta,
                b_q_token,
                m_q,
                q_low,
                q_high,
                p_k,
                p_v,
                p_kv_token,
                p_entry if is_full else p_entry + num_full,
                num_full if is_full else num_partial,
                num_kv_slots,
                num_kv_tokens,
                k_strides[2],
                v_strides[2],
                from_odd(sizes[n][2]),
                from_odd(sizes[n][3]),
                qk_scale,
                PARTS[n][1],
                PARTS[n][2],
                PARTS[n][3],
                PARTS[n][4],
                is_full,
                Q_IDENTITY,
                D,
                DV,
                BLOCK_N,
                BLOCK_D,
                BLOCK_DV,
            )

    b_dq = b_dq * scale
    if CARRY:
        b_dq += load_rows(p_dq, b_q_token, m_token, dq_strides[2], D, BLOCK_D)
    store_rows(p_dq, b_q_token, m_token, dq_strides[2], b_dq, D, BLOCK_D)
