"""Numbers of few bits: to float32 and back, with the roundings that PTX has."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

ROUNDINGS = ("rn", "rz", "rm", "rp", "rna")


def bf16_to_f32(x: np.ndarray) -> np.ndarray:
    return (x.astype(np.uint32) << np.uint32(16)).view(np.float32)


def f32_to_bf16(x: np.ndarray, rounding: str = "rn") -> np.ndarray:
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    if rounding == "rn":
        even = (bits >> np.uint32(16)) & np.uint32(1)
        rounded = (bits + even + np.uint32(0x7FFF)) >> np.uint32(16)
    elif rounding == "rz":
        rounded = bits >> np.uint32(16)
    else:
        raise ValueError(f"bf16 with rounding {rounding}")
    return np.where(np.isnan(x), np.uint32(0x7FFF), rounded).astype(np.uint16)


def f64_to_f32(x: np.ndarray, rounding: str = "rn") -> np.ndarray:
    """Rounds the nearest float32 by one unit towards where `rounding` points."""
    near = x.astype(np.float32)
    if rounding == "rn":
        return near
    if rounding == "rz":
        past = np.abs(near.astype(np.float64)) > np.abs(x)
        toward = np.float32(0)
    elif rounding == "rm":
        past, toward = near.astype(np.float64) > x, np.float32(-np.inf)
    elif rounding == "rp":
        past, toward = near.astype(np.float64) < x, np.float32(np.inf)
    else:
        raise ValueError(f"float32 with rounding {rounding}")
    return np.where(past, np.nextafter(near, toward), near)


def f32_to_tf32(x: np.ndarray, rounding: str = "rna") -> np.ndarray:
    """float32 with 10 bits of mantissa: nearest (ties away) or cut."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    if rounding == "rna":
        bits = bits + np.uint32(0x1000)
    elif rounding == "rn":
        bits = bits + ((bits >> np.uint32(13)) & np.uint32(1)) + np.uint32(0xFFF)
    elif rounding != "rz":
        raise ValueError(f"tf32 with rounding {rounding}")
    return np.where(np.isfinite(x), bits & np.uint32(0xFFFFE000), bits)


def _float8_table(exponent_bits: int, mantissa_bits: int) -> np.ndarray:
    """Values of all 256 patterns of a format; e4m3 has no infinity and one NaN."""
    bias = (1 << (exponent_bits - 1)) - 1
    values = np.zeros(256, np.float32)
    for pattern in range(128):
        exponent, mantissa = pattern >> mantissa_bits, pattern & ((1 << mantissa_bits) - 1)
        fraction = mantissa / (1 << mantissa_bits)
        if exponent == 0:
            value = fraction * 2.0 ** (1 - bias)
        else:
            value = (1 + fraction) * 2.0 ** (exponent - bias)
        if exponent_bits == 5 and exponent == 31:
            value = np.nan if mantissa else np.inf
        elif exponent_bits == 4 and pattern == 127:
            value = np.nan
        values[pattern], values[pattern + 128] = value, -value
    return values


E4M3, E5M2 = _float8_table(4, 3), _float8_table(5, 2)
_LARGEST = {"e4m3": np.float32(448), "e5m2": np.float32(57344)}
_TABLE = {"e4m3": E4M3, "e5m2": E5M2}


def float8_to_f32(x: np.ndarray, kind: str) -> np.ndarray:
    return _TABLE[kind][x]


def f32_to_float8(x: np.ndarray, kind: str) -> np.ndarray:
    """Nearest, ties to even, saturated to the largest finite value; NaN stays."""
    table, largest = _TABLE[kind], _LARGEST[kind]
    size = np.minimum(np.abs(np.where(np.isnan(x), 0, x)), largest).astype(np.float64)
    finite = table[:128][np.isfinite(table[:128])].astype(np.float64)
    above = np.clip(np.searchsorted(finite, size), 1, len(finite) - 1)
    low, high = finite[above - 1], finite[above]
    take = (size - low > high - size) | ((size - low == high - size) & (above % 2 == 0))
    code = np.where(take, above, above - 1).astype(np.uint8)
    code = np.where(np.isnan(x), np.uint8(0x7F), code)
    return (code | (np.signbit(x).astype(np.uint8) << np.uint8(7))).astype(np.uint8)


Decode = Callable[[np.ndarray], np.ndarray]
Encode = Callable[[np.ndarray], np.ndarray]


def _halves(row: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(row).view(np.uint16).reshape(*row.shape, 2)


def _join(halves: np.ndarray, dtype: type) -> np.ndarray:
    return np.ascontiguousarray(halves).view(dtype)[..., 0]


# Types whose arithmetic is done in a wider one: (how to read a row, how to write it).
CODECS: dict[str, tuple[Decode, Encode]] = {
    "f16": (lambda r: r.astype(np.float32), lambda v: v.astype(np.float16)),
    "bf16": (bf16_to_f32, f32_to_bf16),
    "f16x2": (
        lambda r: _halves(r).view(np.float16).astype(np.float32),
        lambda v: _join(v.astype(np.float16), np.uint32),
    ),
    "bf16x2": (
        lambda r: bf16_to_f32(_halves(r)),
        lambda v: _join(f32_to_bf16(v), np.uint32),
    ),
    "f32x2": (
        lambda r: np.ascontiguousarray(r).view(np.float32).reshape(*r.shape, 2),
        lambda v: _join(np.asarray(v, np.float32), np.uint64),
    ),
    "s16x2": (
        lambda r: _halves(r).view(np.int16),
        lambda v: _join(v.astype(np.int16), np.uint32),
    ),
    "u16x2": (_halves, lambda v: _join(v.astype(np.uint16), np.uint32)),
}
# The view of the register file that a packed type lives in.
ROW_OF = {"s16x2": "b32", "u16x2": "b32"}
