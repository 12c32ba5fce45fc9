"""Which steps are measured, which of them share a mask, and the noise levels between bins."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from permattn.calibrate.paro.options import Bins

# Sampled steps where neither a count nor a rule says otherwise.
_FEW = 8
# Of the second half, which shares one mask, every so-manieth step is measured.
_LATE_STRIDE = 4


def sampled_steps(
    num_steps: int, wanted: int | Sequence[int] | None, bins: Bins
) -> tuple[int, ...]:
    """The steps to measure, ascending.

    Args:
        num_steps: of a run.
        wanted, bins: see `MeasureOptions`.

    Raises:
        ValueError: a step that the run does not have.
    """
    if isinstance(wanted, int):
        return spread(range(num_steps), wanted)
    if wanted is not None:
        if max(wanted) >= num_steps:
            raise ValueError(
                f"sampled_steps: wants numbers from 0 to {num_steps - 1}, got {max(wanted)}"
            )
        return tuple(sorted(set(wanted)))
    if bins == "half_shared":
        half = num_steps // 2
        return (*range(half), *range(half, num_steps, _LATE_STRIDE))
    return tuple(range(num_steps)) if bins == "per_step" else spread(range(num_steps), _FEW)


def spread(steps: Sequence[int], count: int) -> tuple[int, ...]:
    """At most `count` of these, evenly, the first and the last among them if there are two."""
    if count >= len(steps):
        return tuple(steps)
    if count == 1:
        return (steps[len(steps) // 2],)
    return tuple(steps[round(i * (len(steps) - 1) / (count - 1))] for i in range(count))


def bin_of_steps(steps: Sequence[int], num_steps: int, bins: Bins) -> tuple[int, ...]:
    """The bin of every sampled step; bins ascend from 0 without a gap.

    Raises:
        ValueError: more bins than sampled steps.
    """
    if bins == "shared":
        return (0,) * len(steps)
    if bins == "per_step":
        return tuple(range(len(steps)))
    if bins == "half_shared":
        early = sum(step < num_steps // 2 for step in steps)
        return tuple(min(i, early) for i in range(len(steps)))
    assert isinstance(bins, int)
    if bins > len(steps):
        raise ValueError(f"bins: wants at most one per sampled step, {len(steps)}, got {bins}")
    return tuple(i * bins // len(steps) for i in range(len(steps)))


def sigma_edges(sigmas: Sequence[float], bins: Sequence[int]) -> tuple[float, ...]:
    """Noise levels between bins: midway between the last step of one and the first of the next.

    Args:
        sigmas: noise level of every sampled step, descending.
        bins: bin of every sampled step, ascending.

    Raises:
        ValueError: noise levels that do not descend within [0, 1].
    """
    falls = all(a > b for a, b in pairwise(sigmas))
    if not falls or not all(0.0 <= sigma <= 1.0 for sigma in sigmas):
        raise ValueError(
            f"sigma: noise levels must fall from step to step within [0, 1], got {list(sigmas)}"
        )
    return tuple(
        (sigmas[i] + sigmas[i + 1]) / 2 for i in range(len(sigmas) - 1) if bins[i] != bins[i + 1]
    )
