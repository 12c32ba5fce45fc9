"""What the tokens of one forward pass are: visual grids, padding, and how much the cache holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from permattn.core import Segment, TokenGrid

TEXT, IMAGE, VIDEO = 0, 1, 2

Rows = tuple[tuple[Segment, ...], ...]
Grids = Mapping[int, Sequence[tuple[int, int, int]]]


@dataclass(frozen=True, eq=False)
class TokenLayout:
    """One prefill-like forward pass: `q_len` queries at the end of `q_offset + q_len` keys.

    Args:
        rows: segments per batch row, at absolute key positions; empty where modality is unknown.
        left_pad, right_pad: padding keys per batch row.
        q_offset: keys that were in the cache before this pass.
        q_len: queries of this pass.
        dense_reason: why this pass cannot be sparse, whatever the layer; None = it can.
    """

    rows: Rows
    left_pad: tuple[int, ...]
    right_pad: tuple[int, ...]
    q_offset: int
    q_len: int
    dense_reason: str | None = None

    @property
    def kv_len(self) -> int:
        return self.q_offset + self.q_len


class FrameRule(Protocol):
    """How a family's visual tokens form grids. A family may bring a rule of its own."""

    def rows(self, labels: Tensor, grids: Grids) -> Rows:
        """Segments per batch row.

        Args:
            labels: int [B, S] on the CPU, TEXT, IMAGE or VIDEO per key position. In chunked prefill
                the last video may be cut: its whole frames count.
            grids: (frames, height, width) per IMAGE and VIDEO in prompt order, in patches, where
                the vision tower was given them.

        Returns: what is certain. Tokens that fit no grid are left out and so count as text.
        """


@dataclass(frozen=True)
class GridPerVideo:
    """The processor hands over (frames, height, width) for every image and video (Qwen-VL).

    Args:
        merge: patches per token along height and width.
    """

    merge: int

    def rows(self, labels: Tensor, grids: Grids) -> Rows:
        copies = self._copies(labels, grids)
        streams = {kind: iter(sizes) for kind, sizes in grids.items()}
        rows: list[tuple[Segment, ...]] = []
        for label in labels[::copies]:
            row: list[TokenGrid] = []
            for kind, sizes in streams.items():
                row += self._grids_of_kind((label == kind).nonzero().flatten(), sizes)
            rows += [tuple(sorted(row, key=lambda grid: grid.start))] * copies
        return tuple(rows)

    def num_tokens(self, sizes: Sequence[tuple[int, int, int]]) -> int:
        """Tokens that images or videos of these sizes take in the prompt."""
        return sum(t * h * w for t, h, w in sizes) // self.merge**2

    def _copies(self, labels: Tensor, grids: Grids) -> int:
        """How often beams repeated every row: generate() repeats rows, not grids."""
        batch = labels.shape[0]
        for kind, sizes in grids.items():
            want = self.num_tokens(sizes)
            copies, rest = divmod(int((labels == kind).sum()), max(want, 1))
            if copies > 1 and rest == 0 and batch % copies == 0:
                groups = labels.view(-1, copies, labels.shape[1])
                if bool((groups == groups[:, :1]).all()):
                    return copies
        return 1

    def _grids_of_kind(self, token: Tensor, sizes) -> list[TokenGrid]:
        """Consumes sizes until the tokens of one row are used up."""
        grids = []
        used = 0
        while used < len(token):
            size = next(sizes, None)
            if size is None:
                break
            frames, height, width = size[0], size[1] // self.merge, size[2] // self.merge
            per_frame = height * width
            seen = min(frames, (len(token) - used) // per_frame)
            frame = token[used : used + seen * per_frame].view(seen, per_frame)
            if seen and bool((frame[:, -1] - frame[:, 0] == per_frame - 1).all()):
                grids.append(grid_of_frames(frame[:, 0].tolist(), height, width))
            used += frames * per_frame
        return grids


@dataclass(frozen=True)
class FixedFrames:
    """Every frame takes the same number of tokens, known from the model's config (LLaVA, InternVL).

    Args:
        height, width: tokens of one frame.
        tail: tokens after the last frame of a video that belong to no frame (a newline).
        as_images: frames are written as images, one run each. A video and a series of images look
            alike then: runs of one frame with at most `max_gap` tokens between them form one grid.
        max_gap: longest text ("Frame12: ") between two frames of one video.
    """

    height: int
    width: int
    tail: int = 0
    as_images: bool = False
    max_gap: int = 64

    def rows(self, labels: Tensor, grids: Grids) -> Rows:
        build = self._frames_as_images if self.as_images else self._videos
        return tuple(tuple(build(label)) for label in labels)

    def _videos(self, label: Tensor) -> list[TokenGrid]:
        per_frame = self.height * self.width
        grids = []
        for start, stop in runs(label == VIDEO):
            frames, rest = divmod(stop - start - self.tail, per_frame)
            if rest and stop == len(label):
                frames, rest = (stop - start) // per_frame, 0
            if frames and not rest:
                grids.append(TokenGrid(start, frames, self.height, self.width))
        return grids

    def _frames_as_images(self, label: Tensor) -> list[TokenGrid]:
        per_frame = self.height * self.width
        videos: list[list[int]] = []
        for start, stop in runs(label == IMAGE):
            if stop - start != per_frame:
                continue
            if videos and start - (videos[-1][-1] + per_frame) <= self.max_gap:
                videos[-1].append(start)
            else:
                videos.append([start])
        return [grid_of_frames(starts, self.height, self.width) for starts in videos]


@dataclass(frozen=True)
class Family:
    """What differs between model families; everything else is generic.

    Args:
        image_token, video_token: placeholder ids in `input_ids`.
        frames: how the placeholders form grids; None = unknown: every token counts as text.
    """

    image_token: int | None = None
    video_token: int | None = None
    frames: FrameRule | None = None

    def labels_of_ids(self, input_ids: Tensor) -> Tensor:
        """int64 [B, S] on the CPU: TEXT, IMAGE or VIDEO."""
        input_ids = input_ids.cpu()
        labels = torch.full(input_ids.shape, TEXT, dtype=torch.long)
        if self.image_token is not None:
            labels[input_ids == self.image_token] = IMAGE
        if self.video_token is not None:
            labels[input_ids == self.video_token] = VIDEO
        return labels


def grid_of_frames(starts: list[int], height: int, width: int) -> TokenGrid:
    """A grid from the first token of every frame; `frame_starts` only where there are gaps."""
    per_frame = height * width
    if starts[-1] - starts[0] == (len(starts) - 1) * per_frame:
        return TokenGrid(starts[0], len(starts), height, width)
    return TokenGrid(starts[0], len(starts), height, width, tuple(starts))


def runs(mask: Tensor) -> list[tuple[int, int]]:
    """[start, stop) of every run of True in a 1-D mask."""
    edge = torch.diff(torch.nn.functional.pad(mask.to(torch.int8), (1, 1)))
    starts, stops = (edge == 1).nonzero().flatten(), (edge == -1).nonzero().flatten()
    return list(zip(starts.tolist(), stops.tolist(), strict=True))


def padding_of_mask(mask: Tensor) -> tuple[tuple[int, ...], tuple[int, ...], bool]:
    """Padding keys left and right of every row of a 2-D mask, and whether a row has gaps inside."""
    seen = mask.bool().cpu()
    n = seen.shape[1]
    left = seen.long().argmax(1)
    last = (seen * torch.arange(1, n + 1)).amax(1)
    right = n - last
    has_gaps = bool((seen.sum(1) != (last - left)).any())
    return tuple(left.tolist()), tuple(right.tolist()), has_gaps
