"""What a training depends on; two with equal settings give equal numbers."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from permattn.cli.errors import UserError

# What runs, in the order of a step. "nudged" is ours with weights moved by one part in ten million
# at every step: how far rounding alone drives two trainings apart.
KINDS = ("dense", "gather", "ours", "nudged")
MIN_STEPS = 2


@dataclass(frozen=True)
class Settings:
    """Network, data and recipe.

    Args:
        kinds: of `KINDS`.
        steps: optimiser steps.
        size: pixels of a side; a multiple of 16 * regions.
        regions: per side, at every stage.
        topks: routed regions of stages 1 to 3.
        batch: crops per step.
        seed: of weights and data.
        backend: of "ours".
        device: cpu or cuda.
        evaluate_every: steps between validations.
        per_photo: validation crops of a photograph.
    """

    kinds: tuple[str, ...]
    steps: int
    size: int
    regions: int
    topks: tuple[int, int, int]
    batch: int = 32
    seed: int = 0
    backend: str = "auto"
    device: str = "cpu"
    depths: tuple[int, int, int, int] = (1, 1, 2, 1)
    dims: tuple[int, int, int, int] = (32, 64, 128, 256)
    head_dim: int = 32
    mlp_ratio: int = 3
    peak_rate: float = 1e-3
    final_rate: float = 1e-5
    warmup: float = 0.1
    weight_decay: float = 0.05
    label_smoothing: float = 0.1
    drop_path: float = 0.05
    clip_norm: float = 5.0
    evaluate_every: int = 50
    per_photo: int = 24

    def to_json(self) -> dict[str, Any]:
        """As JSON gives it back: lists in place of tuples."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


def parse_kinds(text: str) -> tuple[str, ...]:
    """What runs, from the command line. Raises UserError."""
    if text == "all":
        return KINDS
    if text not in KINDS[:3]:
        raise UserError(f"--attention: wants ours, gather, dense or all, got {text!r}")
    return (text,)


def regions_of(size: int) -> tuple[int, tuple[int, int, int]]:
    """(regions per side, topks) for a side in pixels: maps of size / 4, / 8 and / 16 are cut.

    Raises:
        UserError: neither 7 nor 4 regions divide the smallest routed map.
    """
    # The released networks' numbers; with 16 regions in all, top 16 would route nothing.
    for regions, topks in ((7, (1, 4, 16)), (4, (1, 4, 8))):
        if size >= 16 * regions and size % (16 * regions) == 0:
            return regions, topks
    raise UserError(f"--size {size}: wants a multiple of 112 (7 x 7 regions) or of 64 (4 x 4)")


def differences(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    """Where two settings differ, in words; "" where they agree."""
    names = [name for name in {**found, **wanted} if found.get(name) != wanted.get(name)]
    return ", ".join(f"{n} {found.get(n)} where {wanted.get(n)} is asked for" for n in names)
