"""Backward of attention from region to region: dQ along the graph, dK and dV against it.

Cells outside the map, counted or not, have keys and values of zeros: no gradient passes by them.
"""

import triton
import triton.language as tl
from permattn.triton_kernels.bwd import LOG2E
from permattn.triton_kernels.regions_map import (
    cell_offsets,
    cell_tokens,
    graph_row,
    listed_cells,
    load_cells,
    map_base,
    region_cells,
    store_cells,
)
from permattn.triton_kernels.token_rule import dot_rows


@triton.jit(
    do_not_specialize=[
        "num_heads",
        "num_q_regions",
        "num_kv_regions",
        "topk",
        "q_frames",
        "q_height",
        "q_width",
        "kv_frames",
        "kv_height",
        "kv_width",
    ]
)
def region_dq_kernel(
    p_q,
    p_k,
    p_v,
    p_out,
    p_dout,
    p_lse,
    p_dlse,
    p_delta,
    p_dq,
    p_dweights,
    p_graph,
    p_weights,
    q_strides,
    k_strides,
    v_strides,
    out_strides,
    dout_strides,
    dq_strides,
    graph_rows,
    weight_rows,
    num_heads,
    num_q_regions,
    num_kv_regions,
    topk,
    q_frames,
    q_height,
    q_width,
    kv_frames,
    kv_height,
    kv_width,
    scale,
    qk_scale,
    Q_BOX: tl.constexpr,
    KV_BOX: tl.constexpr,
    SPAN: tl.constexpr,
    IMAGE: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """dQ of one query tile of one region and head; arguments as in `region_fwd_kernel`.

    Args:
        p_lse, p_dlse: float32 [B, M, T, H, W], contiguous.
        p_delta: the same, written: sum(out * dout) - dlse, what the softmax subtracts from dP.
        p_dweights: float32 [B, M, q regions, tiles, topk], written; None without weights. Then no
            tile of keys straddles two regions.
    """
    CELLS: tl.constexpr = Q_BOX[0] * Q_BOX[1] * Q_BOX[2]
    KV_CELLS: tl.constexpr = KV_BOX[0] * KV_BOX[1] * KV_BOX[2]
    NUM_TILES: tl.constexpr = (CELLS + BLOCK_M - 1) // BLOCK_M
    q_size, kv_size = (q_frames, q_height, q_width), (kv_frames, kv_height, kv_width)
    i_program = tl.program_id(0)
    i_tile = i_program % NUM_TILES
    i_h = i_program // NUM_TILES % num_heads
    i_row = i_program // NUM_TILES // num_heads
    i_b, i_region = i_row // num_q_regions, i_row % num_q_regions

    o_cell = i_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    q_cell, m_inside = region_cells(i_region, o_cell, q_size, Q_BOX, IMAGE)
    m_inside = m_inside & (o_cell < CELLS)
    i_head = (i_b * num_heads + i_h).to(tl.int64)
    o_token = i_head * (q_frames * q_height * q_width) + cell_tokens(q_cell, q_size)
    b_lse = tl.load(p_lse + o_token, mask=m_inside, other=float("-inf"))
    # Rows that saw no key have no gradient, and are not read.
    m_q = m_inside & (b_lse != float("-inf"))
    b_lse = tl.where(m_q, b_lse * LOG2E, 0.0)
    p_out = map_base(p_out, i_b, i_h, out_strides)
    p_dout = map_base(p_dout, i_b, i_h, dout_strides)
    b_out = load_cells(p_out, cell_offsets(q_cell, out_strides), m_q, out_strides, DV, BLOCK_DV)
    b_offset = cell_offsets(q_cell, dout_strides)
    b_dout = load_cells(p_dout, b_offset, m_q, dout_strides, DV, BLOCK_DV)
    b_delta = tl.sum(b_out.to(tl.float32) * b_dout.to(tl.float32), 1)
    b_delta -= tl.load(p_dlse + o_token, mask=m_q, other=0.0)
    tl.store(p_delta + o_token, b_delta, mask=m_inside)

    p_q = map_base(p_q, i_b, i_h, q_strides)
    p_k = map_base(p_k, i_b, i_h, k_strides)
    p_v = map_base(p_v, i_b, i_h, v_strides)
    p_row = graph_row(p_graph, i_b, i_h, i_region, graph_rows, num_q_regions, topk)
    if p_weights is not None:
        p_weights = graph_row(p_weights, i_b, i_h, i_region, weight_rows, num_q_regions, topk)
        p_dweights += ((i_head * num_q_regions + i_region) * NUM_TILES + i_tile) * topk
    b_q = load_cells(p_q, cell_offsets(q_cell, q_strides), m_q, q_strides, D, BLOCK_D)
    b_dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    b_sum = tl.zeros([BLOCK_N], tl.float32)
    num_lanes = topk * SPAN
    for i_lane in tl.range(0, num_lanes, BLOCK_N):
        b_place, b_region, o_kv_cell, m_named = listed_cells(
            p_row, i_lane, num_lanes, num_kv_regions, KV_CELLS, SPAN, BLOCK_N
        )
        kv_cell, m_held = region_cells(b_region, o_kv_cell, kv_size, KV_BOX, IMAGE)
        m_kv = m_named & m_held
        b_k = load_cells(p_k, cell_offsets(kv_cell, k_strides), m_kv, k_strides, D, BLOCK_D)
        b_v = load_cells(p_v, cell_offsets(kv_cell, v_strides), m_kv, v_strides, DV, BLOCK_DV)
        b_dot = dot_rows(b_q, b_k)
        b_dp = dot_rows(b_dout, b_v)
        m_pair = m_q[:, None] & m_kv[None, :]
        if p_weights is None:
            b_p = tl.where(m_pair, tl.math.exp2(b_dot * qk_scale - b_lse[:, None]), 0.0)
            b_ds = b_p * (b_dp - b_delta[:, None])
        else:
            weight = tl.load(p_weights + b_place)
            b_score = b_dot * (qk_scale * weight)
            b_p = tl.where(m_pair, tl.math.exp2(b_score - b_lse[:, None]), 0.0)
            b_ds = b_p * (b_dp * weight - b_delta[:, None])
            b_sum = tl.where(i_lane % SPAN == 0, 0.0, b_sum)
            b_sum += tl.sum(b_ds * b_dot * scale + b_p * b_dp, 0)
            tl.store(p_dweights + b_place, tl.sum(b_sum, 0))
            # Of a place that names no region, the weight may be anything.
            b_ds = tl.where(m_pair, b_ds * weight, 0.0)
        b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision="ieee")

    p_dq = map_base(p_dq, i_b, i_h, dq_strides)
    b_offset = cell_offsets(q_cell, dq_strides)
    store_cells(p_dq, b_offset, m_inside, dq_strides, b_dq * scale, D, BLOCK_D)


