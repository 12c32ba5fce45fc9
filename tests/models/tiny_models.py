"""Tiny models by name."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from . import tiny_frames, tiny_grids
from .tiny import ONE, TEXT, VOCABULARY, Case, Videos

BUILDERS = {
    "qwen2_vl": tiny_grids.qwen2_vl,
    "qwen2_5_vl": tiny_grids.qwen2_5_vl,
    "qwen3_vl": tiny_grids.qwen3_vl,
    "qwen3_vl_moe": tiny_grids.qwen3_vl_moe,
    "qwen3_5": tiny_grids.qwen3_5,
    "qwen3_5_moe": tiny_grids.qwen3_5_moe,
    "qwen2_5_omni": tiny_grids.qwen2_5_omni,
    "qwen2_5_omni_sound": tiny_grids.qwen2_5_omni_sound,
    "qwen3_omni_sound": tiny_grids.qwen3_omni_sound,
    "glm4v": tiny_grids.glm4v,
    "glm4v_moe": tiny_grids.glm4v_moe,
    "glm46v": tiny_grids.glm46v,
    "video_llama_3": tiny_grids.video_llama_3,
    "llava_onevision": tiny_frames.llava_onevision,
    "llava_next_video": tiny_frames.llava_next_video,
    "video_llava": tiny_frames.video_llava,
    "internvl": tiny_frames.internvl,
    "llava": tiny_frames.llava,
    "smolvlm": tiny_frames.smolvlm,
    "ovis2": tiny_frames.ovis2,
    "gemma3": tiny_frames.gemma3,
}


def llama() -> Any:
    """A text model without a family: two layers, no vision."""
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT)).eval()


def text_case() -> Case:
    """A left-padded batch of two texts for `llama`."""
    ids = torch.randint(10, VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    return Case(llama(), {"input_ids": ids, "attention_mask": mask}, ((), ()))


def build(name: str, videos: Videos = ONE, *, seed: int = 0, **text: Any) -> Case:
    """A model in eval mode with float32 weights; keywords go into its text config."""
    torch.manual_seed(seed)
    model, inputs, rows = BUILDERS[name](videos, torch.Generator().manual_seed(seed), **text)
    return Case(model.eval(), inputs, rows)
