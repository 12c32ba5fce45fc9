"""A layout that the caller states: checked against itself, the ids, the padding and the length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from permattn.core import Segment, TokenGrid
from permattn.models.frames import TEXT, Rows, segments_before


@dataclass(eq=False)
class StatedRows:
    """Rows of `handle.layout`, and how much of them the passes have reached.

    Args:
        rows: segments per batch row, at positions of the padded sequence.
        longest: keys of the longest prefill so far; 0 = none yet.

    Raises:
        TypeError: something else than segments.
        ValueError: segments that share a token.
    """

    rows: Rows
    longest: int = 0

    def __post_init__(self) -> None:
        for number, row in enumerate(self.rows):
            for segment in row:
                if not isinstance(segment, Segment):
                    raise TypeError(
                        f"rows: wants TokenGrid and TokenRun segments, got {type(segment).__name__}"
                    )
            pieces = sorted(
                (piece for segment in row for piece in _pieces(segment)), key=lambda piece: piece[0]
            )
            for (_, stop, before), (start, _, after) in pairwise(pieces):
                if start < stop:
                    raise ValueError(f"rows[{number}]: {before} and {after} share token {start}")

    def check_pass(self, left_pad: Sequence[int], kv_len: int, *, is_whole: bool) -> None:
        """Raises ValueError unless a pass with these keys can be one of this layout.

        Args:
            is_whole: no other chunk of the prompt follows.
        """
        copies = _copies(self.rows, len(left_pad))
        for number, row in enumerate(self.rows):
            pad = left_pad[number * copies]
            for segment in row:
                if segment.start < pad:
                    raise ValueError(
                        f"layout: rows[{number}] has {segment} in the {pad} tokens of padding on "
                        "the left; positions count from the start of the padded sequence"
                    )
        self.longest = max(self.longest, kv_len)
        if is_whole:
            self.check_reached()

    def check_reached(self) -> None:
        """Raises ValueError if the prompt ended before the layout did."""
        for number, row in enumerate(self.rows):
            for segment in row:
                if self.longest and segment.stop > self.longest:
                    raise ValueError(
                        f"layout: rows[{number}] has {segment}, which ends at {segment.stop}, past "
                        f"the {self.longest} tokens of the prompt"
                    )


def check_labels(rows: Rows, labels: Tensor, q_offset: int) -> None:
    """Raises ValueError if a grid claims a token that the ids call text.

    Args:
        rows: segments per batch row.
        labels: int [B, q_len] of this pass's tokens, on the CPU.
        q_offset: keys before them.
    """
    for number, (row, label) in enumerate(zip(rows, labels, strict=True)):
        for grid in row:
            if not isinstance(grid, TokenGrid):
                continue
            token = grid.token_of_rank() - q_offset
            here = label[token[(token >= 0) & (token < len(label))]]
            wrong = int((here == TEXT).sum())
            if wrong:
                raise ValueError(
                    f"layout: rows[{number}] has {grid}, of whose {len(here)} tokens in input_ids "
                    f"{wrong} are no placeholders"
                )


def repeated(rows: Rows, batch: int, kv_len: int) -> Rows:
    """Rows of a batch that beams or num_return_sequences repeated, up to a chunk's end."""
    copies = _copies(rows, batch)
    here = [segments_before(row, kv_len) for row in rows]
    return tuple(row for row in here for _ in range(copies))


def _copies(rows: Rows, batch: int) -> int:
    copies, rest = divmod(batch, max(len(rows), 1))
    if rest or not rows:
        raise ValueError(f"layout: wants one entry per batch row, got {len(rows)} for {batch} rows")
    return copies


def _pieces(segment: Segment) -> list[tuple[int, int, Segment]]:
    """[start, stop) of what a segment claims: every frame of a grid."""
    if isinstance(segment, TokenGrid) and segment.frame_starts is not None:
        size = segment.tokens_per_frame
        return [(start, start + size, segment) for start in segment.frame_starts]
    return [(segment.start, segment.stop, segment)]