@triton.jit(
    do_not_specialize=[
        "num_heads",
        "num_q_regions",
        "num_kv_regions",
        "topk",
        "q_frames",
        "q_height",
        "q_width",
        "kv_frames",
        "kv_height",
        "kv_width",
    ]
)
def region_dkdv_kernel(
    p_q,
    p_k,
    p_v,
    p_dout,
    p_lse,
    p_delta,
    p_dk,
    p_dv,
    p_offsets,
    p_entries,
    p_weights,
    q_strides,
    k_strides,
    v_strides,
    dout_strides,
    dk_strides,
    dv_strides,
    graph_rows,
    weight_rows,
    num_heads,
    num_q_regions,
    num_kv_regions,
    topk,
    q_frames,
    q_height,
    q_width,
    kv_frames,
    kv_height,
    kv_width,
    scale,
    qk_scale,
    Q_BOX: tl.constexpr,
    KV_BOX: tl.constexpr,
    SPAN: tl.constexpr,
    IMAGE: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """dK and dV of one key tile of one region and head; zeros where nobody looks.

    Args:
        p_offsets, p_entries: `core.regions.reverse_graph`, [Bx, Hx, kv regions + 1] and [Bx, Hx, q
            regions * topk]; `graph_rows` of both.
        BLOCK_M, BLOCK_N: keys that stay, queries that stream past in ascending order of regions.
    """
    CELLS: tl.constexpr = Q_BOX[0] * Q_BOX[1] * Q_BOX[2]
    KV_CELLS: tl.constexpr = KV_BOX[0] * KV_BOX[1] * KV_BOX[2]
    NUM_TILES: tl.constexpr = (KV_CELLS + BLOCK_M - 1) // BLOCK_M
    q_size, kv_size = (q_frames, q_height, q_width), (kv_frames, kv_height, kv_width)
    i_program = tl.program_id(0)
    i_tile = i_program % NUM_TILES
    i_h = i_program // NUM_TILES % num_heads
    i_row = i_program // NUM_TILES // num_heads
    i_b, i_region = i_row // num_kv_regions, i_row % num_kv_regions

    o_kv_cell = i_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    kv_cell, m_kv = region_cells(i_region, o_kv_cell, kv_size, KV_BOX, IMAGE)
    m_kv = m_kv & (o_kv_cell < KV_CELLS)
    p_k = map_base(p_k, i_b, i_h, k_strides)
    p_v = map_base(p_v, i_b, i_h, v_strides)
    b_k = load_cells(p_k, cell_offsets(kv_cell, k_strides), m_kv, k_strides, D, BLOCK_D)
    b_v = load_cells(p_v, cell_offsets(kv_cell, v_strides), m_kv, v_strides, DV, BLOCK_DV)
    b_dk = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    b_dv = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)

    p_q = map_base(p_q, i_b, i_h, q_strides)
    p_dout = map_base(p_dout, i_b, i_h, dout_strides)
    o_head = (i_b * num_heads + i_h).to(tl.int64) * (q_frames * q_height * q_width)
    i_list = (i_b * graph_rows[0] + i_h * graph_rows[1]).to(tl.int64)
    p_offsets += i_list * (num_kv_regions + 1) + i_region
    num_places = num_q_regions * topk
    i_first, i_end = tl.load(p_offsets), tl.load(p_offsets + 1)
    p_entries += i_list * num_places + i_first
    if p_weights is not None:
        p_weights = graph_row(p_weights, i_b, i_h, 0, weight_rows, num_q_regions, topk)
    num_lanes = (i_end - i_first) * SPAN
    for i_lane in tl.range(0, num_lanes, BLOCK_N):
        _, b_entry, o_cell, m_named = listed_cells(
            p_entries, i_lane, num_lanes, num_places, CELLS, SPAN, BLOCK_N
        )
        q_cell, m_held = region_cells(b_entry // topk, o_cell, q_size, Q_BOX, IMAGE)
        m_q = m_named & m_held
        o_token = o_head + cell_tokens(q_cell, q_size)
        b_lse = tl.load(p_lse + o_token, mask=m_q, other=float("-inf"))
        m_q = m_q & (b_lse != float("-inf"))
        b_lse = tl.where(m_q, b_lse * LOG2E, 0.0)
        b_delta = tl.load(p_delta + o_token, mask=m_q, other=0.0)
        b_q = load_cells(p_q, cell_offsets(q_cell, q_strides), m_q, q_strides, D, BLOCK_D)
        b_offset = cell_offsets(q_cell, dout_strides)
        b_dout = load_cells(p_dout, b_offset, m_q, dout_strides, DV, BLOCK_DV)
        b_score = dot_rows(b_k, b_q) * qk_scale
        b_dp = dot_rows(b_v, b_dout)
        if p_weights is None:
            b_p = tl.where(m_q[None, :], tl.math.exp2(b_score - b_lse[None, :]), 0.0)
            b_ds = b_p * (b_dp - b_delta[None, :])
        else:
            b_weight = tl.load(p_weights + b_entry + tl.zeros_like(o_cell), mask=m_q, other=0.0)
            b_score = b_score * b_weight[None, :]
            b_p = tl.where(m_q[None, :], tl.math.exp2(b_score - b_lse[None, :]), 0.0)
            b_ds = b_p * (b_dp * b_weight[None, :] - b_delta[None, :]) * b_weight[None, :]
            b_p = b_p * b_weight[None, :]
        b_dv = tl.dot(b_p.to(b_dout.dtype), b_dout, b_dv, input_precision="ieee")
        b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision="ieee")

    p_dk = map_base(p_dk, i_b, i_h, dk_strides)
    p_dv = map_base(p_dv, i_b, i_h, dv_strides)
    b_offset = cell_offsets(kv_cell, dk_strides)
    store_cells(p_dk, b_offset, m_kv, dk_strides, b_dk * scale, D, BLOCK_D)
    b_offset = cell_offsets(kv_cell, dv_strides)
    store_cells(p_dv, b_offset, m_kv, dv_strides, b_dv, DV, BLOCK_DV)
