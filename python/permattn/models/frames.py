"""From labelled tokens to frame grids: the two ways in which families write videos."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from permattn.core import Segment, TokenGrid, TokenRun

# The numbers of transformers' mm_token_type_ids.
TEXT, IMAGE, VIDEO, AUDIO = 0, 1, 2, 3

# Longest text ("Frame12: ", "<12.5 seconds>") between two frames of one video.
MAX_GAP = 64

Rows = tuple[tuple[Segment, ...], ...]
Size = tuple[int, int, int]
Grids = Mapping[int, Sequence[Size]]


class FrameRule(Protocol):
    """How a family's visual tokens form grids. A family may bring a rule of its own."""

    def rows(self, labels: Tensor, grids: Grids, coordinates: Tensor | None) -> Rows:
        """Segments per batch row.

        Args:
            labels: int [B, S] on the CPU, TEXT, IMAGE, VIDEO or AUDIO per key position. In chunked
                prefill the last video may be cut: its whole frames count.
            grids: (frames, height, width) per IMAGE and VIDEO in prompt order, in patches (in
                tokens where the model is told merge sizes), where the vision tower was given them.
            coordinates: int [B, S, 2] on the CPU, (height, width) position of every token, where
                the model's position ids tell them.

        Returns: grids that are certain. `with_runs` adds the other tokens that are not text.
        """


