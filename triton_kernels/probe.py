"""The online probe: two sweeps over the keys, summed along columns and diagonals.

A program takes one head and one split of the axis. What splits share (row sums, the lags that two
neighbours reach) goes through memory and is added by a second kernel in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from permattn.triton_kernels import launch
from permattn.triton_kernels.config import MIN_TILE, Config, next_power_of_2, padded_head_dim
from permattn.triton_kernels.token_rule import head_base, load_rows
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)
# Columns of a product without matrix instructions: the fewest that Triton takes.
PIECE = tl.constexpr(16)
LN2 = tl.constexpr(0.6931471805599453)
# Rows of one launch. Twice as many do not fit the registers; more rows are more launches.
MAX_ROWS = 64
# Coordinates per program: enough to hide the start of one, few enough to fill a device at 32k keys.
SPLIT = 1024
# Splits whose row sums are merged at a time.
MERGED = 32


def select_probe_config(num_rows: int, head_dim: int, element_size: int) -> Config:
    """A pure function of the facts; every choice compiles without spills (tests/triton/aot).

    Args:
        num_rows: 1..64.
        head_dim: 1..256.
        element_size: bytes: 2 or 4.

    Returns: a Config of block_m rows (all of them) and block_n >= block_m keys at a time.
    """
    block_m = max(MIN_TILE, next_power_of_2(num_rows))
    block_n = MAX_ROWS
    stages = 1 if element_size == 4 or head_dim > 128 else 2
    warps = 4 if block_m <= 32 else 8
    registers = 255 if element_size == 4 or head_dim > 128 else 168
    return Config(block_m, block_n, warps, stages, registers)


@triton.jit
def _load_keys(
    i_first,
    p_order,
    p_range,
    i_b,
    last,
    num_coordinates,
    num_keys,
    order_rows,
    HAS_ORDER: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Coordinates of a block, their keys, and which of them some row sees."""
    o_n = i_first + tl.arange(0, BLOCK_N)
    m_key = o_n < num_coordinates
    if HAS_ORDER:
        p_order += (i_b * order_rows).to(tl.int64) * num_coordinates
        b_key = tl.load(p_order + o_n, mask=m_key, other=-1)
    else:
        b_key = o_n
    i_begin = tl.maximum(tl.load(p_range + 2 * i_b), 0)
    i_end = tl.minimum(tl.load(p_range + 2 * i_b + 1), num_keys)
    return o_n, b_key, m_key & (b_key >= i_begin) & (b_key < i_end) & (b_key <= last)


@triton.jit
def _load_piece(p_base, b_row, m_piece, stride):
    """[rows, PIECE] of a tensor whose last stride is 1."""
    o_d = tl.arange(0, PIECE)
    return tl.load(p_base + b_row.to(tl.int64)[:, None] * stride + o_d[None, :], m_piece, 0.0)


