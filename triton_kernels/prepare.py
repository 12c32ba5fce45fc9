"""Rows made ready in one pass: norm, rotary embedding, permutation, smoothing, quantisation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from permattn.triton_kernels import launch
from permattn.triton_kernels.config import next_power_of_2
from permattn.triton_kernels.rounding import e4m3_to_bits, round_to_e4m3, round_to_integer
from permattn.triton_kernels.token_rule import head_base, head_row, load_tokens
from torch import Tensor

# As core.quant has it: below it a group counts as zeros.
LEAST_MAXIMUM = tl.constexpr(1e-30)
HIGH = {"int8": 127.0, "int4": 7.0, "fp8": 448.0}
# Rows of a scale live in registers, all at once.
MAX_ROWS_PER_SCALE = 128
# Rows of a program where no scale binds them together; small groups are packed up to it.
ROW_TILE = 32
# Elements of a tile that one warp holds without spilling.
ELEMENTS_PER_WARP = 1024
# What int8 products of P < 0 leave out: P - 128 fits a signed byte.
P_OFFSET = tl.constexpr(128)


@dataclass(frozen=True, eq=False)
class Transform:
    """Norm and rotation of a row, field by field those of `core.prologue.RowTransform`."""

    norm: str
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    across_heads: bool
    cos: Tensor | None
    sin: Tensor | None
    rope_start: int
    interleaved: bool


NO_TRANSFORM = Transform("none", None, None, 0.0, False, None, None, 0, True)


@dataclass(frozen=True, eq=False)
class Rows:
    """What one launch does to x [B, H, S, D].

    Args:
        token_of_slot: int32 [Bx, Hx, n], contiguous; None = token order.
        num_heads: Hp, heads of the result: H, or a multiple of it.
        mean, factor: float32 [B, H, D], contiguous.
        fmt: "none", or a name of HIGH.
        tiles: write groups as [D, rows_per_scale] tiles, all of their rows, in place of rows.
        offsets: also make 128 * (sums of the values of a group, by column), int32.
        against: float32 [B, Hk, D], Hk divides Hp: also write the products of the transformed rows
            with it to `dots`, float32 [B, Hp, S], of the tokens that stand in a slot.
    """

    x: Tensor
    token_of_slot: Tensor | None
    num_heads: int
    transform: Transform = NO_TRANSFORM
    mean: Tensor | None = None
    factor: Tensor | None = None
    fmt: str = "none"
    rows_per_scale: int = ROW_TILE
    per_column: bool = False
    tiles: bool = False
    offsets: bool = False
    against: Tensor | None = None
    dots: Tensor | None = None

    @property
    def num_slots(self) -> int:
        return self.x.shape[2] if self.token_of_slot is None else self.token_of_slot.shape[-1]

    @property
    def num_groups(self) -> int:
        return launch.ceil_div(self.num_slots, self.rows_per_scale)


@dataclass(frozen=True, eq=False)
class Prepared:
    """Results of a launch; None where nothing was asked for.

    Args:
        rows: [B, Hp, n, D]; [B, Hp, groups, D, rows_per_scale] for tiles.
        scale: float32 [B, Hp, groups], or [B, Hp, groups, D] per column.
        offset: int32 [B, Hp, groups, D].
    """

    rows: Tensor
    scale: Tensor | None = None
    offset: Tensor | None = None


@triton.jit
def _load(p_rows, stride, b_token, o_d, m):
    return tl.load(p_rows + b_token.to(tl.int64) * stride + o_d, mask=m, other=0.0).to(tl.float32)


@triton.jit
def _normalised(b_x, b_mean, b_rstd, p_weight, p_bias, o_d, m_d, NORM: tl.constexpr):
    """Step by step as `RowTransform`; weight and bias are those of the columns o_d."""
    if NORM != "none":
        if NORM == "layer":
            b_x = b_x - b_mean
        b_x = b_x * b_rstd
        if p_weight is not None:
            b_x = b_x * tl.load(p_weight + o_d, mask=m_d, other=0.0).to(tl.float32)
        if p_bias is not None:
            b_x = b_x + tl.load(p_bias + o_d, mask=m_d, other=0.0).to(tl.float32)
    return b_x


@triton.jit
def _transformed(
    p_x,
    b_token,
    m_token,
    x_stride,
    statistics,
    p_weight,
    p_bias,
    p_cos,
    p_sin,
    rope_start,
    num_rotated,
    eps,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NORM: tl.constexpr,
    PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """[groups, rows, BLOCK_D] in float32: rows of tokens, normed and rotated; 0 where masked."""
    o_d = tl.arange(0, BLOCK_D)[None, None, :]
    m_d = o_d < D
    m = m_token & m_d
    b_x = _load(p_x, x_stride, b_token, o_d, m)
    b_mean, b_rstd = statistics
    if NORM != "none" and b_mean is None:
        b_centred = b_x
        if NORM == "layer":
            b_mean = tl.sum(b_x, 2, keep_dims=True) / D
            b_centred = tl.where(m_d, b_x - b_mean, 0.0)
        b_variance = tl.sum(b_centred * b_centred, 2, keep_dims=True) / D
        b_rstd = tl.math.div_rn(1.0, tl.math.sqrt_rn(b_variance + eps))
    b_y = _normalised(b_x, b_mean, b_rstd, p_weight, p_bias, o_d, m_d, NORM)
    if PAIRS > 0:
        m_rotated = m_token & (b_token >= rope_start) & (b_token - rope_start < num_rotated)
        m_rotated = m_rotated & (o_d < 2 * PAIRS)
        if INTERLEAVED:
            o_pair, o_partner, m_first = o_d // 2, o_d ^ 1, o_d % 2 == 0
        else:
            o_pair, m_first = o_d % PAIRS, o_d < PAIRS
            o_partner = tl.where(m_first, o_d + PAIRS, o_d - PAIRS)
        # The other column of a pair is read again: it is in the cache, and shuffles cost more.
        b_z = _load(p_x, x_stride, b_token, o_partner, m_rotated)
        m_partner = o_d < 2 * PAIRS
        b_z = _normalised(b_z, b_mean, b_rstd, p_weight, p_bias, o_partner, m_partner, NORM)
        o_angle = (b_token - rope_start).to(tl.int64) * PAIRS + o_pair
        b_cos = tl.load(p_cos + o_angle, mask=m_rotated, other=1.0)
        b_sin = tl.load(p_sin + o_angle, mask=m_rotated, other=0.0)
        b_turned = b_y * b_cos + tl.where(m_first, -b_z, b_z) * b_sin
        b_y = tl.where(m_rotated, b_turned, b_y)
    return tl.where(m, b_y, 0.0)


@triton.jit
def _quantised(b_x, HIGH: tl.constexpr, FORMAT: tl.constexpr, PER_COLUMN: tl.constexpr):
    """(values in float32, scale [groups, 1, D or 1]), to the last bit as `core.quant.quantise`."""
    b_high = tl.max(tl.abs(b_x), 1, keep_dims=True)
    # A maximum passes over NaN, which must not end as a number.
    m_bad = tl.max((b_x != b_x).to(tl.int32), 1, keep_dims=True)
    if not PER_COLUMN:
        b_high = tl.max(b_high, 2, keep_dims=True)
        m_bad = tl.max(m_bad, 2, keep_dims=True)
    m_zero = b_high < LEAST_MAXIMUM
    b_safe = tl.where(m_zero, 1.0, b_high)
    # The reciprocal is rounded before it is multiplied: so torch divides a number by a tensor.
    b_inverse = tl.where(m_zero, 0.0, tl.math.div_rn(1.0, b_safe) * HIGH)
    b_scale = tl.where(m_zero, 0.0, tl.math.div_rn(b_safe, HIGH))
    b_scale = tl.where(m_bad > 0, float("nan"), b_scale)
    b_value = b_x * b_inverse
    if FORMAT == "int8" or FORMAT == "int4":
        b_value = round_to_integer(b_value)
    elif FORMAT == "fp8_bits":
        b_value = round_to_e4m3(b_value)
    return b_value, b_scale


@triton.jit(
    do_not_specialize=[
        "num_heads",
        "group",
        "against_group",
        "num_tokens",
        "num_slots",
        "num_tiles",
        "rope_start",
        "num_rotated",
    ]
)
def prepare_kernel(
    p_x,
    p_rows,
    p_scale,
    p_offset,
    p_dots,
    p_token,
    p_mean,
    p_factor,
    p_against,
    p_weight,
    p_bias,
    p_cos,
    p_sin,
    p_row_mean,
    p_row_rstd,
    x_strides,
    token_rows,
    num_heads,
    group,
    against_group,
    num_tokens,
    num_slots,
    num_tiles,
    rope_start,
    num_rotated,
    eps,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    FORMAT: tl.constexpr,
    HIGH: tl.constexpr,
    PER_COLUMN: tl.constexpr,
    TILES: tl.constexpr,
    NORM: tl.constexpr,
    ACROSS_HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """GROUPS groups of ROWS slots of one head, as [GROUPS, BLOCK_ROWS, BLOCK_D].

    Args:
        p_rows, p_scale, p_offset, p_dots: see `Rows` and `Prepared`; None = not wanted.
        p_weight, p_bias: [D], or [H, D] across heads.
        p_row_mean, p_row_rstd: float32 [B, S], statistics across heads; None = made here.
        num_heads: Hp; `group` of them read one head of x, `against_group` one row of p_against.
        FORMAT: "none", "int8", "int4", "fp8", or "fp8_bits": bytes, where there is no such type.
    """
    i_program = tl.program_id(0)
    i_head = i_program // num_tiles
    i_b, i_h = i_head // num_heads, i_head % num_heads
    i_hx, num_x_heads = i_h // group, num_heads // group
    o_group = ((i_program % num_tiles) * GROUPS + tl.arange(0, GROUPS))[:, None, None]
    o_row = tl.arange(0, BLOCK_ROWS)[None, :, None]
    o_slot = o_group * ROWS + o_row
    m_slot = (o_row < ROWS) & (o_slot < num_slots)
    if p_token is None:
        b_token, m_token = load_tokens(p_token, o_slot, m_slot, num_tokens, True)
    else:
        p_token += head_row(i_b, i_h, token_rows) * num_slots
        b_token, m_token = load_tokens(p_token, o_slot, m_slot, num_tokens, False)

    o_d = tl.arange(0, BLOCK_D)[None, None, :]
    m_d = o_d < D
    statistics = (None, None)
    if ACROSS_HEADS:
        o_statistics = i_b.to(tl.int64) * num_tokens + b_token
        statistics = (
            tl.load(p_row_mean + o_statistics, mask=m_token, other=0.0),
            tl.load(p_row_rstd + o_statistics, mask=m_token, other=0.0),
        )
        if p_weight is not None:
            p_weight += i_hx * D
        if p_bias is not None:
            p_bias += i_hx * D
    b_x = _transformed(
        head_base(p_x, i_b, i_hx, x_strides),
        b_token,
        m_token,
        x_strides[2],
        statistics,
        p_weight,
        p_bias,
        p_cos,
        p_sin,
        rope_start,
        num_rotated,
        eps,
        D,
        BLOCK_D,
        NORM,
        PAIRS,
        INTERLEAVED,
    )
    if p_against is not None:
        o_against = (i_b * (num_heads // against_group) + i_h // against_group) * D
        b_against = tl.load(p_against + o_against + o_d, mask=m_d, other=0.0)
        b_dots = tl.sum(b_x * b_against, 2, keep_dims=True)
        tl.store(p_dots + i_head.to(tl.int64) * num_tokens + b_token, b_dots, mask=m_token)
    o_column = (i_b * num_x_heads + i_hx) * D + o_d
    if p_mean is not None:
        b_x = b_x - tl.load(p_mean + o_column, mask=m_d, other=0.0)
    if p_factor is not None:
        b_x = b_x * tl.load(p_factor + o_column, mask=m_d, other=0.0)

    m = m_token & m_d
    num_groups = (num_slots + ROWS - 1) // ROWS
    o_groups = i_head.to(tl.int64) * num_groups + o_group
    m_group = o_group < num_groups
    b_x = tl.where(m, b_x, 0.0)
    if FORMAT != "none":
        b_x, b_scale = _quantised(b_x, HIGH, FORMAT, PER_COLUMN)
        if PER_COLUMN:
            tl.store(p_scale + o_groups * D + o_d, b_scale, mask=m_group & m_d)
        else:
            tl.store(p_scale + o_groups, b_scale, mask=m_group)
    if p_offset is not None:
        b_offset = tl.sum(b_x, 1, keep_dims=True).to(tl.int32) * P_OFFSET
        tl.store(p_offset + o_groups * D + o_d, b_offset, mask=m_group & m_d)
    b_rows = e4m3_to_bits(b_x) if FORMAT == "fp8_bits" else b_x.to(p_rows.dtype.element_ty)
    if TILES:
        p_tile = p_rows + (o_groups * D + o_d) * ROWS + o_row
        tl.store(p_tile, b_rows, mask=m_group & m_d & (o_row < ROWS))
    else:
        p_row = p_rows + (i_head.to(tl.int64) * num_slots + o_slot) * D + o_d
        tl.store(p_row, b_rows, mask=m_slot & m_d)


@triton.jit(do_not_specialize=["num_heads", "num_tokens", "num_tiles"])
def row_statistics_kernel(
    p_x,
    p_row_mean,
    p_row_rstd,
    x_strides,
    num_heads,
    num_tokens,
    num_tiles,
    eps,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    NORM: tl.constexpr,
):
    """Mean (layer norm) and 1 / deviation of every token over all of its heads."""
    i_b = tl.program_id(0) // num_tiles
    b_token = ((tl.program_id(0) % num_tiles) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    m_token = b_token < num_tokens
    o_d = tl.arange(0, BLOCK_D)[None, :]
    m = m_token & (o_d < D)
    width = num_heads * D
    p_x += i_b.to(tl.int64) * x_strides[0]
    b_mean = tl.zeros([BLOCK_M, 1], tl.float32)
    if NORM == "layer":
        p_head = p_x
        for _ in tl.range(0, num_heads):
            b_x = _load(p_head, x_strides[2], b_token, o_d, m)
            b_mean += tl.sum(b_x, 1, keep_dims=True)
            p_head += x_strides[1]
        b_mean = b_mean / width
    b_variance = tl.zeros([BLOCK_M, 1], tl.float32)
    for _ in tl.range(0, num_heads):
        b_x = _load(p_x, x_strides[2], b_token, o_d, m)
        b_x = tl.where(m, b_x - b_mean, 0.0)
        b_variance += tl.sum(b_x * b_x, 1, keep_dims=True)
        p_x += x_strides[1]
    b_rstd = tl.math.div_rn(1.0, tl.math.sqrt_rn(b_variance / width + eps))
    o_token = i_b.to(tl.int64) * num_tokens + b_token
    tl.store(p_row_mean + o_token, b_mean, mask=m_token)
    tl.store(p_row_rstd + o_token, b_rstd, mask=m_token)


def launch_row_statistics(x: Tensor, transform: Transform) -> tuple[Tensor, Tensor]:
    """float32 [B, S] twice: mean and 1 / deviation across heads."""
    batch, heads, tokens, dim = x.shape
    mean = torch.empty(batch, tokens, dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    num_tiles = launch.ceil_div(tokens, ROW_TILE)
    if mean.numel():
        row_statistics_kernel[(num_tiles * batch,)](
            *(x, mean, rstd, launch.strides(x), heads, tokens, num_tiles, transform.eps),
            D=dim,
            BLOCK_D=next_power_of_2(dim),
            BLOCK_M=ROW_TILE,
            NORM=transform.norm,
            enable_fp_fusion=False,
        )
    return mean, rstd


def has_fp8(device: torch.device) -> bool:
    """Whether the device converts to float8 and multiplies it (compute capability 8.9)."""
    return launch.capability_of(device) >= 89


def _empty(rows: Rows) -> Prepared:
    x = rows.x
    batch, dim, num_groups = x.shape[0], x.shape[3], rows.num_groups
    dtypes = {"none": x.dtype, "fp8": torch.float8_e4m3fn}
    shape: tuple[int, ...] = (batch, rows.num_heads, rows.num_slots, dim)
    if rows.tiles:
        shape = (batch, rows.num_heads, num_groups, dim, rows.rows_per_scale)
    made = x.new_empty(shape, dtype=dtypes.get(rows.fmt, torch.int8))
    columns = (batch, rows.num_heads, num_groups, dim)
    scale = offset = None
    if rows.fmt != "none":
        size = columns if rows.per_column else columns[:3]
        scale = x.new_empty(size, dtype=torch.float32)
    if rows.offsets:
        offset = x.new_empty(columns, dtype=torch.int32)
    return Prepared(made, scale, offset)


def launch_prepare(rows: Rows) -> Prepared:
    """One reading of x, one writing of the result. No sync."""
    x, transform, made = rows.x, rows.transform, _empty(rows)
    if made.rows.numel() == 0:
        return made
    heads, dim = x.shape[1], x.shape[3]
    row_mean = row_rstd = None
    if transform.norm != "none" and transform.across_heads:
        row_mean, row_rstd = launch_row_statistics(x, transform)
    fmt, out = rows.fmt, made.rows
    if fmt == "fp8" and not has_fp8(x.device):
        fmt, out = "fp8_bits", out.view(torch.uint8)
    size = rows.rows_per_scale if fmt != "none" else ROW_TILE
    block_rows, block_d = next_power_of_2(size), next_power_of_2(dim)
    groups = max(1, ROW_TILE // block_rows)
    num_tiles = launch.ceil_div(launch.ceil_div(rows.num_slots, size), groups)
    token, against = rows.token_of_slot, rows.against
    # Many small groups have scales of their own to hold.
    per_warp = ELEMENTS_PER_WARP if groups == 1 else ELEMENTS_PER_WARP // 2
    warps = groups * block_rows * block_d // per_warp
    prepare_kernel[(num_tiles * x.shape[0] * rows.num_heads,)](
        *(x, out, made.scale, made.offset, rows.dots, token, rows.mean, rows.factor, against),
        *(transform.weight, transform.bias, transform.cos, transform.sin, row_mean, row_rstd),
        launch.strides(x),
        (0, 0) if token is None else launch.plan_rows(token),
        rows.num_heads,
        rows.num_heads // heads,
        1 if against is None else rows.num_heads // against.shape[1],
        x.shape[2],
        rows.num_slots,
        num_tiles,
        transform.rope_start,
        0 if transform.cos is None else transform.cos.shape[0],
        transform.eps,
        D=dim,
        BLOCK_D=block_d,
        ROWS=size,
        BLOCK_ROWS=block_rows,
        GROUPS=groups,
        FORMAT=fmt,
        HIGH=HIGH.get(rows.fmt, 0.0),
        PER_COLUMN=rows.per_column,
        TILES=rows.tiles,
        NORM=transform.norm,
        ACROSS_HEADS=transform.across_heads and transform.norm != "none",
        PAIRS=0 if transform.cos is None else transform.cos.shape[1],
        INTERLEAVED=transform.interleaved,
        num_warps=min(16, max(4, warps)),
        # Products must be rounded before they are: fused, ties would fall the other way.
        enable_fp_fusion=False,
    )
    return made
