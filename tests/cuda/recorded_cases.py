"""Launches of shipped kernels that are run again with checks, and on PTX."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import replays
import torch
from kernel_cases import BRAIN, HALF, WINDOW, Case, a_shape, dense, drawn
from launches import Call, attend
from permattn import testing
from permattn.backends.cuda import device
from permattn.core import BlockIndex, QuantSpec
from permattn.core.prologue import Prologue, RowTransform, pack_prologue
from permattn.patterns.dense import plan_dense
from permattn.testing import split_plan
from quantised_cases import QuantCase
from replays import Recording
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "backends"))
import cuda_on_cpu

# csrc/common/quant.h: Format and Layout.
NONE, INT8, INT4, FP8 = range(4)
ROWS, FRAGMENTS = 0, 6


@dataclass
class Recorder:
    """Records launches as `launches.run_here` makes them."""

    recordings: list[Recording] = field(default_factory=list)

    def __call__(self, shim: ModuleType, args: Any, config: Any, tensors: list[Tensor]) -> None:
        run = lambda: shim.attend(args, config)  # noqa: E731
        self.recordings.append(replays.record(shim, run, tensors))


Made = Callable[[ModuleType], list[Recording]]


def attention(case: Case, capability: int = 80) -> Made:
    def make(shim: ModuleType) -> list[Recording]:
        recorder, plan = Recorder(), case.plan()
        q, k, v, *_ = case.inputs(plan)
        if isinstance(case, QuantCase):
            plan = case.arguments().plan
        attend(shim, Call(q, k, v, plan, case.scale, capability, run=recorder))
        return recorder.recordings

    return make


WIDE = {"heads": 1, "dim": 64, "dim_v": 64}
ATTENTION = [
    Case("causal-tails", dense(131, 131), **WIDE, dtype=BRAIN),
    Case(
        "tiles-of-128-queries",
        drawn(150, 130, density=0.7, block_q=128, block_kv=64),
        **WIDE,
        dtype=BRAIN,
    ),
    Case(
        "dim-128-gqa-different-orders",
        drawn(70, 90, heads=2, permuted=True, holes=5, block_q=32, block_kv=16, band=WINDOW),
        heads=2,
        dim=128,
        dim_v=104,
        dtype=HALF,
    ),
    Case("dim-96", drawn(128, 40, block_q=128, block_kv=40), dim=96, dim_v=80, dtype=BRAIN),
    Case("dim-256", dense(40, 64), heads=1, dim=256, dim_v=256, dtype=BRAIN),
    Case("two-parts-one-launch", lambda: a_shape(100, sink=16), **WIDE, dtype=BRAIN),
    Case("carried-state", lambda: split_plan(40, 50, heads=1, seed=2), **WIDE, dtype=BRAIN),
    Case("negative-scale", dense(40, 70), **WIDE, dtype=BRAIN, scale=-0.3),
]


def causal():
    return plan_dense(100, 100, causal=True, block_q=64, block_kv=64)


def permuted():
    return drawn(70, 130, density=0.7, permuted=True, holes=5, block_q=64, block_kv=64)()


SMALL = [
    QuantCase(f"{qk}-{pv}", plan, **WIDE, dtype=BRAIN, spec=QuantSpec(qk, pv, 32, 64))
    for (qk, pv), plan in {
        ("int8", "none"): permuted,
        ("int8", "int8"): causal,
        ("int8", "fp8"): permuted,
        ("int4", "none"): permuted,
        ("int4", "int4"): permuted,
    }.items()
]


def operator(name: str, *args: Any) -> Made:
    return lambda shim: [replays.record_operator(shim, name, *args)]


def drawn_numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def turned(norm: str, across: bool, heads: int, dim: int, tokens: int) -> tuple:
    """A prologue of a norm and a rotary embedding, as the operators take it."""
    width = heads * dim if across else dim
    bias = drawn_numbers(width, seed=2) if norm == "layer" else None
    angle = drawn_numbers(tokens, dim // 2, seed=3)
    made = RowTransform(
        norm, drawn_numbers(width, seed=1), bias, 1e-5, across, angle.cos(), angle.sin(), 0, False
    )
    return pack_prologue(Prologue(made))


def prepare(
    dtype: torch.dtype, dim: int, transform, fmt: int, size: int, layout: int, per_column: bool
) -> Made:
    """Rows of 100 tokens, in an order of their own and with holes."""
    x = drawn_numbers(1, 2, 100, dim).to(dtype)
    g = torch.Generator().manual_seed(4)
    token = testing.random_permutation(100, heads=2, holes=9, generator=g).token_of_slot
    slots = token.shape[2]
    groups = -(-slots // size)
    tensors, ints, floats = transform
    shape: tuple[int, ...] = (1, 2, slots, dim)
    if layout == FRAGMENTS:
        shape = (1, 2, groups, dim, size // 2 if fmt == INT4 else size)
    rows = torch.zeros(shape, dtype=x.dtype if fmt == NONE else torch.int8)
    if fmt == FP8:
        rows = rows.view(torch.float8_e4m3fn)
    scales = torch.zeros(1, 2, groups, *([dim] if per_column else []))
    wanted = None if fmt == NONE else scales
    given = (x, token, [t.float() for t in tensors], ints, floats, None, None, None, None)
    return operator("cuda_prepare", *given, fmt, size, per_column, layout, rows, wanted)


def statistics() -> Made:
    x = drawn_numbers(1, 2, 600, 40) + 3
    tensors, ints, floats = turned("layer", False, 2, 40, 600)
    seen = drawn_numbers(1, 2, 600) < 0.7
    found = [torch.zeros(1, 2, 40) for _ in range(3)]
    return operator("cuda_column_statistics", x, tensors, ints, floats, seen, *found)


def lists(heads: int, rows: int, capacity: int) -> list[Tensor]:
    shapes = ((1, heads, capacity), (1, heads, rows + 1), (1, heads, rows))
    return [torch.zeros(s, dtype=torch.int32) for s in shapes]


def compact() -> Made:
    return operator("cuda_compact", drawn_numbers(1, 2, 40, 70) < 0, False, *lists(2, 40, 1400))


def transpose() -> Made:
    index = BlockIndex.from_block_mask(drawn_numbers(1, 2, 40, 70) < 0, 64, 32)
    given = (index.kv_indices, index.row_offsets, index.kv_num_full)
    return operator("cuda_transpose", *given, *lists(2, 70, index.capacity))


def order() -> Made:
    length = torch.randint(0, 40, (1, 2, 600), generator=torch.Generator().manual_seed(5))
    offsets = torch.nn.functional.pad(length.cumsum(-1), (1, 0)).int().contiguous()
    ints = [1, 2, 600, 1, 1, 64, 64, 64, 2560]
    return operator("cuda_order", [offsets], ints, torch.zeros(1200, dtype=torch.int32))


def pool() -> Made:
    g = torch.Generator().manual_seed(6)
    token = testing.random_permutation(150, heads=2, holes=20, generator=g).token_of_slot
    means = torch.zeros(1, 2, -(-token.shape[2] // 64), 40)
    return operator("cuda_pool", drawn_numbers(1, 2, 150, 40).to(BRAIN), token, 64, means)


def scores() -> Made:
    q, k = drawn_numbers(1, 2, 70, 40), drawn_numbers(1, 1, 130, 40, seed=1)
    return operator("cuda_scores", q, k, 0.3, torch.zeros(1, 2, 70, 130))


def strongest() -> Made:
    chosen = torch.zeros(1, 2, 20, 9, dtype=torch.int32)
    stop = torch.arange(20, dtype=torch.int32) * 6
    return operator("cuda_strongest", drawn_numbers(1, 2, 20, 130).round(), stop, None, chosen)


def probe() -> Made:
    """Two splits of the axis, an order, and keys that diagonals leave out."""
    q, k = drawn_numbers(1, 1, 20, 40).to(BRAIN), drawn_numbers(1, 1, 1030, 40, seed=1).to(BRAIN)
    g = torch.Generator().manual_seed(7)
    order = torch.randperm(1030, generator=g, dtype=torch.int32)[None]
    skip = drawn_numbers(1, 1, 1030, seed=2) < -1
    first, ranges = torch.tensor([1010], dtype=torch.int32), torch.tensor([[3, 1030]]).int()
    found = [torch.zeros(1, 1, n) for n in (20, 1030, 1030, 1030)]
    return operator("cuda_probe", q, k, first, first, ranges, order, skip, False, 20, *found)


def finish() -> Made:
    acc, high = drawn_numbers(1, 2, 70, 40), drawn_numbers(1, 2, 70, seed=1)
    total = drawn_numbers(1, 2, 70, seed=2).abs().masked_fill(high > 1, 0.0)
    out, lse = torch.zeros(1, 2, 70, 40, dtype=BRAIN), torch.zeros(1, 2, 70)
    return operator("cuda_finish", acc, high, total, out, lse)


PLAIN: tuple = ([], [], [])
NORM = ("rms", False, 2)
MADE: dict[str, Made] = {
    **{f"attention-{c}": attention(c) for c in ATTENTION},
    **{f"attention-{c}": attention(c, 89) for c in SMALL},
    "prepare-norm-rope": prepare(BRAIN, 64, turned(*NORM, 64, 100), INT8, 64, ROWS, False),
    "prepare-across-heads": prepare(
        BRAIN, 40, turned("layer", True, 2, 40, 100), INT8, 16, ROWS, True
    ),
    "prepare-fragments": prepare(BRAIN, 200, PLAIN, INT4, 128, FRAGMENTS, True),
    "prepare-float32": prepare(
        torch.float32, 256, turned(*NORM, 256, 100), FP8, 128, FRAGMENTS, True
    ),
    **{f.__name__: f() for f in (statistics, compact, transpose, order)},
    **{f.__name__: f() for f in (pool, scores, strongest, probe, finish)},
}


shim_path = cuda_on_cpu.shim_path


@pytest.fixture(scope="session")
def recorded(shim: ModuleType, shim_path: str) -> Callable[[str], list[Recording]]:
    """Recordings of a case by its name, made when they are first asked for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device, "SHIM", shim_path)
        why = device.load_kernels.__wrapped__()
    if why is not None:
        pytest.skip(why)
    return functools.cache(lambda name: MADE[name](shim))
