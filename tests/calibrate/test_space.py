"""The candidates: the paper's table, their sizes under a budget, their JSON."""

from __future__ import annotations

import pytest
from permattn.calibrate import Candidate, Space
from permattn.calibrate.space import (
    PAPER,
    describe,
    pattern_from_json,
    pattern_to_json,
)
from permattn.patterns.mminference import HeadPattern


def test_the_papers_table_is_all_there():
    grids = [c.pattern for c in PAPER if c.pattern.pattern == "grid"]
    flags = {(p.strides[0], p.h, p.v, p.s) for p in grids}
    six = [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1), (1, 1, 1)]
    assert flags == {(stride, *map(bool, f)) for stride in ("frame", "row") for f in six}
    assert {p.local for p in grids} == {1024}
    shapes = [(c.pattern.sink, c.pattern.local) for c in PAPER if c.pattern.pattern == "a_shape"]
    assert shapes == [(128, 1024), (128, 2048), (128, 4096)]
    slashes = [c.pattern for c in PAPER if c.pattern.pattern == "vertical_slash"]
    assert len(slashes) == 9 and (3500, 200) in {(p.vertical, p.slash) for p in slashes}


def test_every_pattern_of_the_package_is_searched():
    searched = {c.pattern.pattern for c in Space().candidates}
    assert searched == {"a_shape", "tri_shape", "vertical_slash", "block_sparse", "grid", "auto"}


@pytest.mark.parametrize("candidate", Space().candidates, ids=lambda c: c.name.replace(" ", "-"))
def test_size_follows_the_scale(candidate: Candidate):
    def sizes(scale: float) -> list[int]:
        pattern = candidate.at(scale, keys_per_row=4000.0, num_kv=100_000)
        return [getattr(pattern, name) for name in candidate.scaled]

    published = [getattr(candidate.pattern, name) for name in candidate.scaled]
    for got, want in zip(sizes(1.0), published, strict=True):
        assert abs(got - want) <= 32
    assert all(a <= b <= c for a, b, c in zip(sizes(0.1), sizes(1.0), sizes(2.0), strict=True))
    assert sizes(0.1) != sizes(2.0)
    # Proportions stay.
    if len(published) == 2 and min(published) > 100:
        a, b = sizes(3.0)
        assert a / b == pytest.approx(published[0] / published[1], rel=0.1)


def test_no_size_passes_the_length_and_the_window_never_vanishes():
    for candidate in Space().candidates:
        huge = candidate.at(1e6, keys_per_row=1e9, num_kv=1000)
        tiny = candidate.at(0.0, keys_per_row=1.0, num_kv=1000)
        for name in candidate.scaled:
            assert getattr(huge, name) <= 1000
        assert tiny.local >= 64 and huge.local >= 64


def test_json_round_trip_keeps_boundaries():
    own = HeadPattern("grid", strides=("row", 7), h=False, local=192)
    head = HeadPattern(
        "auto", coverage=0.9, boundary="2d", when={"text,vision": own, "text,text": HeadPattern()}
    )
    data = pattern_to_json(head)
    assert pattern_from_json(data) == head
    assert data["when"]["text,vision"] == {
        "pattern": "grid", "strides": ["row", 7], "h": False, "local": 192
    }  # fmt: skip
    assert pattern_to_json(HeadPattern()) == {"pattern": "auto"}


def test_description_names_what_matters():
    assert describe(HeadPattern("a_shape", sink=128, local=4096)) == "a_shape 128+4096"
    assert describe(HeadPattern("grid", strides=("row",), h=False)) == "grid row vs 512"
    nested = HeadPattern(boundary="q", when={"text": HeadPattern("dense")})
    assert describe(nested) == "q-boundary (text: dense)"


def test_only_keeps_what_is_named():
    space = Space().only(("grid", "auto"))
    assert {c.pattern.pattern for c in space.candidates} == {"grid", "auto"}
    assert [c.name for c in space.cross] == ["auto"]


BAD = {
    "empty": (lambda: Space(candidates=(), cross=()), "at least one"),
    "twice": (lambda: Space(candidates=PAPER[:1] * 2, cross=()), "must differ"),
    "stranger": (lambda: Space(candidates=PAPER[:1], cross=PAPER[1:2]), "names of candidates"),
    "unknown": (lambda: Space().only(("fancy",)), "fancy"),
}


@pytest.mark.parametrize("make, message", BAD.values(), ids=BAD.keys())
def test_bad_space(make, message):
    with pytest.raises(ValueError, match=message):
        make()
