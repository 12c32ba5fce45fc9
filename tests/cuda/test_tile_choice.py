"""Tile choice: a pure function, swept over what can be asked of it."""

from __future__ import annotations

import itertools

import pytest

CAPABILITIES = (80, 86, 89, 90, 100, 120)
FORMATS = ("none", "int8", "int4", "fp8")


def shape(shim, **facts):
    defaults = {"capability": 80, "dtype": "bfloat16", "qk": "none", "pv": "none"}
    defaults |= {"head_dim": 128, "head_dim_v": 128, "unit": 64, "block_kv": 64}
    facts = {**defaults, "q_rows": 64, "kv_rows": 64, **facts}
    named = {"dtype": shim.Dtype, "qk": shim.Format, "pv": shim.Format}
    facts |= {name: enum.__members__[facts[name]] for name, enum in named.items()}
    return shim.Shape(**facts)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_shape_has_a_kernel_that_fits_or_a_reason(shim, capability):
    accepted = 0
    for qk, pv, head_dim, unit in itertools.product(
        FORMATS[:3], FORMATS, (*range(8, 136, 8), 192, 256, 264), (1, 16, 64, 96, 128, 1024)
    ):
        asked = shape(
            shim, capability=capability, qk=qk, pv=pv, head_dim=head_dim, head_dim_v=64, unit=unit
        )
        if shim.why_not(asked) is not None:
            with pytest.raises(ValueError):
                shim.select_config(asked)
            continue
        accepted += 1
        config = shim.select_config(asked)
        assert config.dim >= head_dim
        assert config.block_m % (16 * config.warps) == 0
        assert unit % config.block_m == 0 or config.block_m == 64
        shared = shim.shared_bytes(config, shim.Dtype.bfloat16)
        assert 0 < shared <= shim.shared_limit(capability)
    assert accepted > 100


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"capability": 75}, "compute capability 8.0"),
        ({"dtype": "float32"}, "bfloat16 or float16"),
        ({"head_dim": 20}, "multiples of 8"),
        ({"head_dim_v": 264}, "multiples of 8 up to 256"),
        ({"qk": "int8", "pv": "int8", "head_dim": 256}, "head dims up to 128"),
        ({"pv": "int8"}, "only together with Q and K"),
        ({"qk": "int8", "pv": "fp8"}, "on compute capability 8.9, 9.0 and 12.0"),
        ({"qk": "int8", "pv": "fp8", "capability": 100}, "on compute capability 8.9, 9.0 and 12"),
        ({"qk": "int8", "pv": "int8", "kv_rows": 16}, "kv_rows_per_scale of 64"),
        ({"qk": "int4", "pv": "int8"}, "no kernel for these formats"),
        ({"qk": "int4", "pv": "int4", "capability": 90}, "before compute capability 9.0"),
        ({"qk": "int8", "head_dim": 40}, "multiples of 16"),
        ({"qk": "int4", "head_dim": 48}, "multiples of 32"),
    ],
    ids=lambda x: str(x) if isinstance(x, str) else "",
)
def test_says_why_there_is_no_kernel(shim, facts, reason):
    assert reason in shim.why_not(shape(shim, **facts))


def test_wide_units_get_wide_tiles(shim):
    assert shim.select_config(shape(shim, unit=256)).block_m == 128
    assert shim.select_config(shape(shim, unit=64)).block_m == 64
    assert shim.select_config(shape(shim, unit=256, head_dim=256)).block_m == 64
