"""Tile choice over every problem it can be asked about."""

from __future__ import annotations

from itertools import product

import pytest
from permattn.triton_kernels.config import (
    FAMILIES,
    Config,
    family_of,
    padded_head_dim,
    select_config,
    select_quantised_config,
)
from permattn.triton_kernels.regions_config import select_region_tiles, staying_tile

KERNELS = ("fwd", "dq", "dkdv")


def choose(kernel: str, **facts) -> Config:
    defaults = {
        "capability": 90,
        "element_size": 2,
        "head_dim": 128,
        "head_dim_v": 128,
        "unit": 128,
        "gathered": False,
    }
    return select_config(kernel, **{**defaults, **facts})


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("element_size", [2, 4], ids=["16-bit", "32-bit"])
def test_every_problem_has_a_config_that_triton_can_take(kernel, element_size):
    units = (1, 4, 16, 17, 48, 64, 100, 128, 1000)
    dims = (1, 16, 24, 64, 80, 128, 200, 256)
    for capability, dim, unit, gathered in product(
        (80, 86, 89, 90, 100, 103, 120, 121), dims, units, (False, True)
    ):
        config = choose(
            kernel,
            capability=capability,
            element_size=element_size,
            head_dim=dim,
            head_dim_v=dims[-1 - dims.index(dim)],
            unit=unit,
            gathered=gathered,
        )
        for tile in (config.block_m, config.block_n):
            assert tile >= 16
            assert tile & (tile - 1) == 0
        assert config.num_warps in (4, 8)
        assert 1 <= config.num_stages <= 3
        assert config.block_m < 2 * max(unit, 16), "a tile must not be mostly idle rows"


@pytest.mark.parametrize("element_size", [2, 4], ids=["16-bit", "32-bit"])
@pytest.mark.parametrize("pv", ["none", "int8", "int4", "fp8", "fp8_bits"])
def test_small_numbers_have_a_config_of_one_group_of_keys(pv, element_size):
    for capability, dim, unit, rows in product(
        (80, 89, 90, 103, 120), (1, 24, 64, 80, 128, 256), (1, 16, 48, 64, 128), (32, 64, 128)
    ):
        config = select_quantised_config(
            capability=capability,
            element_size=element_size,
            head_dim=dim,
            head_dim_v=64,
            unit=unit,
            kv_rows=rows,
            pv=pv,
        )
        if pv != "none":
            assert config.block_n == rows
        for tile in (config.block_m, config.block_n):
            assert tile >= 16
            assert tile & (tile - 1) == 0
        assert config.num_warps in (4, 8)
        assert 1 <= config.num_stages <= 2
        assert config.block_m < 2 * max(unit, 16), "a tile must not be mostly idle rows"


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_choice_depends_on_facts_alone(kernel):
    assert choose(kernel) == choose(kernel)


@pytest.mark.parametrize(
    ("capability", "family"),
    [
        (80, 80),
        (86, 80),
        (89, 80),
        (90, 90),
        (100, 100),
        (103, 100),
        (110, 100),
        (120, 120),
        (75, 80),
    ],
)
def test_families(capability, family):
    assert family_of(capability) == family
    assert family in FAMILIES


@pytest.mark.parametrize(
    ("dim", "padded"), [(1, 16), (16, 16), (17, 32), (64, 64), (80, 128), (256, 256)]
)
def test_head_dims_are_padded_to_powers_of_two(dim, padded):
    assert padded_head_dim(dim) == padded


@pytest.mark.parametrize(
    "facts", [{"head_dim": 257}, {"head_dim_v": 512}, {"element_size": 8}], ids=str
)
def test_what_no_kernel_takes_is_refused(facts):
    with pytest.raises(ValueError, match="select_config"):
        choose("fwd", **facts)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("element_size", [2, 4], ids=["16-bit", "32-bit"])
def test_regions_of_every_size_have_tiles(kernel, element_size):
    sizes, dims = (1, 4, 6, 16, 24, 49, 64, 77, 256, 273), (1, 24, 32, 96, 256)
    for cells, streamed, dim, aligned in product(sizes, sizes, dims, (False, True)):
        facts = {"head_dim": dim, "head_dim_v": dims[-1 - dims.index(dim)], "aligned": aligned}
        facts |= {"cells": cells, "streamed_cells": streamed, "element_size": element_size}
        tiles = select_region_tiles(kernel, **facts)
        config, span = tiles.config, tiles.span
        for tile in (config.block_m, config.block_n):
            assert tile >= 16
            assert tile & (tile - 1) == 0
        assert config.num_warps in (1, 2, 4, 8)
        if aligned:
            assert span % config.block_n == 0 and 0 <= span - streamed < config.block_n
        else:
            assert span == streamed


@pytest.mark.parametrize(
    ("cells", "tile"),
    [(1, 16), (16, 16), (24, 32), (49, 64), (64, 64), (77, 32), (256, 128), (273, 64)],
)
def test_a_tile_leaves_few_rows_idle(cells, tile):
    assert staying_tile(cells, 128) == tile


@pytest.mark.parametrize("facts", [{"head_dim": 257}, {"element_size": 8}], ids=str)
def test_regions_that_no_kernel_takes_are_refused(facts):
    defaults = {"head_dim": 32, "head_dim_v": 32, "element_size": 2}
    with pytest.raises(ValueError, match="select_region_tiles"):
        select_region_tiles("fwd", cells=4, streamed_cells=4, **{**defaults, **facts})
