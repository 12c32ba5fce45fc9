"""Where the last queries of every kind put their attention, measured once per kind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from permattn.patterns.mminference.config import HeadPattern
from permattn.patterns.mminference.prompt import Prompt, VideoGrid
from permattn.patterns.mminference.streams import Axis
from permattn.probe import ProbeMass, probe_mass

LAST_Q = 64


@dataclass(frozen=True, eq=False)
class ProbeRows:
    """Consecutive queries of every batch row.

    Args:
        q: [B, Hq, R, D], scaled.
        first: position of the first row of every batch row; -1 = the batch row has none.
        first_position: the same, int32 [B] on the device.
        key_range: int32 [B, 2] on the device, the keys that are not padding.
    """

    q: Tensor
    first: tuple[int, ...]
    first_position: Tensor
    key_range: Tensor

    @property
    def count(self) -> int:
        return self.q.shape[2]


class Prober:
    """Probes each kind of query at most once per layer.

    Source: MMInference, Algorithms 1, 2 and 3 (last_q = 64, the last segment of a modality).
    Deviation: without a boundary the rows end at the last video token, since rows of the trailing
    text do not show how visual rows attend.
    """

    def __init__(self, q: Tensor, k: Tensor, prompt: Prompt, heads: Sequence[HeadPattern]) -> None:
        self.q, self.k, self.prompt = q, k, prompt
        self._main: dict[str | None, tuple[ProbeRows, ProbeMass]] = {}
        # With one video without gaps in every batch row, distances inside the video are lags of
        # keys inside it: the main sweep counts those alone, and no other sweep is needed.
        lined = any(
            h.seeks_grid and h.s for head in heads for h in (head, *dict(head.when).values())
        )
        self._inside = lined and all(len(row) == 1 and row[0].is_contiguous for row in prompt.grids)

    def main(self, query: str | None) -> tuple[ProbeRows, ProbeMass]:
        """The rows of one kind of query, and their mass on every position and at every lag."""
        if query not in self._main:
            runs = [self.prompt.last_run(i, query) for i in range(self.prompt.batch)]
            rows = self._rows(runs)
            skip = None
            if self._inside:
                spans = [(row[0].first, row[0].stop) for row in self.prompt.grids]
                span = torch.tensor(spans).to(self.q.device, non_blocking=True)[..., None, None]
                key = torch.arange(self.prompt.num_kv, device=self.q.device)
                skip = ((key < span[:, 0]) | (key >= span[:, 1])).expand(*self.q.shape[:2], -1)
            self._main[query] = rows, self._mass(rows, skip=skip)
        return self._main[query]

    def diagonals(self, query: str | None, axis: Axis, skip: Tensor | None) -> Tensor:
        """The mass at every lag along an axis: float32 [B, Hq, axis.size].

        Args:
            skip: bool [B, Hq, Skv]: keys that do not count; None = all keys of the axis count.
        """
        rows, main = self.main(query)
        if axis.order is None:
            if skip is None and not self._inside:
                return main.diagonal
            return self._mass(rows, main.lse, skip=skip).diagonal
        batch = self.prompt.batch
        at = axis.coordinate(torch.tensor(rows.first)[:, None].clamp_min(0))[:, 0]
        if skip is not None:
            place = axis.order.clamp_min(0).long()[:, None]
            skip = skip.gather(-1, place.expand(*skip.shape[:2], -1))
        return probe_mass(
            rows.q,
            self.k,
            first_position=rows.first_position,
            key_range=rows.key_range,
            order=axis.order.expand(batch, -1),
            first_coordinate=at.expand(batch).to(self.q.device, torch.int32),
            lse=main.lse,
            skip=skip,
        ).diagonal

    def video(
        self, query: str | None, row: int, video: VideoGrid, own: bool
    ) -> tuple[Tensor, Tensor | None, int]:
        """Mass on every token of a video, and at every distance inside it.

        Args:
            own: whether the stream holds the video's queries; its last ones are probed then.

        Returns: column float32 [Hq, n] in rank order, diagonal float32 [Hq, n] or None (no query of
            the video is here), and the position of the first probe row.
        """
        count = self._own_rows(video) if own else 0
        rows, main = self.main(query)
        last = rows.first[row] + rows.count
        if count == 0 or rows.first[row] < 0:
            on_video = main.column[row].index_select(-1, video.token_of_rank)
            return on_video, None, rows.first[row]
        lse = None
        if last == video.stop and rows.count <= count:
            # The usual case: the rows are the video's last ones.
            if self._inside:
                column = main.column[row, :, video.first : video.stop]
                return column, main.diagonal[row, :, : video.num_tokens], rows.first[row]
            lse = main.lse[row : row + 1]
            rows = replace(
                rows,
                q=rows.q[row : row + 1],
                first=(rows.first[row],),
                first_position=rows.first_position[row : row + 1],
                key_range=rows.key_range[row : row + 1],
            )
        else:
            rows = self._rows([(video.stop - count, video.stop)], row)
        rank = video.num_tokens - rows.count
        mass = probe_mass(
            rows.q,
            self.k[row : row + 1],
            first_position=rows.first_position,
            key_range=rows.key_range,
            order=video.token_of_rank[None],
            first_coordinate=torch.tensor([rank], dtype=torch.int32).to(self.q.device),
            lse=lse,
        )
        return mass.column[0], mass.diagonal[0], rows.first[0]

    def _own_rows(self, video: VideoGrid) -> int:
        """How many of a video's last tokens are queries and follow each other, up to LAST_Q."""
        token = video.host_tokens[-LAST_Q:]
        follows = video.stop - 1 - token == torch.arange(len(token) - 1, -1, -1)
        return int((follows & (token >= self.prompt.q_offset)).sum())

    def _rows(self, runs: list[tuple[int, int]], row: int | None = None) -> ProbeRows:
        """The last rows of every run; a short run is filled up with what stands before it."""
        prompt, device = self.prompt, self.q.device
        numbers = range(prompt.batch) if row is None else [row]
        low = [max(prompt.q_offset, prompt.first[i]) for i in numbers]
        some = [stop - lo for (_, stop), lo in zip(runs, low, strict=True) if stop]
        longest = max((stop - start for start, stop in runs), default=0)
        count = max(1, min([LAST_Q, longest, *some]))
        first = tuple(stop - count if stop else -1 for _, stop in runs)
        q = self.q if row is None else self.q[row : row + 1]
        at = torch.tensor(first)[:, None] - prompt.q_offset + torch.arange(count)
        at = at.clamp(0, max(prompt.num_q - 1, 0)).to(device, non_blocking=True)
        picked = q.gather(2, at[:, None, :, None].expand(*q.shape[:2], count, q.shape[-1]))
        bounds = torch.tensor([(prompt.first[i], prompt.stop[i]) for i in numbers])
        return ProbeRows(
            picked * q.shape[-1] ** -0.5,
            first,
            torch.tensor(first, dtype=torch.int32).to(device, non_blocking=True),
            bounds.to(device, torch.int32, non_blocking=True),
        )

    def _mass(
        self, rows: ProbeRows, lse: Tensor | None = None, skip: Tensor | None = None
    ) -> ProbeMass:
        return probe_mass(
            rows.q,
            self.k,
            first_position=rows.first_position,
            key_range=rows.key_range,
            lse=lse,
            skip=skip,
        )
