"""Input forms, padding on every side, and a second turn over the same cache."""

from __future__ import annotations

import copy

import pytest
import torch
from permattn.core import TokenGrid, TokenRun
from permattn.models import attention, patch
from transformers import DynamicCache

from .checks import (
    BOUND,
    Recorder,
    assert_same_generation,
    assert_same_logits,
    generate,
    logits,
    patched,
)
from .tiny import Case, grids_of, token_types
from .tiny_models import text_case

FAMILIES = ["qwen2_5_vl", "qwen3_vl", "llava_onevision"]
EMBEDDED = ["qwen3_vl", "llava_onevision"]


def embedded(case: Case) -> Case:
    """The same prompt given as embeddings."""
    inputs = dict(case.inputs)
    with torch.no_grad():
        inputs["inputs_embeds"] = case.model.get_input_embeddings()(inputs.pop("input_ids"))
    return Case(case.model, inputs, case.rows)


@pytest.mark.parametrize("name", EMBEDDED)
def test_embeddings_with_token_types(case_of, name):
    plain = case_of(name)
    case = embedded(plain)
    case.inputs["mm_token_type_ids"] = token_types(plain.inputs["input_ids"])
    want = logits(case)
    with patched(case.model) as handle:
        got = logits(case)
        assert handle.last_layout.rows == case.rows
    assert_same_logits(case, got, want)


@pytest.mark.parametrize("name", EMBEDDED)
def test_embeddings_alone_tell_nothing(case_of, name):
    case = embedded(case_of(name))
    case.inputs.pop("mm_token_type_ids", None)
    want = logits(case)
    with patched(case.model) as handle:
        got = logits(case)
        assert handle.last_layout.rows == ((),)
        assert handle.stats["no_labels"] == 1
    assert_same_logits(case, got, want)


@pytest.mark.parametrize("name", EMBEDDED)
def test_video_encoded_beforehand(case_of, name):
    case = case_of(name)
    want = logits(case)
    sizes = {k: v for k, v in case.inputs.items() if k == "video_grid_thw"}
    with patched(case.model) as handle, torch.no_grad():
        pixels = case.inputs.pop("pixel_values_videos")
        features = case.model.base_model.get_video_features(pixels, **sizes, return_dict=True)
        got = logits(case, mm_encoder_outputs={"video": features})
        assert handle.last_layout.rows == case.rows
    assert_same_logits(case, got, want)


@pytest.mark.parametrize("name", FAMILIES)
def test_right_padding(case_of, name):
    case = case_of(name, "BATCH")
    # From left to right: rolling a row by its padding moves the pads behind it.
    pads = (~case.real).sum(1).tolist()
    for key in ("input_ids", "attention_mask", "mm_token_type_ids"):
        if key in case.inputs:
            rows = [row.roll(-n) for row, n in zip(case.inputs[key], pads, strict=True)]
            case.inputs[key] = torch.stack(rows)
    want = logits(case)
    with patched(case.model) as handle:
        got = logits(case)
        assert handle.last_layout.right_pad == tuple(pads)
        assert handle.last_layout.left_pad == (0, 0)
        assert handle.stats["dense"] == 0
    assert_same_logits(case, got, want)


def test_padding_between_tokens_is_dense(case_of):
    case = case_of("qwen2_5_vl", "TWO")
    case.inputs["attention_mask"] = case.inputs["attention_mask"].clone()
    case.inputs["attention_mask"][:, 42:44] = 0
    want = logits(case)
    with patched(case.model) as handle:
        got = logits(case)
        assert handle.stats["dense_reasons"] == {"padding between tokens": 2}
    assert_same_logits(case, got, want)


def test_mask_of_the_callers_own_is_dense():
    """Packed sequences: what sees what is in a 4-D mask, which no layout describes."""
    case = text_case()
    length = case.inputs["input_ids"].shape[1]
    packed = torch.block_diag(torch.ones(15, 15), torch.ones(length - 15, length - 15)).tril()
    mask = packed.bool().expand(2, 1, -1, -1)
    want = logits(case, attention_mask=mask)
    with patched(case.model) as handle:
        got = logits(case, attention_mask=mask)
        assert handle.stats["sparse"] == 0
        assert [r[:8] for r in handle.stats["dense_reasons"]] == ["4-D mask"]
    assert torch.equal(got, want)


