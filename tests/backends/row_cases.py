"""Rows, and transforms of them, that kernels which prepare rows are tried with."""

from __future__ import annotations

from collections.abc import Callable

import torch
from permattn.core.prologue import RowTransform
from torch import Tensor


def rows_of_every_size(
    dtype: torch.dtype, dim: int = 64, tokens: int = 150, heads: int = 2
) -> Tensor:
    """Groups that are zeros, tiny, huge, of one outlier, and ties of rounding."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, heads, tokens, dim, generator=g)
    info = torch.finfo(dtype)
    x[0, 0, :64] = 0.0
    x[0, 0, 64:128] *= info.tiny / 4
    x[0, 1, :64] *= info.max / 16
    x[0, 1, 64:128, 3] = 1e4
    x[1, 0, :64] = torch.randint(-254, 255, (64, dim), generator=g) / 2
    x[1, 0, 0, 0] = 127.0
    x[1, 1, :, 1] = 0.0
    if dtype != torch.float16:
        x[1, 1, :64] *= 1e-31
    return x.clamp(-info.max, info.max).to(dtype)


def transform(
    norm: str,
    rope: str,
    across: bool,
    *,
    heads: int = 4,
    dim: int = 40,
    tokens: int = 100,
    dtype: torch.dtype = torch.bfloat16,
) -> Callable[[bool], RowTransform]:
    """A transform by whether its pairs are interleaved.

    Args:
        norm: of RowTransform.
        rope: "none"; "whole" = all columns of all tokens; "part" = the first columns of all but
            the first and last tokens.
        across: the norm is over all heads.
    """
    g = torch.Generator().manual_seed(5)
    width = heads * dim if across else dim
    weight = bias = cos = sin = None
    if norm != "none":
        weight = (1 + 0.2 * torch.randn(width, generator=g)).to(dtype)
        bias = (0.1 * torch.randn(width, generator=g)).to(dtype) if norm == "layer" else None
    start, pairs = {"none": (0, 0), "whole": (0, dim // 2), "part": (7, dim // 2 - 3)}[rope]
    if pairs:
        angle = 6.3 * torch.rand(tokens - 2 * start, pairs, generator=g)
        cos, sin = angle.cos(), angle.sin()
    return lambda interleaved: RowTransform(
        norm, weight, bias, 1e-5, across, cos, sin, start, interleaved
    )
