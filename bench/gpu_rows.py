"""Sections about rows made ready and lists of blocks: cases of the CPU tests, to the last bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from permattn.backends import BACKENDS, reference
from permattn.core import BlockIndex
from permattn.core.prepare import PrepareArgs
from permattn.core.selection import pooled_blocks, strongest_of
from torch import Tensor

from bench.gpu_cases import DTYPES, tests_module
from bench.gpu_suite import Skip, Suite


def rows(suite: Suite) -> None:
    """Rows of every size, order, format and dtype equal those of `core.quant`, and so do scales."""
    cases = tests_module("test_cuda_prepare")
    shapes = cases.CASES[::4] if suite.rehearsal else cases.CASES
    dtypes = {"bf16": torch.bfloat16} if suite.rehearsal else DTYPES
    for dtype_name, dtype in dtypes.items():
        for fmt in cases.NAMES:
            for dim, order, size in shapes:
                for per_column in (False, True):
                    x = cases.rows_of_every_size(dtype, dim)
                    facts = (None, None, None, fmt, size, per_column)
                    args = PrepareArgs(x, cases.order_of(order), *facts)
                    name = f"{fmt}-{dtype_name}-d{dim}-{order}-{size}"
                    name += "-columns" if per_column else ""
                    _check_rows(suite, name, args, cases)


def _check_rows(suite: Suite, name: str, args: PrepareArgs, cases: Any) -> None:
    """Every layout that a backend has of a case; numbers that differ are counted."""
    want, want_scale = reference.prepare(args)
    layouts = {cases.ROWS: "rows", cases.NIBBLES: "nibbles", cases.FRAGMENTS: "fragments"}
    wanted = cases.layouts_of(args.fmt, args.x.shape[3], args.rows_per_scale)
    for number in wanted if suite.backend == "cuda" else wanted[:1]:

        def one(number: int = number) -> tuple[float, float]:
            made, scale = _prepared(suite, args, layouts[number])
            made = made.cpu()
            if suite.backend != "cuda":
                # Zeros may have another sign.
                off = int((made.float() != want.float()).sum())
            else:
                expected = cases.laid_out(want, args, number)
                if args.format is not None:
                    made, expected = made.view(torch.int8), expected.view(torch.int8)
                off = int((made != expected).sum())
            if args.format is not None and scale is not None:
                off += int((scale.cpu() != want_scale).sum())
            return float(off), 0.0

        suite.check(f"{name} {layouts[number]}", one)


def _prepared(suite: Suite, args: PrepareArgs, layout: Any) -> tuple[Tensor, Tensor | None]:
    token = args.token_of_slot
    there = PrepareArgs(
        args.x.to(suite.device),
        None if token is None else token.to(suite.device),
        *(args.transform, args.mean, args.factor, args.fmt, args.rows_per_scale, args.per_column),
    )
    if suite.backend != "cuda":
        return BACKENDS[suite.asked].prepare(there)
    from permattn.backends.cuda import device
    from permattn.backends.cuda.rows import make_rows

    if why := device.load_kernels():
        raise RuntimeError(why)
    made = make_rows(there, layout)
    return made.rows, made.scale


def lists(suite: Suite) -> None:
    """Lists made of masks, turned, pooled and chosen are exactly those of the core."""
    if suite.backend != "cuda":
        raise Skip("lists of blocks are made by the CUDA kernels alone")
    from permattn.backends.cuda import device

    if why := device.load_kernels():
        raise RuntimeError(why)
    cases = tests_module("test_cuda_index")
    ops: Any = torch.ops.permattn_native
    for shape in cases.SHAPES[:3] if suite.rehearsal else cases.SHAPES:
        for density in (0.0, 0.3, 1.0):
            mask = cases.mask_of(shape, density)
            want = BlockIndex.from_block_mask(mask, 64, 64, full=True)
            index = cases.mixed_index(mask)

            def compact(found: list[Tensor], mask: Tensor = mask) -> None:
                ops.cuda_compact(mask.to(suite.device), True, *found)

            def turn(found: list[Tensor], index: BlockIndex = index) -> None:
                given = (index.kv_indices, index.row_offsets, index.kv_num_full)
                ops.cuda_transpose(*(x.to(suite.device) for x in given), *found)

            name = f"{shape} {density}"
            _check_lists(suite, f"compact {name}", shape[:2], want, compact)
            _check_lists(suite, f"transpose {name}", shape[:2], index.transpose(shape[3]), turn)
    _check_choices(suite, ops, cases)


def _check_lists(
    suite: Suite,
    name: str,
    heads: tuple[int, int],
    want: BlockIndex,
    make: Callable[[list[Tensor]], None],
) -> None:
    def one() -> tuple[float, float]:
        sizes = (want.capacity, want.num_q_blocks + 1, want.num_q_blocks)
        found = [torch.full((*heads, n), -7, dtype=torch.int32).to(suite.device) for n in sizes]
        make(found)
        pairs = zip(found, (want.kv_indices, want.row_offsets, want.kv_num_full), strict=True)
        return float(sum(int((a.cpu() != b).sum()) for a, b in pairs)), 0.0

    suite.check(name, one)


def _check_choices(suite: Suite, ops: Any, cases: Any) -> None:
    """Pooled blocks, their products, and the strongest of every row."""
    g = torch.Generator().manual_seed(3)
    for dim, block in ((40, 16), (128, 64), (256, 100)):

        def pool(dim: int = dim, block: int = block) -> tuple[float, float]:
            x = torch.randn(2, 150, 3, dim, generator=g).bfloat16().transpose(1, 2)
            want = pooled_blocks(x, block, None)
            found = torch.full_like(want, float("nan")).to(suite.device)
            ops.cuda_pool(x.to(suite.device), None, block, found)
            return float((found.cpu() - want).abs().max()), 2e-5 * float(want.abs().max())

        suite.check(f"pool d{dim} {block}", pool)
    for kind in ("any", "equals", "unreachable", "zeros", "close"):
        score = cases.scores_of(kind, (2, 3, 20, 130))

        def strongest(score: Tensor = score) -> tuple[float, float]:
            want = strongest_of(score, torch.full((1, 1, 20), 130), 9, None, 9)
            found = torch.full_like(want, -9).to(suite.device)
            ops.cuda_strongest(score.to(suite.device), None, None, found)
            return float((found.cpu() != want).sum()), 0.0

        suite.check(f"strongest {kind}", strongest)