@pytest.mark.parametrize("name", ["qwen3_vl", "llava_onevision", "internvl"])
def test_text_alone(case_of, name):
    model = case_of(name).model
    ids = torch.randint(10, 90, (1, 20), generator=torch.Generator().manual_seed(3))
    case = Case(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, ((),))
    want = logits(case)
    with patched(model) as handle:
        got = logits(case)
        assert handle.last_layout.rows == ((),)
        assert handle.stats["sparse"] == 2
    assert_same_logits(case, got, want)


def test_bfloat16(case_of):
    case = case_of("qwen3_vl")
    exact = logits(case)
    model = copy.deepcopy(case.model).to(torch.bfloat16)
    half = Case(model, case.inputs, case.rows)
    plain = logits(half)
    with patched(model) as handle:
        got = logits(half)
        assert handle.stats["sparse"] == 2
    error, torchs = (got - exact).abs().max(), (plain - exact).abs().max()
    assert error <= 2 * torchs


def image_prompt(case: Case) -> Case:
    """The video's tokens as an image of one frame, before the video itself."""
    ids = case.inputs["input_ids"]
    image = torch.tensor([[5, *[3] * 6, 6]])
    ids = torch.cat((ids[:, :2], image, ids[:, 2:]), 1)
    generator = torch.Generator().manual_seed(5)
    inputs = {
        **case.inputs,
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": token_types(ids),
        "image_grid_thw": torch.tensor([[1, 4, 6]]),
        "pixel_values": torch.randn(24, 96, generator=generator),
    }
    (video,) = case.rows[0]
    moved = None
    if video.frame_starts is not None:
        moved = tuple(start + image.shape[1] for start in video.frame_starts)
    grid = TokenGrid(video.start + image.shape[1], video.frames, 2, 3, moved)
    return Case(case.model, inputs, ((TokenGrid(3, 1, 2, 3), grid),))


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_image_and_video(case_of, name):
    case = image_prompt(case_of(name))
    want_logits, want_tokens = logits(case), generate(case)
    plans = Recorder()
    with patched(case.model, plans):
        assert_same_logits(case, logits(case), want_logits)
        assert_same_generation(generate(case), want_tokens)
    assert [rows for rows, _, _ in plans.passes] == [case.rows] * 2


def two_turns(case: Case, **options):
    """Generates, appends the same prompt again, and generates over the same cache."""
    model, inputs = case.model, case.inputs
    cache = DynamicCache(config=model.config.get_text_config())
    first = generate(case, past_key_values=cache)
    ids = torch.cat((first.sequences, inputs["input_ids"]), 1)
    again = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "video_grid_thw" in inputs:
        again["mm_token_type_ids"] = token_types(ids)
        # transformers wants every size, and only the new video, encoded.
        pixels = again.pop("pixel_values_videos")
        with torch.no_grad():
            encoded = model.base_model.get_video_features(
                pixels, video_grid_thw=inputs["video_grid_thw"], return_dict=True
            )
        again["mm_encoder_outputs"] = {"video": encoded}
        again["video_grid_thw"] = inputs["video_grid_thw"].repeat(2, 1)
    second = generate(Case(model, again, ()), past_key_values=cache, **options)
    return second, first.sequences.shape[1]


@pytest.mark.parametrize("chunk", [None, 40], ids=["whole", "chunks"])
@pytest.mark.parametrize("name", FAMILIES)
def test_second_turn(case_of, name, chunk):
    case = case_of(name)
    options = {} if chunk is None else {"prefill_chunk_size": chunk}
    want, _ = two_turns(case, **options)
    plans = Recorder()
    with patched(case.model, plans):
        got, shift = two_turns(case, **options)
    assert_same_generation(got, want)
    (old,) = grids_of(case.rows[0])
    found = grids_of(plans.calls[-1][0][0])
    assert found[0] == old
    assert [(grid.start, grid.frames) for grid in found[1:]] == [(old.start + shift, old.frames)]


