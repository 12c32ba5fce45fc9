"""Labels to grids, exactly."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import transformers
from permattn.core import TokenGrid, TokenRun
from permattn.models.families import family_of, known_families
from permattn.models.frames import (
    AUDIO,
    IMAGE,
    TEXT,
    VIDEO,
    FixedFrames,
    GridPerVideo,
    grids_from_coordinates,
    runs,
    segments_before,
    with_runs,
)
from permattn.models.layout import Family, padding_of_mask


def labels(text: str) -> torch.Tensor:
    """'..vva' -> text text video video audio."""
    return torch.tensor([[".iva".index(c) for c in row] for row in text.split()])


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


def test_chunk_of_a_batch_is_uncertain_without_positions():
    """The first row's second video may not be here yet: the next size is not the second row's."""
    sizes = {VIDEO: [(1, 2, 4), (1, 4, 2), (1, 2, 4)]}
    rule = GridPerVideo(merge=2)
    assert rule.rows(labels(".vv. .vv."), sizes, None) == ((), ())
    whole = rule.rows(labels(".vv.vv. .vv...."), sizes, None)
    assert [[grid.width for grid in row] for row in whole] == [[2, 1], [2]]


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


@pytest.mark.parametrize(
    ("text", "want"),
    [
        (".vvvvvv.", [TokenGrid(2, 2, 1, 2, (2, 5))]),
        (".vvvvv", [TokenGrid(2, 1, 1, 2)]),
        (".vv", []),
        (".vvvv.", []),
    ],
    ids=["two", "cut", "no-frame-yet", "not-a-multiple"],
)
def test_fixed_frames_behind_class_tokens(text, want):
    assert FixedFrames(1, 2, head=1).rows(labels(text), {}, None) == (tuple(want),)


def test_images_behind_class_tokens():
    rows = FixedFrames(1, 2, head=1, as_images=True).rows(labels(".iii.iii"), {}, None)
    assert rows == ((TokenGrid(2, 2, 1, 2, (2, 6)),),)


def test_sound_between_frames():
    """A grid goes on behind audio; a cut frame at the end of a chunk does not count yet."""
    rule = GridPerVideo(merge=2)
    label = labels("v.vvvvaaavvvvaav")
    label[0, 0] = IMAGE
    rows = rule.rows(label, {IMAGE: [(1, 2, 2)], VIDEO: [(5, 2, 4)]}, None)
    grid = TokenGrid(2, 4, 1, 2, (2, 4, 9, 11))
    assert rows == ((TokenGrid(0, 1, 1, 1), grid),)
    assert with_runs(rows, label) == (
        (
            TokenGrid(0, 1, 1, 1),
            grid,
            TokenRun(6, 3, "audio"),
            TokenRun(13, 2, "audio"),
            TokenRun(15, 1, "vision"),
        ),
    )


def test_visual_tokens_without_a_grid_are_still_vision():
    label = labels(".iii.vvv ii......")
    rows = with_runs(((TokenGrid(5, 1, 1, 2),), ()), label)
    assert rows == (
        (TokenRun(1, 3, "vision"), TokenGrid(5, 1, 1, 2), TokenRun(7, 1, "vision")),
        (TokenRun(0, 2, "vision"),),
    )


@pytest.mark.parametrize(
    ("kv_len", "want"),
    [
        (30, [TokenGrid(4, 3, 1, 4, (4, 10, 16)), TokenRun(20, 6, "audio")]),
        (23, [TokenGrid(4, 3, 1, 4, (4, 10, 16)), TokenRun(20, 3, "audio")]),
        (18, [TokenGrid(4, 2, 1, 4, (4, 10)), TokenRun(16, 2, "vision")]),
        (15, [TokenGrid(4, 2, 1, 4, (4, 10))]),
        (7, [TokenRun(4, 3, "vision")]),
        (4, []),
    ],
)
def test_segments_of_a_chunk(kv_len, want):
    row = (TokenGrid(4, 3, 1, 4, (4, 10, 16)), TokenRun(20, 6, "audio"))
    assert segments_before(row, kv_len) == tuple(want)


def test_labels_of_ids():
    family = Family(image_token=3, video_token=4, audio_token=7)
    ids = torch.tensor([[1, 3, 4, 7, 9]])
    assert family.labels_of_ids(ids).tolist() == [[TEXT, IMAGE, VIDEO, AUDIO, TEXT]]


def llava_config(tower: str, strategy: str):
    vision = {"model_type": tower, "image_size": 24, "patch_size": 6}
    if tower == "pixtral":
        vision["head_dim"] = 16
    return transformers.LlavaConfig(
        vision_config=vision, image_token_index=3, vision_feature_select_strategy=strategy
    )


@pytest.mark.parametrize(
    ("tower", "strategy", "want"),
    [
        ("clip_vision_model", "default", FixedFrames(4, 4, as_images=True)),
        ("clip_vision_model", "full", FixedFrames(4, 4, head=1, as_images=True)),
        ("siglip_vision_model", "full", FixedFrames(4, 4, as_images=True)),
        ("pixtral", "full", None),
    ],
)
def test_frames_of_llava(tower, strategy, want):
    """Only CLIP has a class token to keep; Pixtral takes images of any size."""
    assert family_of(llava_config(tower, strategy)).frames == want


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


# `model_type`s in the table of the page.
PAGE = re.findall(
    r"`(\w+)`",
    "".join(
        line.split("|")[2]
        for line in (Path(__file__).parents[2] / "docs" / "models.md").read_text().splitlines()
        if line.count("|") == 4 and "`" in line.split("|")[2] and "`model_type`" not in line
    ),
)


def test_families_are_found():
    known = known_families()
    for name in PAGE:
        assert name in known, name
    assert set(known) <= set(PAGE), "docs/models.md names every family"

    class Unknown:
        model_type = "not_yet_written"

    assert family_of(Unknown()) == Family()
