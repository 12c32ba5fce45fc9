"""Forward kernels: several parts under one softmax, rows gathered and scattered by token."""

import triton
import triton.language as tl
from permattn.triton_kernels.quantised import quantised_score, quantised_values, tile_group
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

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _attend_list(
    state,
    b_q,
    b_q_token,
    m_q,
    q_low,
    q_high,
    b_q_factor,
    p_k,
    p_v,
    small,
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
    KV_ROWS: tl.constexpr,
    PV: tl.constexpr,
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
    """Online softmax (base 2) of one query tile over the entries of one list.

    Args:
        small: (scales of K, scales of V, offsets of V) of what is quantised, of this head.
        KV_ROWS: slots that share a scale; 0 where Q and K are not quantised.
    """
    b_acc, b_high, b_total = state
    # Looking at every pair before the loads would carry the pairs through all stages of a pipeline.
    PAIRWISE: tl.constexpr = not IS_FULL and HAS_MIN and HAS_MAX and not Q_IDENTITY
    num_lanes = num_entries * BLOCK_KV
    for i_lane in tl.range(0, num_lanes, BLOCK_N, num_stages=1 if PAIRWISE else None):
        o_slot, m_slot = lane_slots(p_entry, i_lane, num_lanes, num_kv_slots, BLOCK_KV, BLOCK_N)
        b_kv_token, m_kv = load_tokens(p_kv_token, o_slot, m_slot, num_kv_tokens, KV_IDENTITY)
        if IS_FULL:
            m_visible = m_kv[None, :]
            m_v = m_kv
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
            m_v = row_is_seen(
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
        if KV_ROWS == 0:
            b_k = load_rows(p_k, b_kv_token, m_kv, k_stride, D, BLOCK_D)
            b_score = dot_rows(b_q, b_k) * qk_scale
        else:
            b_k = load_rows(p_k, o_slot, m_kv, k_stride, D, BLOCK_D)
            b_score = quantised_score(b_q, b_q_factor, b_k, small[0], o_slot, m_kv, KV_ROWS)
        b_score = tl.where(m_visible, b_score, float("-inf"))
        b_top = tl.max(b_score, 1)
        b_now = tl.maximum(b_high, b_top)
        # A row that has seen nothing keeps -inf, and -inf - -inf must not become NaN.
        b_safe = tl.where(b_now == float("-inf"), 0.0, b_now)
        b_shrink = tl.math.exp2(b_high - b_safe)
        if PV == "none":
            b_p = tl.math.exp2(b_score - b_safe[:, None])
            b_total = b_total * b_shrink + tl.sum(b_p, 1)
            b_v = load_rows(p_v, b_kv_token, m_v, v_stride, DV, BLOCK_DV)
            b_acc = b_acc * b_shrink[:, None]
            b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc, input_precision="ieee")
        else:
            i_group, m_group = tile_group(p_entry, i_lane, num_kv_slots, BLOCK_KV, KV_ROWS)
            b_value, b_sum = quantised_values(
                b_score,
                b_top,
                b_safe,
                p_v,
                small[1],
                small[2],
                i_group,
                m_group,
                PV,
                KV_ROWS,
                DV,
                BLOCK_DV,
            )
            b_total = b_total * b_shrink + b_sum
            b_acc = b_acc * b_shrink[:, None] + b_value
        b_high = b_now
    return b_acc, b_high, b_total


@triton.jit
def _small_heads(
    small,
    p_v,
    i_b,
    i_h,
    num_q_heads,
    num_kv_slots,
    KV_ROWS: tl.constexpr,
    PV: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
):
    """Where the keys, the values, and the scales and offsets of one part begin for a query head."""
    group = from_odd(small[5])
    i_row = i_b.to(tl.int64) * (num_q_heads // group) + i_h // group
    num_groups = (num_kv_slots + KV_ROWS - 1) // KV_ROWS
    i_groups = i_row * num_groups
    p_k = small[0] + i_row * num_kv_slots * D
    p_k_scale = small[1] + i_groups
    if PV == "none":
        scales = (p_k_scale, None, None)
    elif PV == "int8":
        p_v = small[2] + i_groups * DV * KV_ROWS
        scales = (p_k_scale, small[3] + i_groups * DV, small[4] + i_groups * DV)
    else:
        p_v = small[2] + i_groups * DV * KV_ROWS
        scales = (p_k_scale, small[3] + i_groups * DV, None)
    return p_k, p_v, scales


@triton.jit(
    do_not_specialize=["num_q_heads", "num_q_tokens", "num_kv_tokens", "num_q_slots", "num_tiles"]
)
def fwd_kernel(
    p_q,
    p_k,
    p_v,
    p_out,
    p_lse,
    p_acc,
    p_high,
    p_total,
    p_q_scale,
    p_q_token,
    lists,
    small,
    rows,
    sizes,
    q_strides,
    k_strides,
    v_strides,
    out_strides,
    num_q_heads,
    group,
    num_q_tokens,
    num_kv_tokens,
    num_q_slots,
    num_tiles,
    qk_scale,
    PARTS: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    UNIT: tl.constexpr,
    Q_IDENTITY: tl.constexpr,
    CARRY: tl.constexpr,
    Q_ROWS: tl.constexpr,
    KV_ROWS: tl.constexpr,
    PV: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """One query tile of one head, over NUM_PARTS parts that share the query order.

    Where KV_ROWS > 0, q is small numbers in slot order [B, Hq, q slots, D], and so are the keys and
    values of `small`; p_k is not read, nor p_v if PV is not "none".

    Args:
        p_q_scale: float32 [B, Hq, groups of Q_ROWS slots]; None = q is as given.
        p_acc, p_high, p_total: float32 state in token order, [B, Hq, Sq, Dv] and [B, Hq, Sq] twice;
            read and written where CARRY is set: then this launch is one of several of the plan.
        lists: per part (token_of_slot, kv_indices, row_offsets, kv_num_full).
        small: per part (K, its scales, V, its scales, its offsets, odd number of query heads that
            read one head of them), as `prepare.Prepared` has them; () = k and v are as given.
        rows: `plan_rows` of q's token_of_slot, then of the four tensors of every part.
        sizes: per part odd numbers of (num_kv_slots, capacity, min_lag, max_lag).
        Q_ROWS, KV_ROWS: slots that share a scale; 0 = not quantised.
        PV: "none", or a format of `quantised_values`; then KV_ROWS = BLOCK_N.
        PARTS: per part (block_q, block_kv, kv is identity, has min_lag, has max_lag).
        UNIT: slots that lie in one block row of every part.
    """
    i_program = tl.program_id(0)
    i_head = i_program // num_tiles
    # Under causality the last tiles are the longest: they start first.
    i_tile = num_tiles - 1 - i_program % num_tiles
    i_b = i_head // num_q_heads
    i_h = i_head % num_q_heads
    i_hkv = i_h // group

    i_first, o_q_slot, m_q_slot = tile_slots(i_tile, num_q_slots, UNIT, BLOCK_M)
    p_q_token += head_row(i_b, i_h, rows[0]) * num_q_slots
    b_q_token, m_q = load_tokens(p_q_token, o_q_slot, m_q_slot, num_q_tokens, Q_IDENTITY)
    p_q = head_base(p_q, i_b, i_h, q_strides)
    p_k = head_base(p_k, i_b, i_hkv, k_strides)
    p_v = head_base(p_v, i_b, i_hkv, v_strides)
    b_q_factor = qk_scale
    b_q_row = b_q_token
    if Q_ROWS > 0:
        b_q_row = o_q_slot
        p_q_scale += i_head.to(tl.int64) * ((num_q_slots + Q_ROWS - 1) // Q_ROWS)
        b_q_factor = tl.load(p_q_scale + o_q_slot // Q_ROWS, mask=m_q, other=0.0) * qk_scale
    b_q = load_rows(p_q, b_q_row, m_q, q_strides[2], D, BLOCK_D)

    o_row = i_head.to(tl.int64) * num_q_tokens
    if CARRY:
        b_acc = load_rows(p_acc + o_row * DV, b_q_token, m_q, DV, DV, BLOCK_DV)
        b_high = tl.load(p_high + o_row + b_q_token, mask=m_q, other=float("-inf"))
        b_total = tl.load(p_total + o_row + b_q_token, mask=m_q, other=0.0)
    else:
        b_acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
        b_high = tl.full([BLOCK_M], float("-inf"), tl.float32)
        b_total = tl.zeros([BLOCK_M], tl.float32)

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
        if KV_ROWS == 0:
            p_k_part, p_v_part, scales = p_k, p_v, (None, None, None)
        else:
            p_k_part, p_v_part, scales = _small_heads(
                small[n], p_v, i_b, i_h, num_q_heads, num_kv_slots, KV_ROWS, PV, D, DV
            )
        for is_full in tl.static_range(1, -1, -1):
            b_acc, b_high, b_total = _attend_list(
                (b_acc, b_high, b_total),
                b_q,
                b_q_token,
                m_q,
                q_low,
                q_high,
                b_q_factor,
                p_k_part,
                p_v_part,
                scales,
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
                KV_ROWS,
                PV,
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

    if CARRY:
        store_rows(p_acc + o_row * DV, b_q_token, m_q, DV, b_acc, DV, BLOCK_DV)
        tl.store(p_high + o_row + b_q_token, b_high, mask=m_q)
        tl.store(p_total + o_row + b_q_token, b_total, mask=m_q)
    else:
        p_out = head_base(p_out, i_b, i_h, out_strides)
        b_out, b_lse = normalise(b_acc, b_high, b_total)
        store_rows(p_out, b_q_token, m_q, out_strides[2], b_out, DV, BLOCK_DV)
        tl.store(p_lse + o_row + b_q_token, b_lse, mask=m_q)


@triton.jit
def normalise(b_acc, b_high, b_total):
    """(out, lse in natural log); 0 and -inf for a row that saw nothing."""
    m_empty = b_total == 0
    b_divisor = tl.where(m_empty, 1.0, b_total)
    b_lse = (b_high + tl.math.log2(b_divisor)) * LN2
    return b_acc / b_divisor[:, None], tl.where(m_empty, float("-inf"), b_lse)


@triton.jit(do_not_specialize=["num_q_heads", "num_q_tokens", "num_tiles"])
def finish_kernel(
    p_acc,
    p_high,
    p_total,
    p_out,
    p_lse,
    out_strides,
    num_q_heads,
    num_q_tokens,
    num_tiles,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """State of all parts -> out and lse, in token order."""
    i_program = tl.program_id(0)
    i_head = i_program // num_tiles
    b_token = (i_program % num_tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_token = b_token < num_q_tokens
    o_row = i_head.to(tl.int64) * num_q_tokens
    b_acc = load_rows(p_acc + o_row * DV, b_token, m_token, DV, DV, BLOCK_DV)
    b_high = tl.load(p_high + o_row + b_token, mask=m_token, other=float("-inf"))
    b_total = tl.load(p_total + o_row + b_token, mask=m_token, other=0.0)
    b_out, b_lse = normalise(b_acc, b_high, b_total)
    p_out = head_base(p_out, i_head // num_q_heads, i_head % num_q_heads, out_strides)
    store_rows(p_out, b_token, m_token, out_strides[2], b_out, DV, BLOCK_DV)
    tl.store(p_lse + o_row + b_token, b_lse, mask=m_token)
