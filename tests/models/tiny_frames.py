"""Families with a fixed number of tokens per frame, and those that write frames as images."""

from __future__ import annotations

import torch
import transformers
from permattn.core import TokenRun
from torch import Tensor

from .tiny import (
    IMAGE_ID,
    PAD,
    TEXT,
    VIDEO_ID,
    VISION_END,
    VISION_START,
    VOCABULARY,
    Prompts,
    Videos,
)

TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 24,
    "patch_size": 4,
}
SIGLIP = {**TOWER, "model_type": "siglip_vision_model", "vision_use_head": False}
CLIP = {**TOWER, "model_type": "clip_vision_model", "projection_dim": 32}


def frames_inputs(
    videos: Videos,
    generator: torch.Generator,
    *,
    token: int,
    tail: int = 0,
    wrapped: bool = False,
    side: int = 3,
):
    """Videos of side x side tokens per frame; `wrapped`: between markers, with text before them."""
    prompts = Prompts(generator)

    def write(row, frames, height, width):
        starts = []
        for i in range(frames):
            if wrapped:
                row += [*prompts.text(4 if i else 0), VISION_START]
            starts.append(len(row))
            row += [token] * (height * width)
            if wrapped:
                row.append(VISION_END)
        if tail:
            prompts.runs.append(TokenRun(len(row), tail, "vision"))
            row += [token] * tail
        return starts

    for row in videos:
        prompts.add_row([(t, side, side) for t, _, _ in row], write)
    return prompts.padded()


def llava_onevision(videos: Videos, generator: torch.Generator, **text):
    config = transformers.LlavaOnevisionConfig(
        text_config={**TEXT, "model_type": "qwen2", **text},
        vision_config=SIGLIP,
        image_token_index=IMAGE_ID,
        video_token_index=VIDEO_ID,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_grid_pinpoints=[[24, 24]],
    )
    inputs, rows = frames_inputs(videos, generator, token=VIDEO_ID, tail=1)
    inputs["pixel_values_videos"] = stacked_videos(videos, generator)
    return transformers.LlavaOnevisionForConditionalGeneration(config), inputs, rows


def llava_next_video(videos: Videos, generator: torch.Generator, **text):
    config = transformers.LlavaNextVideoConfig(
        text_config={**TEXT, "model_type": "llama", **text},
        vision_config=CLIP,
        image_token_index=IMAGE_ID,
        video_token_index=VIDEO_ID,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_grid_pinpoints=[[24, 24]],
    )
    inputs, rows = frames_inputs(videos, generator, token=VIDEO_ID)
    inputs["pixel_values_videos"] = stacked_videos(videos, generator)
    return transformers.LlavaNextVideoForConditionalGeneration(config), inputs, rows


def internvl(videos: Videos, generator: torch.Generator, **text):
    vision = {k: v for k, v in TOWER.items() if k not in ("image_size", "patch_size")}
    config = transformers.InternVLConfig(
        text_config={**TEXT, "model_type": "qwen2", **text},
        vision_config={**vision, "image_size": [24, 24], "patch_size": [4, 4]},
        image_token_id=IMAGE_ID,
        image_seq_length=9,
    )
    inputs, rows = frames_inputs(videos, generator, token=IMAGE_ID, wrapped=True)
    inputs["pixel_values"] = torch.randn(num_frames(videos), 3, 24, 24, generator=generator)
    return transformers.InternVLForConditionalGeneration(config), inputs, rows


def num_frames(videos: Videos) -> int:
    return sum(t for row in videos for t, _, _ in row)


def stacked_videos(videos: Videos, generator: torch.Generator) -> Tensor:
    frames = videos[0][0][0]
    return torch.randn(sum(map(len, videos)), frames, 3, 24, 24, generator=generator)


