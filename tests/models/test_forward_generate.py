"""Every family: forward and generate, one video, two videos, a left-padded batch."""

from __future__ import annotations

import pytest
from permattn.core import TokenGrid

from .checks import Recorder, assert_same_generation, assert_same_logits, generate, logits, patched
from .tiny import BUILDERS

LAYERS, STEPS = 2, 4


def one_grid_per_row(rows):
    """What is known where frames are images: neighbouring videos cannot be told apart."""
    joined = []
    for row in rows:
        starts = [s for grid in row for s in grid.frame_starts]
        joined.append(
            (TokenGrid(starts[0], len(starts), row[0].height, row[0].width, tuple(starts)),)
        )
    return tuple(joined)


@pytest.mark.parametrize("videos", ["ONE", "TWO", "BATCH"])
@pytest.mark.parametrize("name", BUILDERS)
def test_patched_equals_sdpa(case_of, name, videos):
    case = case_of(name, videos)
    want_logits, want_tokens = logits(case), generate(case)
    rows = one_grid_per_row(case.rows) if name == "internvl" else case.rows
    plans = Recorder()
    with patched(case.model, plans) as handle:
        got = logits(case)
        assert handle.stats == {
            "sparse": LAYERS,
            "dense": 0,
            "dense_reasons": {},
            "no_labels": 0,
        }
        assert handle.last_layout.rows == rows
        tokens = generate(case)
        assert handle.stats["sparse"] == 2 * LAYERS
        assert handle.stats["dense_reasons"] == {"decode step (one query)": LAYERS * STEPS}
    assert_same_logits(case, got, want_logits)
    assert_same_generation(tokens, want_tokens)
    length = case.inputs["input_ids"].shape[1]
    assert plans.passes == [(rows, length, length)] * 2
