"""What the tokens of a prompt are: runs of text and grids of visual tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenRun:
    """One contiguous run of tokens without spatial structure: text, audio, anything else.

    Args:
        start, length: in tokens.
        modality: what the tokens are, as boundary patterns name it. Tokens that no segment claims
            are text.

    Invariants: `start >= 0`, `length >= 0`.
    """

    start: int
    length: int
    modality: str = "text"

    def __post_init__(self) -> None:
        if self.start < 0 or self.length < 0:
            raise ValueError(f"TokenRun: start and length must be >= 0, got {self}")
        check_modality(self.modality)

    @property
    def stop(self) -> int:
        return self.start + self.length


@dataclass(frozen=True)
class TokenGrid:
    """One video (or image: one frame) as `frames` x `height` x `width` tokens in time-major order.

    Args:
        start: position of the first visual token in the prompt.
        frames, height, width: grid size in tokens (after the vision tower's spatial merge).
        frame_starts: position of the first token of every frame when text (timestamps, separators)
            sits between frames; None when the frames follow each other without a gap.
        modality: what the tokens are, as boundary patterns name it.

    Invariants: every frame is contiguous; `frame_starts` ascends by at least `height * width`.
    """

    start: int
    frames: int
    height: int
    width: int
    frame_starts: tuple[int, ...] | None = None
    modality: str = "vision"

    def __post_init__(self) -> None:
        check_modality(self.modality)
        if self.start < 0 or min(self.frames, self.height, self.width) < 1:
            raise ValueError(f"TokenGrid: start >= 0 and positive sizes wanted, got {self}")
        starts = self.frame_starts
        if starts is None:
            return
        if len(starts) != self.frames or starts[0] != self.start:
            raise ValueError(
                f"TokenGrid: frame_starts must hold {self.frames} positions from {self.start}, "
                f"got {len(starts)} from {starts[0] if starts else None}"
            )
        if any(b - a < self.tokens_per_frame for a, b in pairwise(starts)):
            raise ValueError("TokenGrid: frame_starts must ascend by at least one frame each")

    @property
    def tokens_per_frame(self) -> int:
        return self.height * self.width

    @property
    def num_tokens(self) -> int:
        return self.frames * self.tokens_per_frame

    @property
    def stop(self) -> int:
        """One past the last visual token."""
        if self.frame_starts is None:
            return self.start + self.num_tokens
        return self.frame_starts[-1] + self.tokens_per_frame

    def token_of_rank(self) -> Tensor:
        """int64 [num_tokens]: prompt position of every visual token, in time-major order."""
        if self.frame_starts is None:
            return torch.arange(self.start, self.start + self.num_tokens)
        starts = torch.tensor(self.frame_starts)
        return (starts[:, None] + torch.arange(self.tokens_per_frame)).flatten()


Segment = TokenGrid | TokenRun


def check_modality(name: object) -> None:
    """Raises ValueError unless the name of a modality is a word (commas separate pairs)."""
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"modality: wants a word such as 'text' or 'audio', got {name!r}")


def rank_of_visual_token(segments: Sequence[Segment], num_tokens: int) -> Tensor:
    """Rank of every token inside its own visual grid; -1 for text.

    Text between frames is squeezed out, so a frame is always `height * width` ranks long and a grid
    line keeps one phase, whatever separates the frames.

    Args:
        segments: the segments of one prompt, in any order.
        num_tokens: prompt length S; segments that start past it are cut.

    Returns: int32 [S] on the CPU.
    """
    rank = torch.full((num_tokens,), -1, dtype=torch.int32)
    for grid in segments:
        if isinstance(grid, TokenGrid):
            token = grid.token_of_rank()
            inside = token < num_tokens
            rank[token[inside]] = torch.arange(grid.num_tokens, dtype=torch.int32)[inside]
    return rank
