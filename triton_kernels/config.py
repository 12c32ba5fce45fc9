"""Tile choice: one pure function from the facts of a problem to the shape of a kernel.

Patterns never see these numbers: a block of a pattern is packed into tiles of any size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kernel = Literal["fwd", "dq", "dkdv"]


@dataclass(frozen=True)
class Config:
    """The shape of one kernel.

    Args:
        block_m: rows that stay (queries; keys in dkdv).
        block_n: columns that stream past (keys; queries in dkdv).
        num_warps, num_stages: Triton's launch options.
        max_registers: per thread, told to the assembler; without a word it spills a few values
            where one block more would fit on a multiprocessor. None = say nothing.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None


# Architectures whose instructions and shared memory differ: the least capability of each.
FAMILIES = (120, 100, 90, 80)
MAX_HEAD_DIM = 256
MIN_TILE = 16

# (kernel, padded head dim) -> family -> tiles for 16-bit types and wide pattern blocks. Every entry
# compiles without spills in the heaviest variant (rows gathered by index, a band of two ends);
# tests/triton/aot holds the evidence.
_WIDE: dict[tuple[Kernel, int], dict[int, Config]] = {
    ("fwd", 64): {
        80: Config(128, 64, 8, 3),
        90: Config(128, 64, 8, 3),
        100: Config(128, 64, 8, 3),
        120: Config(128, 64, 8, 2),
    },
    ("fwd", 128): {
        80: Config(128, 32, 8, 2),
        90: Config(128, 64, 8, 2),
        100: Config(128, 64, 8, 2),
        120: Config(64, 32, 4, 2),
    },
    ("fwd", 256): dict.fromkeys(FAMILIES, Config(64, 32, 8, 2)),
    ("dq", 64): {
        80: Config(64, 32, 4, 2),
        90: Config(64, 64, 8, 2),
        100: Config(64, 64, 4, 2),
        120: Config(64, 32, 8, 2),
    },
    ("dq", 128): {
        80: Config(64, 64, 8, 2),
        90: Config(64, 32, 4, 2),
        100: Config(64, 64, 8, 2),
        120: Config(64, 64, 8, 2),
    },
    ("dq", 256): dict.fromkeys(FAMILIES, Config(32, 32, 8, 1)),
    ("dkdv", 64): {
        80: Config(32, 64, 4, 2, 255),
        90: Config(64, 64, 8, 2),
        100: Config(64, 64, 8, 2),
        120: Config(64, 32, 4, 2),
    },
    ("dkdv", 128): {
        80: Config(64, 32, 8, 2),
        90: Config(64, 32, 8, 2),
        100: Config(64, 16, 8, 2),
        120: Config(64, 64, 8, 2),
    },
    ("dkdv", 256): dict.fromkeys(FAMILIES, Config(32, 32, 8, 2)),
}
# Gathered rows and blocks smaller than a tile need registers for addresses.
_GATHERED: dict[tuple[Kernel, int, int], Config] = {
    ("fwd", 64, 120): Config(128, 32, 8, 2),
    ("fwd", 128, 90): Config(128, 32, 8, 2),
}
# float32 runs on the ordinary cores, where a tile lives in registers; the same everywhere. A head
# dim above 128 spills whatever the tile: right, and slow.
_SINGLE: dict[tuple[Kernel, int], Config] = {
    ("fwd", 64): Config(32, 32, 8, 1, 255),
    ("fwd", 128): Config(16, 16, 8, 1),
    ("fwd", 256): Config(16, 16, 8, 1),
    ("dq", 64): Config(16, 32, 8, 1),
    ("dq", 128): Config(16, 16, 8, 1),
    ("dq", 256): Config(16, 16, 8, 1),
    ("dkdv", 64): Config(32, 32, 8, 1, 255),
    ("dkdv", 128): Config(16, 16, 8, 1, 255),
    ("dkdv", 256): Config(16, 16, 8, 1, 255),
}
# (kernel, padded head dim) -> block_n and stages for tiles of fewer rows than the wide ones.
_NARROW: dict[tuple[Kernel, int], tuple[int, int]] = {
    ("fwd", 64): (64, 2),
    ("fwd", 128): (64, 2),
    ("fwd", 256): (32, 2),
    ("dq", 64): (64, 2),
    ("dq", 128): (32, 2),
    ("dq", 256): (32, 2),
    ("dkdv", 64): (32, 2),
    ("dkdv", 128): (32, 2),
    ("dkdv", 256): (32, 1),
}


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def padded_head_dim(head_dim: int) -> int:
    """The tile width of a head dim: a power of two that a matrix instruction can take."""
    return max(MIN_TILE, next_power_of_2(head_dim))


