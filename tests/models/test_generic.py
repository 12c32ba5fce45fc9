"""Models without a family: text patterns where attention is plain, SDPA elsewhere, refusals."""

from __future__ import annotations

import pytest
import torch
from permattn.models import patch

from . import tiny_text
from .checks import assert_same_generation, assert_same_logits, generate, logits, patched
from .tiny import Case

# Softmax layers that run sparse, and why others do not.
MODELS = {
    "deepseek_v3": (2, {}),
    "ernie4_5_vl_moe": (2, {}),
    "glm_ocr": (2, {}),
    "idefics3": (2, {}),
    "lfm2_vl": (1, {}),
    "llama4": (1, {"4-D mask (sliding window, packed or bidirectional tokens)": 1}),
    "mistral3": (2, {}),
    "mllama": (2, {}),
    "paddleocr_vl": (2, {}),
    "gemma4": (
        0,
        {
            "sliding_window is set": 1,
            "4-D mask (sliding window, packed or bidirectional tokens)": 1,
        },
    ),
    "paligemma": (0, {"not causal": 2}),
}


def texts() -> dict[str, torch.Tensor]:
    """A left-padded batch of two."""
    ids = torch.randint(10, 90, (2, 40), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("name", MODELS)
def test_text(name):
    sparse, reasons = MODELS[name]
    case = Case(tiny_text.build(getattr(tiny_text, name)), texts(), ((), ()))
    try:
        want, tokens = logits(case), generate(case, max_new_tokens=2)
    except AttributeError as e:
        # transformers 5.24 asks a text output of Llama 4 for its images.
        if name != "llama4" or "image_outputs" not in str(e):
            raise
        pytest.skip(f"this transformers cannot run {name} itself: {e}")
    with patched(case.model) as handle:
        got = logits(case)
        assert handle.stats["sparse"] == sparse
        assert handle.stats["dense_reasons"] == reasons
        assert_same_generation(generate(case, max_new_tokens=2), tokens)
    assert_same_logits(case, got, want)


def test_images_through_cross_attention():
    """Llama 3.2 Vision: self-attention is text and runs as such, cross-attention is as it was."""
    model = tiny_text.build(tiny_text.mllama)
    # Its gates start closed; open, the image matters.
    cross = model.model.language_model.layers[1]
    with torch.no_grad():
        cross.cross_attn_attn_gate.fill_(1.0)
        cross.cross_attn_mlp_gate.fill_(1.0)
    inputs = texts()
    pixels = torch.randn(2, 1, 1, 3, 24, 24, generator=torch.Generator().manual_seed(1))
    inputs |= {
        "pixel_values": pixels,
        "aspect_ratio_ids": torch.ones(2, 1, dtype=torch.long),
        "aspect_ratio_mask": torch.ones(2, 1, 1, dtype=torch.long),
        "cross_attention_mask": torch.ones(2, 40, 1, 1, dtype=torch.long),
    }
    case = Case(model, inputs, ((), ()))
    want, tokens = logits(case), generate(case, max_new_tokens=2)
    blind = logits(case, pixel_values=-pixels)
    assert (blind - want).abs().max().item() > 1e-3
    with patched(model) as handle:
        assert_same_logits(case, logits(case), want)
        assert handle.stats == {"sparse": 2, "dense": 0, "dense_reasons": {}, "no_labels": 0}
        assert_same_generation(generate(case, max_new_tokens=2), tokens)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (tiny_text.git, "GitModel has no attention module with layer_idx and is_causal"),
        (tiny_text.gemma2, "Gemma2Model does not support SDPA"),
    ],
    ids=["git", "gemma2"],
)
def test_refused(make, message):
    model = tiny_text.build(make)
    before = [set(module.__dict__) for module in model.modules()]
    with pytest.raises(ValueError, match=message):
        patch(model)
    assert [set(module.__dict__) for module in model.modules()] == before


def test_thinker_inside_a_whole_omni_model():
    model = tiny_text.build(tiny_text.qwen2_5_omni_whole)
    case = Case(model.thinker, texts(), ((), ()))
    want = generate(case)
    with patched(model, model_type="qwen2_5_omni", num_layers=2) as handle:
        got = generate(case)
        assert handle.stats["sparse"] == 2
    assert_same_generation(got, want)
    assert model.thinker.config.text_config._attn_implementation == "sdpa"
