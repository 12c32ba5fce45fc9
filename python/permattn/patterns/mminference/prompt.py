"""The host's view of a prompt: where its rows begin and end, and which video grids it holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from permattn.core import Segment, TokenGrid

MAX_TEXT_TAIL = 1024


@dataclass(frozen=True, eq=False)
class VideoGrid:
    """One video of one batch row, cut to the keys that exist.

    Args:
        token_of_rank: int32 [n] on the plan's device.
        host_tokens: the same as int64 on the host, so that no look-up waits for the device.
        frame, row: strides in visual tokens.
        first, stop: token range on the host.
    """

    token_of_rank: Tensor
    host_tokens: Tensor
    frame: int
    row: int
    first: int
    stop: int

    @property
    def num_tokens(self) -> int:
        return self.token_of_rank.shape[0]

    def strides(self, names: Sequence[str | int]) -> tuple[int, ...]:
        """Candidate strides in tokens; those that do not repeat inside the video are left out."""
        table = {"frame": self.frame, "row": self.row}
        sizes = [table[x] if isinstance(x, str) else x for x in names]
        return tuple(dict.fromkeys(x for x in sizes if 2 <= x <= self.num_tokens // 2))


@dataclass(frozen=True, eq=False)
class Prompt:
    """Sizes and grids of one call, all host integers.

    Args:
        num_q, num_kv: Sq and Skv; query i stands at position i + num_kv - num_q.
        first, stop: valid key range of every batch row (padding lies outside).
        grids: the videos of every batch row; images (one frame) repeat nothing and are left out.
    """

    num_q: int
    num_kv: int
    first: tuple[int, ...]
    stop: tuple[int, ...]
    grids: tuple[tuple[VideoGrid, ...], ...]

    @property
    def batch(self) -> int:
        return len(self.first)

    @property
    def q_offset(self) -> int:
        return self.num_kv - self.num_q

    @property
    def padded(self) -> bool:
        return any(self.first) or any(s != self.num_kv for s in self.stop)

    def last_visual(self, row: int) -> int | None:
        """One past the last visual token of a batch row, if a query stands there."""
        stops = [g.stop for g in self.grids[row] if g.stop > self.q_offset]
        return max(stops) if stops else None

    def tail_start(self, row: int, last: int) -> int:
        """First position of the dense rows at the end."""
        stop, visual = self.stop[row], self.last_visual(row)
        text = 0 if visual is None else stop - visual
        return stop - max(last, min(text, MAX_TEXT_TAIL))


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
        ValueError: pads that leave no room, or a segment that starts past the keys.
    """
    first, stop = [], []
    grids = []
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
            if isinstance(segment, TokenGrid) and segment.frames > 1:
                token = segment.token_of_rank()
                token = token[(token >= first[i]) & (token < stop[i])]
                if len(token) > 0:
                    found.append(
                        VideoGrid(
                            token.to(device, torch.int32),
                            token,
                            segment.tokens_per_frame,
                            segment.width,
                            int(token[0]),
                            int(token[-1]) + 1,
                        )
                    )
        grids.append(tuple(found))
    return Prompt(num_q, num_kv, tuple(first), tuple(stop), tuple(grids))
