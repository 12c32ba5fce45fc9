"""What one attention head is asked to do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

PatternName = Literal["auto", "dense", "a_shape", "tri_shape", "vertical_slash", "grid"]


@dataclass(frozen=True)
class HeadPattern:
    """The prefill pattern of one head, causal throughout.

    Source: MMInference (arXiv 2504.16083), Table 4 and section 3; MInference (2407.02490),
    section 3. Deviations: the sink takes part in every pattern; the remainder of the grid is
    masked, not dense.

    Args:
        pattern: what the head keeps besides the local window and the sink:
            a_shape: nothing; tri_shape: the last rows; vertical_slash: the strongest columns and
            diagonals; grid: lines of one stride and phase; dense: everything; auto: whatever the
            probe finds to carry mass (lines, columns, diagonals).
        sink: the first keys, in tokens.
        local: the local window: keys with a lag in [0, local).
        last: rows at the end that stay dense (tri_shape, grid, auto). Text after the last video is
            dense too, up to 1024 rows.
        vertical: at most that many columns (vertical_slash, auto).
        slash: at most that many diagonals (vertical_slash, auto).
        strides: candidate grid strides in visual tokens: "frame", "row" or a number.
        h, v, s: which grid lines: rows on the phase see every key; keys on the phase are seen by
            every row; keys a whole number of strides before (plus a phase) are seen.
    """

    pattern: PatternName = "auto"
    sink: int = 64
    local: int = 512
    last: int = 64
    vertical: int = 1024
    slash: int = 8
    strides: tuple[str | int, ...] = ("frame", "row")
    h: bool = True
    v: bool = True
    s: bool = True

    def __post_init__(self) -> None:
        if self.pattern not in get_args(PatternName):
            raise ValueError(
                f"HeadPattern.pattern: wants one of {list(get_args(PatternName))}, "
                f"got {self.pattern!r}"
            )
        for name in ("sink", "last", "vertical", "slash"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"HeadPattern.{name}: wants an integer >= 0, got {value!r}")
        if isinstance(self.local, bool) or not isinstance(self.local, int) or self.local < 1:
            # Without the diagonal a row could see nothing at all.
            raise ValueError(f"HeadPattern.local: wants an integer >= 1, got {self.local!r}")
        object.__setattr__(self, "strides", tuple(self.strides))
        for stride in self.strides:
            if stride in ("frame", "row"):
                continue
            if isinstance(stride, bool) or not isinstance(stride, int) or stride < 2:
                raise ValueError(
                    f"HeadPattern.strides: wants 'frame', 'row' or an integer >= 2, got {stride!r}"
                )

    @property
    def seeks_grid(self) -> bool:
        return self.pattern in ("grid", "auto") and bool(self.strides)

    @property
    def seeks_columns(self) -> bool:
        return self.pattern in ("vertical_slash", "auto") and self.vertical > 0

    @property
    def seeks_slashes(self) -> bool:
        return self.pattern in ("vertical_slash", "auto") and self.slash > 0

    @property
    def needs_probe(self) -> bool:
        return self.seeks_grid or self.seeks_columns or self.seeks_slashes

    @property
    def keeps_last(self) -> bool:
        return self.pattern in ("tri_shape", "grid", "auto")
