"""The token rule on the device, and every address that follows from a plan.

Source: `core.plan.TokenBand`; twins in backends/reference.py and csrc/common/token_rule.h.
"""

import triton
import triton.language as tl


@triton.jit
def token_is_visible(
    b_q_token,
    b_kv_token,
    m_q,
    m_kv,
    min_lag,
    max_lag,
    HAS_MIN: tl.constexpr,
    HAS_MAX: tl.constexpr,
):
    """Whether query tokens (first axis) see key tokens (second axis).

    Args: tokens and masks broadcast to one [rows, columns] shape; the masks say which are no holes.
    """
    m_visible = m_q & m_kv
    if HAS_MIN or HAS_MAX:
        b_lag = b_q_token - b_kv_token
        if HAS_MIN:
            m_visible = m_visible & (b_lag >= min_lag)
        if HAS_MAX:
            m_visible = m_visible & (b_lag < max_lag)
    return m_visible


@triton.jit
def token_range(b_token, m_token):
    """Lowest and highest token of a tile, for `row_is_seen`; lowest > highest when it has none."""
    return tl.min(tl.where(m_token, b_token, 1 << 30)), tl.max(tl.where(m_token, b_token, -1))


@triton.jit
def row_is_seen(
    m_visible,
    b_kv_token,
    m_kv,
    q_low,
    q_high,
    min_lag,
    max_lag,
    HAS_MIN: tl.constexpr,
    HAS_MAX: tl.constexpr,
    IN_ORDER: tl.constexpr,
):
    """Which key rows some query of the tile sees. The others must not be read: 0 * NaN is NaN.

    One bound needs only the tile's lowest or highest token, and so do both where its tokens follow
    each other. Only two bounds over queries out of order need a look at every pair, which costs
    registers.
    """
    if HAS_MIN and HAS_MAX and not IN_ORDER:
        return tl.max(m_visible.to(tl.int32), 0) > 0
    m_seen = m_kv
    if HAS_MIN:
        m_seen = m_seen & (q_high - b_kv_token >= min_lag)
    if HAS_MAX:
        m_seen = m_seen & (q_low - b_kv_token < max_lag)
    return m_seen


@triton.jit
def from_odd(x):
    """The integer that `launch.odd` packed."""
    return (x - 1) // 2


@triton.jit
def head_row(i_b, i_h, rows):
    """Which row of a [Bx, Hx, n] plan tensor serves a batch row and head; see `plan_rows`."""
    return (i_b * rows[0] + i_h * rows[1]).to(tl.int64)


