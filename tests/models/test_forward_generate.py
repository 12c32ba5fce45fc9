"""Every family: forward and generate, one video, two videos, a left-padded batch."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from permattn.core import TokenGrid, TokenRun
from permattn.models.capture import TOKENS_DROPPED

from .checks import (
    Recorder,
    assert_same_generation,
    assert_same_logits,
    generate,
    logits,
    patched,
)
from .tiny import VIDEO_ID, Case, Prompts, grids_of
from .tiny_models import BUILDERS

LAYERS, STEPS = 2, 4

# A frame is an image there: neighbouring videos of one size cannot be told apart.
AS_IMAGES = ("internvl", "llava", "smolvlm", "ovis2", "gemma3")
# Bidirectional blocks of image tokens: dense, always.
ALWAYS_DENSE = ("gemma3",)
SPARSE = [name for name in BUILDERS if name not in ALWAYS_DENSE]
GRIDS = [name for name in SPARSE if "qwen" in name or "glm" in name or name == "video_llama_3"]


def joined(rows):
    """What can be known where frames are images: one grid per row."""
    out = []
    for row in rows:
        starts = [s for grid in row for s in grid.frame_starts]
        out.append((TokenGrid(starts[0], len(starts), row[0].height, row[0].width, tuple(starts)),))
    return tuple(out)


def check(case: Case, rows, layers: int = LAYERS) -> None:
    """Forward and generate equal the unpatched model's, over exactly these segments."""
    want_logits, want_tokens = logits(case), generate(case)
    plans = Recorder()
    with patched(case.model, plans) as handle:
        got = logits(case)
        assert handle.stats == {"sparse": layers, "dense": 0, "dense_reasons": {}, "no_labels": 0}
        assert handle.last_layout.rows == rows
        tokens = generate(case)
        assert handle.stats["sparse"] == 2 * layers
        assert handle.stats["dense_reasons"] == {"decode step (one query)": layers * STEPS}
    assert_same_logits(case, got, want_logits)
    assert_same_generation(tokens, want_tokens)
    length = case.inputs["input_ids"].shape[1]
    assert plans.passes == [(rows, length, length)] * 2


@pytest.mark.parametrize("videos", ["ONE", "TWO", "BATCH"])
@pytest.mark.parametrize("name", SPARSE)
def test_patched_equals_sdpa(case_of, name, videos):
    case = case_of(name, videos)
    check(case, joined(case.rows) if name in AS_IMAGES else case.rows)


@pytest.mark.parametrize("name", GRIDS)
def test_videos_of_different_resolution(case_of, name):
    case = case_of(name, "MIXED")
    sizes = [(grid.frames, grid.height, grid.width) for grid in grids_of(case.rows[0])]
    assert sizes == [(6, 2, 3), (4, 3, 2), (1, 2, 2)]
    check(case, case.rows)


@pytest.mark.parametrize(
    ("name", "gaps", "lengths"),
    [
        ("qwen2_5_omni_sound", [0, 8] * 5 + [0], [8, 8, 8, 8, 8, 5]),
        ("qwen3_omni_sound", [4] * 11, [4] * 11 + [1]),
    ],
)
def test_sound_stands_between_the_frames(case_of, name, gaps, lengths):
    """Frames, the sound of their seconds, frames: one grid with gaps, and runs in them."""
    row = case_of(name).rows[0]
    (grid,) = grids_of(row)
    starts = grid.frame_starts
    assert [b - a - 6 for a, b in pairwise(starts)] == gaps
    sounds = [segment for segment in row if isinstance(segment, TokenRun)]
    assert [run.modality for run in sounds] == ["audio"] * len(lengths)
    assert [run.length for run in sounds] == lengths


@pytest.mark.parametrize("name", ALWAYS_DENSE)
def test_always_dense_and_says_why(case_of, name):
    case = case_of(name)
    want_logits, want_tokens = logits(case), generate(case)
    with patched(case.model) as handle:
        assert torch.equal(logits(case), want_logits)
        assert_same_generation(generate(case), want_tokens)
        assert handle.last_layout.rows == case.rows
        stats = handle.stats
    assert stats["sparse"] == 0
    assert stats["dense_reasons"]["sliding_window is set"] == 2
    assert stats["dense_reasons"]["4-D mask (sliding window, packed or bidirectional tokens)"] == 2


def test_dropped_video_tokens_run_dense(case_of):
    """VideoLLaMA3 leaves out tokens that did not change since the frame before."""
    case = case_of("video_llama_3")
    kept = torch.rand(12 * 6, generator=torch.Generator().manual_seed(0)) < 0.7
    assert not kept[-6:].all()
    ids = case.inputs["input_ids"][0]
    real = torch.ones(len(ids), dtype=torch.bool)
    real[ids == VIDEO_ID] = kept
    case.inputs |= {
        "input_ids": ids[real][None],
        "attention_mask": torch.ones(1, int(real.sum()), dtype=torch.long),
        "video_compression_mask": kept,
    }
    want = generate(case)
    with patched(case.model) as handle:
        got = generate(case)
        assert handle.stats["sparse"] == 0
        assert handle.stats["dense_reasons"][TOKENS_DROPPED] == 2
        assert grids_of(handle.last_layout.rows[0]) == []
        seen = [run for run in handle.last_layout.rows[0] if run.modality == "vision"]
        assert sum(run.length for run in seen) == int(kept.sum())
    assert_same_generation(got, want)


def test_prompt_of_everything(case_of):
    """Images, audio and videos of two sizes in one prompt, audio on its own and in a video."""
    case = case_of("qwen2_5_omni_sound", "MIXED")
    moved = 12
    prompts = Prompts(torch.Generator().manual_seed(1))
    # An image of 1 x 2 x 3 tokens and a text in front of all that.
    front = torch.tensor([[1, *prompts.text(3), 5, *[3] * 6, 6]])
    ids = torch.cat((front, case.inputs["input_ids"]), 1)
    case.inputs |= {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "image_grid_thw": torch.tensor([[1, 4, 6]]),
        "pixel_values": torch.randn(24, 96, generator=torch.Generator().manual_seed(2)),
    }
    row = [TokenGrid(5, 1, 2, 3)]
    for segment in case.rows[0]:
        starts = getattr(segment, "frame_starts", None)
        gaps = {} if starts is None else {"frame_starts": tuple(s + moved for s in starts)}
        row.append(replace(segment, start=segment.start + moved, **gaps))
    check(case, (tuple(row),))
