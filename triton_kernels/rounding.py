"""Rounding to the formats of `core.quant`, ties to even, and float8 where a GPU has none.

Sums with a large constant round: float32 has no digit left behind the last one wanted. They need a
compiler that does not contract x * y + constant where the product must be rounded, too.
"""

import triton
import triton.language as tl

# 1.5 * 2^23: one unit apart. 1.5 * 2^14: steps of 2^-9, those of e4m3 next to zero.
UNIT_STEPS = tl.constexpr(12582912.0)
E4M3_STEPS = tl.constexpr(24576.0)
E4M3_LEAST_NORMAL = tl.constexpr(0.015625)


@triton.jit
def round_to_integer(b_x):
    """The nearest integer in float32, for |x| < 2^22."""
    return (b_x + UNIT_STEPS) - UNIT_STEPS


@triton.jit
def round_to_e4m3(b_x):
    """The nearest e4m3 number in float32, for |x| up to 448."""
    b_bits = b_x.to(tl.int32, bitcast=True)
    # Three digits of the mantissa stay, 20 go.
    b_bits = (b_bits + 0x7FFFF + ((b_bits >> 20) & 1)) & -0x100000
    b_small = (b_x + E4M3_STEPS) - E4M3_STEPS
    return tl.where(tl.abs(b_x) < E4M3_LEAST_NORMAL, b_small, b_bits.to(tl.float32, bitcast=True))


@triton.jit
def e4m3_to_bits(b_x):
    """float32 that hold e4m3 numbers -> their bytes (uint8): float16's exponent is 8 further up."""
    b_bits = (b_x * 0.00390625).to(tl.float16).to(tl.int16, bitcast=True)
    return (((b_bits >> 7) & 0x7F) | ((b_bits >> 8) & 0x80)).to(tl.uint8)


@triton.jit
def e4m3_from_bits(b_byte):
    """The inverse of `e4m3_to_bits`, in float16, exact."""
    b_bits = b_byte.to(tl.int16)
    b_bits = ((b_bits & 0x80) << 8) | ((b_bits & 0x7F) << 7)
    return b_bits.to(tl.float16, bitcast=True) * 256.0
