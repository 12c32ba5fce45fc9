"""The constructed model: the real class, and heads that show the patterns of their names."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from permattn.cli.demo.circuits import (
    CONTENT_KEY,
    HEAD_DIM,
    PAIRS,
    SECTIONS,
    Grid,
    Sizes,
    frequencies,
)
from permattn.cli.demo.measure import Meter
from permattn.cli.demo.patches import patches_of
from permattn.cli.demo.subject import choose_grid, constructed_subject
from permattn.cli.demo.video import Clip

SIZES = Sizes(
    mlp=256, layers=4, heads=4, kv_heads=2, vocab=256, vision_hidden=64,
    vision_depth=2, patch=4, num_spots=4,
)  # fmt: skip
GRID = Grid(12, 6, 8)


@pytest.fixture(scope="module")
def subject():
    rng = np.random.default_rng(0)
    size = (2 * GRID.frames, 8 * GRID.height, 8 * GRID.width, 3)
    clip = Clip(rng.integers(0, 256, size, np.uint8), 0.1, "raw", size[1:3], size[0])
    return constructed_subject(
        clip, GRID, device=torch.device("cpu"), dtype=torch.float32, sizes=SIZES
    )


@pytest.fixture(scope="module")
def maps(subject):
    """Softmax of every layer and head: list of [H, S, S]."""
    seen = []

    def look(attention, module, q, k, v, *rest, **keywords):
        group = q.shape[1] // k.shape[1]
        score = (q @ k.repeat_interleave(group, 1).mT) * HEAD_DIM**-0.5
        hidden = ~torch.ones(score.shape[-2:]).tril().bool()
        seen.append(score.masked_fill(hidden, float("-inf")).softmax(-1)[0])
        return attention(module, q, k, v, *rest, **keywords)

    Meter(subject.model, subject.inputs, torch.device("cpu")).run(instead=look)
    return seen


@pytest.fixture(scope="module")
def places(subject):
    """(first visual token, rows of the last frame, masks of the special keys)."""
    start = int((subject.inputs["input_ids"][0] == 4).nonzero()[0])
    rows = start + torch.arange(GRID.num_tokens - 48, GRID.num_tokens)
    return start, rows


def of_kind(subject, maps, kind):
    head = next(h for h in subject.sheet if h.label == kind)
    return maps[head.layer][head.head]


def test_it_is_the_real_class(subject):
    from transformers import Qwen2_5_VLForConditionalGeneration

    assert type(subject.model) is Qwen2_5_VLForConditionalGeneration
    assert subject.model.config.text_config.rope_parameters["mrope_section"] == list(SECTIONS)
    turning = subject.model.get_decoder().rotary_emb.inv_freq
    torch.testing.assert_close(turning.double(), frequencies(), rtol=1e-5, atol=0)
    assert len(turning) == PAIRS and CONTENT_KEY > 0
    assert subject.visual_tokens == GRID.num_tokens
    assert "constructed" in subject.note and "meaningless" in subject.note


def test_place_heads_look_at_the_same_place_in_earlier_frames(subject, maps, places):
    start, rows = places
    stride = GRID.height * GRID.width
    p = of_kind(subject, maps, "place")[rows]
    key = torch.arange(p.shape[1])
    same = (rows[:, None] - key) % stride == 0
    kept = (p * (same & (key >= start))).sum(-1)
    assert float((kept + p[:, 0]).mean()) > 0.75 and float(kept.mean()) > 0.5


def test_grid_heads_look_at_one_place_of_every_frame(subject, maps, places):
    start, rows = places
    p = of_kind(subject, maps, "grid")[rows]
    height, width = GRID.place
    line = start + height * GRID.width + width + GRID.height * GRID.width * torch.arange(12)
    on_line = p[:, line].sum(-1)
    assert float(on_line.mean()) > 0.5
    # In every earlier frame it is the strongest place.
    strongest = p[:, start : start + GRID.num_tokens].mean(0).view(12, -1)[:-1].argmax(-1)
    assert bool((strongest == height * GRID.width + width).all())


def test_spots_are_single_tokens(subject, maps, places):
    start, rows = places
    p = of_kind(subject, maps, "spots")[rows]
    spots = [
        start + (t * GRID.height + h) * GRID.width + w for t, h, w in GRID.spots(SIZES.num_spots)
    ]
    assert float(p[:, spots].sum(-1).mean()) > 0.4


def test_local_and_sink_heads(subject, maps, places):
    _, rows = places
    local = of_kind(subject, maps, "local")[rows]
    lag = rows[:, None] - torch.arange(local.shape[1])
    assert float((local * ((lag >= 0) & (lag < 3 * 48))).sum(-1).mean()) > 0.9
    assert float(of_kind(subject, maps, "sink")[rows, 0].mean()) > 0.4


def test_some_mass_lies_off_the_pattern(subject, maps, places):
    """Else dropping it would cost nothing, and the demo's error would say nothing."""
    _, rows = places
    kinds = ("place", "grid", "sink", "spots")
    best = [
        of_kind(subject, maps, kind)[rows].topk(GRID.frames, -1).values.sum(-1).mean()
        for kind in kinds
    ]
    assert 0.5 < float(min(best)) < 0.99


def test_the_same_seed_gives_the_same_model(subject):
    torch.manual_seed(123)
    before = torch.random.get_rng_state()
    rng = np.random.default_rng(0)
    size = (2 * GRID.frames, 8 * GRID.height, 8 * GRID.width, 3)
    clip = Clip(rng.integers(0, 256, size, np.uint8), 0.1, "raw", size[1:3], size[0])
    again = constructed_subject(
        clip, GRID, device=torch.device("cpu"), dtype=torch.float32, sizes=SIZES
    )
    assert torch.equal(torch.random.get_rng_state(), before)
    for a, b in zip(subject.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "tokens, frames, aspect, want",
    [
        (16384, None, 2.0, (128, 8, 16)),
        (600, None, 2.0, (5, 8, 16)),
        (64, None, 2.0, (2, 8, 16)),
        (16384, 64, 2.0, (32, 16, 32)),
        (600, 12, 1.0, (6, 10, 10)),
        (600, None, 0.5, (5, 16, 8)),
    ],
)
def test_grid_holds_the_tokens(tokens, frames, aspect, want):
    grid = choose_grid(tokens, frames, aspect)
    assert (grid.frames, grid.height, grid.width) == want
    assert grid.num_tokens >= tokens


def test_patches_are_in_the_order_of_the_vision_tower():
    """Merge windows together, then channel, time and place inside a patch."""
    frames = np.zeros((4, 8, 16, 3), np.uint8)
    # Frame 3, pixel row 5, column 9, green: patch row 2, column 4 of patches of 2.
    frames[3, 5, 9, 1] = 255
    patches, thw = patches_of(frames, 2)
    assert thw.tolist() == [[2, 4, 8]]
    dark = patches.min(0).values
    patch, value = ((patches - dark) > 1).nonzero()[0].tolist()
    # Grid time 1; merge window row 1, column 2; patch (0, 0) inside the window.
    assert patch == 32 + (1 * 4 + 2) * 4 + 0
    # Channel 1, frame 1 of the pair, pixel row 1, column 1.
    assert value == ((1 * 2 + 1) * 2 + 1) * 2 + 1
