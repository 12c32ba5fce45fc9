"""What the search tries: candidate patterns, and how a budget makes them larger or smaller."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from permattn.patterns.mminference import HeadPattern

# Columns, windows and sinks are computed in blocks of this many keys.
BLOCK = 64
# Of the keys that a budget buys per row, a counted pattern (columns, diagonals, key blocks) spends
# at most this share on its window.
WINDOW_SHARE = 0.25
# Fields that all heads share: a plan has one set of parts per window, so windows stay few.
SHARED_FIELDS = ("local", "sink")


@dataclass(frozen=True)
class Candidate:
    """One pattern of the search space, before it is fitted to a budget.

    Args:
        name: what reports call it; unique in a space.
        pattern: the pattern at its published size.
        scaled: the fields that the budget scales, all by one factor so that their proportions stay.
    """

    name: str
    pattern: HeadPattern
    scaled: tuple[str, ...]

    @property
    def per_head(self) -> bool:
        """Whether every head has a scale of its own (counts) or all share one (windows)."""
        return not set(self.scaled) & set(SHARED_FIELDS)

    def at(self, scale: float, *, keys_per_row: float, num_kv: int) -> HeadPattern:
        """The pattern with its scaled fields multiplied, in the steps that kernels compute.

        Args:
            scale: 1 = as published.
            keys_per_row: what the budget buys on average; bounds the window of counted patterns.
            num_kv: no field passes the length.
        """
        sizes = {}
        for name in self.scaled:
            least = BLOCK if name == "local" else 0
            step = BLOCK if name in ("local", "sink", "vertical") else 1
            size = round(getattr(self.pattern, name) * scale / step) * step
            sizes[name] = min(max(size, least), max(num_kv, least))
        if self.per_head:
            most = int(keys_per_row * WINDOW_SHARE) // BLOCK * BLOCK
            sizes["local"] = min(self.pattern.local, max(most, BLOCK))
        return replace(self.pattern, **sizes)


def _grid(stride: str, flags: str, local: int) -> Candidate:
    h, v, s = (x == "1" for x in flags)
    lines = "".join(n for n, on in zip("hvs", (h, v, s), strict=True) if on)
    pattern = HeadPattern("grid", strides=(stride,), h=h, v=v, s=s, local=local)
    return Candidate(f"grid {stride} {lines}", pattern, ("local",))


def _vertical_slash(vertical: int, slash: int) -> Candidate:
    pattern = HeadPattern("vertical_slash", vertical=vertical, slash=slash, local=128)
    return Candidate(f"vertical_slash {vertical}+{slash}", pattern, ("vertical", "slash"))


def _window(name: str, sink: int, local: int) -> Candidate:
    pattern = HeadPattern(name, sink=sink, local=local, last=128)  # type: ignore[arg-type]
    return Candidate(f"{name} {sink}+{local}", pattern, ("local",))


# MMInference, Table 4 (the fifth field of a grid is its local window); h, v, s as flags.
GRID_FLAGS = ("100", "010", "001", "110", "011", "111")
PAPER = (
    *(_grid(stride, flags, 1024) for stride in ("frame", "row") for flags in GRID_FLAGS),
    *(_window("a_shape", 128, local) for local in (1024, 2048, 4096)),
    *(
        _vertical_slash(*sizes)
        for sizes in (
            (1000, 1024),
            (1000, 2048),
            (2000, 2048),
            (1000, 3096),
            (2000, 3096),
            (1000, 4096),
            (2000, 4096),
            (3500, 200),
            (1000, 2500),
        )
    ),
)
# Beyond the paper's table: MInference's other patterns, and what this package finds by itself.
EXTRA = (
    _window("tri_shape", 128, 4096),
    _vertical_slash(1024, 8),
    _vertical_slash(30, 2048),
    Candidate("block_sparse 100", HeadPattern("block_sparse", local=128), ("blocks",)),
    Candidate("auto", HeadPattern("auto"), ("vertical", "slash")),
)
# Between two modalities: little to find, so a few kinds suffice.
CROSS_NAMES = ("a_shape 128+1024", "vertical_slash 1000+1024", "vertical_slash 3500+200", "auto")


@dataclass(frozen=True)
class Space:
    """The candidates of a search.

    Source: MMInference (arXiv 2504.16083), Table 4; MInference (2407.02490), section 3.

    Args:
        candidates: patterns for a whole head, or for the queries of one modality.
        cross: patterns for one pair of different modalities, in place of the query's own.

    Raises:
        ValueError: no candidates, two of one name, or a cross one that is not a candidate.
    """

    candidates: tuple[Candidate, ...] = field(default=PAPER + EXTRA)
    cross: tuple[Candidate, ...] = field(
        default=tuple(c for c in PAPER + EXTRA if c.name in CROSS_NAMES)
    )

    def __post_init__(self) -> None:
        if not self.candidates:
            raise ValueError("Space.candidates: wants at least one, got none")
        for name in ("candidates", "cross"):
            names = [c.name for c in getattr(self, name)]
            twice = sorted({n for n in names if names.count(n) > 1})
            if twice:
                raise ValueError(f"Space.{name}: names must differ, got {twice} twice")
        strangers = sorted({c.name for c in self.cross} - {c.name for c in self.candidates})
        if strangers:
            raise ValueError(f"Space.cross: wants names of candidates, got {strangers}")

    def only(self, names: tuple[str, ...]) -> Space:
        """The candidates whose name starts with one of `names`.

        Raises:
            ValueError: a name that no candidate has.
        """
        for name in names:
            if not any(c.name.startswith(name) for c in self.candidates):
                known = sorted({c.name.split()[0] for c in self.candidates})
                raise ValueError(f"candidates: wants names that start with {known}, got {name!r}")
        kept = tuple(c for c in self.candidates if c.name.startswith(names))
        return Space(kept, tuple(c for c in self.cross if c.name.startswith(names)))


def describe(pattern: HeadPattern) -> str:
    """A pattern in a few words: what it is, and the sizes that matter to it."""
    p = pattern
    sizes = {
        "dense": "",
        "a_shape": f"{p.sink}+{p.local}",
        "tri_shape": f"{p.sink}+{p.local}+{p.last}",
        "vertical_slash": f"{p.vertical}+{p.slash}",
        "block_sparse": f"{p.blocks}",
        "grid": f"{'/'.join(map(str, p.strides))} "
        f"{''.join(n for n, on in zip('hvs', (p.h, p.v, p.s), strict=True) if on)} {p.local}",
        "auto": f"{p.vertical}+{p.slash}",
    }[p.pattern]
    inner = f"{p.pattern} {sizes}".strip()
    if p.boundary in ("none", "k"):
        return inner
    parts = ", ".join(f"{name}: {describe(x)}" for name, x in dict(p.when).items())
    return f"{p.boundary}-boundary ({parts or inner})"


def pattern_to_json(pattern: HeadPattern) -> dict[str, Any]:
    """The fields that differ from the default; `pattern` itself always."""
    out: dict[str, Any] = {"pattern": pattern.pattern}
    for spec in dataclasses.fields(HeadPattern):
        value = getattr(pattern, spec.name)
        if spec.name == "when":
            if value:
                out["when"] = {name: pattern_to_json(p) for name, p in value}
        elif value != spec.default:
            out[spec.name] = list(value) if isinstance(value, tuple) else value
    return out


def pattern_from_json(data: Mapping[str, Any]) -> HeadPattern:
    """The inverse of `pattern_to_json`."""
    values = dict(data)
    if "when" in values:
        values["when"] = {name: pattern_from_json(p) for name, p in values["when"].items()}
    return HeadPattern(**values)
