"""What one attention head is asked to do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

PatternName = Literal[
    "auto", "dense", "a_shape", "tri_shape", "vertical_slash", "block_sparse", "grid"
]
Boundary = Literal["none", "k", "q", "2d"]


@dataclass(frozen=True)
class HeadPattern:
    """The prefill pattern of one head, causal throughout.

    Source: MMInference (arXiv 2504.16083), Table 4 and section 3; MInference (2407.02490),
    section 3. Deviations: the window and the sink take part in every pattern; the remainder of the
    grid is masked, not dense.

    Args:
        pattern: what the head keeps besides the local window and the sink:
            a_shape: nothing; tri_shape: the last rows; vertical_slash: the strongest columns and
            diagonals; block_sparse: per 64 queries the key blocks of highest pooled score; grid:
            lines of one stride and phase; dense: everything; auto: whatever the probe finds to
            carry mass (lines, columns, diagonals).
        sink: the first keys, in tokens.
        local: the local window: keys with a lag in [0, local).
        last: rows at the end that stay dense (tri_shape, grid, auto). Text after the last video is
            dense too, up to 1024 rows.
        vertical: at most that many columns (vertical_slash, auto).
        slash: at most that many diagonals (vertical_slash, auto).
        blocks: at most that many key blocks per block of 64 queries (block_sparse).
        coverage: share of the mass outside window and sink that columns and diagonals (or key
            blocks) must hold: the fewest that do are kept, within the budgets above. None = the
            budgets alone decide.
        strides: candidate grid strides in visual tokens: "frame", "row" or a number.
        h, v, s: which grid lines: rows on the phase see every key; keys on the phase are seen by
            every row; keys a whole number of strides before (plus a phase) are seen.
        boundary: how the pattern meets the borders between modalities: none or k: it runs through
            them; q: queries of every modality have a pattern and a probe of their own; 2d: every
            pair of a query and a key modality has.
        when: the patterns of a boundary, by modality (q: {"text": ...}) or by pair of query and key
            modality (2d: {"text,vision": ...}); what is not named runs this head's own fields.

    Raises:
        ValueError: names the field, what it got and what it wants.
    """

    pattern: PatternName = "auto"
    sink: int = 64
    local: int = 512
    last: int = 64
    vertical: int = 1024
    slash: int = 8
    blocks: int = 100
    coverage: float | None = None
    strides: tuple[str | int, ...] = ("frame", "row")
    h: bool = True
    v: bool = True
    s: bool = True
    boundary: Boundary = "none"
    when: Mapping[str, HeadPattern] | tuple[tuple[str, HeadPattern], ...] = ()

    def __post_init__(self) -> None:
        _one_of("pattern", self.pattern, get_args(PatternName))
        _one_of("boundary", self.boundary, get_args(Boundary))
        for name in ("sink", "last", "vertical", "slash", "blocks"):
            _integer(name, getattr(self, name), 0)
        # Without the diagonal a row could see nothing at all.
        _integer("local", self.local, 1)
        share = self.coverage
        number = isinstance(share, (int, float)) and not isinstance(share, bool)
        if share is not None and not (number and 0.0 < share <= 1.0):
            raise ValueError(
                f"HeadPattern.coverage: wants None or a share in (0, 1], got {share!r}"
            )
        for name in ("h", "v", "s"):
            if not isinstance(getattr(self, name), bool):
                value = getattr(self, name)
                raise ValueError(f"HeadPattern.{name}: wants True or False, got {value!r}")
        if isinstance(self.strides, (str, int)):
            raise ValueError(f"HeadPattern.strides: wants a sequence, got {self.strides!r}")
        object.__setattr__(self, "strides", tuple(self.strides))
        for stride in self.strides:
            if isinstance(stride, str):
                known = stride in ("frame", "row")
            else:
                known = isinstance(stride, int) and not isinstance(stride, bool) and stride >= 2
            if not known:
                raise ValueError(
                    f"HeadPattern.strides: wants 'frame', 'row' or an integer >= 2, got {stride!r}"
                )
        pairs = self.when.items() if isinstance(self.when, Mapping) else self.when
        object.__setattr__(self, "when", tuple(sorted(pairs, key=lambda pair: pair[0])))
        for key, value in pairs:
            self._check_when(key, value)

    def _check_when(self, key: str, value: Any) -> None:
        names = key.split(",")
        want = {"q": 1, "2d": 2}.get(self.boundary)
        if want is None:
            raise ValueError(
                f"HeadPattern.when: boundary {self.boundary!r} has one pattern for all modalities, "
                f"got one for {key!r}"
            )
        if len(names) != want or not all(name.isidentifier() for name in names):
            form = "'<modality>'" if want == 1 else "'<query modality>,<key modality>'"
            raise ValueError(f"HeadPattern.when: boundary {self.boundary!r} wants {form}: {key!r}")
        if not isinstance(value, HeadPattern) or value.boundary != "none":
            raise ValueError(f"HeadPattern.when[{key!r}]: wants a HeadPattern without a boundary")

    def between(self, query: str, key: str) -> HeadPattern:
        """The pattern of queries of one modality over keys of another."""
        name = {"q": query, "2d": f"{query},{key}"}.get(self.boundary)
        return dict(self.when).get(name, self) if name else self

    @property
    def is_dense(self) -> bool:
        """Whether it keeps everything, whatever the modality."""
        return all(h.pattern == "dense" for h in (self, *dict(self.when).values()))

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
    def seeks_blocks(self) -> bool:
        return self.pattern == "block_sparse" and self.blocks > 0

    @property
    def needs_probe(self) -> bool:
        return self.seeks_grid or self.seeks_columns or self.seeks_slashes

    @property
    def keeps_last(self) -> bool:
        return self.pattern in ("tri_shape", "grid", "auto")


def _one_of(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"HeadPattern.{name}: wants one of {list(choices)}, got {value!r}")


def _integer(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"HeadPattern.{name}: wants an integer >= {least}, got {value!r}")
