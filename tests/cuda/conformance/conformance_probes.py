"""Single instructions on seeded bits: what a probe is given, and how close an answer must come.

A device's answers are kept as a fixture; the stand-in of tests/cuda_shim and the simulator of
tests/ptxsim are held to it, and to each other.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
ROUNDS = 8
# A float32 sum of n products may lose this much of the sum of their sizes, per product.
ROUNDING = 2.0**-23
# Hopper's tensor cores keep some 13 bits of the sums of FP8 products between two instructions.
FP8_ROUNDING = 2.0**-12


@dataclass(frozen=True, eq=False)
class Box:
    """A tensor of 16-bit numbers that is copied in boxes of 16 rows of `row_bytes`."""

    tensor: Array
    row_bytes: int

    @property
    def box(self) -> tuple[int, int, int]:
        return 1, 16, self.row_bytes // 2


@dataclass(frozen=True, eq=False)
class Probe:
    """One launch of one block.

    Args:
        name: of the kernel.
        source: "warp" or "hopper", the file that it is in.
        inputs: what the kernel is given before its result.
        words: of the result.
        simulators: how far two simulators may be from each other, word by word as float32; None =
            bits are equal.
        device: how far they may be from a device.
        shim: whether the stand-in for CUDA has it.
        exact: the answer in float64, where the instruction computes.
    """

    name: str
    source: str
    inputs: tuple[Array | Box, ...]
    words: int
    simulators: Array | None = None
    device: Array | None = None
    threads: int = 32
    shared_bytes: int = 0
    shim: bool = True
    exact: Array | None = None

    def __str__(self) -> str:
        return self.name

    def distance(self, a: Array, b: Array, bound: Array | None) -> float:
        """At most 1 where two answers agree: words that differ, or the largest share of a bound."""
        if bound is None:
            return 2.0 * float((a != b).sum())
        x, y = (v.view(np.float32).astype(np.float64) for v in (a, b))
        same = (a == b) | (np.isnan(x) & np.isnan(y))
        with np.errstate(invalid="ignore"):
            share = np.where(same, 0.0, np.abs(x - y) / bound)
        return float(np.nan_to_num(share, nan=np.inf).max())

    def sha256(self) -> str:
        """Of the inputs: an answer is one to exactly these."""
        made = hashlib.sha256()
        for x in self.inputs:
            made.update(x.tensor.tobytes() if isinstance(x, Box) else x.tobytes())
        return made.hexdigest()


@functools.cache
def probes() -> tuple[Probe, ...]:
    made = [_mma(name) for name in _MMA]
    made += [_moved("ldmatrix"), _moved("ldmatrix_trans"), _moved("cp_async_zeros")]
    made += [_function(name) for name in ("exp2_approx", "log2_approx", "rcp_approx")]
    made += [_pack(name) for name in ("pack_bf16", "pack_f16", "pack_e4m3")]
    made += [_wgmma(name, way) for name in _WGMMA for way in ("ss", "rs")]
    made += [_tma(row_bytes) for row_bytes in (128, 64, 32)]
    return tuple(made)


# kernel -> formats of a and b; the summed axis is 256 bits of a row
_MMA = {
    "mma_bf16": ("bf16", "bf16"),
    "mma_f16": ("f16", "f16"),
    "mma_s8": ("s8", "s8"),
    "mma_u8s8": ("u8", "s8"),
    "mma_s4": ("s4", "s4"),
    "mma_u4s4": ("u4", "s4"),
    "mma_e4m3": ("e4m3", "e4m3"),
}
# kernel -> formats, columns, bytes of a row of a, b transposed
_WGMMA = {
    "wgmma_bf16": ("bf16", "bf16", 64, 128, False),
    "wgmma_bf16_64": ("bf16", "bf16", 64, 64, False),
    "wgmma_bf16_32": ("bf16", "bf16", 64, 32, False),
    "wgmma_bf16_mn": ("bf16", "bf16", 64, 128, True),
    "wgmma_bf16_mn_n96": ("bf16", "bf16", 96, 64, True),
    "wgmma_f16": ("f16", "f16", 64, 128, False),
    "wgmma_f16_mn": ("f16", "f16", 64, 128, True),
    "wgmma_s8": ("s8", "s8", 64, 128, False),
    "wgmma_s8_64": ("s8", "s8", 64, 64, False),
    "wgmma_u8s8": ("u8", "s8", 64, 64, False),
    "wgmma_e4m3": ("e4m3", "e4m3", 72, 64, False),
}
_BITS = {"bf16": 16, "f16": 16, "s8": 8, "u8": 8, "s4": 4, "u4": 4, "e4m3": 8}


def _rng(name: str) -> np.random.Generator:
    return np.random.default_rng(list(name.encode()))


def draw(fmt: str, rows: int, row_words: int, rng: np.random.Generator) -> Array:
    """uint32 [rows, row_words] of numbers of a format: any integers, or floats of many sizes."""
    count = row_words * 32 // _BITS[fmt]
    if fmt not in ("bf16", "f16", "e4m3"):
        return rng.integers(0, 1 << 32, (rows, row_words), dtype=np.uint32)
    x = rng.normal(size=(rows, count)) * 2.0 ** rng.integers(-3, 4, (rows, count))
    single = x.astype(np.float32)
    if fmt == "bf16":
        half = (single.view(np.uint32) >> 16).astype(np.uint16)
        return half.view(np.uint32)
    if fmt == "f16":
        return single.astype(np.float16).view(np.uint32)
    bits = rng.integers(0, 256, (rows, count)).astype(np.uint8)
    bits[(bits & 0x7F) == 0x7F] = 0  # NaN
    return bits.view(np.uint32)


def values(words: Array, fmt: str) -> Array:
    """float64, the numbers of the last axis of words."""
    if fmt == "bf16":
        return (words.view(np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    if fmt == "f16":
        return words.view(np.float16).astype(np.float64)
    if fmt in ("s8", "u8"):
        return words.view(np.int8 if fmt == "s8" else np.uint8).astype(np.float64)
    if fmt == "e4m3":
        bits = words.view(np.uint8).astype(np.int64)
        size, exponent = bits & 7, bits >> 3 & 15
        x = np.where(exponent == 0, size / 512.0, (8 + size) * 2.0 ** (exponent - 10.0))
        return np.where(bits & 0x80, -x, x)
    nibbles = words.view(np.uint8)[..., None] >> np.array([0, 4], np.uint8) & 15
    flat = nibbles.reshape(*words.shape[:-1], -1).astype(np.float64)
    return np.where(flat > 7, flat - 16, flat) if fmt == "s4" else flat


def _bounds(size: Array, depth: int, fmt: str) -> tuple[Array | None, Array | None]:
    if fmt not in ("bf16", "f16", "e4m3"):
        return None, None
    near = (depth + 1) * ROUNDING * size
    return near, np.maximum(near, FP8_ROUNDING * size) if fmt == "e4m3" else near


def _mma(name: str) -> Probe:
    """Words as the tables of the PTX manual have them, [round, lane, 4 of a + 2 of b + 4 of c]."""
    fmt_a, fmt_b = _MMA[name]
    rng = _rng(name)
    given, sizes, answers = [], [], []
    lane = np.arange(32)
    row, word = lane // 4, lane % 4
    for _ in range(ROUNDS):
        a, b = draw(fmt_a, 16, 8, rng), draw(fmt_b, 8, 8, rng)
        is_float = fmt_a in ("bf16", "f16", "e4m3")
        c = rng.normal(size=(16, 8)).astype(np.float32) * 8 if is_float else None
        sums = rng.integers(-(1 << 20), 1 << 20, (16, 8)).astype(np.int32) if c is None else c
        left, right = values(a, fmt_a), values(b, fmt_b).T
        size, answer = np.abs(left) @ np.abs(right) + np.abs(sums), left @ right + sums
        parts = [a[row, word], a[row + 8, word], a[row, word + 4], a[row + 8, word + 4]]
        parts += [b[row, word], b[row, word + 4]]
        places = [
            (row, 2 * word),
            (row, 2 * word + 1),
            (row + 8, 2 * word),
            (row + 8, 2 * word + 1),
        ]
        parts += [sums.view(np.uint32)[place] for place in places]
        given.append(np.stack(parts, -1))
        sizes.append(np.stack([size[place] for place in places], -1))
        answers.append(np.stack([answer[place] for place in places], -1))
    depth = 256 // _BITS[fmt_a]
    bounds = _bounds(np.stack(sizes).ravel(), depth, fmt_a)
    exact = np.stack(answers).ravel()
    return Probe(name, "warp", (np.stack(given).ravel(),), ROUNDS * 128, *bounds, exact=exact)


def _moved(name: str) -> Probe:
    words = _rng(name).integers(0, 1 << 32, 128, dtype=np.uint32)
    return Probe(name, "warp", (words,), 128, shared_bytes=512)


def _function(name: str) -> Probe:
    """Numbers whose results are normal, with whole ones and ends of the range among them."""
    rng, count = _rng(name), 256
    edges = np.arange(-8.0, 8.0)
    if name == "exp2_approx":
        x = np.concatenate([edges, [0.0, -125.0, 127.0, -np.inf], rng.uniform(-120, 20, count)])
        x = x[:count].astype(np.float32)
        exact = np.exp2(x.astype(np.float64))
        size = exact
    else:
        x = np.concatenate([2.0**edges, 1 + edges / 1024, 2.0 ** rng.uniform(-100, 100, count)])
        x = x[:count].astype(np.float32)
        exact = np.log2(x.astype(np.float64)) if name == "log2_approx" else 1 / x.astype(np.float64)
        size = np.maximum(np.abs(exact), 1.0) if name == "log2_approx" else np.abs(exact)
    # The manual allows 2^-22 of a power and of a logarithm, and one unit of a reciprocal.
    device = 2.0**-22 * size + 1e-45
    given = np.ascontiguousarray(x).view(np.uint32)
    return Probe(
        *(name, "warp", (given,), count, 2 * ROUNDING * size + 1e-45, device + ROUNDING * size),
        shim=name != "rcp_approx",
        exact=exact,
    )


def _pack(name: str) -> Probe:
    """Ties, numbers beyond the largest, subnormal results and random ones; all exact."""
    rng = _rng(name)
    ties = np.concatenate([1 + np.arange(32) / 2.0**k for k in (4, 5, 9, 11, 12)])
    sizes = rng.normal(size=96) * 2.0 ** rng.integers(-14, 9, 96)
    x = np.concatenate([ties, -ties, [0.0, -0.0, 448.0, 464.0, 480.0, 1e5, -1e5, 65504.0], sizes])
    x = np.resize(x, 512).astype(np.float32)
    return Probe(name, "warp", (x.view(np.uint32),), 256, threads=128)


def _wgmma(name: str, way: str) -> Probe:
    fmt_a, fmt_b, columns, row_bytes, transposed = _WGMMA[name]
    rng, row_words = _rng(f"{name}_{way}"), row_bytes // 4
    a = draw(fmt_a, 64, row_words, rng)
    if transposed:
        b = draw(fmt_b, row_bytes // 2, columns // 2, rng)
        right = values(b, fmt_b)
    else:
        b = draw(fmt_b, columns, row_words, rng)
        right = values(b, fmt_b).T
    size = np.abs(values(a, fmt_a)) @ np.abs(right)
    thread, i = np.arange(128)[:, None], np.arange(columns // 2)[None]
    place = (
        16 * (thread // 32) + thread % 32 // 4 + 8 * (i // 2 % 2),
        8 * (i // 4) + 2 * (thread % 4) + i % 2,
    )
    bounds = _bounds(size[place].ravel(), 8 * row_bytes // _BITS[fmt_a], fmt_a)
    given = a
    if way == "rs":
        step, lane, r = np.ogrid[: row_bytes // 32, :128, :4]
        row = 16 * (lane // 32) + lane % 32 // 4 + 8 * (r % 2)
        given = a[row, 8 * step + lane % 4 + 4 * (r // 2)]
    return Probe(
        *(f"{name}_{way}", "hopper", (given.ravel(), b.ravel()), 64 * columns, *bounds),
        threads=128,
        shared_bytes=64 * row_bytes + 4 * b.size,
        shim=False,
        exact=(values(a, fmt_a) @ right)[place].ravel(),
    )


def _tma(row_bytes: int) -> Probe:
    """Boxes inside, and past every side of the tensor."""
    tensor = _rng(f"tma{row_bytes}").integers(0, 1 << 16, (3, 20, 72), dtype=np.uint16)
    at = np.array([0, 0, 0, 8, 10, 1, -8, -3, 2, 48, 4, 2, 0, 0, 3], np.int32)
    return Probe(
        *(f"tma_{row_bytes}", "hopper", (Box(tensor, row_bytes), at), 5 * 4 * row_bytes),
        threads=128,
        shared_bytes=5 * 16 * row_bytes + 16,
        shim=False,
    )