@triton.jit
def tile_slots(i_tile, num_slots, UNIT: tl.constexpr, TILE: tl.constexpr):
    """First slot of a tile, its TILE slots, and which of them are its own.

    Slots fall into units (blocks of the pattern), units into tiles: a tile never crosses a unit.
    """
    TILES_PER_UNIT: tl.constexpr = (UNIT + TILE - 1) // TILE
    i_in_unit = i_tile % TILES_PER_UNIT
    i_first = (i_tile // TILES_PER_UNIT) * UNIT + i_in_unit * TILE
    o_slot = i_first + tl.arange(0, TILE)
    m_slot = o_slot < num_slots
    if UNIT % TILE != 0:
        m_slot = m_slot & (i_in_unit * TILE + tl.arange(0, TILE) < UNIT)
    return i_first, o_slot, m_slot


@triton.jit
def load_tokens(p_token, o_slot, m_slot, num_tokens, IDENTITY: tl.constexpr):
    """Tokens of slots, and which of them exist: no holes, no numbers of an unchecked plan."""
    if IDENTITY:
        b_token = o_slot
        m_token = m_slot & (o_slot < num_tokens)
    else:
        b_token = tl.load(p_token + o_slot, mask=m_slot, other=-1)
        m_token = (b_token >= 0) & (b_token < num_tokens)
    return b_token, m_token


@triton.jit
def load_list(p_row_offsets, p_num_full, i_row, capacity):
    """Where a row's entries begin, how many are full and how many partial; sane on any plan."""
    i_begin = tl.load(p_row_offsets + i_row)
    i_end = tl.load(p_row_offsets + i_row + 1)
    num_full = tl.load(p_num_full + i_row)
    i_begin = tl.minimum(tl.maximum(i_begin, 0), capacity)
    i_end = tl.minimum(tl.maximum(i_end, i_begin), capacity)
    num_full = tl.minimum(tl.maximum(num_full, 0), i_end - i_begin)
    return i_begin, num_full, i_end - i_begin - num_full


@triton.jit
def lane_slots(p_entry, i_lane, num_lanes, num_slots, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """Slots of TILE consecutive lanes of a list, where lane j means slot j % BLOCK of entry j //
    BLOCK.

    So a tile may be part of a block, or hold many blocks, or straddle them: blocks carry the
        meaning,
    tiles the speed.
    """
    num_blocks = (num_slots + BLOCK - 1) // BLOCK
    if BLOCK % TILE == 0:
        b_block = tl.load(p_entry + i_lane // BLOCK)
        b_inside = i_lane % BLOCK + tl.arange(0, TILE)
        m_lane = tl.full([TILE], True, tl.int1)
    else:
        o_lane = i_lane + tl.arange(0, TILE)
        m_lane = o_lane < num_lanes
        b_block = tl.load(p_entry + o_lane // BLOCK, mask=m_lane, other=-1)
        b_inside = o_lane % BLOCK
    # A block number out of range (unchecked plans) is skipped; clamped, it cannot overflow either.
    m_block = (b_block >= 0) & (b_block < num_blocks)
    o_slot = tl.where(m_block, b_block, 0) * BLOCK + b_inside
    return o_slot, m_lane & m_block & (o_slot < num_slots)


@triton.jit
def load_rows(p_base, b_token, m_row, stride, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """[TILE, BLOCK_D] rows of tokens; zeros where the mask or the padding of D says so."""
    o_d = tl.arange(0, BLOCK_D)
    p_rows = p_base + b_token.to(tl.int64)[:, None] * stride + o_d[None, :]
    m = m_row[:, None]
    if D != BLOCK_D:
        m = m & (o_d < D)[None, :]
    return tl.load(p_rows, mask=m, other=0.0)


@triton.jit
def store_rows(p_base, b_token, m_row, stride, b_value, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Writes [TILE, BLOCK_D] values to the rows of tokens, in the dtype of the target."""
    o_d = tl.arange(0, BLOCK_D)
    p_rows = p_base + b_token.to(tl.int64)[:, None] * stride + o_d[None, :]
    m = m_row[:, None]
    if D != BLOCK_D:
        m = m & (o_d < D)[None, :]
    tl.store(p_rows, b_value.to(p_base.dtype.element_ty), mask=m)


@triton.jit
def dot_rows(b_x, b_y):
    """b_x b_y^T in float32.

    Without matrix instructions (float32 in full precision) a thread keeps whole rows of both sides
    in registers: wide rows are cut into pieces that fit, and the products of the pieces added.
    """
    PIECE: tl.constexpr = 64
    WIDTH: tl.constexpr = b_x.shape[1]
    if b_x.dtype == tl.float32 and WIDTH > 2 * PIECE:
        b_x_pieces = tl.reshape(b_x, (b_x.shape[0], WIDTH // PIECE, PIECE))
        b_y_pieces = tl.reshape(b_y, (b_y.shape[0], WIDTH // PIECE, PIECE))
        b_products = tl.dot(
            tl.permute(b_x_pieces, (1, 0, 2)),
            tl.permute(b_y_pieces, (1, 2, 0)),
            input_precision="ieee",
        )
        b_dot = tl.sum(b_products, 0)
    else:
        b_dot = tl.dot(b_x, tl.trans(b_y), input_precision="ieee")
    return b_dot


@triton.jit
def head_base(p_base, i_b, i_h, strides):
    """Address of token 0 of a batch row and head; strides (batch, head, token) in elements."""
    return p_base + i_b.to(tl.int64) * strides[0] + i_h.to(tl.int64) * strides[1]
