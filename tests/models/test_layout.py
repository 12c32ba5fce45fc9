"""Labels to grids, exactly."""

from __future__ import annotations

import pytest
import torch
from permattn.core import TokenGrid
from permattn.models.families import family_of, known_families
from permattn.models.frames import (
    IMAGE,
    VIDEO,
    FixedFrames,
    GridPerVideo,
    grids_from_coordinates,
    runs,
)
from permattn.models.layout import Family, padding_of_mask


def labels(text: str) -> torch.Tensor:
    """'..vv' -> text text video video."""
    return torch.tensor([[".iv".index(c) for c in row] for row in text.split()])


def test_runs():
    assert runs(torch.tensor([1, 1, 0, 1]).bool()) == [(0, 2), (3, 4)]
    assert runs(torch.zeros(3).bool()) == []
    assert runs(torch.zeros(0).bool()) == []


@pytest.mark.parametrize(
    ("mask", "want"),
    [
        ([[1, 1, 1]], ((0,), (0,), False)),
        ([[0, 1, 1], [1, 1, 0]], ((1, 0), (0, 1), False)),
        ([[1, 0, 1]], ((0,), (0,), True)),
        ([[0, 0, 0]], ((0,), (3,), False)),
    ],
    ids=["none", "both-sides", "gap", "all"],
)
def test_padding_of_mask(mask, want):
    assert padding_of_mask(torch.tensor(mask)) == want


@pytest.mark.parametrize(
    ("text", "sizes", "want"),
    [
        (".vvvv.", [(2, 2, 4)], [TokenGrid(1, 2, 1, 2)]),
        (".vv.vv.", [(2, 2, 4)], [TokenGrid(1, 2, 1, 2, (1, 4))]),
        (".vv.vv.", [(1, 2, 4)] * 2, [TokenGrid(1, 1, 1, 2), TokenGrid(4, 1, 1, 2)]),
        (".vvv", [(2, 2, 4)], [TokenGrid(1, 1, 1, 2)]),
        (".v", [(2, 2, 4)], []),
        (".v.v.", [(1, 2, 4)], []),
        (".vv.", [], []),
    ],
    ids=["one-run", "run-per-frame", "two", "cut", "no-frame-yet", "broken-frame", "no-size"],
)
def test_grid_per_video(text, sizes, want):
    rule = GridPerVideo(merge=2)
    assert rule.rows(labels(text), {IMAGE: [], VIDEO: sizes}, None) == (tuple(want),)


def test_grid_per_video_repeats_rows_of_beams():
    rows = GridPerVideo(merge=2).rows(labels(".vv ".strip() + " .vv"), {VIDEO: [(1, 2, 4)]}, None)
    assert rows == ((TokenGrid(1, 1, 1, 2),),) * 2


@pytest.mark.parametrize(
    ("text", "want"),
    [
        (".vvvvvvvvv.", [TokenGrid(1, 2, 2, 2)]),
        (".vvvvvvvvvvvv.", []),
        (".vvvvvvv", [TokenGrid(1, 1, 2, 2)]),
        (".vvv", []),
    ],
    ids=["tail", "not-a-multiple", "cut", "no-frame-yet"],
)
def test_fixed_frames(text, want):
    assert FixedFrames(2, 2, tail=1).rows(labels(text), {}, None) == (tuple(want),)


def test_frames_written_as_images():
    rule = FixedFrames(1, 2, as_images=True)
    far = "." * 65
    rows = rule.rows(labels(f".ii.ii..iiii.{far}ii"), {}, None)
    assert rows == ((TokenGrid(1, 2, 1, 2, (1, 4)), TokenGrid(78, 1, 1, 2)),)


def test_grids_from_coordinates():
    label = labels("..vvvvvvvv..vvvv.")[0]
    place = torch.zeros(len(label), 2, dtype=torch.int)
    frame = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]], dtype=torch.int)
    place[2:10] = torch.cat((frame, frame)) + 7
    place[12:16] = torch.tensor([[0, 0], [0, 1], [0, 2], [0, 3]]) + 30
    found = grids_from_coordinates(label, place, VIDEO)
    assert found == [TokenGrid(2, 2, 2, 2), TokenGrid(12, 1, 1, 4)]


def test_families_are_found():
    known = known_families()
    for name in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava_onevision", "internvl"):
        assert name in known

    class Unknown:
        model_type = "not_yet_written"

    assert family_of(Unknown()) == Family()
