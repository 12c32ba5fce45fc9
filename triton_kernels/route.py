"""Routing: means of regions in one pass over the maps, affinities, and the best of every row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from permattn.triton_kernels import launch
from permattn.triton_kernels.config import MIN_TILE, next_power_of_2, padded_head_dim
from permattn.triton_kernels.regions_launch import Sizes, num_cells, num_regions
from permattn.triton_kernels.regions_map import cell_offsets, load_cells, map_base, region_cells
from torch import Tensor

# Key regions whose affinities a program keeps in registers, and elements it keeps in all.
MAX_KEY_REGIONS = 1024
MAX_ELEMENTS = 4096
# Cells that a program adds up in one step.
CELL_STEP = 32
# Channels that a product takes in one step.
CHANNEL_STEP = 16
LOW = tl.constexpr(-(2**63))


@triton.jit(do_not_specialize=["num_heads", "num_regions", "frames", "height", "width"])
def region_mean_kernel(
    p_x,
    p_mean,
    strides,
    num_heads,
    num_regions,
    frames,
    height,
    width,
    BOX: tl.constexpr,
    IMAGE: tl.constexpr,
    D: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Mean of one head's channels over the cells of one region that the map holds.

    Args:
        p_x: [B, M, T, H, W, D], any strides.
        p_mean: float32 [B, regions, M * D], contiguous.
    """
    CELLS: tl.constexpr = BOX[0] * BOX[1] * BOX[2]
    size = (frames, height, width)
    i_program = tl.program_id(0)
    i_h = i_program % num_heads
    i_row = i_program // num_heads
    i_b, i_region = i_row // num_regions, i_row % num_regions
    p_x = map_base(p_x, i_b, i_h, strides)
    b_sum = tl.zeros([BLOCK_D], tl.float32)
    b_held = tl.zeros([STEP], tl.int32)
    for i_cell in tl.range(0, CELLS, STEP):
        o_cell = i_cell + tl.arange(0, STEP)
        cell, m_cell = region_cells(i_region, o_cell, size, BOX, IMAGE)
        m_cell = m_cell & (o_cell < CELLS)
        b_x = load_cells(p_x, cell_offsets(cell, strides), m_cell, strides, D, BLOCK_D)
        b_sum += tl.sum(b_x.to(tl.float32), 0)
        b_held += m_cell.to(tl.int32)
    b_mean = b_sum / tl.sum(b_held, 0).to(tl.float32)
    o_d = tl.arange(0, BLOCK_D)
    p_mean += i_program.to(tl.int64) * D
    tl.store(p_mean + o_d, b_mean, mask=o_d < D)


@triton.jit
def sort_keys(b_x, b_column):
    """int64 that are ordered as torch sorts descending: values, NaN first; then lower columns."""
    # -0 becomes 0, and every NaN one NaN above infinity.
    b_x = tl.where(b_x == b_x, b_x + 0.0, float("nan"))
    b_bits = b_x.to(tl.int32, bitcast=True)
    b_bits = tl.where(b_x == b_x, b_bits, 0x7FC00000)
    b_bits = tl.where(b_bits < 0, b_bits ^ 0x7FFFFFFF, b_bits)
    return (b_bits.to(tl.int64) << 32) | (0x7FFFFFFF - b_column).to(tl.int64)


@triton.jit
def value_of_key(b_key):
    b_bits = (b_key >> 32).to(tl.int32)
    b_bits = tl.where(b_bits < 0, b_bits ^ 0x7FFFFFFF, b_bits)
    return b_bits.to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["num_q_regions", "num_kv_regions", "num_tiles", "topk"])
