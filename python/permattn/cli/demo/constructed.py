"""The default model: the real Qwen2.5-VL (or Qwen2-VL) class, weights built and not trained.

Its heads show what heads of trained vision-language models show: see `circuits`. All other weights
are small and random, so part of every head's mass is spread, and hidden states depend on what
attention returns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from permattn.cli.demo.circuits import (
    BOS,
    CONTENT,
    FIRST_LAYER_KINDS,
    FIRST_MARKER,
    GRID_MARKER,
    KINDS,
    MARKER,
    PAIRS,
    SECTIONS,
    SPOT_MARKERS,
    VIDEO_TOKEN,
    Grid,
    Sizes,
    frequencies,
    write_keys,
    write_markers,
    write_query,
)

THETA = 1e4
MAX_POSITIONS = 1 << 20
# Classes that can be constructed; the first is the demo's.
MODEL_TYPES = {
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen2_vl": "Qwen2VLForConditionalGeneration",
}


@dataclass(frozen=True, eq=False)
class Constructed:
    """A model, and the prompt it is built for.

    Args:
        model: of a class in `MODEL_TYPES`, in eval mode.
        input_ids: [1, S].
        kinds: names of the heads' kinds, per layer and head.
    """

    model: Any
    input_ids: Tensor
    kinds: tuple[tuple[str, ...], ...]


def build(
    grid: Grid,
    sample: Tensor,
    sample_thw: Tensor,
    *,
    sizes: Sizes = Sizes(),
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    model_type: str = "qwen2_5_vl",
) -> Constructed:
    """Builds the model and its prompt.

    Args:
        grid: the video that the prompt will hold.
        sample, sample_thw: patches and sizes of a few frames: the merger's last layer is scaled so
            that visual embeddings have mean 0 and variance 1, as text embeddings do.
        model_type: one of `MODEL_TYPES`: the same decoder below another vision tower.
    """
    import transformers

    config = _config(sizes, model_type)
    model_class = getattr(transformers, MODEL_TYPES[model_type])
    random_state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    try:
        model: Any = model_class._from_config(
            config, dtype=dtype, attn_implementation="sdpa"
        ).eval()
        with torch.no_grad():
            ids = _write_prompt(model, grid, sizes)
            _write_vision(model, sample, sample_thw, sizes)
            kinds = _write_decoder(model, grid, ids, sizes)
    finally:
        torch.random.set_rng_state(random_state)
    return Constructed(model, ids, kinds)


def _config(sizes: Sizes, model_type: str) -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2VLConfig

    # longrope states one factor per pair, which lets the config choose every frequency.
    plain = THETA ** -(torch.arange(PAIRS, dtype=torch.double) / PAIRS)
    factors = (plain / frequencies()).tolist()
    rope = {
        "rope_type": "longrope",
        "rope_theta": THETA,
        "mrope_section": list(SECTIONS),
        "short_factor": factors,
        "long_factor": factors,
        "factor": 1.0,
        "attention_factor": 1.0,
        "original_max_position_embeddings": MAX_POSITIONS,
    }
    text = {
        "vocab_size": sizes.vocab,
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.mlp,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "max_position_embeddings": MAX_POSITIONS,
        "rope_parameters": rope,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    vision: dict[str, Any] = {
        "depth": sizes.vision_depth,
        "num_heads": max(2, sizes.vision_hidden // 64),
        "patch_size": sizes.patch,
    }
    if model_type == "qwen2_vl":
        vision |= {"embed_dim": sizes.vision_hidden, "hidden_size": sizes.hidden, "mlp_ratio": 2}
    else:
        vision |= {
            "hidden_size": sizes.vision_hidden,
            "intermediate_size": 2 * sizes.vision_hidden,
            "window_size": 16 * sizes.patch,
            "fullatt_block_indexes": [sizes.vision_depth - 1],
            "out_hidden_size": sizes.hidden,
            "tokens_per_second": 1,
        }
    make = Qwen2VLConfig if model_type == "qwen2_vl" else Qwen2_5_VLConfig
    return make(
        text_config=text,
        vision_config=vision,
        image_token_id=3,
        video_token_id=VIDEO_TOKEN,
        vision_start_token_id=5,
        vision_end_token_id=6,
        tie_word_embeddings=False,
    )


# The prompt: bos, system text, markers, vision start, the video, vision end, question.
_FIRST_WORD = 64
_SYSTEM, _QUESTION = 21, 24
# Special tokens outweigh what layers add to them, as the first token of trained models does.
_SPECIAL_SIZE = 8.0


def _write_prompt(model: Any, grid: Grid, sizes: Sizes) -> Tensor:
    config = model.config
    table = model.get_input_embeddings().weight
    table.normal_()
    table[:, : SPOT_MARKERS + sizes.num_spots] = 0.0
    # A special token is its own coordinate and nothing else; RMSNorm keeps it at sqrt(hidden).
    special = {config.text_config.bos_token_id: BOS, FIRST_MARKER: GRID_MARKER}
    special |= {FIRST_MARKER + 1 + i: SPOT_MARKERS + i for i in range(sizes.num_spots)}
    for token, coordinate in special.items():
        table[token] = 0.0
        table[token, coordinate] = _SPECIAL_SIZE * math.sqrt(sizes.hidden)
    words = torch.randint(_FIRST_WORD, sizes.vocab, (_SYSTEM + _QUESTION,))
    ids = [
        config.text_config.bos_token_id,
        *words[:_SYSTEM].tolist(),
        *range(FIRST_MARKER, FIRST_MARKER + 1 + sizes.num_spots),
        config.vision_start_token_id,
        *[config.video_token_id] * grid.num_tokens,
        config.vision_end_token_id,
        *words[_SYSTEM:].tolist(),
    ]
    return torch.tensor([ids])


def _write_vision(model: Any, sample: Tensor, thw: Tensor, sizes: Sizes) -> None:
    """Scales the merger's output to mean 0 and variance 1 over the sample."""
    visual = model.model.visual
    for weight in visual.parameters():
        if weight.ndim > 1:
            weight.normal_(std=weight[0].numel() ** -0.5)
    last = visual.merger.mlp[-1]
    reserved = SPOT_MARKERS + sizes.num_spots
    out = visual(sample.to(last.weight.dtype), grid_thw=thw).pooler_output.float()
    last.weight.div_((out - out.mean(0)).std().to(last.weight.dtype))
    out = visual(sample.to(last.weight.dtype), grid_thw=thw).pooler_output.float()
    last.bias.sub_(out.mean(0).to(last.bias.dtype))
    last.weight[:reserved] = 0.0
    last.bias[:reserved] = 0.0


