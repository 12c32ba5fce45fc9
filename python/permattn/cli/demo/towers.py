"""What differs between the families whose place is a code: configs, prompts, pixels and towers."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from permattn.cli.demo.circuits import HEAD_DIM, PAIRS, Grid, Sizes
from permattn.cli.demo.patches import every_other, patches_of
from permattn.cli.demo.place_code import Pairs

MAX_POSITIONS = 1 << 20
PAD, BOS_TOKEN, EOS, IMAGE_TOKEN, VIDEO_TOKEN, START, END = range(7)
# Ids of the words around every frame, and the first id of words that mean nothing.
_DIGIT, _BEFORE, _AFTER, _NEWLINE, FIRST_WORD = 16, 26, 27, 28, 64


@dataclass(frozen=True, eq=False)
class Tower:
    """The parts of a vision tower that carry a code from position embeddings to features.

    Args:
        root: the tower.
        table: [n, hidden] position embeddings.
        height, width: [n] their places, in tokens of the prompt.
        writers: layers whose output is added to the residual.
        first, last: linear layers of the projector, with GELU between.
        copies: patches that `first` reads side by side.
        others: further projectors, into later layers of the decoder.
    """

    root: nn.Module
    table: Tensor
    height: Tensor
    width: Tensor
    writers: Sequence[Any]
    first: nn.Linear
    last: nn.Linear
    copies: int
    others: Sequence[Any] = ()


class CodedFamily(ABC):
    """One family; `model_type` and `class_name` as in transformers."""

    model_type: str
    class_name: str
    # Whether frames are as high as wide.
    is_square: bool

    @abstractmethod
    def config(self, grid: Grid, sizes: Sizes) -> Any:
        """The model's config."""

    @abstractmethod
    def pairs(self, grid: Grid) -> Pairs:
        """Pairs of the decoder's RoPE, for the frames of this prompt."""

    @abstractmethod
    def visual_ids(self, grid: Grid) -> list[int]:
        """Token ids of the video, with what stands between frames."""

    @abstractmethod
    def pixels(self, frames: np.ndarray, patch: int) -> dict[str, Tensor]:
        """What the forward takes for frames uint8 [T, H, W, 3]."""

    @abstractmethod
    def tower(self, model: Any, grid: Grid) -> Tower:
        """The vision tower's parts."""

    @abstractmethod
    def features(self, model: Any, pixels: dict[str, Tensor]) -> Tensor:
        """[n, hidden]: visual embeddings."""

    def inputs_of_ids(self, ids: Tensor) -> dict[str, Tensor]:
        """Further inputs that follow from the ids."""
        return {"attention_mask": torch.ones_like(ids)}


def _text(sizes: Sizes, rope: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "vocab_size": sizes.vocab,
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.mlp,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "max_position_embeddings": MAX_POSITIONS,
        "rope_parameters": {"rope_type": "default", **rope},
        "bos_token_id": BOS_TOKEN,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        "tie_word_embeddings": False,
    } | more


