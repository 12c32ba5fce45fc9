"""Budgets: every candidate computes what the target allows, counted by the plan itself."""

from __future__ import annotations

import pytest
from permattn.calibrate import Budget, Space
from permattn.calibrate.align import fit
from permattn.calibrate.layer import LayerInput, pairs_of
from permattn.patterns.mminference import HeadPattern

TOLERANCE = 0.05
NAMES = (
    "a_shape 128+1024",
    "vertical_slash 1000+1024",
    "block_sparse 100",
    "grid frame vs",
    "auto",
)
CANDIDATES = [c for c in Space().candidates if c.name in NAMES]


@pytest.mark.parametrize("candidate", CANDIDATES, ids=lambda c: c.name.replace(" ", "-"))
def test_fit_stays_within_the_budget(candidate, layer: LayerInput):
    budget = Budget(density=0.65).pairs(layer)
    patterns, pairs = fit(candidate, layer, budget, TOLERANCE)
    assert pairs == pytest.approx(pairs_of(layer.plan(patterns), layer).tolist())
    assert max(pairs) <= budget * (1 + TOLERANCE)
    # Blocks of 64 keys are 8 % of a row here: nobody gets nearer than one of them.
    assert max(pairs) >= 0.7 * budget or candidate.name == "auto"
    if not candidate.per_head:
        assert len(set(patterns)) == 1


def test_heads_have_sizes_of_their_own_but_one_window(layer: LayerInput):
    candidate = next(c for c in CANDIDATES if c.name == "vertical_slash 1000+1024")
    budget = Budget(density=0.65).pairs(layer)
    patterns, _ = fit(candidate, layer, budget, TOLERANCE)
    assert len({p.local for p in patterns}) == 1
    assert len({(p.vertical, p.slash) for p in patterns}) > 1


def test_a_boundary_is_fitted_with_its_own_cost(layer: LayerInput):
    candidate = next(c for c in CANDIDATES if c.name.startswith("a_shape"))
    budget = Budget(density=0.7).pairs(layer)
    patterns, pairs = fit(candidate, layer, budget, TOLERANCE, "q")
    assert {p.boundary for p in patterns} == {"q"}
    assert max(pairs) <= budget * (1 + TOLERANCE)


def test_what_cannot_be_met_keeps_its_cheapest_size(layer: LayerInput):
    candidate = next(c for c in CANDIDATES if c.name.startswith("a_shape"))
    patterns, pairs = fit(candidate, layer, 1000.0, TOLERANCE)
    assert patterns[0].local == 64 and min(pairs) > 1000.0


def test_the_default_budget_is_an_a_shape(layer: LayerInput):
    budget = Budget(sink=100, local=300)
    head = HeadPattern("a_shape", sink=100, local=300)
    assert budget.pairs(layer) == float(pairs_of(layer.plan([head] * 4), layer)[0])


BAD = {
    "density": (lambda layer: Budget(density=0.0), "density in"),
    "above-one": (lambda layer: Budget(density=1.5), "density in"),
    "sizes": (lambda layer: Budget(sink=0), "sizes >= 1"),
    "tolerance": (lambda layer: Budget(tolerance=1.0), "tolerance"),
    "over-the-length": (lambda layer: Budget().pairs(layer), "holds all of the"),
}


@pytest.mark.parametrize("make, message", BAD.values(), ids=BAD.keys())
def test_bad_budget(make, message, layer: LayerInput):
    with pytest.raises(ValueError, match=message):
        make(layer)