def _write_decoder(
    model: Any, grid: Grid, ids: Tensor, sizes: Sizes
) -> tuple[tuple[str, ...], ...]:
    text = model.model.language_model
    reserved = SPOT_MARKERS + sizes.num_spots
    kinds = []
    for number, layer in enumerate(text.layers):
        attention, mlp = layer.self_attn, layer.mlp
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj):
            linear.weight.normal_(std=linear.in_features**-0.5)
        for linear in (mlp.gate_proj, mlp.up_proj, mlp.down_proj):
            linear.weight.normal_(std=linear.in_features**-0.5)
        for linear in (attention.q_proj, attention.k_proj):
            linear.weight.mul_(CONTENT)
            linear.weight[:, :reserved] = 0.0
            linear.bias.zero_()
        attention.v_proj.bias.zero_()
        for linear in (attention.o_proj, mlp.down_proj):
            linear.weight[:reserved] = 0.0
        table = KINDS if number else FIRST_LAYER_KINDS
        chosen = [table[(number * 3 + i) % len(table)] for i in range(sizes.heads)]
        if number == 0:
            chosen[0] = MARKER
        for head, kind in enumerate(chosen):
            write_query(attention, head, kind)
        write_keys(attention, sizes)
        if number == 0:
            write_markers(attention, grid, ids, sizes)
        kinds.append(tuple(kind.name for kind in chosen))
    return tuple(kinds)