def route_kernel(
    p_mean_q,
    p_mean_k,
    p_graph,
    p_values,
    num_q_regions,
    num_kv_regions,
    num_tiles,
    num_channels,
    topk,
    scale,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
):
    """ROWS query regions against all key regions of a batch row, and the best `topk` of each.

    Args:
        p_mean_q, p_mean_k: float32 [B, q regions, C] and [B, kv regions, C], contiguous.
        p_graph, p_values: int32 and float32 [B, q regions, topk], contiguous.
    """
    i_program = tl.program_id(0)
    i_b = (i_program // num_tiles).to(tl.int64)
    o_row = i_program % num_tiles * ROWS + tl.arange(0, ROWS)
    o_column = tl.arange(0, COLUMNS)
    m_row, m_column = o_row < num_q_regions, o_column < num_kv_regions
    p_rows = p_mean_q + (i_b * num_q_regions + o_row)[:, None] * num_channels
    p_columns = p_mean_k + (i_b * num_kv_regions + o_column)[None, :] * num_channels
    b_affinity = tl.zeros([ROWS, COLUMNS], tl.float32)
    for i_channel in tl.range(0, num_channels, STEP):
        o_channel = i_channel + tl.arange(0, STEP)
        m_channel = o_channel < num_channels
        b_q = tl.load(
            p_rows + o_channel[None, :], mask=m_row[:, None] & m_channel[None, :], other=0.0
        )
        b_k = tl.load(
            p_columns + o_channel[:, None], mask=m_channel[:, None] & m_column[None, :], other=0.0
        )
        b_affinity = tl.dot(b_q, b_k, b_affinity, input_precision="ieee")
    b_key = sort_keys(b_affinity * scale, o_column[None, :] + tl.zeros([ROWS, 1], tl.int32))
    b_key = tl.where(m_column[None, :], b_key, LOW)
    o_place = (i_b * num_q_regions + o_row) * topk
    for i_place in tl.range(0, topk):
        b_best = tl.max(b_key, 1)
        b_key = tl.where(b_key == b_best[:, None], LOW, b_key)
        b_column = 0x7FFFFFFF - (b_best & 0x7FFFFFFF).to(tl.int32)
        tl.store(p_graph + o_place + i_place, b_column, mask=m_row)
        tl.store(p_values + o_place + i_place, value_of_key(b_best), mask=m_row)


def launch_region_mean(x: Tensor, box: Sizes) -> Tensor:
    """float32 [B, regions, M * D]: `core.regions.region_means` of a map [B, M, T, H, W, D]."""
    batch, heads, *size, dim = x.shape
    regions = num_regions(x, box)
    mean = torch.empty(batch, regions, heads * dim, dtype=torch.float32, device=x.device)
    step = min(CELL_STEP, next_power_of_2(num_cells(box)))
    if mean.numel():
        region_mean_kernel[(heads * regions * batch,)](
            *(x, mean, x.stride(), heads, regions, *size),
            BOX=box,
            IMAGE=size[0] == 1,
            D=dim,
            STEP=step,
            BLOCK_D=padded_head_dim(dim),
            num_warps=max(1, step * padded_head_dim(dim) // 1024),
        )
    return mean


def launch_route(mean_q: Tensor, mean_k: Tensor, topk: int, scale: float) -> tuple[Tensor, Tensor]:
    """(graph int32, values float32) [B, Rq, topk] of means [B, Rq, C] and [B, Rkv, C].

    Equal affinities: the lower number first. Up to MAX_KEY_REGIONS key regions.
    """
    batch, num_q_regions, num_channels = mean_q.shape
    num_kv_regions = mean_k.shape[1]
    columns = max(MIN_TILE, next_power_of_2(num_kv_regions))
    rows = min(MIN_TILE, MAX_ELEMENTS // columns)
    num_tiles = launch.ceil_div(num_q_regions, rows)
    graph = torch.empty(batch, num_q_regions, topk, dtype=torch.int32, device=mean_q.device)
    values = torch.empty_like(graph, dtype=torch.float32)
    if graph.numel():
        route_kernel[(num_tiles * batch,)](
            *(mean_q, mean_k, graph, values),
            *(num_q_regions, num_kv_regions, num_tiles, num_channels, topk, scale),
            ROWS=rows,
            COLUMNS=columns,
            STEP=CHANNEL_STEP,
            num_warps=4 if columns < 256 else 8,
            # Two steps of many key regions would not fit into shared memory.
            num_stages=2 if columns <= 256 else 1,
            maxnreg=255,
        )
    return graph, values
