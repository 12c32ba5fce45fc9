"""Families whose processor hands over (frames, height, width) of every video."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from permattn.core import TokenRun

from .tiny import (
    IMAGE_ID,
    MROPE,
    TEXT,
    TOKENS,
    VIDEO_ID,
    VISION_END,
    VISION_START,
    Prompts,
    Videos,
    token_types,
)

QWEN_VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 64,
}
QWEN3_VISION = {
    **QWEN_VISION,
    "num_position_embeddings": 64,
    "deepstack_visual_indexes": [0],
}


def qwen_inputs(videos: Videos, generator: torch.Generator, *, timestamps: bool):
    prompts = Prompts(generator)

    def write(row, frames, height, width):
        if not timestamps:
            start = len(row) + 1
            row += [VISION_START, *[VIDEO_ID] * (frames * height * width), VISION_END]
            return [start + i * height * width for i in range(frames)]
        starts = []
        for i in range(frames):
            row += [*prompts.text(4 if i < 2 else 5), VISION_START]
            starts.append(len(row))
            row += [*[VIDEO_ID] * (height * width), VISION_END]
        return starts

    for row in videos:
        prompts.add_row([(t, h // 2, w // 2) for t, h, w in row], write)
    inputs, rows = prompts.padded()
    grid = torch.tensor([size for row in videos for size in row])
    inputs["video_grid_thw"] = grid
    inputs["mm_token_type_ids"] = token_types(inputs["input_ids"])
    inputs["pixel_values_videos"] = torch.randn(
        int(grid.prod(-1).sum()), 3 * 2 * 16, generator=generator
    )
    return inputs, rows


def qwen2_vl(videos: Videos, generator: torch.Generator, **text):
    vision = {
        k: v for k, v in QWEN_VISION.items() if k not in ("out_hidden_size", "intermediate_size")
    }
    vision |= {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2}
    config = transformers.Qwen2VLConfig(
        text_config={**TEXT, "rope_parameters": MROPE, **text}, vision_config=vision, **TOKENS
    )
    inputs = qwen_inputs(videos, generator, timestamps=False)
    return transformers.Qwen2VLForConditionalGeneration(config), *inputs


def qwen2_5_vl(videos: Videos, generator: torch.Generator, **text):
    config = transformers.Qwen2_5_VLConfig(
        text_config={**TEXT, "rope_parameters": MROPE, **text},
        vision_config={**QWEN_VISION, "window_size": 16, "fullatt_block_indexes": [1]},
        **TOKENS,
    )
    inputs = qwen_inputs(videos, generator, timestamps=False)
    return transformers.Qwen2_5_VLForConditionalGeneration(config), *inputs


def qwen3_vl(videos: Videos, generator: torch.Generator, **text):
    rope = {**MROPE, "mrope_interleaved": True}
    config = transformers.Qwen3VLConfig(
        text_config={**TEXT, "head_dim": 16, "rope_parameters": rope, **text},
        vision_config=QWEN3_VISION,
        **TOKENS,
    )
    inputs = qwen_inputs(videos, generator, timestamps=True)
    return transformers.Qwen3VLForConditionalGeneration(config), *inputs


def qwen3_vl_moe(videos: Videos, generator: torch.Generator, **text):
    rope = {**MROPE, "mrope_interleaved": True}
    experts = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
    config = transformers.Qwen3VLMoeConfig(
        text_config={**TEXT, "head_dim": 16, "rope_parameters": rope, **experts, **text},
        vision_config=QWEN3_VISION,
        **TOKENS,
    )
    inputs = qwen_inputs(videos, generator, timestamps=True)
    return transformers.Qwen3VLMoeForConditionalGeneration(config), *inputs


def _qwen3_5_text() -> dict[str, Any]:
    rope = {**MROPE, "mrope_interleaved": True, "partial_rotary_factor": 1.0}
    return {
        **TEXT,
        "head_dim": 16,
        "rope_parameters": rope,
        "num_hidden_layers": 4,
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
    }


def qwen3_5(videos: Videos, generator: torch.Generator, **text):
    vision = {k: v for k, v in QWEN3_VISION.items() if k != "deepstack_visual_indexes"}
    config = transformers.Qwen3_5Config(
        text_config={**_qwen3_5_text(), **text}, vision_config=vision, **TOKENS
    )
    inputs = qwen_inputs(videos, generator, timestamps=True)
    return transformers.Qwen3_5ForConditionalGeneration(config), *inputs


def qwen3_5_moe(videos: Videos, generator: torch.Generator, **text):
    vision = {k: v for k, v in QWEN3_VISION.items() if k != "deepstack_visual_indexes"}
    experts = {
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    }
    config = transformers.Qwen3_5MoeConfig(
        text_config={**_qwen3_5_text(), **experts, **text}, vision_config=vision, **TOKENS
    )
    inputs = qwen_inputs(videos, generator, timestamps=True)
    return transformers.Qwen3_5MoeForConditionalGeneration(config), *inputs


AUDIO_ID = 7
AUDIO_START, AUDIO_END = 8, 9

# Frames are one second long.
AUDIO_PER_FRAME = 4


def _omni_inputs(
    videos: Videos,
    generator: torch.Generator,
    *,
    audio: bool = True,
    frames_per_chunk: int,
    mel_of_tokens: Callable[[int], int],
):
    """With audio: every video carries a sound track, cut in between its frames."""
    prompts, mels = Prompts(generator), []

    def write(row, frames, height, width):
        row.append(VISION_START)
        if audio:
            row.append(AUDIO_START)
        # The sound ends in the middle of the last chunk.
        sound = length = AUDIO_PER_FRAME * frames - 3 if audio else 0
        starts = []
        for i in range(frames):
            starts.append(len(row))
            row += [VIDEO_ID] * (height * width)
            if (i + 1) % frames_per_chunk == 0 or i == frames - 1:
                here = min(sound, AUDIO_PER_FRAME * frames_per_chunk)
                sound -= here
                if here:
                    prompts.runs.append(TokenRun(len(row), here, "audio"))
                row += [AUDIO_ID] * here
        if audio:
            row.append(AUDIO_END)
            mels.append(mel_of_tokens(length))
        row.append(VISION_END)
        return starts

    for row in videos:
        prompts.add_row([(t, h // 2, w // 2) for t, h, w in row], write)
    inputs, rows = prompts.padded()
    grid = torch.tensor([size for row in videos for size in row])
    inputs["video_grid_thw"] = grid
    inputs["pixel_values_videos"] = torch.randn(
        int(grid.prod(-1).sum()), 3 * 2 * 16, generator=generator
    )
    inputs["video_second_per_grid"] = torch.ones(len(grid))
    if audio:
        inputs["input_features"] = torch.randn(len(mels), 16, max(mels), generator=generator)
        mask = torch.arange(max(mels)) < torch.tensor(mels)[:, None]
        inputs["feature_attention_mask"] = mask.long()
        inputs["use_audio_in_video"] = True
    return inputs, rows


def qwen2_5_omni(videos: Videos, generator: torch.Generator, *, audio: bool = False, **text):
    config = transformers.Qwen2_5OmniThinkerConfig(
        text_config={**TEXT, "rope_parameters": MROPE, **text},
        vision_config={**QWEN_VISION, "window_size": 16, "fullatt_block_indexes": [1]},
        audio_config={
            "d_model": 32,
            "encoder_layers": 1,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 32,
            "num_mel_bins": 16,
            "output_dim": 64,
        },
        image_token_index=IMAGE_ID,
        video_token_index=VIDEO_ID,
        audio_token_index=AUDIO_ID,
        vision_start_token_id=VISION_START,
        audio_start_token_id=AUDIO_START,
        position_id_per_seconds=AUDIO_PER_FRAME,
        seconds_per_chunk=2,
    )
    # The inverse of ((n - 1) // 2 + 1 - 2) // 2 + 1 tokens for n frames of mel bands.
    inputs = _omni_inputs(
        videos, generator, audio=audio, frames_per_chunk=2, mel_of_tokens=lambda n: 4 * n - 1
    )
    return transformers.Qwen2_5OmniThinkerForConditionalGeneration(config), *inputs


def qwen2_5_omni_sound(videos: Videos, generator: torch.Generator, **text):
    return qwen2_5_omni(videos, generator, audio=True, **text)


def qwen3_omni_sound(videos: Videos, generator: torch.Generator, **text):
    rope = {**MROPE, "mrope_interleaved": True}
    experts = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
    config = transformers.Qwen3OmniMoeThinkerConfig(
        text_config={**TEXT, "head_dim": 16, "rope_parameters": rope, **experts, **text},
        vision_config=QWEN3_VISION,
        audio_config={
            "d_model": 32,
            "encoder_layers": 1,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 32,
            "num_mel_bins": 16,
            "output_dim": 64,
            "downsample_hidden_size": 8,
        },
        image_token_id=IMAGE_ID,
        video_token_id=VIDEO_ID,
        audio_token_id=AUDIO_ID,
        vision_start_token_id=VISION_START,
        audio_start_token_id=AUDIO_START,
        position_id_per_seconds=AUDIO_PER_FRAME,
    )

    def mel_of_tokens(n):
        """13 tokens come from 100 frames of mel bands, n < 13 from 8 n - 7."""
        return n // 13 * 100 + (8 * (n % 13) - 7 if n % 13 else 0)

    inputs = _omni_inputs(videos, generator, frames_per_chunk=1, mel_of_tokens=mel_of_tokens)
    return transformers.Qwen3OmniMoeThinkerForConditionalGeneration(config), *inputs


def glm4v(videos: Videos, generator: torch.Generator, **text):
    rope = {**MROPE, "partial_rotary_factor": 1.0}
    config = transformers.Glm4vConfig(
        text_config={**TEXT, "rope_parameters": rope, **text},
        vision_config={**QWEN_VISION, "image_size": 32},
        **GLM_TOKENS,
    )
    return transformers.Glm4vForConditionalGeneration(config), *_glm_inputs(videos, generator)


def glm4v_moe(videos: Videos, generator: torch.Generator, **text):
    rope = {**MROPE, "partial_rotary_factor": 1.0}
    experts = {
        "moe_intermediate_size": 32,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    }
    config = transformers.Glm4vMoeConfig(
        text_config={**TEXT, "head_dim": 16, "rope_parameters": rope, **experts, **text},
        vision_config={**QWEN_VISION, "image_size": 32},
        **GLM_TOKENS,
    )
    return transformers.Glm4vMoeForConditionalGeneration(config), *_glm_inputs(videos, generator)


def glm46v(videos: Videos, generator: torch.Generator, **text):
    rope = {**MROPE, "partial_rotary_factor": 1.0}
    config = transformers.Glm46VConfig(
        text_config={**TEXT, "model_type": "glm4v_text", "rope_parameters": rope, **text},
        vision_config={**QWEN_VISION, "model_type": "glm4v_vision", "image_size": 32},
        **GLM_TOKENS,
    )
    return transformers.Glm46VForConditionalGeneration(config), *_glm_inputs(videos, generator)


GLM_TOKENS = {
    "image_token_id": IMAGE_ID,
    "video_token_id": VIDEO_ID,
    "image_start_token_id": VISION_START,
    "image_end_token_id": VISION_END,
    "video_start_token_id": 7,
    "video_end_token_id": 8,
}


def _glm_inputs(videos: Videos, generator: torch.Generator):
    """Frames are image tokens; token types alone call them video."""
    prompts = Prompts(generator)

    def write(row, frames, height, width):
        starts = []
        row.append(GLM_TOKENS["video_start_token_id"])
        for _ in range(frames):
            row.append(VISION_START)
            starts.append(len(row))
            row += [*[IMAGE_ID] * (height * width), VISION_END, *prompts.text(2)]
        row.append(GLM_TOKENS["video_end_token_id"])
        return starts

    for row in videos:
        prompts.add_row([(t, h // 2, w // 2) for t, h, w in row], write)
    inputs, rows = prompts.padded()
    grid = torch.tensor([size for row in videos for size in row])
    inputs["video_grid_thw"] = grid
    inputs["mm_token_type_ids"] = 2 * (inputs["input_ids"] == IMAGE_ID)
    inputs["pixel_values_videos"] = torch.randn(
        int(grid.prod(-1).sum()), 3 * 2 * 16, generator=generator
    )
    return inputs, rows


def video_llama_3(videos: Videos, generator: torch.Generator, **text):
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = transformers.VideoLlama3Config(
        text_config={**TEXT, "model_type": "qwen2", **text},
        vision_config={**vision, "num_attention_heads": 2, "patch_size": 4},
        image_token_id=IMAGE_ID,
        video_token_id=VIDEO_ID,
    )
    prompts = Prompts(generator)

    def write(row, frames, height, width):
        starts = []
        for _ in range(frames):
            row += prompts.text(3)
            starts.append(len(row))
            row += [VIDEO_ID] * (height * width)
        return starts

    for row in videos:
        prompts.add_row([(t, h // 2, w // 2) for t, h, w in row], write)
    inputs, rows = prompts.padded()
    grid = torch.tensor([size for row in videos for size in row])
    inputs["video_grid_thw"] = grid
    inputs["video_merge_sizes"] = torch.full((len(grid),), 2)
    inputs["pixel_values_videos"] = torch.randn(
        int(grid.prod(-1).sum()), 3 * 16, generator=generator
    )
    return transformers.VideoLlama3ForConditionalGeneration(config), inputs, rows
