"""What nvcc compiles: TMA, an mbarrier ring and wgmma, whole and with one thing missing."""

from __future__ import annotations

import struct

import compiled
import deletions
import numpy as np
import ptxsim
import pytest
import torch

pytestmark = pytest.mark.skipif(compiled.why_not() is not None, reason=str(compiled.why_not()))
SOURCE = compiled.KERNELS / "pipelined_product.cu"
ROWS, STEPS = 128, 3


@pytest.fixture(scope="module")
def ptx() -> str:
    return compiled.ptx_of(SOURCE, "sm_90a")


def operands(kind: str) -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray]:
    """Bit patterns, values, and a poisoned result."""
    rng = np.random.default_rng(0)
    if kind == "s8":
        bits = [rng.integers(-128, 128, (ROWS, 128 * STEPS)).astype(np.int8) for _ in "ab"]
        return bits, [x.astype(np.float64) for x in bits], np.full((ROWS, ROWS), 77, np.int32)
    made = [torch.from_numpy(rng.normal(size=(ROWS, 64 * STEPS))).bfloat16() for _ in "ab"]
    bits = [x.view(torch.uint16).numpy() for x in made]
    return bits, [x.double().numpy() for x in made], np.full((ROWS, ROWS), np.nan, np.float32)


def multiply(ptx: str, kind: str, blocks: int = 2, **options):
    """(found, wanted, report) of the first blocks."""
    bits, values, sums = operands(kind)
    box = (64, 128 if kind == "s8" else 64)
    maps = b"".join(ptxsim.TensorMap.of(x, box, 128).to_bytes() for x in bits)
    params = maps + struct.pack("<qii", sums.ctypes.data, ROWS, STEPS)
    memory = [ptxsim.Region.of(x, n, read_only=True) for x, n in zip(bits, "ab", strict=True)]
    memory.append(ptxsim.Region.of(sums, "sums"))
    facts = ((blocks, blocks), 256, 2 * 2 * 64 * 128 + 32)
    packed = params.ljust(320, b"\0")
    report = ptxsim.launch(ptx, f"product_{kind}", *facts, packed, memory, **options)
    corner = np.s_[: 64 * blocks, : 64 * blocks]
    return sums[corner], (values[0] @ values[1].T)[corner], report


@pytest.mark.parametrize("kind", ["bf16", "s8"])
@pytest.mark.parametrize("options", [{}, {"eager": True}, {"blocks_at_once": 4}], ids=str)
def test_a_pipeline_of_bulk_copies_and_products(ptx, kind, options):
    found, wanted, _ = multiply(ptx, kind, **options)
    np.testing.assert_allclose(found, wanted, 1e-5, 0 if kind == "s8" else 1e-4)


def test_an_error_names_the_line_of_the_source(ptx):
    broken = ptx.replace("fence.mbarrier_init.release.cluster;", "")
    line = next(
        number
        for number, text in enumerate(SOURCE.read_text(encoding="utf-8").splitlines(), 1)
        if "cp.async.bulk.tensor.2d" in text
    )
    with pytest.raises(ptxsim.SimulationError) as error:
        multiply(broken, "s8")
    named = int(str(error.value).rsplit(f"{SOURCE.name}:", 1)[1].split("]")[0].split(" ")[0])
    assert abs(named - line) <= 2


def test_whatever_is_left_out_is_noticed(ptx):
    def is_right(text: str) -> bool:
        found, wanted, _ = multiply(text, "s8", blocks=1, most_steps=20_000)
        return bool((found == wanted).all())

    # Only the second of the two kernels runs: mutants of the first would change nothing.
    start = ptx.index(".visible .entry product_s8")
    body = ptx[: ptx.index(".visible .entry")] + ptx[start:]
    found, wanted, ran = multiply(body, "s8", blocks=1)
    assert (found == wanted).all()
    outcomes = deletions.try_all(body, ran.lines, is_right)
    report = deletions.told(outcomes)
    print(report)
    made = sum(o.made for o in outcomes.values())
    survivors = [s for o in outcomes.values() for s in o.survivors]
    assert made >= 12, report
    assert not survivors, report
