"""LLaVA-Video, VILA and VideoChat-Flash, by the shape of their classes: `patch` is all it takes."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from permattn.core import TokenGrid, TokenRun
from permattn.models import patch
from permattn.models.attention import dense_attention
from permattn.models.families.llava_video import rows_of_prompt
from permattn.models.layout import TokenLayout
from permattn.models.splice import Frames, Prompt, grid_rows, newlines_of

from .checks import GREEDY, Recorder, assert_same_generation, patched
from .spliced import (
    PLACEHOLDER,
    FlashConfig,
    FlashForCausalLM,
    LlavaQwenConfig,
    LlavaQwenForCausalLM,
    VilaConfig,
    VilaModel,
)
from .tiny import TEXT

GENERATOR = torch.Generator().manual_seed(0)
# (frames, side) of three videos: the first row has two, the second one.
VIDEOS = [torch.randn(t, 3, 3, 8, generator=GENERATOR) for t in (6, 4, 9)]
ONE = torch.tensor([[20, 21, 22, PLACEHOLDER, 23, 24]])
TWO = torch.tensor([[20, PLACEHOLDER, 22, 23, PLACEHOLDER, 24, 25]])
BATCH = torch.tensor(
    [[20, PLACEHOLDER, 22, 23, PLACEHOLDER, 24, 25], [0, 0, 20, 21, PLACEHOLDER, 25, 26]]
)
MASK = torch.tensor([[1] * 7, [0, 0, 1, 1, 1, 1, 1]])


@lru_cache
def llava(newline: str) -> LlavaQwenForCausalLM:
    torch.manual_seed(0)
    return LlavaQwenForCausalLM(LlavaQwenConfig(**TEXT, mm_newline_position=newline)).eval()


@lru_cache
def vila() -> VilaModel:
    torch.manual_seed(0)
    return VilaModel(VilaConfig(llm_cfg={})).eval()


@pytest.mark.parametrize("newline", ["grid", "frame", "one_token", "no_token"])
@pytest.mark.parametrize(
    ("prompt", "videos", "mask"),
    [(ONE, VIDEOS[:1], None), (TWO, VIDEOS[:2], None), (BATCH, VIDEOS, MASK)],
    ids=["one", "two", "batch"],
)
def test_llava_video(newline, prompt, videos, mask):
    model = llava(newline)
    want = model.generate(prompt, videos, mask, **GREEDY)
    plans = Recorder()
    with patched(model, plans) as handle:
        got = model.generate(prompt, videos, mask, **GREEDY)
        assert handle.stats["sparse"] == 2
        assert handle.stats["no_labels"] == 0
    assert_same_generation(got, want)
    rows = [ids if mask is None else ids[m.bool()] for ids, m in zip(prompt, MASK, strict=False)]
    sizes = [tuple(video.shape[:3]) for video in videos]
    truth = rows_of_prompt(rows, sizes, newline=newline, padding_side="left")
    assert plans.calls[-1][0] == truth
    assert "prepare_inputs_labels_for_multimodal" not in model.__dict__


@pytest.mark.parametrize(
    "options",
    [{"num_beams": 2}, {"cache_implementation": "static"}],
    ids=["beams", "static"],
)
def test_llava_video_variants(options):
    model = llava("grid")
    want = model.generate(BATCH, VIDEOS, MASK, **GREEDY, **options)
    plans = Recorder()
    with patched(model, plans):
        got = model.generate(BATCH, VIDEOS, MASK, **GREEDY, **options)
    assert_same_generation(got, want)
    (first, second), (third,) = plans.calls[-1][0][:: options.get("num_beams", 1)]
    assert [grid.frames for grid in (first, second, third)] == [6, 4, 9]


def test_llava_video_says_nothing_of_images():
    """Tiles of images follow rules of their own: the prompt counts as text, and runs."""
    model = llava("grid")
    with patched(model) as handle:
        model.generate(ONE, VIDEOS[:1], modalities=("image",), **GREEDY)
        assert handle.last_layout.rows == ((),)
        assert handle.stats["no_labels"] == 1
        assert handle.stats["sparse"] == 2


def test_rows_serve_one_pass():
    """A text behind a video is not mistaken for it."""
    model = llava("grid")
    text = torch.randint(20, 90, (1, 70), generator=torch.Generator().manual_seed(1))
    with patched(model) as handle:
        model.prepare_inputs_labels_for_multimodal(
            ONE, None, None, None, None, VIDEOS[:1], ("video",)
        )
        model.generate(text, attention_mask=torch.ones_like(text), **GREEDY)
        assert handle.last_layout.rows == ((),)
        model.generate(ONE, VIDEOS[:1], **GREEDY)
        assert handle.last_layout.rows == ((TokenGrid(3, 6, 3, 4),),)


def test_stated_rows_come_first():
    model = llava("grid")
    stated = [[TokenGrid(3, 2, 3, 4)]]
    with patched(model) as handle, handle.layout(stated):
        model.generate(ONE, VIDEOS[:1], **GREEDY)
        assert handle.last_layout.rows == (tuple(stated[0]),)


def test_vila():
    """An image between two videos; the newline of a frame is text."""
    model = vila()
    image, video = model.IMAGE, model.VIDEO
    ids = torch.tensor([[20, video, 21, image, 22, video, 23], [0, 0, 20, 21, 22, video, 24]])
    mask = torch.tensor([[True] * 7, [False, False, *[True] * 5]])
    media = {"image": [VIDEOS[0][0]], "video": VIDEOS}
    want = model.generate(ids, media, mask, **GREEDY)
    plans = Recorder()
    with patched(model, plans) as handle:
        got = model.generate(ids, media, mask, **GREEDY)
        assert handle.stats["sparse"] == 2
        assert handle.stats["no_labels"] == 0
        with pytest.raises(ValueError, match="patched already"):
            patch(model)
    assert_same_generation(got, want)
    # 20, six frames of ten, 21, one image of ten, 22, four frames of ten, 23.
    first = (
        TokenGrid(1, 6, 3, 3, tuple(range(1, 61, 10))),
        TokenGrid(62, 1, 3, 3),
        TokenGrid(73, 4, 3, 3, tuple(range(73, 113, 10))),
    )
    # 114 - 94 tokens of padding, three of text.
    second = (TokenGrid(23, 9, 3, 3, tuple(range(23, 113, 10))),)
    assert plans.calls[-1][0] == (first, second)
    assert "_embed" not in model.__dict__
    assert model.llm.config._attn_implementation == "sdpa"


def test_vila_wants_its_decoder():
    model = vila()
    broken = VilaModel(VilaConfig(llm_cfg={}))
    broken.llm = torch.nn.Linear(2, 2)
    with pytest.raises(
        ValueError, match=r"VilaModel wants a transformers model in .llm, got Linear"
    ):
        patch(broken)
    with patch(model, {"model_type": "llava_llama", "num_layers": 2}):
        pass


@pytest.mark.parametrize("compress", [True, False])
def test_videochat_flash(compress):
    """Sparse only where the tokens are still the prompt's."""
    torch.manual_seed(0)
    config = FlashConfig(**TEXT, mm_llm_compress=compress)
    model = FlashForCausalLM(config).eval()
    want = model.generate(ONE, VIDEOS[:1], **GREEDY)
    plans = Recorder()
    with patched(model, plans) as handle:
        got = model.generate(ONE, VIDEOS[:1], **GREEDY)
        reasons = handle.stats["dense_reasons"]
        assert handle.stats["sparse"] == (1 if compress else 2)
        dropped = {k: n for k, n in reasons.items() if k.startswith("tokens are dropped")}
        assert dropped == ({"tokens are dropped from layer 1 on": 1} if compress else {})
    assert_same_generation(got, want)
    assert plans.calls[0][0] == ((TokenRun(3, 54, "vision"),),)


