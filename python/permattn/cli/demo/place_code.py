"""Query and key weights that make a head show one pattern where RoPE does not tell places apart.

Features of a visual token hold its place as cosines and sines, as vision towers with position
embeddings leave it there. Query and key weights read this code into pairs of RoPE that hardly turn:

    place      the same place in every frame: code times code, a function of (dh, dw)
    grid       one place of every frame, seen by everyone: the query holds that place's code
    local      this frame and its neighbours: constant times constant on the pairs that turn
    sink       the first token: a key weight reads its embedding
    spots      visual tokens that the projector finds salient: a key weight reads their mark

Constants are biases where the decoder has them (Qwen2). Elsewhere (Qwen3) weights read a coordinate
that every token holds, and since q_norm and k_norm fix the norm of a head's vector, a pair that the
other side does not read takes what is left of the norm.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from permattn.cli.demo.circuits import (
    CONTENT,
    CONTENT_KEY,
    HEAD_DIM,
    KEY_BIAS,
    MARK_SIZE,
    PAIRS,
    HeadKind,
    Sizes,
)

# The code is one cosine and one sine per wave, each of its own length and direction: codes of two
# places are alike only where the places are (a separate code per axis would be half alike in every
# row and column). Spread by the golden ratio; of offsets this one keeps other places furthest.
_WAVES = 10
_RADIUS = torch.linspace(1.2, 2.2, _WAVES, dtype=torch.double)
_ANGLE = math.pi * ((torch.arange(_WAVES, dtype=torch.double) * 0.618034 + 0.272) % 1.0)
CODE_SIZE = 2 * _WAVES
# Residual coordinates that random weights never write: the first token, what every other token
# holds, the mark of salient tokens, and the code.
BOS, ONE, SPOT, CODE = 0, 1, 2, 3
RESERVED = CODE + CODE_SIZE
# Sizes where random coordinates have standard deviation 1.
ONE_SIZE, CODE_HEIGHT = 8.0, 4.0
# Output weights are scaled by it, so that layers do not drown the code.
DAMPING = 0.5
# Mean square of a hidden state: at the start, and what every layer adds.
_START_SQUARE, _LAYER_SQUARE = 1.18, 0.24
# Norm of every query, and the constant that keys add to theirs, where vectors are normalised.
_QUERY_NORM, _KEY_SLACK = 44.0, 40.0

KINDS = (
    HeadKind("place", place=24.0, sink=23.0),
    HeadKind("grid", time=4.0, grid=14.0, sink=17.0),
    HeadKind("local", place=2.0, time=16.0, sink=12.0),
    HeadKind("sink", time=5.0, sink=13.0),
    HeadKind("place and grid", place=21.0, grid=20.0, sink=20.0),
    HeadKind("spots", time=6.0, spots=12.0, sink=12.0),
    HeadKind("near", place=6.0, time=12.0, sink=14.0),
    HeadKind("near and spots", place=5.0, time=14.0, spots=16.0),
)


def code_of(height: Tensor, width: Tensor) -> Tensor:
    """float64 [n, CODE_SIZE]: the code of places, in tokens from the top left."""
    down, right = _RADIUS * _ANGLE.cos(), _RADIUS * _ANGLE.sin()
    angle = height.double()[:, None] * down + width.double()[:, None] * right
    return torch.cat((angle.cos(), angle.sin()), -1)


@dataclass(frozen=True)
class Pairs:
    """Which pairs of a head hold what.

    Args:
        moving: pairs that tell neighbouring frames apart and turn at most once per few frames.
        code: pairs that hardly turn, one per wave.
        sink, spots: pairs for single values.
        query_slack, key_slack: pairs that only one side writes.
    """

    moving: tuple[int, ...]
    code: tuple[int, ...]
    sink: int
    spots: int
    query_slack: int
    key_slack: int

    @classmethod
    def of(cls, theta: float, step: float, time_pairs: tuple[int, ...]) -> Pairs:
        """The pairs for a rotary embedding of base `theta`.

        Args:
            step: positions from one frame to the next.
            time_pairs: pairs that turn with time.
        """
        moving = tuple(i for i in time_pairs if 0.1 <= step * theta ** (-i / PAIRS) <= 2.2)
        last = PAIRS - 1
        code = tuple(range(last - 3 - _WAVES, last - 3))
        return cls(moving, code, last, last - 1, last - 2, last - 3)

    @property
    def code_values(self) -> list[int]:
        """Values of a head that hold the code, in the order of `code_of`."""
        return [i + part for part in (0, PAIRS) for i in self.code]


def _amplitude(score: float, pairs: int, key: float) -> float:
    """The query value per pair that gives this score against keys of size `key`."""
    return score * math.sqrt(HEAD_DIM) / (pairs * key)


def write_attention(
    attention: Any,
    kinds: tuple[HeadKind, ...],
    pairs: Pairs,
    place: tuple[int, int],
    sizes: Sizes,
    layer: int,
) -> None:
    """All query and key weights of one layer; other weights of the layer are random.

    Args:
        place: height and width that grid heads look at.
    """
    square = _START_SQUARE + layer * _LAYER_SQUARE
    for linear in (attention.q_proj, attention.k_proj):
        linear.weight.mul_(CONTENT)
        linear.weight[:, :RESERVED] = 0.0
        if linear.bias is not None:
            linear.bias.zero_()
    target = code_of(*(torch.tensor([x]) for x in place))[0]
    is_normalised = hasattr(attention, "q_norm")
    for head, kind in enumerate(kinds):
        _write_query(attention.q_proj, head, kind, pairs, target, square, is_normalised)
    for head in range(sizes.kv_heads):
        _write_key(attention.k_proj, head, pairs, sizes, square, is_normalised)
    if is_normalised:
        key_norm = math.sqrt(_key_square(pairs) + _KEY_SLACK**2)
        attention.q_norm.weight.fill_(_QUERY_NORM / math.sqrt(HEAD_DIM))
        attention.k_norm.weight.fill_(key_norm / math.sqrt(HEAD_DIM))
        attention.q_norm.weight[[pairs.key_slack, pairs.key_slack + PAIRS]] = 0.0
        attention.k_norm.weight[[pairs.query_slack, pairs.query_slack + PAIRS]] = 0.0


def _key_square(pairs: Pairs) -> float:
    constant = (len(pairs.moving) + len(pairs.code)) * KEY_BIAS**2
    return constant + HEAD_DIM * CONTENT**2


def _write_query(
    linear: Any,
    head: int,
    kind: HeadKind,
    pairs: Pairs,
    target: Tensor,
    square: float,
    is_normalised: bool,
) -> None:
    rows = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
    weight = linear.weight[rows]
    constant = torch.zeros(HEAD_DIM, dtype=torch.double)
    constant[list(pairs.moving)] = _amplitude(kind.time, len(pairs.moving), KEY_BIAS)
    constant[pairs.sink] = _amplitude(kind.sink, 1, CONTENT_KEY)
    constant[pairs.spots] = _amplitude(kind.spots, 1, CONTENT_KEY)
    constant[pairs.code_values] = target * _amplitude(kind.grid, len(pairs.code), KEY_BIAS)
    own = _amplitude(kind.place, len(pairs.code), KEY_BIAS)
    weight[pairs.code_values, range(CODE, RESERVED)] = own * math.sqrt(square) / CODE_HEIGHT
    if is_normalised:
        used = float(constant.square().sum()) + len(pairs.code) * own**2
        used += HEAD_DIM * CONTENT**2
        constant[pairs.query_slack] = math.sqrt(max(0.0, _QUERY_NORM**2 - used))
    _write_constant(linear, rows, constant, square)


def _write_key(
    linear: Any, head: int, pairs: Pairs, sizes: Sizes, square: float, is_normalised: bool
) -> None:
    rows = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
    weight = linear.weight[rows]
    constant = torch.zeros(HEAD_DIM, dtype=torch.double)
    constant[list(pairs.moving)] = KEY_BIAS
    weight[pairs.code_values, range(CODE, RESERVED)] = KEY_BIAS * math.sqrt(square) / CODE_HEIGHT
    # A token that is one coordinate has it at sqrt(hidden) behind RMSNorm; a mark has this share.
    size = math.sqrt(sizes.hidden)
    marked = size * MARK_SIZE / math.sqrt(MARK_SIZE**2 + square)
    if linear.bias is not None:
        # The first token stands apart: its weight takes the bias away.
        weight[:, BOS] = (-constant / size).to(weight)
    weight[pairs.sink, BOS] = CONTENT_KEY / size
    weight[pairs.spots, SPOT] = CONTENT_KEY / marked
    if is_normalised:
        constant[pairs.key_slack] = _KEY_SLACK
        rest = math.sqrt(_key_square(pairs) + _KEY_SLACK**2 - CONTENT_KEY**2)
        weight[pairs.key_slack, BOS] = rest / size
        weight[pairs.key_slack, SPOT] = rest / marked
    _write_constant(linear, rows, constant, square)


def _write_constant(linear: Any, rows: slice, values: Tensor, square: float) -> None:
    """Adds values to every token's vector but the first's."""
    if linear.bias is not None:
        linear.bias[rows] = values.to(linear.bias)
    else:
        linear.weight[rows, ONE] = (values * math.sqrt(square) / ONE_SIZE).to(linear.weight)
