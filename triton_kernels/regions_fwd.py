"""Forward of attention from region to region: no permuted copy, nothing gathered."""

import triton
import triton.language as tl
from permattn.triton_kernels.fwd import normalise
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
def region_fwd_kernel(
    p_q,
    p_k,
    p_v,
    p_out,
    p_lse,
    p_graph,
    p_weights,
    q_strides,
    k_strides,
    v_strides,
    out_strides,
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
    qk_scale,
    Q_BOX: tl.constexpr,
    KV_BOX: tl.constexpr,
    SPAN: tl.constexpr,
    IMAGE: tl.constexpr,
    COUNT_PADDING: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """One query tile of one region and head, over the cells of the listed regions.

    Args:
        p_lse: float32 [B, M, T, H, W], contiguous.
        p_graph: int32 [Bx, Hx, q regions, topk]; p_weights: the same in float32, or None.
        graph_rows, weight_rows: their `plan_rows`.
        qk_scale: of scores in base 2.
        SPAN: see `listed_cells`.
        IMAGE: neither map has more than one frame.
        COUNT_PADDING: cells outside the key map are keys and values of zeros.
    """
    CELLS: tl.constexpr = Q_BOX[0] * Q_BOX[1] * Q_BOX[2]
    KV_CELLS: tl.constexpr = KV_BOX[0] * KV_BOX[1] * KV_BOX[2]
    NUM_TILES: tl.constexpr = (CELLS + BLOCK_M - 1) // BLOCK_M
    q_size, kv_size = (q_frames, q_height, q_width), (kv_frames, kv_height, kv_width)
    # Heads of a region are neighbours: they read the two halves of one line of memory.
    i_program = tl.program_id(0)
    i_tile = i_program % NUM_TILES
    i_h = i_program // NUM_TILES % num_heads
    i_row = i_program // NUM_TILES // num_heads
    i_b, i_region = i_row // num_q_regions, i_row % num_q_regions

    o_cell = i_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    q_cell, m_inside = region_cells(i_region, o_cell, q_size, Q_BOX, IMAGE)
    m_q = m_inside & (o_cell < CELLS)
    p_q = map_base(p_q, i_b, i_h, q_strides)
    p_k = map_base(p_k, i_b, i_h, k_strides)
    p_v = map_base(p_v, i_b, i_h, v_strides)
    p_row = graph_row(p_graph, i_b, i_h, i_region, graph_rows, num_q_regions, topk)
    if p_weights is not None:
        p_weights = graph_row(p_weights, i_b, i_h, i_region, weight_rows, num_q_regions, topk)
    b_q = load_cells(p_q, cell_offsets(q_cell, q_strides), m_q, q_strides, D, BLOCK_D)

    b_acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    b_high = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_total = tl.zeros([BLOCK_M], tl.float32)
    num_lanes = topk * SPAN
    for i_lane in tl.range(0, num_lanes, BLOCK_N):
        b_place, b_region, o_kv_cell, m_named = listed_cells(
            p_row, i_lane, num_lanes, num_kv_regions, KV_CELLS, SPAN, BLOCK_N
        )
        kv_cell, m_held = region_cells(b_region, o_kv_cell, kv_size, KV_BOX, IMAGE)
        m_kv = m_named & m_held
        m_seen = m_named if COUNT_PADDING else m_kv
        b_k = load_cells(p_k, cell_offsets(kv_cell, k_strides), m_kv, k_strides, D, BLOCK_D)
        b_score = dot_rows(b_q, b_k) * qk_scale
        if p_weights is not None:
            b_weight = tl.load(p_weights + b_place + tl.zeros_like(o_kv_cell), mask=m_seen, other=0)
            b_score = b_score * b_weight[None, :]
        b_score = tl.where(m_seen[None, :], b_score, float("-inf"))
        b_now = tl.maximum(b_high, tl.max(b_score, 1))
        # A row that has seen nothing keeps -inf, and -inf - -inf must not become NaN.
        b_safe = tl.where(b_now == float("-inf"), 0.0, b_now)
        b_shrink = tl.math.exp2(b_high - b_safe)
        b_p = tl.math.exp2(b_score - b_safe[:, None])
        b_total = b_total * b_shrink + tl.sum(b_p, 1)
        if p_weights is not None:
            b_p = b_p * b_weight[None, :]
        b_v = load_cells(p_v, cell_offsets(kv_cell, v_strides), m_kv, v_strides, DV, BLOCK_DV)
        b_acc = b_acc * b_shrink[:, None]
        b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc, input_precision="ieee")
        b_high = b_now

    b_out, b_lse = normalise(b_acc, b_high, b_total)
    p_out = map_base(p_out, i_b, i_h, out_strides)
    b_offset = cell_offsets(q_cell, out_strides)
    store_cells(p_out, b_offset, m_q, out_strides, b_out, DV, BLOCK_DV)
    o_lse = (i_b * num_heads + i_h).to(tl.int64) * (q_frames * q_height * q_width)
    tl.store(p_lse + o_lse + cell_tokens(q_cell, q_size), b_lse, mask=m_q)
