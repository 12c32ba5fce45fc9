"""Choosing from hand-written records: budgets, near ties, boundaries, one pattern for all."""

from __future__ import annotations

import math

import pytest
from permattn.calibrate import Candidate, Space
from permattn.calibrate.choose import (
    Choice,
    check_affordable,
    choose_boundary,
    choose_layer,
    choose_own,
    choose_shared,
    mean_times,
)
from permattn.calibrate.space import pattern_to_json
from permattn.patterns.mminference import HeadPattern

A = HeadPattern("a_shape", local=64)
V = HeadPattern("vertical_slash", vertical=64)
SPACE = Space(
    (Candidate("a", A, ("local",)), Candidate("v", V, ("vertical",))),
    (Candidate("v", V, ("vertical",)),),
)


def trial(pattern: HeadPattern, errors: dict[str, float], pairs: float = 90.0, **more) -> dict:
    """One head; errors per modality, relative to a norm of 1 each."""
    return {
        "patterns": [pattern_to_json(pattern)],
        "err2": {m: [e * e] for m, e in errors.items()},
        "kept": {m: [50.0] for m in errors},
        "pairs": [pairs],
        **more,
    }


def record(trials: dict, **rows: int) -> dict:
    rows = rows or {"vision": 100}
    return {
        "tokens": 100,
        "budget": 100.0,
        "tolerance": 0.05,
        "causal": 1000,
        "modalities": list(rows),
        "rows": rows,
        "norm2": {m: [1.0] for m in rows},
        "trials": trials,
    }


def test_the_smallest_error_within_the_budget_wins():
    r = record(
        {
            "none/a": trial(A, {"vision": 0.3}),
            "none/v": trial(V, {"vision": 0.1}),
            "none/big": trial(HeadPattern(), {"vision": 0.0}, pairs=106.0),
        }
    )
    choice = alone([r], 0, {})
    assert choice.name == "v" and choice.pattern == V
    assert choice.error == pytest.approx(0.1)
    assert choice.recall == pytest.approx(0.5) and choice.density == pytest.approx(0.09)


def test_errors_are_means_over_samples():
    first = record(
        {"none/a": trial(A, {"vision": 0.1}), "none/v": trial(V, {"vision": 0.2})},
    )
    second = record({"none/a": trial(A, {"vision": 0.5}), "none/v": trial(V, {"vision": 0.2})})
    choice = alone([first, second], 0, {})
    assert choice.name == "v" and choice.error == pytest.approx(0.2)


@pytest.mark.parametrize("other, winner", [(0.104, "v"), (0.106, "a")], ids=["near", "not-near"])
def test_time_decides_between_near_errors_alone(other, winner):
    r = record({"none/a": trial(A, {"vision": 0.1}), "none/v": trial(V, {"vision": other})})
    choice = alone([r], 0, {"none/a": 2.0, "none/v": 1.0})
    assert choice.name == winner
    assert choice.ms == {"a": 2.0, "v": 1.0}[winner]


def two_heads(
    errors: tuple[float, float], pairs: tuple[float, float], pattern: HeadPattern
) -> dict:
    return {
        "patterns": 2 * [pattern_to_json(pattern)],
        "err2": {"vision": [e * e for e in errors]},
        "kept": {"vision": [50.0, 50.0]},
        "pairs": list(pairs),
    }


@pytest.mark.parametrize("pooled, names", [(True, ["a", "v"]), (False, ["a", "a"])], ids=str)
def test_what_one_head_leaves_another_may_spend(pooled, names):
    """Head 1 needs 130 pairs, head 0 uses 60 of its 100."""
    r = record({"none/a": two_heads((0.1, 0.6), (60, 90), A)})
    r["trials"]["none/v"] = two_heads((0.099, 0.01), (200, 130), V)
    r["norm2"] = {"vision": [1.0, 1.0]}
    chosen = choose_layer([r], 2, {}, pooled=pooled)
    assert [c.name for c in chosen] == names


def test_a_layer_never_spends_more_than_its_budget():
    r = record({"none/a": two_heads((0.5, 0.6), (90, 90), A)})
    r["trials"]["none/v"] = two_heads((0.1, 0.1), (115, 125), V)
    r["norm2"] = {"vision": [1.0, 1.0]}
    # 210 pairs are allowed: one of both can be better.
    assert [c.name for c in choose_layer([r], 2, {}, pooled=True)] == ["v", "a"]


