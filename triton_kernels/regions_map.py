"""Where the tokens of regions lie: closed forms, shared by every kernel over regions.

Source: `core.regions.RegionGrid`. A map is [B, M, T, H, W, D] with six strides of any kind; `size`
is (T, H, W) and BOX the cells of a region per axis. Nothing of a map's size enters the code.
"""

import triton
import triton.language as tl


@triton.jit
def region_cells(b_region, o_cell, size, BOX: tl.constexpr, IMAGE: tl.constexpr):
    """(frame, row, column) of cells of regions that exist, and which of them the map holds.

    Cells count in raster order; a box at the far edge may hang over.

    Args:
        b_region, o_cell: scalars or [TILE]; a cell past the box must be masked by the caller.
        IMAGE: the map has one frame.
    """
    num_down = (size[1] + BOX[1] - 1) // BOX[1]
    num_across = (size[2] + BOX[2] - 1) // BOX[2]
    b_y = b_region // num_across
    b_x = (b_region - b_y * num_across) * BOX[2] + o_cell % BOX[2]
    if IMAGE:
        b_t = tl.zeros_like(b_x)
        b_y = b_y * BOX[1] + o_cell // BOX[2]
        m_inside = (b_y < size[1]) & (b_x < size[2])
    else:
        b_t = b_y // num_down
        b_y = (b_y - b_t * num_down) * BOX[1] + o_cell // BOX[2] % BOX[1]
        b_t = b_t * BOX[0] + o_cell // (BOX[2] * BOX[1])
        m_inside = (b_t < size[0]) & (b_y < size[1]) & (b_x < size[2])
    return (b_t, b_y, b_x), m_inside


@triton.jit
def cell_tokens(cell, size):
    """Numbers of cells in raster order of the whole map."""
    return (cell[0] * size[1] + cell[1]) * size[2] + cell[2]


@triton.jit
def cell_offsets(cell, strides):
    """Elements from the first cell of a map's batch row and head."""
    b_offset = cell[1].to(tl.int64) * strides[3] + cell[2].to(tl.int64) * strides[4]
    return b_offset + cell[0].to(tl.int64) * strides[2]


@triton.jit
def map_base(p_map, i_b, i_h, strides):
    """Address of the first cell of a batch row and head."""
    return p_map + i_b.to(tl.int64) * strides[0] + i_h.to(tl.int64) * strides[1]


@triton.jit
def _row_pointers(p_base, b_offset, m_row, strides, D: tl.constexpr, BLOCK_D: tl.constexpr):
    o_d = tl.arange(0, BLOCK_D)
    p_rows = p_base + b_offset[:, None] + o_d.to(tl.int64)[None, :] * strides[5]
    m_rows = m_row[:, None]
    if D != BLOCK_D:
        m_rows = m_rows & (o_d < D)[None, :]
    return p_rows, m_rows


@triton.jit
def load_cells(p_base, b_offset, m_row, strides, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """[TILE, BLOCK_D] rows of cells; zeros where the mask or the padding of D says so."""
    p_rows, m_rows = _row_pointers(p_base, b_offset, m_row, strides, D, BLOCK_D)
    return tl.load(p_rows, mask=m_rows, other=0.0)


@triton.jit
def store_cells(p_base, b_offset, m_row, strides, b_value, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Writes [TILE, BLOCK_D] rows of cells, in the dtype of the target."""
    p_rows, m_rows = _row_pointers(p_base, b_offset, m_row, strides, D, BLOCK_D)
    tl.store(p_rows, b_value.to(p_base.dtype.element_ty), mask=m_rows)


@triton.jit
def graph_row(p_graph, i_b, i_h, i_region, rows, num_regions, topk):
    """Address of a region's row in a contiguous [Bx, Hx, regions, topk]; `rows` of `plan_rows`."""
    i_row = (i_b * rows[0] + i_h * rows[1]).to(tl.int64) * num_regions + i_region
    return p_graph + i_row * topk


@triton.jit
def listed_cells(
    p_row, i_lane, num_lanes, num_named, CELLS: tl.constexpr, SPAN: tl.constexpr, TILE: tl.constexpr
):
    """TILE consecutive lanes of a row of numbers: lane j is cell j % SPAN of place j // SPAN.

    So a tile may be a part of a region, hold many regions, or straddle them.

    Args:
        num_named: numbers from 0 to below it name something; others are hidden, never followed.
        SPAN: lanes of a place: CELLS, or a multiple of TILE that holds CELLS.

    Returns: (place, number, cell, mask); the first two are scalars where SPAN % TILE == 0.
    """
    if SPAN % TILE == 0:
        b_place = i_lane // SPAN
        o_cell = i_lane % SPAN + tl.arange(0, TILE)
        b_number = tl.load(p_row + b_place)
        m_lane = o_cell < CELLS
    else:
        o_lane = i_lane + tl.arange(0, TILE)
        m_lane = o_lane < num_lanes
        b_place = o_lane // SPAN
        o_cell = o_lane % SPAN
        b_number = tl.load(p_row + b_place, mask=m_lane, other=-1)
    m_named = (b_number >= 0) & (b_number < num_named)
    return b_place, tl.where(m_named, b_number, 0), o_cell, m_lane & m_named
