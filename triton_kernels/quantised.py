"""The two products of attention over small numbers; the forward kernel calls them per tile."""

import triton
import triton.language as tl
from permattn.triton_kernels.rounding import (
    e4m3_from_bits,
    round_to_e4m3,
    round_to_integer,
)

# Unsigned bytes of P, made signed; see prepare.P_OFFSET.
SIGNED_STEPS = tl.constexpr(12582912.0 - 128.0)
# Numbers that one product of bytes sums, on every target.
BYTES_DEEP = tl.constexpr(32)


@triton.jit
def _load_tile(p_tile, m_tile, ROWS: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr):
    """One group of V, [BLOCK_DV, ROWS] as it lies in memory; zeros for a group that is not there.

    Transposed: products of bytes want the summed axis innermost.
    """
    o_d = tl.arange(0, BLOCK_DV)[:, None]
    o_tile = o_d * ROWS + tl.arange(0, ROWS)[None, :]
    if DV == BLOCK_DV:
        b_tile = tl.load(p_tile + o_tile, mask=m_tile, other=0.0)
    else:
        b_tile = tl.load(p_tile + o_tile, mask=m_tile & (o_d < DV), other=0.0)
    return b_tile


@triton.jit
def quantised_score(b_q, b_q_factor, b_k, p_k_scale, o_slot, m_kv, KV_ROWS: tl.constexpr):
    """q k^T of integers, exact, as scores in base 2. b_q_factor: scales of q times the scale."""
    b_k_scale = tl.load(p_k_scale + o_slot // KV_ROWS, mask=m_kv, other=0.0)
    b_product = tl.dot(b_q, tl.trans(b_k), out_dtype=tl.int32)
    return b_product.to(tl.float32) * b_q_factor[:, None] * b_k_scale[None, :]


@triton.jit
def tile_group(p_entry, i_lane, num_slots, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """The group that a tile of ROWS lanes is, and whether there is such a group; ROWS | BLOCK."""
    b_block = tl.load(p_entry + i_lane // BLOCK)
    num_groups = (num_slots + ROWS - 1) // ROWS
    m_block = (b_block >= 0) & (b_block < (num_slots + BLOCK - 1) // BLOCK)
    i_group = tl.where(m_block, b_block, 0) * (BLOCK // ROWS) + i_lane % BLOCK // ROWS
    return i_group, m_block & (i_group < num_groups)


@triton.jit
def quantised_values(
    b_score,
    b_top,
    b_safe,
    p_v,
    p_v_scale,
    p_v_offset,
    i_group,
    m_group,
    PV: tl.constexpr,
    KV_ROWS: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """(sum of p v, sum of p) of one group of keys, p relative to 2^b_safe.

    P is rounded relative to b_top, the row's maximum in this group, and the sum adds what it was
    rounded to.

    Args:
        p_v: tiles of `prepare.Rows`; p_v_offset: int32 by column, for int8 only.
        PV: "int8", "int4", "fp8", or "fp8_bits" where float8 is bytes and multiplied as float16.
    """
    P_HIGH: tl.constexpr = 255.0 if PV == "int8" else (15.0 if PV == "int4" else 448.0)
    b_p = tl.math.exp2(b_score - tl.where(b_top == float("-inf"), 0.0, b_top)[:, None])
    i_tile = i_group.to(tl.int64) * DV
    b_v = _load_tile(p_v + i_tile * KV_ROWS, m_group, KV_ROWS, DV, BLOCK_DV)
    o_d = tl.arange(0, BLOCK_DV)
    m_d = m_group & (o_d < DV)
    b_v_scale = tl.load(p_v_scale + i_tile + o_d, mask=m_d, other=0.0)
    if KV_ROWS < BYTES_DEEP and PV != "fp8_bits":
        # Too few for a product of bytes. These numbers, and sums of products of so few, are exact
        # in float16 and float32.
        if PV == "fp8":
            b_p = (b_p * P_HIGH).to(tl.float8e4nv).to(tl.float32)
        else:
            b_p = round_to_integer(b_p * P_HIGH)
        b_sum = tl.sum(b_p, 1)
        b_product = tl.dot(b_p.to(tl.float16), tl.trans(b_v.to(tl.float16)))
    elif PV == "int8":
        # The last byte of the sum is the rounded number less 128, as a signed one.
        b_p = b_p * P_HIGH + SIGNED_STEPS
        b_sum = tl.sum(b_p - SIGNED_STEPS, 1)
        b_small = b_p.to(tl.int32, bitcast=True).to(tl.int8)
        b_offset = tl.load(p_v_offset + i_tile + o_d, mask=m_d, other=0)
        b_start = tl.zeros([b_p.shape[0], BLOCK_DV], tl.int32) + b_offset[None, :]
        b_product = tl.dot(b_small, tl.trans(b_v), b_start, out_dtype=tl.int32)
    elif PV == "int4":
        b_p = round_to_integer(b_p * P_HIGH)
        b_sum = tl.sum(b_p, 1)
        b_product = tl.dot(b_p.to(tl.int8), tl.trans(b_v), out_dtype=tl.int32)
    elif PV == "fp8":
        b_small = (b_p * P_HIGH).to(tl.float8e4nv)
        b_sum = tl.sum(b_small.to(tl.float32), 1)
        b_product = tl.dot(b_small, tl.trans(b_v))
    else:
        b_p = round_to_e4m3(b_p * P_HIGH)
        b_sum = tl.sum(b_p, 1)
        b_product = tl.dot(b_p.to(tl.float16), tl.trans(e4m3_from_bits(b_v)))
    b_weight = tl.math.exp2(b_top - b_safe) * (1.0 / P_HIGH)
    b_value = b_product.to(tl.float32) * b_weight[:, None] * b_v_scale[None, :]
    return b_value, b_sum * b_weight
