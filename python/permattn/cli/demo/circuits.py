"""Query, key and value weights that make a head show one pattern through M-RoPE.

    place      the same place in every earlier frame: bias times bias, a function of (dh, dw)
    local      this frame and its neighbours: bias times bias, a function of dt
    sink       the first token: a key weight reads its embedding
    grid       one place of every frame, seen by everyone: a vertical line per frame
    spots      a few single tokens, seen by everyone

Grid and spots are a circuit of two layers. In layer 0 one head looks at itself, except where
M-RoPE says that it stands at the place a marker token of the prompt points to; there it reads the
marker, and o_proj writes a mark into the residual. Key weights of later layers read the mark.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Residual coordinates that random weights never write, one per thing that key weights read.
BOS, GRID_MARKER, GRID_MARK, SPOT_MARK, SPOT_MARKERS = 0, 1, 2, 3, 4

HEAD_DIM = 128
PAIRS = HEAD_DIM // 2
# Pairs of the time, height and width section, as in the released Qwen2.5-VL models.
SECTIONS = (16, 24, 24)
# The slowest pairs of every section do not turn within any prompt: key weights write content there.
STILL = (4, 6, 6)
STILL_FREQUENCY = 1e-6

# What a key pair holds; a head chooses by its query bias how much it cares.
KEY_BIAS = 3.0
# Standard deviation of the random part of every query and key value.
CONTENT = 0.45
# Key value of a content pair where the thing is there, so that queries stay of moderate size.
CONTENT_KEY = 12.0
# Size of a mark where text and visual embeddings have 1, and its share of the token's norm then.
MARK_SIZE, MARK_SHARE = 3.0, 0.86
# Token ids: a visual token, and the first marker (the grid's; spots follow).
VIDEO_TOKEN, FIRST_MARKER = 4, 8


@dataclass(frozen=True)
class HeadKind:
    """Scores of one query head, in units of the softmax's exponent.

    Args:
        place: at the same height and width; one token away, an eighth of it is gone.
        time: at the same time.
        sink, grid, spots: at keys of that kind.
    """

    name: str
    place: float = 0.0
    time: float = 0.0
    sink: float = 0.0
    grid: float = 0.0
    spots: float = 0.0


MARKER = HeadKind("marker", place=36.0, time=14.0)
KINDS = (
    HeadKind("place", place=36.0, sink=38.0),
    HeadKind("grid", time=6.0, grid=9.0, sink=12.0),
    HeadKind("local", place=5.0, time=16.0, sink=12.0),
    HeadKind("sink", time=5.0, sink=13.0),
    HeadKind("place and grid", place=30.0, grid=29.0, sink=30.0),
    HeadKind("spots", time=6.0, spots=11.5, sink=12.0),
    HeadKind("near", place=8.0, time=12.0, sink=14.0),
    HeadKind("near and spots", place=6.0, time=14.0, spots=16.0),
)
# Marks do not exist yet where layer 0 makes its keys; its first head writes them.
FIRST_LAYER_KINDS = (KINDS[0], KINDS[6], KINDS[2], KINDS[3])


@dataclass(frozen=True)
class Sizes:
    """Sizes of the model. The defaults fit two CPU cores; tests take smaller ones."""

    mlp: int = 2048
    layers: int = 4
    heads: int = 8
    kv_heads: int = 2
    vocab: int = 2048
    vision_hidden: int = 128
    vision_depth: int = 3
    patch: int = 14
    num_spots: int = 8

    @property
    def hidden(self) -> int:
        return self.heads * HEAD_DIM


@dataclass(frozen=True)
class Grid:
    """The video in tokens, and the places that markers point to."""

    frames: int
    height: int
    width: int

    @property
    def num_tokens(self) -> int:
        return self.frames * self.height * self.width

    @property
    def place(self) -> tuple[int, int]:
        """Height and width of the vertical grid line."""
        return self.height // 3, self.width // 4

    def spots(self, count: int) -> list[tuple[int, int, int]]:
        """(t, h, w) of single tokens, scattered over the first three quarters."""
        steps = torch.arange(1, count + 1, dtype=torch.float64)
        # Fractions of the golden ratio and its powers: spread out, and the same in every run.
        where = (steps[:, None] * torch.tensor([0.61803, 0.38197, 0.23607])) % 1.0
        size = torch.tensor([0.75 * self.frames, self.height, self.width])
        return [(int(t), int(h), int(w)) for t, h, w in (where * size).tolist()]


def frequencies() -> Tensor:
    """float64 [PAIRS]: how fast each pair turns per position of its section."""
    out = []
    for count, still in zip(SECTIONS, STILL, strict=True):
        moving = torch.logspace(
            math.log10(1.6), math.log10(0.15), count - still, dtype=torch.double
        )
        out += [moving, torch.full((still,), STILL_FREQUENCY, dtype=torch.double)]
    return torch.cat(out)


def _moving_pairs(section: int) -> slice:
    start = sum(SECTIONS[:section])
    return slice(start, start + SECTIONS[section] - STILL[section])


def _still_pair(section: int) -> int:
    return sum(SECTIONS[:section]) + SECTIONS[section] - 1


# Pairs where key weights write sink, grid and spots; queries read the first value of each.
_CONTENT_PAIRS = {BOS: _still_pair(0), GRID_MARK: _still_pair(1), SPOT_MARK: _still_pair(2)}


def _amplitude(score: float, pairs: int, key: float) -> float:
    """The query bias per pair that gives this score against keys of size `key`."""
    return score * math.sqrt(HEAD_DIM) / (pairs * key)


def write_query(attention: Any, head: int, kind: HeadKind) -> None:
    """The query bias of one head."""
    bias = attention.q_proj.bias[head * HEAD_DIM : (head + 1) * HEAD_DIM]
    for section, score in enumerate((kind.time, kind.place / 2, kind.place / 2)):
        where = _moving_pairs(section)
        bias[where] = _amplitude(score, where.stop - where.start, KEY_BIAS)
    for coordinate, score in ((BOS, kind.sink), (GRID_MARK, kind.grid), (SPOT_MARK, kind.spots)):
        bias[_CONTENT_PAIRS[coordinate]] = _amplitude(score, 1, CONTENT_KEY)


def _key_rows(attention: Any, kv_head: int) -> tuple[Tensor, Tensor]:
    rows = slice(kv_head * HEAD_DIM, (kv_head + 1) * HEAD_DIM)
    return attention.k_proj.weight[rows], attention.k_proj.bias[rows]


def write_keys(attention: Any, sizes: Sizes) -> None:
    """Biases for place and time; weights that read the sink and the marks."""
    size = math.sqrt(sizes.hidden)
    for kv_head in range(sizes.kv_heads):
        weight, bias = _key_rows(attention, kv_head)
        for section in range(3):
            bias[_moving_pairs(section)] = KEY_BIAS
        special = [BOS, GRID_MARKER, *range(SPOT_MARKERS, SPOT_MARKERS + sizes.num_spots)]
        # Special tokens have no place of their own: their weight takes the bias away.
        weight[:, special] = -(bias / size)[:, None]
        weight[_CONTENT_PAIRS[BOS], BOS] = CONTENT_KEY / size
        for mark in (GRID_MARK, SPOT_MARK):
            weight[_CONTENT_PAIRS[mark], mark] = CONTENT_KEY / (size * MARK_SHARE)


def write_markers(attention: Any, grid: Grid, ids: Tensor, sizes: Sizes) -> None:
    """Layer 0, query head 0 and its key head: who stands where a marker points reads the marker."""
    size = math.sqrt(sizes.hidden)
    weight, _ = _key_rows(attention, 0)
    video = int((ids[0] == VIDEO_TOKEN).nonzero()[0])
    height, width = grid.place
    here = MARKER.place + MARKER.time
    targets: list[tuple[int, tuple[int | None, int, int], float]]
    targets = [(GRID_MARKER, (None, height, width), here / MARKER.place)]
    targets += [(SPOT_MARKERS + i, s, 1.0) for i, s in enumerate(grid.spots(sizes.num_spots))]
    turn = frequencies().float()
    # Just above the score that a token gives itself.
    margin = 1.0 + 2.0 / here
    for coordinate, target, gain in targets:
        token = FIRST_MARKER + (0 if coordinate == GRID_MARKER else coordinate - SPOT_MARKERS + 1)
        lag = video - int((ids[0] == token).nonzero()[0])
        for section, position in enumerate(target):
            if position is None:
                continue
            where = _moving_pairs(section)
            angle = turn[where] * (lag + position)
            key = KEY_BIAS * gain * margin / size
            weight[where, coordinate] += (key * angle.cos()).to(weight)
            weight[slice(where.start + PAIRS, where.stop + PAIRS), coordinate] = (
                key * angle.sin()
            ).to(weight)
    # Values 0 and 1 of this key head say which kind of marker was read.
    attention.v_proj.weight[:2] = 0.0
    attention.v_proj.weight[0, GRID_MARKER] = 1.0 / size
    attention.v_proj.weight[1, SPOT_MARKERS : SPOT_MARKERS + sizes.num_spots] = 1.0 / size
    attention.o_proj.weight[GRID_MARK, 0] = MARK_SIZE * size
    attention.o_proj.weight[SPOT_MARK, 1] = MARK_SIZE * size
