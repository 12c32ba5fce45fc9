"""Fake video prompts for tiny random vision-language models: no hub, no tokenizer.

Vocabulary: 0 pad, 1 bos, 2 eos, 3 image, 4 video, 5 vision start, 6 vision end, 10.. text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from permattn.core import Segment, TokenGrid, TokenRun
from torch import Tensor

PAD, BOS, EOS, IMAGE_ID, VIDEO_ID, VISION_START, VISION_END = range(7)
VOCABULARY = 96

TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8192,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}
MROPE = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}
TOKENS = {
    "image_token_id": IMAGE_ID,
    "video_token_id": VIDEO_ID,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}
# A batch of prompts: per row, the (frames, height, width) of its videos in patches.
Videos = list[list[tuple[int, int, int]]]
ONE: Videos = [[(12, 4, 6)]]
TWO: Videos = [[(6, 4, 6), (6, 4, 6)]]
# Different sizes, and a video of one frame.
MIXED: Videos = [[(6, 4, 6), (4, 6, 4), (1, 4, 4)]]
BATCH: Videos = [[(6, 4, 6)], [(6, 4, 6), (6, 4, 6)]]


@dataclass
class Case:
    """A model, inputs for it, and the segments that its prompts really hold, per batch row."""

    model: Any
    inputs: dict[str, Tensor]
    rows: tuple[tuple[Segment, ...], ...]

    @property
    def real(self) -> Tensor:
        """bool [B, S]: tokens that are not padding."""
        return self.inputs["attention_mask"].bool()


def grids_of(row: tuple[Segment, ...]) -> list[TokenGrid]:
    """The segments of a row that are grids."""
    return [segment for segment in row if isinstance(segment, TokenGrid)]


class Prompts:
    """Writes rows of token ids and remembers where the frames began.

    Attributes:
        runs: what stands in the row that is being written, and is neither text nor a grid.
    """

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator
        self.ids: list[list[int]] = []
        self.segments: list[list[Segment]] = []
        self.runs: list[TokenRun] = []

    def text(self, n: int) -> list[int]:
        return torch.randint(10, VOCABULARY, (n,), generator=self.generator).tolist()

    def add_row(self, videos: list[tuple[int, int, int]], write: Callable) -> None:
        """`write(row, frames)` appends one video to a row and returns the starts of its frames."""
        row, grids = [BOS, *self.text(3)], []
        self.runs = []
        for frames, height, width in videos:
            starts = write(row, frames, height, width)
            gaps = starts[-1] - starts[0] != (frames - 1) * height * width
            grids.append(
                TokenGrid(starts[0], frames, height, width, tuple(starts) if gaps else None)
            )
            row += self.text(3)
        self.ids.append(row + self.text(4))
        self.segments.append(sorted((*grids, *self.runs), key=lambda segment: segment.start))

    def padded(self, side: str = "left") -> tuple[dict[str, Tensor], tuple]:
        length = max(map(len, self.ids))
        ids, mask, rows = [], [], []
        for row, segments in zip(self.ids, self.segments, strict=True):
            pad = length - len(row)
            left, right = (pad, 0) if side == "left" else (0, pad)
            ids.append([PAD] * left + row + [PAD] * right)
            mask.append([0] * left + [1] * len(row) + [0] * right)
            rows.append(tuple(_moved(segment, left) for segment in segments))
        inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
        return inputs, tuple(rows)


def _moved(segment: Segment, by: int) -> Segment:
    starts = getattr(segment, "frame_starts", None)
    moved = {} if starts is None else {"frame_starts": tuple(s + by for s in starts)}
    return replace(segment, start=segment.start + by, **moved)


def token_types(ids: Tensor) -> Tensor:
    return (ids == IMAGE_ID) + 2 * (ids == VIDEO_ID)
