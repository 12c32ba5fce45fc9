"""Multimodal models without a family of their own, small enough to be built in a test."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from .tiny import IMAGE_ID, MROPE, PAD, TEXT, VISION_START

VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 24,
    "patch_size": 4,
}
ROPE = {"rope_type": "default", "rope_theta": 1e4}
# Keys are wider than values there.
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
}
EXPERTS = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
}


def deepseek_v3() -> Any:
    config = transformers.DeepseekV3Config(**{**TEXT, **LATENT}, **EXPERTS)
    return transformers.DeepseekV3ForCausalLM(config)


def ernie4_5_vl_moe() -> Any:
    text = {
        **TEXT,
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_intermediate_size": [32, 32],
        "rope_parameters": {**MROPE, "mrope_section": [3, 3, 2]},
    }
    vision = {"hidden_size": 32, "intermediate_size": 48, "depth": 1, "num_heads": 2}
    config = transformers.Ernie4_5_VLMoeConfig(text_config=text, vision_config=vision)
    return transformers.Ernie4_5_VLMoeForConditionalGeneration(config)


def gemma4() -> Any:
    text = {
        **TEXT,
        "head_dim": 16,
        "global_head_dim": 16,
        "sliding_window": 8,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": TEXT["vocab_size"],
        "num_kv_shared_layers": 0,
        "layer_types": ["sliding_attention", "full_attention"],
    }
    config = transformers.Gemma4Config(text_config=text, vision_config=None, audio_config=None)
    return transformers.Gemma4ForConditionalGeneration(config)


def glm_ocr() -> Any:
    rope = {**MROPE, "partial_rotary_factor": 1.0}
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2}
    config = transformers.GlmOcrConfig(
        text_config={**TEXT, "head_dim": 16, "rope_parameters": rope},
        vision_config={**vision, "patch_size": 4, "out_hidden_size": 64},
    )
    return transformers.GlmOcrForConditionalGeneration(config)


def idefics3() -> Any:
    config = transformers.Idefics3Config(
        text_config={**TEXT, "model_type": "llama"},
        vision_config=VISION,
        image_token_id=IMAGE_ID,
        pad_token_id=PAD,
    )
    return transformers.Idefics3ForConditionalGeneration(config)


def lfm2_vl() -> Any:
    vision = {k: v for k, v in VISION.items() if k != "image_size"}
    config = transformers.Lfm2VlConfig(
        text_config={**TEXT, "model_type": "lfm2", "layer_types": ["conv", "full_attention"]},
        vision_config={**vision, "model_type": "siglip2_vision_model", "num_patches": 36},
    )
    return transformers.Lfm2VlForConditionalGeneration(config)


def llama4() -> Any:
    text = {
        **TEXT,
        "head_dim": 16,
        "attention_chunk_size": 16,
        "num_local_experts": 2,
        "intermediate_size_mlp": 48,
        "interleave_moe_layer_step": 2,
        "layer_types": ["chunked_attention", "full_attention"],
    }
    vision = {**VISION, "vision_output_dim": 32, "projector_input_dim": 32}
    config = transformers.Llama4Config(
        text_config=text, vision_config={**vision, "projector_output_dim": 32}
    )
    return transformers.Llama4ForConditionalGeneration(config)


def mistral3() -> Any:
    vision = {**VISION, "model_type": "pixtral", "head_dim": 16}
    config = transformers.Mistral3Config(
        text_config={**TEXT, "model_type": "mistral", "sliding_window": None}, vision_config=vision
    )
    return transformers.Mistral3ForConditionalGeneration(config)


def mllama() -> Any:
    """Images are seen through a cross-attention layer alone."""
    vision = {k: v for k, v in VISION.items() if k != "num_attention_heads"}
    config = transformers.MllamaConfig(
        text_config={
            **TEXT,
            "num_hidden_layers": 3,
            "cross_attention_layers": [1],
            "rope_parameters": ROPE,
        },
        vision_config={
            **vision,
            "attention_heads": 2,
            "num_hidden_layers": 2,
            "num_global_layers": 1,
            "vision_output_dim": 64,
            "intermediate_layers_indices": [0],
            "max_num_tiles": 1,
            "supported_aspect_ratios": [[1, 1]],
        },
        image_token_index=IMAGE_ID,
    )
    return transformers.MllamaForConditionalGeneration(config)


def paddleocr_vl() -> Any:
    config = transformers.PaddleOCRVLConfig(
        text_config={**TEXT, "head_dim": 16, "rope_parameters": MROPE}, vision_config=VISION
    )
    return transformers.PaddleOCRVLForConditionalGeneration(config)


def paligemma() -> Any:
    config = transformers.PaliGemmaConfig(
        text_config={**TEXT, "model_type": "gemma", "head_dim": 16},
        vision_config={**VISION, "model_type": "siglip_vision_model", "vision_use_head": False},
        image_token_index=IMAGE_ID,
        projection_dim=64,
        hidden_size=64,
    )
    return transformers.PaliGemmaForConditionalGeneration(config)


def git() -> Any:
    text = {k: v for k, v in TEXT.items() if k != "num_key_value_heads"}
    return transformers.GitForCausalLM(transformers.GitConfig(vision_config=VISION, **text))


def gemma2() -> Any:
    config = transformers.Gemma2Config(**TEXT, head_dim=16, sliding_window=8)
    return transformers.Gemma2ForCausalLM(config)


def qwen2_5_omni_whole() -> Any:
    """A thinker inside the model that also speaks."""
    thinker = {
        "vision_start_token_id": VISION_START,
        "text_config": {**TEXT, "rope_parameters": MROPE},
        "vision_config": {
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "patch_size": 4,
            "out_hidden_size": 64,
        },
        "audio_config": {
            "d_model": 32,
            "encoder_layers": 1,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 32,
            "num_mel_bins": 16,
            "output_dim": 64,
        },
    }
    config = transformers.Qwen2_5OmniConfig(thinker_config=thinker, enable_audio_output=False)
    return transformers.Qwen2_5OmniForConditionalGeneration(config)


def build(make: Any) -> Any:
    """In eval mode, from one seed."""
    torch.manual_seed(0)
    return make().eval()