@dataclass(frozen=True)
class GridPerVideo:
    """The processor hands over (frames, height, width) for every image and video (Qwen-VL).

    Args:
        merge: patches per token along height and width.
    """

    merge: int

    def rows(self, labels: Tensor, grids: Grids, coordinates: Tensor | None) -> Rows:
        """See `FrameRule.rows`."""
        copies = self._copies(labels, grids)
        is_clear = self._is_clear(labels[::copies], grids)
        if coordinates is None and not is_clear and labels.shape[0] > copies:
            # Which row a size belongs to is open: nothing is certain.
            return ((),) * labels.shape[0]
        if coordinates is not None and not is_clear:
            return tuple(
                _sorted(
                    grid
                    for kind in (IMAGE, VIDEO)
                    for grid in grids_from_coordinates(label, place, kind)
                )
                for label, place in zip(labels, coordinates, strict=True)
            )
        streams = {kind: iter(sizes) for kind, sizes in grids.items()}
        rows: list[tuple[Segment, ...]] = []
        for label in labels[::copies]:
            row: list[Segment] = []
            for kind, sizes in streams.items():
                row += self._grids_of_kind((label == kind).nonzero().flatten(), sizes)
            rows += [_sorted(row)] * copies
        return tuple(rows)

    def num_tokens(self, sizes: Sequence[Size]) -> int:
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

    def _is_clear(self, labels: Tensor, grids: Grids) -> bool:
        """Whether the sizes say it all: they fit, or one row is cut by the end of a chunk."""
        for kind in (IMAGE, VIDEO):
            tokens, want = int((labels == kind).sum()), self.num_tokens(grids.get(kind, ()))
            if tokens > want or (tokens < want and labels.shape[0] > 1):
                return False
        return True

    def _grids_of_kind(self, token: Tensor, sizes: Iterator[Size]) -> list[TokenGrid]:
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
        head: tokens before the grid of every frame that are no part of it (a class token).
        tail: tokens after the last frame of a video that belong to no frame (a newline).
        as_images: frames are written as images, one run each. A video and a series of images look
            alike then: runs of one frame with at most MAX_GAP tokens between them form one grid.
    """

    height: int
    width: int
    head: int = 0
    tail: int = 0
    as_images: bool = False

    def rows(self, labels: Tensor, grids: Grids, coordinates: Tensor | None) -> Rows:
        """See `FrameRule.rows`."""
        build = self._frames_as_images if self.as_images else self._videos
        return tuple(tuple(build(label)) for label in labels)

    @property
    def _per_frame(self) -> int:
        return self.head + self.height * self.width

    def _videos(self, label: Tensor) -> list[TokenGrid]:
        grids = []
        for start, stop in runs(label == VIDEO):
            frames, rest = divmod(stop - start - self.tail, self._per_frame)
            if rest and stop == len(label):
                frames, rest = (stop - start) // self._per_frame, 0
            if frames and not rest:
                starts = range(start + self.head, stop, self._per_frame)[:frames]
                grids.append(grid_of_frames(list(starts), self.height, self.width))
        return grids

    def _frames_as_images(self, label: Tensor) -> list[TokenGrid]:
        frames = [
            ([start + self.head], self.height, self.width)
            for start, stop in runs(label == IMAGE)
            if stop - start == self._per_frame
        ]
        return joined_frames(frames)


def grids_from_coordinates(label: Tensor, place: Tensor, kind: int) -> list[TokenGrid]:
    """Grids of one row from the (height, width) position of every token.

    Args:
        label: int [S]; runs of `kind` are looked at.
        place: int [S, 2]; positions count up from any first value, anew in every frame.
    """
    found: list[tuple[list[int], int, int]] = []
    for start, stop in runs(label == kind):
        here = place[start:stop] - place[start]
        height, width = (int(x) + 1 for x in here.amax(0))
        frames = (stop - start) // (height * width)
        want = torch.arange(frames) * height * width
        first = (here == 0).all(-1).nonzero().flatten()
        if not frames or not torch.equal(first[:frames], want):
            continue
        if stop == len(label) and frames == 1 and (not found or found[-1][1:] != (height, width)):
            # The end of a chunk: a cut frame looks like a small one.
            continue
        found.append(((start + want).tolist(), height, width))
    if kind == IMAGE or any(len(starts) > 1 for starts, _, _ in found):
        return [grid_of_frames(*frames) for frames in found]
    # One run per frame: text stands between the frames of a video.
    return joined_frames(found)


def joined_frames(runs_of_frames: Sequence[tuple[list[int], int, int]]) -> list[TokenGrid]:
    """One grid per video: neighbours of one size with at most MAX_GAP tokens between them."""
    videos: list[tuple[list[int], int, int]] = []
    for starts, height, width in runs_of_frames:
        if videos:
            before, *size = videos[-1]
            gap = starts[0] - (before[-1] + height * width)
            if size == [height, width] and gap <= MAX_GAP:
                before += starts
                continue
        videos.append((list(starts), height, width))
    return [grid_of_frames(*video) for video in videos]


def grid_of_frames(starts: list[int], height: int, width: int) -> TokenGrid:
    """A grid from the first token of every frame; `frame_starts` only where there are gaps."""
    if starts[-1] - starts[0] == (len(starts) - 1) * height * width:
        return TokenGrid(starts[0], len(starts), height, width)
    return TokenGrid(starts[0], len(starts), height, width, tuple(starts))


def segments_before(row: Sequence[Segment], kv_len: int) -> tuple[Segment, ...]:
    """The part of a prompt that the first `kv_len` keys hold; of a grid, its whole frames."""
    here: list[Segment] = []
    for segment in row:
        if segment.stop <= kv_len:
            here.append(segment)
        elif isinstance(segment, TokenGrid):
            per_frame = segment.tokens_per_frame
            first = segment.token_of_rank()[::per_frame]
            starts = first[first + per_frame <= kv_len].tolist()
            if starts:
                here.append(grid_of_frames(starts, segment.height, segment.width))
            here += cut_frame(first, per_frame, kv_len, segment.modality)
        elif segment.start < kv_len:
            here.append(TokenRun(segment.start, kv_len - segment.start, segment.modality))
    return tuple(here)


def cut_frame(first: Tensor, per_frame: int, kv_len: int, modality: str) -> list[TokenRun]:
    """The frame that the end of the keys cuts, as a run of its modality."""
    cut = first[(first < kv_len) & (first + per_frame > kv_len)].tolist()
    return [TokenRun(start, kv_len - start, modality) for start in cut]


def with_runs(rows: Rows, labels: Tensor) -> Rows:
    """Adds what is neither text nor in a grid: audio, newlines of a video, images without a grid.

    Args:
        rows: the grids of every batch row.
        labels: int [B, S] on the CPU.
    """
    return tuple(
        _sorted((*row, *_runs_outside(row, label))) for row, label in zip(rows, labels, strict=True)
    )


def _runs_outside(row: Sequence[Segment], label: Tensor) -> list[TokenRun]:
    visual = (label == IMAGE) | (label == VIDEO)
    for segment in row:
        if isinstance(segment, TokenGrid):
            visual[segment.token_of_rank()] = False
    return [
        TokenRun(start, stop - start, modality)
        for modality, mask in (("vision", visual), ("audio", label == AUDIO))
        for start, stop in runs(mask)
    ]


def runs(mask: Tensor) -> list[tuple[int, int]]:
    """[start, stop) of every run of True in a 1-D mask."""
    edge = torch.diff(torch.nn.functional.pad(mask.to(torch.int8), (1, 1)))
    starts, stops = (edge == 1).nonzero().flatten(), (edge == -1).nonzero().flatten()
    return list(zip(starts.tolist(), stops.tolist(), strict=True))


def _sorted(segments: Iterable[Segment]) -> tuple[Segment, ...]:
    return tuple(sorted(segments, key=lambda segment: segment.start))
