"""Fitting candidates to one budget: what the kernel really computes, not what a formula says."""

from __future__ import annotations

from dataclasses import dataclass, replace

from permattn.calibrate.layer import Heads, LayerInput, pairs_of
from permattn.calibrate.space import BLOCK, Candidate
from permattn.patterns.mminference import HeadPattern
from permattn.patterns.mminference.config import Boundary

_ROUNDS = 8
# A step may not change a scale by more than this: a plan's cost has steps of its own.
_MOST_STEP = 8.0


@dataclass(frozen=True)
class Budget:
    """How many (query, key) pairs a head may compute.

    Source: MInference (2407.02490), Algorithm 1: candidates are compared at the cost of an A-shape
    with 1024 global and 4096 local keys.

    Args:
        sink, local: the A-shape that sets the budget.
        density: in place of it, a share of all causal pairs.
        tolerance: a head may miss the budget by this share.

    Raises:
        ValueError: names the field.
    """

    sink: int = 1024
    local: int = 4096
    density: float | None = None
    tolerance: float = 0.05

    def __post_init__(self) -> None:
        if self.density is not None and not 0.0 < self.density <= 1.0:
            raise ValueError(f"budget: wants a density in (0, 1], got {self.density}")
        if min(self.sink, self.local) < 1:
            raise ValueError(f"budget: wants sizes >= 1, got {self.sink}+{self.local}")
        if not 0.0 < self.tolerance < 1.0:
            raise ValueError(f"budget: wants a tolerance in (0, 1), got {self.tolerance}")

    def pairs(self, layer: LayerInput) -> float:
        """The budget of one head of this layer.

        Raises:
            ValueError: the A-shape holds the whole prompt.
        """
        if self.density is not None:
            return self.density * layer.causal_pairs()
        if self.sink + self.local >= layer.num_kv:
            raise ValueError(
                f"budget: an A-shape of {self.sink} global and {self.local} local keys holds all "
                f"of the {layer.num_kv} tokens; use a longer prompt or state a density"
            )
        head = HeadPattern("a_shape", sink=self.sink, local=self.local)
        return float(pairs_of(layer.plan([head] * layer.num_heads), layer)[0])


def fit(
    candidate: Candidate,
    layer: LayerInput,
    budget: float,
    tolerance: float,
    boundary: Boundary = "none",
) -> tuple[Heads, list[float]]:
    """The candidate at the size that meets the budget, head by head.

    Heads share one scale where the candidate scales windows, and have their own where it scales
    counts. A candidate that stays below the budget at any size is taken as large as it gets.

    Args:
        boundary: "q" = every query modality runs it, with a probe of its own.

    Returns: per head a pattern and its computed pairs; a head that cannot go below the budget keeps
        its cheapest size.
    """
    heads = layer.num_heads
    keys = budget / max(layer.q.shape[2], 1)
    scales = [keys / _keys_at_one(candidate)] * heads
    low, high = [0.0] * heads, [float("inf")] * heads
    tried: dict[tuple[HeadPattern, ...], list[float]] = {}
    for _ in range(_ROUNDS):
        sized = (candidate.at(s, keys_per_row=keys, num_kv=layer.num_kv) for s in scales)
        patterns = tuple(replace(p, boundary=boundary) for p in sized)
        # Sizes have steps: another scale may be the same pattern, and needs no other plan.
        if patterns not in tried:
            tried[patterns] = pairs_of(layer.plan(patterns), layer).tolist()
        pairs = tried[patterns]
        cost = pairs if candidate.per_head else [max(pairs)] * heads
        near = [abs(c - budget) <= tolerance * budget for c in cost]
        if all(near):
            break
        for h in range(heads):
            if near[h]:
                continue
            if cost[h] > budget:
                high[h] = min(high[h], scales[h])
            else:
                low[h] = max(low[h], scales[h])
            scales[h] = _next_scale(scales[h], budget / max(cost[h], 1.0), low[h], high[h])
    most = budget * (1 + tolerance)
    trials = list(tried.items())
    if not candidate.per_head:
        # The most expensive head must be able to afford the window.
        return trials[_within([max(pairs) for _, pairs in trials], most)]
    picks = [_within([pairs[h] for _, pairs in trials], most) for h in range(heads)]
    return (
        tuple(trials[i][0][h] for h, i in enumerate(picks)),
        [trials[i][1][h] for h, i in enumerate(picks)],
    )


def _keys_at_one(candidate: Candidate) -> float:
    """About how many keys a row sees of the published size."""
    weight = {"slash": BLOCK, "blocks": BLOCK}
    return max(sum(getattr(candidate.pattern, f) * weight.get(f, 1) for f in candidate.scaled), 1)


def _next_scale(scale: float, ratio: float, low: float, high: float) -> float:
    """Where cost was proportional to scale it would meet the budget; between known bounds."""
    proposed = scale * min(max(ratio, 1 / _MOST_STEP), _MOST_STEP)
    if low < proposed < high:
        return proposed
    return (low * high) ** 0.5 if low > 0.0 and high != float("inf") else (low + high) / 2


def _within(costs: list[float], most: float) -> int:
    """The largest cost that `most` allows; the smallest where it allows none."""
    allowed = [(c, -i) for i, c in enumerate(costs) if c <= most]
    return -max(allowed)[1] if allowed else costs.index(min(costs))