@triton.jit
def _load_queries(p_q, o_m, m_row, stride, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """All rows, except in float32; see `_scores`."""
    if p_q.dtype.element_ty == tl.float32:
        b_q = m_row
    else:
        b_q = load_rows(p_q, o_m, m_row, stride, D, BLOCK_D)
    return b_q


@triton.jit
def _scores(
    b_q,
    p_q,
    p_k,
    b_key,
    m_key,
    b_position,
    m_row,
    q_stride,
    k_stride,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Scores of one block of keys in base 2; -inf where the row does not see the key.

    Without matrix instructions (float32 in full precision) a thread keeps whole rows of both sides
    in registers: they are read in pieces that fit, and b_q is not used.
    """
    if p_q.dtype.element_ty == tl.float32:
        b_score = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        o_m = tl.arange(0, BLOCK_M)
        for i_d in tl.range(0, D, PIECE, num_stages=1):
            m_d = (i_d + tl.arange(0, PIECE) < D)[None, :]
            b_x = _load_piece(p_q + i_d, o_m, m_row[:, None] & m_d, q_stride)
            b_y = _load_piece(p_k + i_d, b_key, m_key[:, None] & m_d, k_stride)
            b_score = tl.dot(b_x, tl.trans(b_y), b_score, input_precision="ieee")
    else:
        b_k = load_rows(p_k, b_key, m_key, k_stride, D, BLOCK_D)
        b_score = tl.dot(b_q, tl.trans(b_k))
    m_seen = m_row[:, None] & m_key[None, :] & (b_key[None, :] <= b_position[:, None])
    return tl.where(m_seen, b_score * LOG2E, float("-inf"))


@triton.jit(
    do_not_specialize=["num_q_heads", "num_splits", "num_rows", "num_coordinates", "num_keys"]
)
def probe_total_kernel(
    p_q,
    p_k,
    p_first,
    p_range,
    p_order,
    p_top,
    p_sum,
    q_strides,
    k_strides,
    num_q_heads,
    group,
    num_splits,
    num_rows,
    num_coordinates,
    num_keys,
    order_rows,
    HAS_ORDER: tl.constexpr,
    D: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """First sweep: largest score and sum of every row, over one split of the axis.

    Args:
        p_first: int32 [B], position of row 0; p_range: int32 [B, 2]; p_order: int32 [Bx, n].
        p_top, p_sum: float32 [B, Hq, splits, BLOCK_M]: base 2, relative to the largest.
    """
    i_h = tl.program_id(0) % num_q_heads
    i_split = tl.program_id(0) // num_q_heads % num_splits
    i_b = tl.program_id(0) // num_q_heads // num_splits
    o_m = tl.arange(0, BLOCK_M)
    i_position = tl.load(p_first + i_b)
    m_row = o_m < tl.where(i_position >= 0, num_rows, 0)
    p_q = head_base(p_q, i_b, i_h, q_strides)
    p_k = head_base(p_k, i_b, i_h // group, k_strides)
    b_q = _load_queries(p_q, o_m, m_row, q_strides[2], D, BLOCK_D)
    b_top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    i_end = tl.minimum((i_split + 1) * SPLIT, num_coordinates)
    if not HAS_ORDER:
        i_end = tl.minimum(i_end, i_position + num_rows)
    for i_first in tl.range(i_split * SPLIT, i_end, BLOCK_N):
        _, b_key, m_key = _load_keys(
            i_first,
            p_order,
            p_range,
            i_b,
            i_position + num_rows - 1,
            num_coordinates,
            num_keys,
            order_rows,
            HAS_ORDER,
            BLOCK_N,
        )
        b_score = _scores(
            b_q,
            p_q,
            p_k,
            b_key,
            m_key,
            i_position + o_m,
            m_row,
            q_strides[2],
            k_strides[2],
            D,
            BLOCK_M,
            BLOCK_N,
            BLOCK_D,
        )
        b_now = tl.maximum(b_top, tl.max(b_score, 1))
        # A row that has seen nothing keeps -inf, and -inf - -inf must not become NaN.
        b_safe = tl.where(b_now == float("-inf"), 0.0, b_now)
        b_p = tl.math.exp2(b_score - b_safe[:, None])
        b_sum = b_sum * tl.math.exp2(b_top - b_safe) + tl.sum(b_p, 1)
        b_top = b_now
    o_part = ((i_b * num_q_heads + i_h).to(tl.int64) * num_splits + i_split) * BLOCK_M
    tl.store(p_top + o_part + o_m, b_top)
    tl.store(p_sum + o_part + o_m, b_sum)


@triton.jit(do_not_specialize=["num_splits", "num_rows"])
def probe_lse_kernel(
    p_top,
    p_sum,
    p_lse,
    num_splits,
    num_rows,
    MERGED: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Row sums of all splits -> lse [B, Hq, R], natural log; one program per head."""
    i_head = tl.program_id(0)
    o_m = tl.arange(0, BLOCK_M)
    o_part = i_head.to(tl.int64) * num_splits * BLOCK_M
    b_top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    for i_first in tl.range(0, num_splits, MERGED):
        o_split = i_first + tl.arange(0, MERGED)
        o = o_part + o_split[:, None] * BLOCK_M + o_m[None, :]
        m_split = (o_split < num_splits)[:, None]
        b_tops = tl.load(p_top + o, mask=m_split, other=float("-inf"))
        b_sums = tl.load(p_sum + o, mask=m_split, other=0.0)
        b_now = tl.maximum(b_top, tl.max(b_tops, 0))
        b_safe = tl.where(b_now == float("-inf"), 0.0, b_now)
        b_sum = b_sum * tl.math.exp2(b_top - b_safe)
        b_sum += tl.sum(b_sums * tl.math.exp2(b_tops - b_safe[None, :]), 0)
        b_top = b_now
    m_empty = b_sum == 0
    b_lse = (b_top + tl.math.log2(tl.where(m_empty, 1.0, b_sum))) * LN2
    b_lse = tl.where(m_empty, float("-inf"), b_lse)
    tl.store(p_lse + i_head.to(tl.int64) * num_rows + o_m, b_lse, mask=o_m < num_rows)


@triton.jit
def _diagonals(b_p, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Diagonal sums of [BLOCK_M, BLOCK_N], BLOCK_N >= BLOCK_M, in two halves of BLOCK_N.

    Entry s of both together sums b_p[r, s - (BLOCK_M - 1 - r)]. Every row is turned by what it is
    shifted; what comes round belongs to the upper half.
    """
    o_m = tl.arange(0, BLOCK_M)[:, None]
    o_n = tl.arange(0, BLOCK_N)[None, :]
    b_turned = tl.gather(b_p, (o_n + o_m + (BLOCK_N + 1 - BLOCK_M)) % BLOCK_N, 1)
    m_low = o_n >= BLOCK_M - 1 - o_m
    return tl.sum(tl.where(m_low, b_turned, 0.0), 0), tl.sum(tl.where(m_low, 0.0, b_turned), 0)


@triton.jit(
    do_not_specialize=[
        "num_q_heads",
        "num_splits",
        "num_rows",
        "num_all_rows",
        "num_coordinates",
        "num_keys",
    ]
)
def probe_mass_kernel(
    p_q,
    p_k,
    p_first,
    p_coordinate,
    p_range,
    p_order,
    p_lse,
    p_skip,
    p_column,
    p_square,
    p_diagonal,
    p_edge,
    q_strides,
    k_strides,
    num_q_heads,
    group,
    num_splits,
    num_rows,
    num_all_rows,
    num_coordinates,
    num_keys,
    order_rows,
    HAS_ORDER: tl.constexpr,
    HAS_SKIP: tl.constexpr,
    D: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Second sweep: columns and diagonals of one split of the axis.

    Args:
        p_coordinate: int32 [B], coordinate of row 0; see `probe_total_kernel` for the rest.
        p_lse: float32 [B, Hq, R]; p_skip: uint8 [B, Hq, n].
        p_column, p_square, p_diagonal: float32 [B, Hq, n].
        p_edge: float32 [B, Hq, splits, BLOCK_N]: diagonals that go on in the next split.
    """
    i_h = tl.program_id(0) % num_q_heads
    i_split = tl.program_id(0) // num_q_heads % num_splits
    i_b = tl.program_id(0) // num_q_heads // num_splits
    o_m = tl.arange(0, BLOCK_M)
    i_position = tl.load(p_first + i_b)
    m_row = o_m < tl.where(i_position >= 0, num_rows, 0)
    p_q = head_base(p_q, i_b, i_h, q_strides)
    p_k = head_base(p_k, i_b, i_h // group, k_strides)
    b_q = _load_queries(p_q, o_m, m_row, q_strides[2], D, BLOCK_D)
    i_head = (i_b * num_q_heads + i_h).to(tl.int64)
    b_lse = tl.load(p_lse + i_head * num_rows + o_m, mask=m_row, other=float("-inf")) * LOG2E
    # A row that sees nothing: 2^(-inf - inf) is 0, where 2^(-inf - -inf) is NaN.
    b_lse = tl.where(b_lse == float("-inf"), float("inf"), b_lse)
    mean = 1.0 / num_all_rows
    o_out = i_head * num_coordinates
    i_last = tl.load(p_coordinate + i_b) + BLOCK_M - 1
    b_carry = tl.zeros([BLOCK_N], tl.float32)
    # One block past the last coordinate takes what the diagonals still carry.
    i_end = tl.minimum((i_split + 1) * SPLIT, num_coordinates + BLOCK_N)
    for i_first in tl.range(i_split * SPLIT, i_end, BLOCK_N):
        o_n, b_key, m_key = _load_keys(
            i_first,
            p_order,
            p_range,
            i_b,
            i_position + num_rows - 1,
            num_coordinates,
            num_keys,
            order_rows,
            HAS_ORDER,
            BLOCK_N,
        )
        b_score = _scores(
            b_q,
            p_q,
            p_k,
            b_key,
            m_key,
            i_position + o_m,
            m_row,
            q_strides[2],
            k_strides[2],
            D,
            BLOCK_M,
            BLOCK_N,
            BLOCK_D,
        )
        b_p = tl.math.exp2(b_score - b_lse[:, None])
        m_out = o_n < num_coordinates
        tl.store(p_column + o_out + o_n, tl.sum(b_p, 0) * mean, mask=m_out)
        tl.store(p_square + o_out + o_n, tl.sum(b_p * b_p, 0) * mean, mask=m_out)
        if HAS_SKIP:
            b_skip = tl.load(p_skip + o_out + o_n, mask=m_out, other=1)
            b_p = tl.where((b_skip == 0)[None, :], b_p, 0.0)
        b_low, b_high = _diagonals(b_p, BLOCK_M, BLOCK_N)
        o_lag = i_last - o_n
        m_lag = (o_lag >= 0) & (o_lag < num_coordinates)
        tl.store(p_diagonal + o_out + o_lag, (b_low + b_carry) * mean, mask=m_lag)
        b_carry = b_high
    o_edge = (i_head * num_splits + i_split) * BLOCK_N + tl.arange(0, BLOCK_N)
    tl.store(p_edge + o_edge, b_carry * mean)


@triton.jit(do_not_specialize=["num_q_heads", "num_splits", "num_coordinates"])
def probe_edge_kernel(
    p_edge,
    p_coordinate,
    p_diagonal,
    num_q_heads,
    num_splits,
    num_coordinates,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Adds what one split left to the lags of the next; no two programs share a lag."""
    i_split = tl.program_id(0) % num_splits
    i_head = tl.program_id(0) // num_splits
    o_n = tl.arange(0, BLOCK_N)
    b_edge = tl.load(p_edge + tl.program_id(0).to(tl.int64) * BLOCK_N + o_n)
    i_last = tl.load(p_coordinate + i_head // num_q_heads) + BLOCK_M - 1
    o_lag = i_last - ((i_split + 1) * SPLIT + o_n)
    # The last entry of a split's edge is empty: a diagonal has BLOCK_M places.
    m_lag = (o_lag >= 0) & (o_lag < num_coordinates) & (o_n < BLOCK_M - 1)
    p_lag = p_diagonal + i_head.to(tl.int64) * num_coordinates + o_lag
    tl.store(p_lag, tl.load(p_lag, mask=m_lag, other=0.0) + b_edge, mask=m_lag)


def launch_probe(
    q: Tensor,
    k: Tensor,
    first_position: Tensor,
    first_coordinate: Tensor,
    key_range: Tensor,
    order: Tensor | None,
    skip: Tensor | None,
    lse: Tensor | None,
    num_all_rows: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launches both sweeps over at most MAX_ROWS rows.

    Args:
        q: [B, Hq, R, D], scaled, last stride 1; k: [B, Hkv, Skv, D], last stride 1.
        first_position, first_coordinate: int32 [B]; key_range: int32 [B, 2]; order: int32
            [Bx, n]; skip: bool [B, Hq, n]; lse: float32 [B, Hq, R] or None: computed; all
            contiguous.
        num_all_rows: what sums are divided by.

    Returns: (lse, column, square, diagonal): float32 [B, Hq, R] and three times [B, Hq, n].
    """
    batch, heads, rows, dim = q.shape
    n = k.shape[2] if order is None else order.shape[1]

    def empty(*shape: int) -> Tensor:
        return torch.empty(batch, heads, *shape, dtype=torch.float32, device=q.device)

    # A lag that no coordinate reaches has no writer.
    column, square, diagonal = empty(n), empty(n), empty(n).zero_()
    splits = launch.ceil_div(n, SPLIT)
    if batch * splits == 0:
        return empty(rows).fill_(float("-inf")), column, square, diagonal
    config = select_probe_config(rows, dim, q.element_size())
    tiles = {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n}
    shape = {"D": dim, "SPLIT": SPLIT, **tiles, "BLOCK_D": padded_head_dim(dim)}
    options = {"HAS_ORDER": order is not None, **shape, **launch.launch_options(config)}
    strides = launch.strides(q), launch.strides(k)
    order_rows = int(order is not None and order.shape[0] > 1)
    axis = n, k.shape[2], order_rows
    grid = (batch * splits * heads,)
    if lse is None:
        lse, top, total = empty(rows), empty(splits, config.block_m), empty(splits, config.block_m)
        probe_total_kernel[grid](
            *(q, k, first_position, key_range, order, top, total),
            *(*strides, heads, heads // k.shape[1], splits, rows, *axis),
            **options,
        )
        probe_lse_kernel[(batch * heads,)](
            *(top, total, lse, splits, rows), MERGED=MERGED, BLOCK_M=config.block_m
        )
    edge = empty(splits, config.block_n)
    probe_mass_kernel[grid](
        *(q, k, first_position, first_coordinate, key_range, order, lse),
        *(None if skip is None else skip.view(torch.uint8), column, square, diagonal, edge),
        *(*strides, heads, heads // k.shape[1], splits, rows, num_all_rows, *axis),
        HAS_SKIP=skip is not None,
        **options,
    )
    probe_edge_kernel[grid](
        *(edge, first_coordinate, diagonal, heads, splits, n), SPLIT=SPLIT, **tiles, num_warps=1
    )
    return lse, column, square, diagonal