def _heads(sizes: Sizes) -> int:
    return max(2, sizes.vision_hidden // 64)


def _places(height: int, width: int) -> tuple[Tensor, Tensor]:
    """Places of patches, two by two to a token, in tokens: the mean of four is their token's."""
    rows, columns = ((torch.arange(2 * n) - 0.5) / 2 for n in (height, width))
    return rows.repeat_interleave(2 * width), columns.repeat(2 * height)


class Qwen3VL(CodedFamily):
    """Interleaved M-RoPE, q_norm and k_norm, a timestamp before every frame, DeepStack."""

    model_type = "qwen3_vl"
    class_name = "Qwen3VLForConditionalGeneration"
    is_square = False
    THETA, SECTIONS = 5e6, (24, 20, 20)
    # Position embeddings per side, resampled to the frame.
    SIDE = 48

    def config(self, grid: Grid, sizes: Sizes) -> Any:
        """See `CodedFamily.config`."""
        from transformers import Qwen3VLConfig

        rope = {
            "rope_theta": self.THETA,
            "mrope_section": list(self.SECTIONS),
            "mrope_interleaved": True,
        }
        vision = {
            "depth": sizes.vision_depth,
            "hidden_size": sizes.vision_hidden,
            "intermediate_size": 2 * sizes.vision_hidden,
            "num_heads": _heads(sizes),
            "patch_size": sizes.patch,
            "out_hidden_size": sizes.hidden,
            "num_position_embeddings": self.SIDE**2,
            "deepstack_visual_indexes": [0],
        }
        return Qwen3VLConfig(
            text_config=_text(sizes, rope, head_dim=HEAD_DIM),
            vision_config=vision,
            image_token_id=IMAGE_TOKEN,
            video_token_id=VIDEO_TOKEN,
            vision_start_token_id=START,
            vision_end_token_id=END,
            tie_word_embeddings=False,
        )

    def pairs(self, grid: Grid) -> Pairs:
        """See `CodedFamily.pairs`."""
        between = len(self.visual_ids(Grid(1, 1, 1))) - 1
        # Height and width take every third pair up to their section's size; time has the others.
        others = {axis + 3 * i for axis in (1, 2) for i in range(self.SECTIONS[axis])}
        time = tuple(i for i in range(PAIRS) if i not in others)
        return Pairs.of(self.THETA, max(grid.height, grid.width) + between, time)

    def visual_ids(self, grid: Grid) -> list[int]:
        """See `CodedFamily.visual_ids`; "<12.5 seconds>" before every frame."""
        ids: list[int] = []
        for t in range(grid.frames):
            digits = [_DIGIT + int(digit) for digit in f"{t:04d}"]
            ids += [_BEFORE, *digits, _AFTER, START]
            ids += [VIDEO_TOKEN] * (grid.height * grid.width) + [END]
        return ids

    def inputs_of_ids(self, ids: Tensor) -> dict[str, Tensor]:
        """See `CodedFamily.inputs_of_ids`."""
        return super().inputs_of_ids(ids) | {"mm_token_type_ids": 2 * (ids == VIDEO_TOKEN).int()}

    def pixels(self, frames: np.ndarray, patch: int) -> dict[str, Tensor]:
        """See `CodedFamily.pixels`."""
        patches, thw = patches_of(frames, patch)
        return {"pixel_values_videos": patches, "video_grid_thw": thw}

    def tower(self, model: Any, grid: Grid) -> Tower:
        """See `CodedFamily.tower`."""
        root = model.model.visual
        # The table's corners lie on the frame's corner patches.
        rows, columns = (
            (torch.arange(self.SIDE) * (2 * n - 1) / (self.SIDE - 1) - 0.5) / 2
            for n in (grid.height, grid.width)
        )
        writers = [root.patch_embed.proj]
        for block in root.blocks:
            writers += [block.attn.proj, block.mlp.linear_fc2]
        return Tower(
            root,
            root.pos_embed.weight,
            rows.repeat_interleave(self.SIDE),
            columns.repeat(self.SIDE),
            writers,
            root.merger.linear_fc1,
            root.merger.linear_fc2,
            root.spatial_merge_unit,
            [merger.linear_fc2 for merger in root.deepstack_merger_list],
        )

    def features(self, model: Any, pixels: dict[str, Tensor]) -> Tensor:
        """See `CodedFamily.features`."""
        patches, thw = pixels["pixel_values_videos"], pixels["video_grid_thw"]
        out: Tensor = model.model.visual(patches.to(model.dtype), grid_thw=thw).pooler_output
        return out


class LlavaOnevision(CodedFamily):
    """SigLIP, patches pooled two by two, a Qwen2 decoder, one newline after the last frame."""

    model_type = "llava_onevision"
    class_name = "LlavaOnevisionForConditionalGeneration"
    is_square = True
    THETA = 1e6

    def config(self, grid: Grid, sizes: Sizes) -> Any:
        """See `CodedFamily.config`."""
        from transformers import LlavaOnevisionConfig

        vision = {
            "model_type": "siglip_vision_model",
            "hidden_size": sizes.vision_hidden,
            "intermediate_size": 2 * sizes.vision_hidden,
            "num_hidden_layers": sizes.vision_depth,
            "num_attention_heads": _heads(sizes),
            "patch_size": sizes.patch,
            "image_size": 2 * grid.height * sizes.patch,
            "vision_use_head": False,
        }
        return LlavaOnevisionConfig(
            text_config=_text(sizes, {"rope_theta": self.THETA}, model_type="qwen2"),
            vision_config=vision,
            image_token_index=IMAGE_TOKEN,
            video_token_index=VIDEO_TOKEN,
        )

    def pairs(self, grid: Grid) -> Pairs:
        """See `CodedFamily.pairs`."""
        return Pairs.of(self.THETA, grid.height * grid.width, tuple(range(PAIRS)))

    def visual_ids(self, grid: Grid) -> list[int]:
        """See `CodedFamily.visual_ids`."""
        return [START, *[VIDEO_TOKEN] * (grid.num_tokens + 1), END]

    def pixels(self, frames: np.ndarray, patch: int) -> dict[str, Tensor]:
        """See `CodedFamily.pixels`."""
        return {"pixel_values_videos": every_other(frames)[None]}

    def tower(self, model: Any, grid: Grid) -> Tower:
        """See `CodedFamily.tower`."""
        root = model.model.vision_tower
        embeddings = root.embeddings
        writers = [embeddings.patch_embedding]
        for block in root.encoder.layers:
            writers += [block.self_attn.out_proj, block.mlp.fc2]
        projector = model.model.multi_modal_projector
        return Tower(
            root,
            embeddings.position_embedding.weight,
            *_places(grid.height, grid.width),
            writers,
            projector.linear_1,
            projector.linear_2,
            1,
        )

    def features(self, model: Any, pixels: dict[str, Tensor]) -> Tensor:
        """See `CodedFamily.features`."""
        frames = pixels["pixel_values_videos"].to(model.dtype)
        out: Tensor = model.model.get_video_features(frames).pooler_output[0, :-1]
        return out


class InternVL(CodedFamily):
    """InternViT, pixel shuffle, a Qwen2 decoder, every frame written as an image."""

    model_type = "internvl"
    class_name = "InternVLForConditionalGeneration"
    is_square = True
    THETA = 1e6

    def config(self, grid: Grid, sizes: Sizes) -> Any:
        """See `CodedFamily.config`."""
        from transformers import InternVLConfig

        side = 2 * grid.height * sizes.patch
        vision = {
            "hidden_size": sizes.vision_hidden,
            "intermediate_size": 2 * sizes.vision_hidden,
            "num_hidden_layers": sizes.vision_depth,
            "num_attention_heads": _heads(sizes),
            "patch_size": [sizes.patch, sizes.patch],
            "image_size": [side, side],
        }
        return InternVLConfig(
            text_config=_text(sizes, {"rope_theta": self.THETA}, model_type="qwen2"),
            vision_config=vision,
            image_token_id=IMAGE_TOKEN,
            image_seq_length=grid.height * grid.width,
            tie_word_embeddings=False,
        )

    def pairs(self, grid: Grid) -> Pairs:
        """See `CodedFamily.pairs`."""
        step = len(self.visual_ids(Grid(1, grid.height, grid.width)))
        return Pairs.of(self.THETA, step, tuple(range(PAIRS)))

    def visual_ids(self, grid: Grid) -> list[int]:
        """See `CodedFamily.visual_ids`; "Frame12: <img>...</img>" and a newline."""
        ids: list[int] = []
        for t in range(grid.frames):
            digits = [_DIGIT + int(digit) for digit in f"{t + 1}"]
            ids += [_BEFORE, *digits, _AFTER, START]
            ids += [IMAGE_TOKEN] * (grid.height * grid.width) + [END, _NEWLINE]
        return ids

    def pixels(self, frames: np.ndarray, patch: int) -> dict[str, Tensor]:
        """See `CodedFamily.pixels`."""
        return {"pixel_values": every_other(frames)}

    def tower(self, model: Any, grid: Grid) -> Tower:
        """See `CodedFamily.tower`."""
        root = model.model.vision_tower
        embeddings = root.embeddings
        writers = [embeddings.patch_embeddings.projection]
        for block in root.encoder.layer:
            writers += [block.attention.projection_layer, block.mlp.fc2]
        projector = model.model.multi_modal_projector
        return Tower(
            root,
            # Behind the class token's.
            embeddings.position_embeddings[0, 1:],
            *_places(grid.height, grid.width),
            writers,
            projector.linear_1,
            projector.linear_2,
            4,
        )

    def features(self, model: Any, pixels: dict[str, Tensor]) -> Tensor:
        """See `CodedFamily.features`."""
        frames = pixels["pixel_values"].to(model.dtype)
        out: Tensor = model.model.get_image_features(frames).pooler_output
        return out.flatten(0, 1)


FAMILIES: dict[str, CodedFamily] = {
    family.model_type: family for family in (Qwen3VL(), LlavaOnevision(), InternVL())
}


def square_grid(tokens: int, frames: int | None) -> Grid:
    """Frames as high as wide that hold at least `tokens` tokens.

    Args:
        frames: video frames to use, two per frame of tokens; None = as many as it takes.
    """
    count = max(2, frames // 2) if frames else max(2, math.ceil(tokens / _SIDE**2))
    side = max(2, math.ceil(math.sqrt(tokens / count))) if frames else _SIDE
    return Grid(count, side, side)


# Tokens along both sides of a square frame.
_SIDE = 12