def family_of(capability: int) -> int:
    """The family of a compute capability (major * 10 + minor); the oldest one for older devices."""
    return next((f for f in FAMILIES if capability >= f), FAMILIES[-1])


def select_config(
    kernel: Kernel,
    *,
    capability: int,
    element_size: int,
    head_dim: int,
    head_dim_v: int,
    unit: int,
    gathered: bool,
) -> Config:
    """Tiles, warps and stages of a kernel.

    Args:
        kernel: "fwd", "dq" or "dkdv".
        capability: compute capability, major * 10 + minor.
        element_size: bytes per element of q, k and v: 2 or 4.
        head_dim, head_dim_v: D and Dv, 1..256.
        unit: slots of the staying side that share one list (block_q; block_kv in dkdv): a tile is
            never larger than the power of two that holds it.
        gathered: rows of the streaming side are looked up, or its blocks are smaller than a tile.

    Returns: a Config whose block_m and block_n are powers of two >= 16.

    Raises:
        ValueError: an element size or head dim that no kernel takes.
    """
    if element_size not in (2, 4) or not 1 <= max(head_dim, head_dim_v) <= MAX_HEAD_DIM:
        raise ValueError(
            f"select_config: wants 2 or 4 bytes and head dims up to {MAX_HEAD_DIM}, "
            f"got {element_size} bytes, D = {head_dim}, Dv = {head_dim_v}"
        )
    width = max(64, padded_head_dim(max(head_dim, head_dim_v)))
    rows = max(MIN_TILE, next_power_of_2(unit))
    if element_size == 4:
        wide = _SINGLE[kernel, width]
        rows = min(rows, wide.block_m)
        return Config(rows, wide.block_n, wide.num_warps, wide.num_stages, wide.max_registers)
    family = family_of(capability)
    wide = _WIDE[kernel, width][family]
    if gathered:
        wide = _GATHERED.get((kernel, width, family), wide)
    if rows >= wide.block_m:
        return wide
    block_n, num_stages = _NARROW[kernel, width]
    return Config(rows, block_n, 4, num_stages, 255)


def select_quantised_config(
    *,
    capability: int,
    element_size: int,
    head_dim: int,
    head_dim_v: int,
    unit: int,
    kv_rows: int,
    pv: str,
) -> Config:
    """As `select_config`, of the forward over small numbers.

    Args:
        element_size: bytes per element of v as it is given.
        kv_rows: slots that share a scale of K and V; where P is quantised, a tile of keys is one
            such group.
        pv: "none", or a format of P and V.
    """
    width = max(64, padded_head_dim(max(head_dim, head_dim_v)))
    rows = max(MIN_TILE, next_power_of_2(unit))
    if pv == "none" and element_size == 4:
        wide = _SINGLE["fwd", width]
        return Config(min(rows, wide.block_m), wide.block_n, wide.num_warps, 1, 255)
    block_n = 64 if pv == "none" else kv_rows
    family = family_of(capability)
    if family == 120 and pv == "none" and width > 64:
        block_n = 32
    if family == 120 and pv != "none" and width == 64:
        return Config(min(rows, 32), block_n, 4, 2)
    # Where warps multiply on their own, a tile of 64 rows lives in the registers of eight.
    warps = 4 if width == 64 and block_n <= 64 and family in (90, 100) else 8
    stages = 1 if block_n == 128 and family in (90, 120) else 2
    return Config(min(rows, 64), block_n, warps, stages)
