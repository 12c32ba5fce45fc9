"""What generate() can be asked: caches, chunks, beams, look-ahead."""

from __future__ import annotations

import itertools

import pytest

from .checks import Recorder, assert_same_generation, generate, patched
from .tiny import grids_of

FAMILIES = ["qwen2_5_vl", "qwen3_vl", "llava_onevision", "internvl"]
MORE = ["qwen3_5", "glm4v", "smolvlm", "video_llama_3", "video_llava"]
VARIANTS = {
    "static": {"cache_implementation": "static"},
    "chunks": {"prefill_chunk_size": 32},
    "static-chunks": {"cache_implementation": "static", "prefill_chunk_size": 32},
    "beams": {"num_beams": 2},
    "returns": {"num_beams": 2, "num_return_sequences": 2},
}


def last_rows(plans):
    return plans.calls[-1][0]


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        *itertools.product(FAMILIES, VARIANTS),
        *itertools.product(MORE, ["chunks", "static-chunks"]),
    ],
)
def test_one_row(case_of, name, variant):
    case, options = case_of(name), VARIANTS[variant]
    want = generate(case, **options)
    plans = Recorder()
    with patched(case.model, plans) as handle:
        got = generate(case, **options)
        assert handle.stats["sparse"] == len(plans.calls) > 0
    assert_same_generation(got, want)
    copies = options.get("num_beams", 1)
    assert last_rows(plans) == tuple(row for row in case.rows for _ in range(copies))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["qwen3_vl", "llava_onevision"])
def test_left_padded_batch(case_of, name, variant):
    case, options = case_of(name, "BATCH"), VARIANTS[variant]
    want = generate(case, **options)
    plans = Recorder()
    with patched(case.model, plans):
        got = generate(case, **options)
    assert_same_generation(got, want)
    copies = options.get("num_beams", 1)
    assert last_rows(plans) == tuple(row for row in case.rows for _ in range(copies))


@pytest.mark.parametrize("name", [*FAMILIES, *MORE])
def test_chunks_see_the_frames_so_far(case_of, name):
    case = case_of(name)
    plans = Recorder()
    with patched(case.model, plans):
        generate(case, prefill_chunk_size=32)
    (grid,) = grids_of(case.rows[0])
    starts = grid.frame_starts or range(grid.start, grid.stop, grid.tokens_per_frame)
    assert len(plans.passes) > 2
    for rows, _, length in plans.passes:
        whole = sum(start + grid.tokens_per_frame <= length for start in starts)
        assert [found.frames for found in grids_of(rows[0])] == ([whole] if whole else [])


@pytest.mark.parametrize("name", FAMILIES)
def test_prompt_lookup_drafts_are_dense(case_of, name):
    case = case_of(name)
    want = generate(case, prompt_lookup_num_tokens=3)
    with patched(case.model, min_q_len=16) as handle:
        got = generate(case, prompt_lookup_num_tokens=3)
        assert handle.stats["sparse"] == 2
    assert_same_generation(got, want)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava_onevision"])
def test_prompt_lookup_drafts_may_be_sparse(case_of, name):
    """Two to four queries behind a cache: lower-right causality through the plan."""
    case = case_of(name)
    want = generate(case, prompt_lookup_num_tokens=3)
    with patched(case.model):
        got = generate(case, prompt_lookup_num_tokens=3)
    assert_same_generation(got, want)


@pytest.mark.parametrize("name", FAMILIES)
def test_without_cache_every_step_is_a_prefill(case_of, name):
    case = case_of(name)
    want = generate(case, use_cache=False)
    with patched(case.model) as handle:
        got = generate(case, use_cache=False)
        assert handle.stats["sparse"] == 2 * 5
        assert handle.last_layout.rows == case.rows
    assert_same_generation(got, want)


def test_sliding_layers_stay_dense(own_case):
    case = own_case(
        "llava_onevision",
        "BATCH",
        use_sliding_window=True,
        sliding_window=16,
        max_window_layers=1,
        layer_types=["full_attention", "sliding_attention"],
    )
    want = generate(case)
    plans = Recorder()
    with patched(case.model, plans) as handle:
        got = generate(case)
        assert handle.stats["sparse"] == len(plans.calls) == 1
        assert handle.stats["dense_reasons"]["sliding_window is set"] == 1
    assert_same_generation(got, want)
