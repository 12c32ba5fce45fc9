"""Sampled steps, bins, and the noise levels between them."""

from __future__ import annotations

import pytest
from permattn.calibrate.paro.bins import bin_of_steps, sampled_steps, sigma_edges, spread
from permattn.calibrate.paro.options import MeasureOptions, SelectOptions


def test_thirty_steps_have_the_papers_sixteen_bins():
    steps = sampled_steps(30, None, "half_shared")
    assert steps == (*range(15), 15, 19, 23, 27)
    bins = bin_of_steps(steps, 30, "half_shared")
    assert bins == (*range(15), 15, 15, 15, 15)


@pytest.mark.parametrize("num_steps", [1, 2, 3, 7, 50])
@pytest.mark.parametrize("bins", ["half_shared", "per_step", "shared", 1])
def test_bins_ascend_without_a_gap(num_steps, bins):
    steps = sampled_steps(num_steps, None, bins)
    found = bin_of_steps(steps, num_steps, bins)
    assert sorted(set(found)) == list(range(found[-1] + 1)) and list(found) == sorted(found)
    sigmas = [1 - s / num_steps for s in steps]
    edges = sigma_edges(sigmas, found)
    assert len(edges) == found[-1]
    # Every sampled step finds its own bin by its noise level.
    assert [sum(sigma <= edge for edge in edges) for sigma in sigmas] == list(found)


def test_counts_and_numbers_of_steps():
    assert sampled_steps(10, 4, "shared") == (0, 3, 6, 9)
    assert sampled_steps(10, 1, "shared") == (5,)
    assert sampled_steps(10, [7, 2, 2], "per_step") == (2, 7)
    assert spread((3, 4, 9), 5) == (3, 4, 9)
    assert bin_of_steps((0, 2, 4, 6, 8), 10, 2) == (0, 0, 0, 1, 1)
    with pytest.raises(ValueError, match="0 to 9, got 10"):
        sampled_steps(10, [10], "shared")
    with pytest.raises(ValueError, match="at most one per sampled step, 2, got 3"):
        bin_of_steps((0, 1), 2, 3)


def test_edges_lie_midway():
    assert sigma_edges((1.0, 0.8, 0.4, 0.1), (0, 1, 1, 2)) == (0.9, 0.25)
    for sigmas in ((0.5, 0.5), (0.5, 0.7), (1.5, 0.5)):
        with pytest.raises(ValueError, match="sigma: noise levels"):
            sigma_edges(sigmas, (0, 1))


BAD_MEASURE = {
    "density-zero": ({"density": 0.0}, "density"),
    "density-over": ({"density": 1.1}, "density"),
    "density-nan": ({"density": float("nan")}, "density"),
    "metric": ({"metric": "area"}, "metric: wants one of"),
    "alpha": ({"alpha": 2.0}, "alpha"),
    "eps": ({"eps": 0.0}, "eps"),
    "share": ({"sparse_share": -1.0}, "sparse_share"),
    "block": ({"block": (8, 64)}, "block: wants two sizes of at least 16"),
    "one-block": ({"block": (64,)}, "block"),
    "bins": ({"bins": "weekly"}, "bins: wants one of"),
    "bins-zero": ({"bins": 0}, "bins"),
    "steps": ({"sampled_steps": []}, "sampled_steps"),
    "steps-zero": ({"sampled_steps": 0}, "sampled_steps"),
    "steps-negative": ({"sampled_steps": [-1]}, "sampled_steps"),
    "order-steps": ({"order_steps": 0}, "order_steps"),
    "stride": ({"order_stride": 0}, "order_stride"),
}
BAD_SELECT = {
    "density": ({"density": -0.1}, "density"),
    "scope": ({"scope": "planet"}, "scope: wants one of"),
    "coverage": ({"coverage": 0.0}, "coverage"),
    "empty": ({"empty_below": 2.0}, "empty_below"),
    "recall": ({"min_recall": -1.0}, "min_recall"),
}


@pytest.mark.parametrize("name", BAD_MEASURE)
def test_bad_measure_options(name):
    values, text = BAD_MEASURE[name]
    with pytest.raises(ValueError, match=text):
        MeasureOptions(**values)


@pytest.mark.parametrize("name", BAD_SELECT)
def test_bad_select_options(name):
    values, text = BAD_SELECT[name]
    with pytest.raises(ValueError, match=text):
        SelectOptions(**values)
