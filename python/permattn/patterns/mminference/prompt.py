"""The host's view of a prompt: where its rows begin and end, and what its tokens are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from permattn.core import Segment, TokenGrid, TokenRun

MAX_TEXT_TAIL = 1024
# An image repeats its rows; smaller ones hold too few keys to be worth lines of their own.
MIN_IMAGE_TOKENS = 1024
TEXT = "text"
PADDING = -1


@dataclass(frozen=True, eq=False)
class VideoGrid:
    """One video (or large image) of one batch row, cut to the keys that exist.

    Args:
        modality: number of its modality in `Prompt.names`.
        token_of_rank: int32 [n] on the plan's device.
        host_tokens: the same as int64 on the host, so that no look-up waits for the device.
        frame, row: strides in visual tokens.
        first, stop: token range on the host.
    """

    modality: int
    token_of_rank: Tensor
    host_tokens: Tensor
    frame: int
    row: int
    first: int
    stop: int

    @property
    def num_tokens(self) -> int:
        return self.token_of_rank.shape[0]

    @property
    def is_contiguous(self) -> bool:
        """Whether no other token lies between its own."""
        return self.stop - self.first == self.num_tokens

    def strides(self, names: Sequence[str | int]) -> tuple[int, ...]:
        """Candidate strides in tokens; those that do not repeat inside the video are left out."""
        table = {"frame": self.frame, "row": self.row}
        sizes = [table[x] if isinstance(x, str) else x for x in names]
        return tuple(dict.fromkeys(x for x in sizes if 2 <= x <= self.num_tokens // 2))


@dataclass(frozen=True, eq=False)
class Prompt:
    """Sizes and contents of one call, all on the host.

    Args:
        num_q, num_kv: Sq and Skv; query i stands at position i + num_kv - num_q.
        first, stop: valid key range of every batch row (padding lies outside).
        names: the modalities that occur, "text" first.
        modality: int16 [B, num_kv]: number in `names` of every position; -1 = padding.
        grids: the videos of every batch row; small images are left out.
    """

    num_q: int
    num_kv: int
    first: tuple[int, ...]
    stop: tuple[int, ...]
    names: tuple[str, ...]
    modality: Tensor
    grids: tuple[tuple[VideoGrid, ...], ...]
    device: torch.device

    @property
    def batch(self) -> int:
        return len(self.first)

    @property
    def q_offset(self) -> int:
        return self.num_kv - self.num_q

    def of(self, name: str | None) -> Tensor:
        """bool [B, num_kv]: the positions of a modality; None = all that are not padding."""
        if name is None:
            return self.modality != PADDING
        return self.modality == self.names.index(name)

    def last_visual(self, row: int) -> int | None:
        """One past the last token of the last video of a batch row, if a query stands there."""
        stops = [g.stop for g in self.grids[row] if g.stop > self.q_offset]
        return max(stops) if stops else None

    def tail_start(self, row: int, last: int) -> int:
        """First position of the dense rows at the end."""
        stop, visual = self.stop[row], self.last_visual(row)
        text = 0 if visual is None else stop - visual
        return stop - max(last, min(text, MAX_TEXT_TAIL))

    def last_run(self, row: int, name: str | None) -> tuple[int, int]:
        """Positions [start, stop) of the last queries of one kind that follow each other.

        Args:
            name: a modality; None = the last video's, or whatever ends the prompt.

        Returns: (0, 0) where there is no such query.
        """
        label = self.modality[row]
        low = max(self.q_offset, self.first[row])
        if name is None:
            stop = self.last_visual(row) or self.stop[row]
        else:
            place = (label[low:] == self.names.index(name)).nonzero()
            stop = low + int(place[-1]) + 1 if len(place) else 0
        if stop <= low:
            return 0, 0
        other = (label[low:stop] != label[stop - 1]).nonzero()
        return (low + int(other[-1]) + 1 if len(other) else low), stop


@lru_cache(maxsize=16)
def describe_prompt(
    rows: tuple[tuple[Segment, ...], ...],
    num_q: int,
    num_kv: int,
    left_pad: tuple[int, ...],
    right_pad: tuple[int, ...],
    device: torch.device,
) -> Prompt:
    """The prompt of one call; all layers of a model share it.

    Raises:
        ValueError: pads that leave no room, a segment that starts past the keys, or two that claim
            the same token.
        TypeError: what is no segment.
    """
    for i, row in enumerate(rows):
        for segment in row:
            if not isinstance(segment, (TokenGrid, TokenRun)):
                raise TypeError(f"rows[{i}]: wants TokenGrid and TokenRun, got {segment!r}")
    names = list(dict.fromkeys([TEXT, *(s.modality for row in rows for s in row)]))
    first, stop, grids = [], [], []
    # Cached tensors outlive the call: they must not be inference tensors.
    with torch.inference_mode(False):
        modality = torch.zeros(len(rows), num_kv, dtype=torch.int16)
        claimed = torch.zeros(len(rows), num_kv, dtype=torch.bool)
        for i, segments in enumerate(rows):
            if left_pad[i] < 0 or right_pad[i] < 0 or left_pad[i] + right_pad[i] > num_kv:
                raise ValueError(
                    f"left_pad, right_pad: must be >= 0 and leave room in {num_kv} keys, "
                    f"got {left_pad[i]} and {right_pad[i]} for batch row {i}"
                )
            first.append(left_pad[i])
            stop.append(num_kv - right_pad[i])
            found = []
            for segment in segments:
                if segment.start > num_kv:
                    raise ValueError(
                        f"rows[{i}]: a segment starts at {segment.start}, past the {num_kv} keys"
                    )
                if isinstance(segment, TokenGrid):
                    token = segment.token_of_rank()
                else:
                    token = torch.arange(segment.start, segment.stop)
                token = token[token < num_kv]
                if bool(claimed[i, token].any()):
                    raise ValueError(f"rows[{i}]: {segment} claims tokens of another segment")
                claimed[i, token] = True
                number = names.index(segment.modality)
                modality[i, token] = number
                if not isinstance(segment, TokenGrid):
                    continue
                token = token[(token >= first[i]) & (token < stop[i])]
                repeats = segment.frames > 1 or segment.num_tokens >= MIN_IMAGE_TOKENS
                if repeats and len(token) > 0:
                    found.append(_video(segment, token, number, device))
            grids.append(tuple(found))
            modality[i, : first[i]] = PADDING
            modality[i, stop[i] :] = PADDING
    return Prompt(
        num_q, num_kv, tuple(first), tuple(stop), tuple(names), modality, tuple(grids), device
    )


def _video(grid: TokenGrid, token: Tensor, modality: int, device: torch.device) -> VideoGrid:
    first, stop = int(token[0]), int(token[-1]) + 1
    on_device = token.to(device, torch.int32)
    return VideoGrid(modality, on_device, token, grid.tokens_per_frame, grid.width, first, stop)
