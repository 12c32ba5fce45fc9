"""Tile choice of attention from region to region: a pure function, like `config.select_config`."""

from __future__ import annotations

from dataclasses import dataclass

from permattn.triton_kernels.config import (
    MAX_HEAD_DIM,
    MIN_TILE,
    Config,
    Kernel,
    next_power_of_2,
    padded_head_dim,
)

# (kernel, padded head dim) -> the largest tile of 16-bit types that stays in registers everywhere.
_WIDE: dict[tuple[Kernel, int], tuple[int, int]] = {
    ("fwd", 64): (128, 64),
    ("fwd", 128): (64, 64),
    ("fwd", 256): (64, 32),
    ("dq", 64): (64, 64),
    ("dq", 128): (64, 32),
    ("dq", 256): (32, 32),
    ("dkdv", 64): (64, 32),
    ("dkdv", 128): (64, 32),
    ("dkdv", 256): (32, 32),
}
# float32 in full precision runs on the ordinary cores, where whole rows live in registers.
_SINGLE: dict[tuple[Kernel, int], tuple[int, int]] = {
    ("fwd", 64): (32, 32),
    ("dq", 64): (16, 32),
    ("dkdv", 64): (32, 32),
}
# Rows that no cell fills are work for nothing: at most this share more than with the least tiles.
_MOST_IDLE = 0.25


@dataclass(frozen=True)
class RegionTiles:
    """Config of a kernel over regions.

    Args:
        span: lanes that one place of a row takes: the cells of a region, packed, or, aligned, a
            multiple of block_n.
    """

    config: Config
    span: int


def select_region_tiles(
    kernel: Kernel,
    *,
    element_size: int,
    head_dim: int,
    head_dim_v: int,
    cells: int,
    streamed_cells: int,
    aligned: bool = False,
) -> RegionTiles:
    """Tiles, warps and stages of a kernel over regions.

    Args:
        kernel: "fwd", "dq" or "dkdv".
        element_size: bytes per element of q, k and v: 2 or 4.
        head_dim, head_dim_v: D and Dv, 1..256.
        cells: of a region of the side that stays (queries; keys in dkdv).
        streamed_cells: of a region of the other side.
        aligned: no tile straddles two regions of the other side.

    Returns: block_m and block_n are powers of two >= 16; block_m leaves little of itself idle.

    Raises:
        ValueError: an element size or head dim that no kernel takes.
    """
    widest = max(head_dim, head_dim_v)
    if element_size not in (2, 4) or not 1 <= widest <= MAX_HEAD_DIM:
        raise ValueError(
            f"select_region_tiles: wants 2 or 4 bytes and head dims up to {MAX_HEAD_DIM}, "
            f"got {element_size} bytes, D = {head_dim}, Dv = {head_dim_v}"
        )
    width = max(64, padded_head_dim(widest))
    if element_size == 4:
        block_m, block_n = _SINGLE.get((kernel, width), (MIN_TILE, MIN_TILE))
    else:
        block_m, block_n = _WIDE[kernel, width]
    block_m = staying_tile(cells, block_m)
    if aligned:
        block_n = min(block_n, max(MIN_TILE, next_power_of_2(streamed_cells)))
    span = -(-streamed_cells // block_n) * block_n if aligned else streamed_cells
    if element_size == 4:
        return RegionTiles(Config(block_m, block_n, 8 if width > 64 else 4, 1, 255), span)
    # One warp multiplies 16 rows; four make the group that the newest instructions want.
    warps = min(8, block_m // 16)
    if width > 64:
        # Rows twice as wide fill the registers of twice as many.
        warps = 8 if block_m > 32 or width > 128 else 4
    return RegionTiles(Config(block_m, block_n, warps, 2, 255), span)


def staying_tile(cells: int, largest: int) -> int:
    """The largest power of two, 16 to `largest`, whose tiles are nearly as full as the least."""
    tile = min(largest, max(MIN_TILE, next_power_of_2(cells)))
    least = -(-cells // MIN_TILE) * MIN_TILE
    while -(-cells // tile) * tile > (1 + _MOST_IDLE) * least:
        tile //= 2
    return tile
