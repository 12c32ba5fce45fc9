"""Kernels for 8.0 and on as nvcc compiles them, on the simulator of tests/ptxsim.

By hand, all kernels of attention: python tests/cuda/ptx_cases.py
"""

from __future__ import annotations

from collections.abc import Callable

import deletions
import ptxsim
import pytest
import recorded_cases
import simulated
import torch
from ptx_cases import check_kernel
from recorded_cases import recorded, shim_path  # noqa: F401
from replays import Recording, Region
from simulated import ptx_of
from test_every_kernel import for_mma
from torch import Tensor

pytestmark = pytest.mark.skipif(simulated.why_not() is not None, reason=str(simulated.why_not()))

# Every pair of formats, every width, tiles of 64 and of 128 queries, both dtypes.
NAMES = (
    *("bfloat16-none-none-64-64", "float16-none-none-64-128", "bfloat16-none-none-96-128"),
    *("float16-none-none-128-64", "bfloat16-none-none-256-64", "bfloat16-int8-none-64-128"),
    *("float16-int8-none-128-64", "bfloat16-int8-int8-128-64", "bfloat16-int8-int4-64-64"),
    *("bfloat16-int8-fp8-64-64", "bfloat16-int4-none-128-64", "bfloat16-int4-int4-64-64"),
)
SAMPLE = [next(k for k in for_mma() if k.name == name) for name in NAMES]
# Rows made ready in float32 take nvcc as long as all the others.
OTHERS = [x for x in recorded_cases.MADE if not x.startswith(("attention-", "prepare-float32"))]


@pytest.mark.parametrize("kernel", SAMPLE, ids=str)
def test_attention_matches_float64(shim, kernel):
    symbol = check_kernel(shim, kernel)
    assert f"ELi{kernel.dim}ELi{kernel.blocks[0]}EE" in symbol


@pytest.mark.parametrize("kernel", [SAMPLE[0], SAMPLE[7]], ids=str)
def test_copies_may_land_at_once(shim, kernel):
    check_kernel(shim, kernel, eager=True)


def simulate(recording: Recording, edit: Callable[[str], str] = str) -> set[int]:
    """Runs the launches of a recording again, on PTX, from the same memory; lines that ran."""
    for region in recording.regions:
        storage(region).copy_(torch.frombuffer(bytearray(region.before), dtype=torch.uint8))
    memory, ran = [storage(r) for r in recording.regions], set()
    for x in recording.launches:
        facts = (x.kernel, x.blocks, x.threads, x.shared_bytes, x.parameters)
        ran |= ptxsim.launch(edit(ptx_of(x.kernel)), *facts, memory, most_steps=20_000).lines
    return ran


def storage(region: Region) -> Tensor:
    return torch.tensor([], dtype=torch.uint8).set_(region.tensor.untyped_storage())


def test_whatever_is_left_out_is_noticed(recorded):  # noqa: F811
    recording = recorded("attention-causal-tails")[0]
    ran = simulate(recording)
    wanted = [bytes(storage(r).numpy()) for r in recording.regions]

    def is_right(text: str) -> bool:
        simulate(recording, lambda _: text)
        return wanted == [bytes(storage(r).numpy()) for r in recording.regions]

    outcomes = deletions.try_all(ptx_of(recording.launches[0].kernel), frozenset(ran), is_right)
    report = deletions.told(outcomes)
    print(report)
    survivors = [s for o in outcomes.values() for s in o.survivors]
    # The last one waits for groups that hold no copies.
    (last,) = survivors
    assert last.endswith("cp.async.wait_group 0;"), report


@pytest.mark.parametrize("name", OTHERS)
def test_rows_and_lists_are_those_of_the_sources(recorded, name):  # noqa: F811
    """Whole numbers to the last bit; sums may be fused with products."""
    for recording in recorded(name):
        simulate(recording)
        for region, after in zip(recording.regions, recording.after, strict=True):
            dtype = region.tensor.dtype
            found = storage(region).view(dtype)
            wanted = torch.frombuffer(bytearray(after), dtype=dtype)
            if dtype.is_floating_point and dtype.itemsize > 1:
                torch.testing.assert_close(found, wanted)
            else:
                assert torch.equal(found.view(torch.uint8), wanted.view(torch.uint8))