def test_a_trial_that_points_to_another_counts_as_that():
    r = record({"none/a": {"same": "none/v"}, "none/v": trial(V, {"vision": 0.1}, ms=3.0)})
    assert alone([r], 0, {}).pattern == V
    assert mean_times([r]) == {"none/a": 3.0, "none/v": 3.0}


def alone(records: list[dict], head: int, times: dict[str, float]) -> Choice:
    """One head with a budget of its own."""
    return choose_layer(records, head + 1, times, pooled=False)[head]


def both(text: float, vision: float) -> dict[str, float]:
    return {"text": text, "vision": vision}


def boundary_records(pair_text: float = 0.5) -> tuple[dict, dict]:
    intra = record(
        {
            "none/a": trial(A, both(0.1, 0.6)),
            "none/v": trial(V, both(0.6, 0.1)),
            "q/a": trial(A, both(0.1, 0.6)),
            "q/v": trial(V, both(0.6, 0.1)),
        },
        text=80,
        vision=120,
    )
    own = HeadPattern(boundary="2d")
    pairs = record(
        {
            "2d/0/own": trial(own, both(0.5, 0.5)),
            "2d/0/v": trial(own, both(pair_text, 0.5)),
        },
        text=80,
        vision=120,
    )
    return intra, pairs


def test_every_query_modality_gets_its_own():
    intra, pairs = boundary_records()
    names = choose_own([intra], 0, ("text", "vision"), {})
    assert names == {"text": "q/a", "vision": "q/v"}
    whole = alone([intra], 0, {})
    choice = choose_boundary(whole, [intra], [pairs], 0, ("text", "vision"), {})
    assert choice.pattern.boundary == "q"
    assert choice.pattern.between("text", "vision") == A
    assert choice.pattern.between("vision", "text") == V
    # Squared errors of different rows add up.
    assert choice.error == pytest.approx(math.sqrt((0.1**2 + 0.1**2) / 2))


def test_a_pair_wins_where_it_is_better():
    intra, pairs = boundary_records(pair_text=0.01)
    pairs["trials"]["2d/0/own"]["err2"]["vision"] = [1e-4]
    whole = alone([intra], 0, {})
    choice = choose_boundary(whole, [intra], [pairs], 0, ("text", "vision"), {})
    assert choice.pattern.boundary == "2d"
    assert choice.pattern.between("text", "text") == A
    assert choice.pattern.between("text", "vision") == V
    assert choice.pattern.between("vision", "text") == V
    assert "text to vision: v" in choice.name


def test_the_simpler_boundary_wins_near_ties_and_cheap_budgets():
    intra, pairs = boundary_records()
    good = Choice("x", V, 0.101, 1.0, 0.09, None)
    modalities = ("text", "vision")
    assert choose_boundary(good, [intra], [pairs], 0, modalities, {}) is good
    for name in ("q/a", "q/v"):
        intra["trials"][name]["pairs"] = [200.0]
    whole = alone([intra], 0, {})
    assert choose_boundary(whole, [intra], [pairs], 0, modalities, {}) is whole


def test_one_pattern_for_all_is_not_the_one_that_wins_most():
    """Two heads of three love a, and it ruins the third."""
    records = [
        [record({"none/a": trial(A, {"vision": 0.1}), "none/v": trial(V, {"vision": 0.15})})],
        [record({"none/a": trial(A, {"vision": 0.1}), "none/v": trial(V, {"vision": 0.15})})],
        [record({"none/a": trial(A, {"vision": 0.9}), "none/v": trial(V, {"vision": 0.15})})],
    ]
    shared = choose_shared(records, SPACE)
    assert shared.name == "v" and shared.pattern == V
    assert shared.errors == pytest.approx({"a": 1.1 / 3, "v": 0.15})


def test_one_pattern_for_all_is_affordable():
    records = [
        [record({"none/a": trial(A, {"vision": 0.5}), "none/v": trial(V, {"vision": 0.1}, 200.0)})]
    ]
    assert choose_shared(records, SPACE).name == "a"


def test_a_budget_below_everything_is_refused():
    r = record({"none/a": trial(A, {"vision": 0.1}, pairs=300.0)})
    with pytest.raises(ValueError, match=r"10\.0% of all pairs is less.*cheapest 30\.0%"):
        check_affordable([r])
