"""Tiny diffusion transformers of every family, with inputs; and plans for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from permattn.models.diffusion import describe
from permattn.patterns.paro import ParoOrigin, ParoPlan, pack_bits
from torch import Tensor, nn

diffusers.utils.logging.set_verbosity_error()

NUM_TEXT = 8
BLOCK = 16
HEADS = 4


@dataclass
class Case:
    """A model, arguments of one call, and what its tokens are."""

    model: Any
    inputs: dict[str, Any]
    grid: tuple[int, int, int]
    num_text: int

    def run(self, **changed: Any) -> Tensor:
        """The model's output without gradients."""
        with torch.no_grad():
            return self.model(**(self.inputs | changed), return_dict=False)[0]


def _noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


def wan(layers: int = 2) -> Case:
    model = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=HEADS,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=layers,
        cross_attn_norm=True,
        rope_max_seq_len=32,
    )
    inputs = {
        "hidden_states": _noise(2, 4, 4, 8, 12),
        "timestep": torch.tensor([900, 900]),
        "encoder_hidden_states": _noise(2, NUM_TEXT, 16),
    }
    return Case(model, inputs, (4, 4, 6), 0)


def cogvideox() -> Case:
    model = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=16,
        num_layers=2,
        sample_width=12,
        sample_height=8,
        sample_frames=13,
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=NUM_TEXT,
        use_rotary_positional_embeddings=True,
    )
    inputs = {
        "hidden_states": _noise(2, 4, 4, 8, 12),
        "timestep": torch.tensor([900, 900]),
        "encoder_hidden_states": _noise(2, NUM_TEXT, 16),
        "image_rotary_emb": get_3d_rotary_pos_embed(16, ((0, 0), (4, 6)), (4, 6), 4),
    }
    return Case(model, inputs, (4, 4, 6), NUM_TEXT)


def hunyuan_video() -> Case:
    model = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=HEADS,
        attention_head_dim=12,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=2,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(2, 4, 6),
    )
    seen = torch.ones(2, NUM_TEXT, dtype=torch.long)
    seen[1, 5:] = 0
    inputs = {
        "hidden_states": _noise(2, 4, 4, 8, 12),
        "timestep": torch.tensor([900, 900]),
        "encoder_hidden_states": _noise(2, NUM_TEXT, 16),
        "encoder_attention_mask": seen,
        "pooled_projections": _noise(2, 8),
        "guidance": torch.tensor([6000.0, 6000.0]),
    }
    return Case(model, inputs, (4, 4, 6), NUM_TEXT)


def ltx() -> Case:
    model = diffusers.LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=HEADS,
        attention_head_dim=8,
        cross_attention_dim=32,
        num_layers=2,
        caption_channels=16,
    )
    inputs = {
        "hidden_states": _noise(2, 96, 4),
        "timestep": torch.tensor([900, 900]),
        "encoder_hidden_states": _noise(2, NUM_TEXT, 16),
        "encoder_attention_mask": torch.ones(2, NUM_TEXT),
        "num_frames": 4,
        "height": 4,
        "width": 6,
    }
    return Case(model, inputs, (4, 4, 6), 0)


def flux() -> Case:
    model = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=HEADS,
        joint_attention_dim=16,
        pooled_projection_dim=8,
        axes_dims_rope=[4, 4, 8],
        guidance_embeds=False,
    )
    ids = torch.cartesian_prod(torch.zeros(1), torch.arange(8.0), torch.arange(12.0))
    inputs = {
        "hidden_states": _noise(2, 96, 4),
        "timestep": torch.tensor([0.9, 0.9]),
        "encoder_hidden_states": _noise(2, NUM_TEXT, 16),
        "pooled_projections": _noise(2, 8),
        "img_ids": ids,
        "txt_ids": torch.zeros(NUM_TEXT, 3),
    }
    return Case(model, inputs, (1, 8, 12), NUM_TEXT)


def qwen_image() -> Case:
    model = diffusers.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=HEADS,
        joint_attention_dim=16,
        guidance_embeds=False,
        axes_dims_rope=(8, 4, 4),
    )
    seen = torch.ones(2, NUM_TEXT, dtype=torch.bool)
    seen[0, 6:] = False
    inputs = {
        "hidden_states": _noise(2, 96, 16),
        "timestep": torch.tensor([0.9, 0.9]),
        "encoder_hidden_states": _noise(2, NUM_TEXT, 16),
        "encoder_hidden_states_mask": seen,
        "img_shapes": [[(1, 8, 12)], [(1, 8, 12)]],
    }
    return Case(model, inputs, (1, 8, 12), NUM_TEXT)


BUILDERS: dict[str, Callable[[], Case]] = {
    "wan": wan,
    "cogvideox": cogvideox,
    "hunyuan_video": hunyuan_video,
    "ltx": ltx,
    "flux": flux,
    "qwen_image": qwen_image,
}


def build(name: str) -> Case:
    """A model with random weights, the same in every process."""
    torch.manual_seed(0)
    case = BUILDERS[name]()
    fill(case.model)
    return case


def fill(model: nn.Module) -> None:
    """Gates and norms start at zero, which would hide what attention does: fills them."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.02, generator=generator)
    model.eval()


def plan_for(
    case: Case,
    *,
    density: float = 0.4,
    bins: int = 2,
    num_steps: int = 4,
    seed: int = 3,
    **changed: Any,
) -> ParoPlan:
    """Random orders and masks; bin 0 serves sigma above 1/2."""
    facts = describe(case.model)
    generator = torch.Generator().manual_seed(seed)
    frames, height, width = changed.get("grid", case.grid)
    size = -(-frames * height * width // BLOCK)
    shape = (facts.num_layers, facts.num_heads)
    mask = torch.rand(bins, *shape, size, size, generator=generator) < density
    mask |= torch.eye(size, dtype=torch.bool)
    fields: dict[str, Any] = {
        "grid": case.grid,
        "text": facts.text,
        "axis_orders": torch.randint(0, 6, shape, generator=generator, dtype=torch.uint8),
        "packed_masks": pack_bits(mask),
        "sigma_edges": tuple(1 - (b + 1) / bins for b in range(bins - 1)),
        "empty_heads": torch.zeros(shape, dtype=torch.bool),
        "origin": ParoOrigin(
            facts.model_class, facts.head_dim, num_steps, fingerprint=facts.fingerprint
        ),
        "block": (BLOCK, BLOCK),
    }
    return ParoPlan(**(fields | changed))