def video_llava(videos: Videos, generator: torch.Generator, **text):
    """Always eight frames, each behind a class token."""
    config = transformers.VideoLlavaConfig(
        text_config={**TEXT, "model_type": "llama", **text},
        vision_config=CLIP,
        image_token_index=IMAGE_ID,
        video_token_index=VIDEO_ID,
        image_seq_length=36,
        video_seq_length=0,
    )
    prompts = Prompts(generator)

    def write(row, frames, height, width):
        starts = []
        for _ in range(frames):
            prompts.runs.append(TokenRun(len(row), 1, "vision"))
            starts.append(len(row) + 1)
            row += [VIDEO_ID] * (1 + height * width)
        return starts

    for row in videos:
        prompts.add_row([(8, 6, 6)] * len(row), write)
    inputs, rows = prompts.padded()
    inputs["pixel_values_videos"] = torch.randn(
        sum(map(len, videos)), 8, 3, 24, 24, generator=generator
    )
    return transformers.VideoLlavaForConditionalGeneration(config), inputs, rows


def llava(videos: Videos, generator: torch.Generator, **text):
    config = transformers.LlavaConfig(
        text_config={**TEXT, "model_type": "llama", **text},
        vision_config={**CLIP, "image_size": 16},
        image_token_index=IMAGE_ID,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=16,
    )
    inputs, rows = frames_inputs(videos, generator, token=IMAGE_ID, wrapped=True, side=4)
    inputs["pixel_values"] = torch.randn(num_frames(videos), 3, 16, 16, generator=generator)
    return transformers.LlavaForConditionalGeneration(config), inputs, rows


def smolvlm(videos: Videos, generator: torch.Generator, **text):
    config = transformers.SmolVLMConfig(
        text_config={**TEXT, "model_type": "llama", **text},
        vision_config=TOWER,
        image_token_id=IMAGE_ID,
        scale_factor=2,
        pad_token_id=PAD,
    )
    inputs, rows = frames_inputs(videos, generator, token=IMAGE_ID, wrapped=True)
    # One entry per image of every row; images of zeros are padding and dropped.
    counts = [sum(t for t, _, _ in row) for row in videos]
    pixels = torch.randn(len(videos), max(counts), 3, 24, 24, generator=generator)
    for row, count in zip(pixels, counts, strict=True):
        row[count:] = 0
    inputs["pixel_values"] = pixels
    inputs["pixel_attention_mask"] = torch.ones(*pixels.shape[:2], 24, 24, dtype=torch.long)
    return transformers.SmolVLMForConditionalGeneration(config), inputs, rows


def ovis2(videos: Videos, generator: torch.Generator, **text):
    config = transformers.Ovis2Config(
        text_config={**TEXT, "model_type": "qwen2", **text},
        vision_config={**TOWER, "hidden_stride": 2, "vocab_size": 40},
        image_token_id=IMAGE_ID,
        visual_indicator_token_ids=[5, 6, 7, 8, 9],
        vocab_size=VOCABULARY,
        hidden_size=64,
    )
    inputs, rows = frames_inputs(videos, generator, token=IMAGE_ID, wrapped=True)
    inputs["pixel_values"] = torch.randn(num_frames(videos), 3, 24, 24, generator=generator)
    return transformers.Ovis2ForConditionalGeneration(config), inputs, rows


def gemma3(videos: Videos, generator: torch.Generator, **text):
    config = transformers.Gemma3Config(
        text_config={
            **TEXT,
            "head_dim": 16,
            "sliding_window": 8,
            "query_pre_attn_scalar": 16,
            "layer_types": ["sliding_attention", "full_attention"],
            **text,
        },
        vision_config=SIGLIP,
        image_token_index=IMAGE_ID,
        boi_token_index=VISION_START,
        eoi_token_index=VISION_END,
        mm_tokens_per_image=9,
    )
    inputs, rows = frames_inputs(videos, generator, token=IMAGE_ID, wrapped=True)
    inputs["pixel_values"] = torch.randn(num_frames(videos), 3, 24, 24, generator=generator)
    inputs["token_type_ids"] = (inputs["input_ids"] == IMAGE_ID).long()
    return transformers.Gemma3ForConditionalGeneration(config), inputs, rows