def test_tokens_dropped_against_the_config():
    """Whoever drops tokens unannounced gets SDPA there."""
    torch.manual_seed(0)
    model = FlashForCausalLM(FlashConfig(**TEXT)).eval()
    want = model.generate(ONE, VIDEOS[:1], **GREEDY)
    model.config.mm_llm_compress = False
    with patched(model) as handle:
        model.config.mm_llm_compress = True
        got = model.generate(ONE, VIDEOS[:1], **GREEDY)
        assert handle.stats["dense_reasons"]["queries or keys do not match the layout"] == 1
    assert_same_generation(got, want)


def test_tokens_dropped_behind_a_cache():
    """The layer's own cache tells where its queries stand, not the first layer's."""
    q, k = torch.randn(1, 2, 6, 8), torch.randn(1, 2, 20, 8)
    layout = TokenLayout(((),), (0,), (0,), q_offset=30, q_len=12)
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = 1, True
    got = dense_attention(module, q, k, k, None, layout, None, 0.0, None)
    mask = torch.ones(6, 20, dtype=torch.bool).tril(14)
    want = torch.nn.functional.scaled_dot_product_attention(q, k, k, attn_mask=mask)
    torch.testing.assert_close(got.transpose(1, 2), want)


def test_lengths_that_do_not_add_up():
    prompt = Prompt(num_text=4, places=(2,), frames=(3,), first=0, stop=4 + 3 * 9)
    assert grid_rows([prompt], Frames()) == ((TokenGrid(2, 3, 3, 3),),)
    assert grid_rows([prompt], Frames(after_frame=1)) is None
    assert grid_rows([prompt], Frames(after_video=1)) is None
    text = Prompt(num_text=5, places=(), frames=(), first=0, stop=5)
    assert grid_rows([text], Frames()) == ((),)
    assert grid_rows([prompt, text], Frames()) == ((TokenGrid(2, 3, 3, 3),), ())


@pytest.mark.parametrize(
    ("merge", "position", "want"),
    [
        ("flat", "grid", Frames()),
        ("spatial_unpad", "grid", Frames(after_row=1)),
        ("spatial_unpad", None, Frames(after_video=1)),
        ("spatial", "one_token", Frames()),
        (None, None, Frames()),
    ],
)
def test_newlines_of_a_config(merge, position, want):
    class Config:
        mm_patch_merge_type = merge
        mm_newline_position = position

    assert newlines_of(Config()) == want
