"""Heads that aggregate around their own place: query and key biases that RoPE turns into distance.

A pair of values that holds (a, 0) in every query and every key contributes a^2 cos(f d) to the
score of two tokens at distance d, where f is the frequency of the pair. Non-negative sums of such
cosines fall with the distance as a wanted kernel does, axis by axis.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

HEAD_DIM = 64
# Pairs of the frame, height and width axis, and the base, as WanTransformer3DModel splits 64.
AXIS_PAIRS = (12, 10, 10)
THETA = 10_000.0
# The slowest pairs of height and width hardly turn within a video: they hold content.
CONTENT_PAIRS = (0, 4, 4)
# How far scores fall with the distance, at most: a head has that many nats to tell near from far.
_DEPTH = 12.0
# Distances that kernels are fitted on: longer axes than this repeat what the last pair does.
_REACH = 48
_STEPS = 4000


@dataclass(frozen=True)
class HeadKind:
    """What a head aggregates over: standard deviations along frames, height and width, in tokens.

    Args:
        name: for pictures and tables.
        widths: one per axis.
    """

    name: str
    widths: tuple[float, float, float]


KINDS = (
    HeadKind("line through time", (5.0, 0.7, 0.7)),
    HeadKind("time x height plane", (5.0, 6.0, 0.6)),
    HeadKind("row", (0.6, 0.7, 6.0)),
    HeadKind("neighbourhood", (1.1, 1.1, 1.1)),
    HeadKind("column", (1.2, 6.0, 0.7)),
    HeadKind("time x width plane", (5.0, 0.6, 5.0)),
    HeadKind("columns through time", (2.5, 8.0, 0.6)),
    HeadKind("wide neighbourhood", (2.0, 2.5, 2.2)),
)


def frequencies(axis: int) -> Tensor:
    """float64 [pairs]: how fast the pairs of an axis turn per token."""
    pairs = AXIS_PAIRS[axis]
    return THETA ** (-torch.arange(pairs, dtype=torch.float64) / pairs)


@lru_cache(maxsize=64)
def kernel_weights(axis: int, width: float) -> Tensor:
    """float64 [pairs]: weights >= 0 of the cosines whose sum falls like a Gaussian of this width.

    The exponent -d^2 / (2 width^2) is followed closely where it matters, and its floor loosely.
    """
    count = AXIS_PAIRS[axis] - CONTENT_PAIRS[axis]
    weights = torch.zeros(AXIS_PAIRS[axis], dtype=torch.float64)
    distance = torch.arange(_REACH, dtype=torch.float64)
    fall = (distance**2 / (2 * width**2)).clamp_max(_DEPTH)
    basis = 1 - torch.cos(distance[:, None] * frequencies(axis)[:count])
    importance = torch.exp(-fall / 8)[:, None]
    weights[:count] = _non_negative_fit(basis * importance, fall * importance[:, 0])
    return weights


def _non_negative_fit(basis: Tensor, target: Tensor) -> Tensor:
    """Least squares with weights >= 0, by multiplicative steps: all values here are >= 0."""
    gram, wanted = basis.mT @ basis, basis.mT @ target
    weights = torch.full_like(wanted, 0.1)
    for _ in range(_STEPS):
        weights *= wanted / (gram @ weights).clamp_min(1e-12)
    return weights


def place_bias(kind: HeadKind) -> Tensor:
    """float32 [HEAD_DIM]: the query and key bias of a head; interleaved pairs, as Wan turns them.

    Scores divide by sqrt(HEAD_DIM); the bias makes up for it.
    """
    weights = torch.cat([kernel_weights(axis, w) for axis, w in enumerate(kind.widths)])
    bias = torch.zeros(HEAD_DIM)
    bias[0::2] = (weights * math.sqrt(HEAD_DIM)).sqrt().float()
    return bias


def content_values() -> Tensor:
    """int64: the places of a head's 64 values that hold content."""
    ends = torch.tensor(AXIS_PAIRS).cumsum(0).tolist()
    pairs = torch.cat(
        [torch.arange(end - count, end) for end, count in zip(ends, CONTENT_PAIRS, strict=True)]
    )
    return torch.stack((2 * pairs, 2 * pairs + 1), -1).flatten()
