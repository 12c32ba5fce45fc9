"""State of the forward pass that is running now, per thread and per task.

Hooks write it and attention functions read it; the two never see each other otherwise. Everything
lives in ContextVars: two threads may run one model at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from permattn.models.frames import Rows, Size
from permattn.models.layout import TokenLayout
from permattn.models.stated import StatedRows


@dataclass(frozen=True)
class _Frame:
    owner: object
    layout: TokenLayout | None


@dataclass(frozen=True)
class PendingGrid:
    """Sizes of one image or video that a vision call was given, for the next prefill of `owner`."""

    owner: object
    kind: int
    size: Size


@dataclass(frozen=True)
class SplicedRows:
    """What a splicing method told of the sequence that `owner` will see next.

    Args:
        length: of that sequence.
    """

    owner: object
    rows: Rows
    length: int


MAX_PENDING = 4096

_FRAMES: ContextVar[tuple[_Frame, ...]] = ContextVar("permattn_frames", default=())
_PREPARING: ContextVar[bool] = ContextVar("permattn_preparing", default=False)
_OBSERVED: ContextVar[Mapping[str, Any] | None] = ContextVar("permattn_observed", default=None)
_IN_VISION_CALL: ContextVar[bool] = ContextVar("permattn_in_vision_call", default=False)
_PENDING: ContextVar[tuple[PendingGrid, ...]] = ContextVar("permattn_pending", default=())
_EXPLICIT: ContextVar[tuple[tuple[object, StatedRows], ...]] = ContextVar(
    "permattn_explicit", default=()
)

_SPLICED: ContextVar[tuple[SplicedRows, ...]] = ContextVar("permattn_spliced", default=())


def push_layout(owner: object, layout: TokenLayout | None) -> None:
    """Enters a decoder pass of `owner`; None = a pass without geometry (one query).

    A pass that Ctrl-C ended never said goodbye: torch calls no hook then. It ends here.
    """
    forget_layouts(owner)
    _FRAMES.set((*_FRAMES.get(), _Frame(owner, layout)))


def forget_layouts(owner: object) -> None:
    """Ends every pass of `owner`."""
    _FRAMES.set(tuple(frame for frame in _FRAMES.get() if frame.owner is not owner))


def pop_layout(owner: object) -> None:
    """Leaves it. Does nothing when the pass was never entered (its pre-hook raised)."""
    frames = _FRAMES.get()
    if frames and frames[-1].owner is owner:
        _FRAMES.set(frames[:-1])


def current_layout(owner: object) -> TokenLayout | None:
    """The layout of the innermost pass, if that pass belongs to `owner`."""
    frames = _FRAMES.get()
    return frames[-1].layout if frames and frames[-1].owner is owner else None


def in_prefill() -> bool:
    """Whether the innermost decoder pass of any patched model has geometry."""
    frames = _FRAMES.get()
    return bool(frames) and frames[-1].layout is not None


@contextmanager
def preparing() -> Iterator[None]:
    """Around `prepare_inputs_for_generation`, which builds the masks of static caches."""
    token = _PREPARING.set(True)
    try:
        yield
    finally:
        _PREPARING.reset(token)


def is_preparing() -> bool:
    """Whether `preparing` is active."""
    return _PREPARING.get()


@contextmanager
def vision_call() -> Iterator[bool]:
    """Around get_{image,video}_features, which call each other: whether this is the outer one."""
    is_outer = not _IN_VISION_CALL.get()
    token = _IN_VISION_CALL.set(True)
    try:
        yield is_outer
    finally:
        _IN_VISION_CALL.reset(token)


def observe(inputs: Mapping[str, Any] | None) -> None:
    """Remembers what the multimodal model was called with; None forgets it."""
    _OBSERVED.set(inputs)


def observed() -> Mapping[str, Any] | None:
    """What `observe` was told last."""
    return _OBSERVED.get()


def add_pending(grids: list[PendingGrid]) -> None:
    """Keeps grids for the next prefill of their owner."""
    # Features may be asked for without any prefill; then the oldest are of no use to anybody.
    _PENDING.set((*_PENDING.get(), *grids)[-MAX_PENDING:])


def take_pending(owner: object) -> list[PendingGrid]:
    """Hands over and forgets the pending grids of `owner`."""
    pending = _PENDING.get()
    if not pending:
        return []
    _PENDING.set(tuple(grid for grid in pending if grid.owner is not owner))
    return [grid for grid in pending if grid.owner is owner]


def set_spliced(spliced: SplicedRows) -> None:
    """Keeps what a splicing method told, in place of what it told before."""
    _SPLICED.set((*_without(spliced.owner), spliced))


def take_spliced(owner: object) -> SplicedRows | None:
    """Hands over and forgets what was kept for `owner`."""
    found = next((spliced for spliced in _SPLICED.get() if spliced.owner is owner), None)
    if found is not None:
        _SPLICED.set(_without(owner))
    return found


def _without(owner: object) -> tuple[SplicedRows, ...]:
    return tuple(spliced for spliced in _SPLICED.get() if spliced.owner is not owner)


def set_explicit(owner: object, rows: StatedRows | None) -> None:
    """Rows that the caller states for the next passes of `owner`; None withdraws them."""
    others = tuple(entry for entry in _EXPLICIT.get() if entry[0] is not owner)
    _EXPLICIT.set(others if rows is None else (*others, (owner, rows)))


def explicit(owner: object) -> StatedRows | None:
    """The rows that `set_explicit` holds for `owner`."""
    return next((rows for entry, rows in _EXPLICIT.get() if entry is owner), None)