def test_chunks_of_a_batch(case_of):
    """Sizes do not say how many videos each row holds until the last chunk; positions do."""
    case = case_of("qwen2_5_vl", "BATCH")
    plans = Recorder()
    with patched(case.model, plans):
        generate(case, prefill_chunk_size=30)
    for rows, _, length in plans.passes:
        for found, truth in zip(rows, case.rows, strict=True):
            whole = [min(grid.frames, (length - grid.start) // 6) for grid in truth]
            assert [grid.frames for grid in grids_of(found)] == [n for n in whole if n > 0]
            assert [grid.start for grid in grids_of(found)] == [
                grid.start for grid, n in zip(truth, whole, strict=True) if n > 0
            ]


def test_cache_cut_back(case_of):
    """A dropped turn is forgotten: what follows is labelled at its own place."""
    case = case_of("llava_onevision")
    model, length = case.model, case.inputs["input_ids"].shape[1]
    extra = torch.randint(10, 90, (1, 12), generator=torch.Generator().manual_seed(7))

    def run():
        cache = DynamicCache(config=model.config.get_text_config())
        with torch.no_grad():
            model(**case.inputs, past_key_values=cache)
            cut = length - 30
            cache.crop(-30)
            mask = torch.ones(1, cut + 12, dtype=torch.long)
            return model(input_ids=extra, attention_mask=mask, past_key_values=cache).logits

    want = run()
    plans = Recorder()
    with patched(model, plans):
        got = run()
    assert (got - want).abs().max().item() <= BOUND
    # The rest of the cut frame is not a multiple of a frame any more: nothing is sure of its grid.
    assert plans.calls[0][0] == case.rows
    run = TokenRun(4, length - 30 - 4, "vision")
    assert plans.calls[-1] == (((run,),), 12, length - 18)


@pytest.mark.parametrize("videos", ["ONE", "BATCH"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_masks_stay_small(case_of, monkeypatch, videos, cache):
    """Nothing of size S x S is made, padded or not."""
    case = case_of("llava_onevision", videos)
    shapes = []
    real = attention.run_layer

    def watch(module, q, k, v, mask, *rest):
        shapes.append(None if mask is None else tuple(mask.shape))
        return real(module, q, k, v, mask, *rest)

    monkeypatch.setattr(attention, "run_layer", watch)
    with patched(case.model):
        generate(case, cache_implementation=cache)
    assert len(shapes) == 2
    for found in shapes:
        assert found is None or found == (len(case.rows), case.inputs["input_ids"].shape[1])
    if cache == "dynamic":
        assert all((found is None) == (videos == "ONE") for found in shapes)


def test_wide_prefill_of_real_planner_is_exact(case_of):
    """A local window longer than the prompt keeps everything."""
    case = case_of("qwen2_5_vl", "BATCH")
    want_logits, want_tokens = logits(case), generate(case)
    for pattern in ("a_shape", "tri_shape", "vertical_slash", "grid", "auto"):
        config = {"min_q_len": 2, "default": {"pattern": pattern, "local": 512}}
        with patch(case.model, config) as handle:
            assert_same_logits(case, logits(case), want_logits)
            assert_same_generation(generate(case), want_tokens)
            assert handle.stats["sparse"] == 4


@pytest.mark.parametrize("name", ["qwen2_5_omni_sound", "video_llava", "llava_onevision"])
def test_wide_boundaries_of_real_planner_are_exact(case_of, name):
    """Text, vision and audio, and runs between the frames of a grid: nothing is lost or doubled."""
    case = case_of(name, "BATCH")
    want_logits, want_tokens = logits(case), generate(case)
    wide = {"pattern": "a_shape", "local": 4096}
    pairs = {"text,vision": wide, "vision,audio": {"pattern": "dense"}, "audio,text": wide}
    for boundary, when in (("k", {}), ("q", {"audio": wide, "vision": wide}), ("2d", pairs)):
        head = {"pattern": "grid", "local": 4096, "boundary": boundary, "when": when}
        with patch(case.model, {"min_q_len": 2, "default": head, "heads_per_pass": 2}) as handle:
            assert_same_logits(case, logits(case), want_logits)
            assert_same_generation(generate(case), want_tokens)
            assert handle.stats["sparse"] == 4


def test_narrow_prefill_of_real_planner_differs(case_of):
    """The planner's choice really reaches the kernel."""
    case = case_of("qwen2_5_vl")
    want = logits(case)
    config = {"min_q_len": 2, "default": {"pattern": "a_shape", "sink": 0, "local": 4}}
    with patch(case.model, config):
        got = logits(case)
    error = (got - want).abs().amax((0, 2))
    assert error[:4].max().item() <= BOUND
    assert error[-4:].min().item() > 100 * BOUND
