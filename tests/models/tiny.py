"""Tiny random vision-language models with fake video prompts: no hub, no tokenizer.

Vocabulary: 0 pad, 1 bos, 2 eos, 3 image, 4 video, 5 vision start, 6 vision end, 10.. text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from permattn.core import Segment, TokenGrid, TokenRun
from torch import Tensor

PAD, BOS, EOS, IMAGE_ID, VIDEO_ID, VISION_START, VISION_END = range(7)
VOCABULARY = 96

TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8192,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}
MROPE = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}
TOKENS = {
    "image_token_id": IMAGE_ID,
    "video_token_id": VIDEO_ID,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}
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

# A batch of prompts: per row, the (frames, height, width) of its videos in patches.
Videos = list[list[tuple[int, int, int]]]
ONE: Videos = [[(12, 4, 6)]]
TWO: Videos = [[(6, 4, 6), (6, 4, 6)]]
BATCH: Videos = [[(6, 4, 6)], [(6, 4, 6), (6, 4, 6)]]


@dataclass
class Case:
    """A model, inputs for it, and the segments that its prompts really hold, per batch row."""

    model: Any
    inputs: dict[str, Tensor]
    rows: tuple[tuple[Segment, ...], ...]

    @property
    def real(self) -> Tensor:
        """bool [B, S]: tokens that are not padding."""
        return self.inputs["attention_mask"].bool()


def grids_of(row: tuple[Segment, ...]) -> list[TokenGrid]:
    """The segments of a row that are grids."""
    return [segment for segment in row if isinstance(segment, TokenGrid)]


class Prompts:
    """Writes rows of token ids and remembers where the frames began.

    Attributes:
        runs: what stands in the row that is being written, and is neither text nor a grid.
    """

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator
        self.ids: list[list[int]] = []
        self.segments: list[list[Segment]] = []
        self.runs: list[TokenRun] = []

    def text(self, n: int) -> list[int]:
        return torch.randint(10, VOCABULARY, (n,), generator=self.generator).tolist()

    def add_row(self, videos: list[tuple[int, int, int]], write: Callable) -> None:
        """`write(row, frames)` appends one video to a row and returns the starts of its frames."""
        row, grids = [BOS, *self.text(3)], []
        self.runs = []
        for frames, height, width in videos:
            starts = write(row, frames, height, width)
            gaps = starts[-1] - starts[0] != (frames - 1) * height * width
            grids.append(
                TokenGrid(starts[0], frames, height, width, tuple(starts) if gaps else None)
            )
            row += self.text(3)
        self.ids.append(row + self.text(4))
        self.segments.append(sorted((*grids, *self.runs), key=lambda segment: segment.start))

    def padded(self, side: str = "left") -> tuple[dict[str, Tensor], tuple]:
        length = max(map(len, self.ids))
        ids, mask, rows = [], [], []
        for row, segments in zip(self.ids, self.segments, strict=True):
            pad = length - len(row)
            left, right = (pad, 0) if side == "left" else (0, pad)
            ids.append([PAD] * left + row + [PAD] * right)
            mask.append([0] * left + [1] * len(row) + [0] * right)
            rows.append(tuple(_moved(segment, left) for segment in segments))
        inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
        return inputs, tuple(rows)


def _moved(segment: Segment, by: int) -> Segment:
    starts = getattr(segment, "frame_starts", None)
    moved = {} if starts is None else {"frame_starts": tuple(s + by for s in starts)}
    return replace(segment, start=segment.start + by, **moved)


def token_types(ids: Tensor) -> Tensor:
    return (ids == IMAGE_ID) + 2 * (ids == VIDEO_ID)


def _qwen_inputs(videos: Videos, generator: torch.Generator, *, timestamps: bool):
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


def _qwen2_vl(videos: Videos, generator: torch.Generator, **text):
    vision = {
        k: v for k, v in QWEN_VISION.items() if k not in ("out_hidden_size", "intermediate_size")
    }
    vision |= {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2}
    config = transformers.Qwen2VLConfig(
        text_config={**TEXT, "rope_parameters": MROPE, **text}, vision_config=vision, **TOKENS
    )
    inputs = _qwen_inputs(videos, generator, timestamps=False)
    return transformers.Qwen2VLForConditionalGeneration(config), *inputs


def _qwen2_5_vl(videos: Videos, generator: torch.Generator, **text):
    config = transformers.Qwen2_5_VLConfig(
        text_config={**TEXT, "rope_parameters": MROPE, **text},
        vision_config={**QWEN_VISION, "window_size": 16, "fullatt_block_indexes": [1]},
        **TOKENS,
    )
    inputs = _qwen_inputs(videos, generator, timestamps=False)
    return transformers.Qwen2_5_VLForConditionalGeneration(config), *inputs


def _qwen3_vl(videos: Videos, generator: torch.Generator, **text):
    rope = {**MROPE, "mrope_interleaved": True}
    config = transformers.Qwen3VLConfig(
        text_config={**TEXT, "head_dim": 16, "rope_parameters": rope, **text},
        vision_config={
            **QWEN_VISION,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0],
        },
        **TOKENS,
    )
    inputs = _qwen_inputs(videos, generator, timestamps=True)
    return transformers.Qwen3VLForConditionalGeneration(config), *inputs


def _frames_inputs(
    videos: Videos, generator: torch.Generator, *, token: int, tail: int = 0, wrapped: bool = False
):
    """Videos of 3 x 3 tokens per frame; `wrapped`: between markers, with text before them."""
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
        prompts.add_row([(t, 3, 3) for t, _, _ in row], write)
    return prompts.padded()


def _llava_onevision(videos: Videos, generator: torch.Generator, **text):
    config = transformers.LlavaOnevisionConfig(
        text_config={**TEXT, "model_type": "qwen2", **text},
        vision_config=SIGLIP,
        image_token_index=IMAGE_ID,
        video_token_index=VIDEO_ID,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_grid_pinpoints=[[24, 24]],
    )
    inputs, rows = _frames_inputs(videos, generator, token=VIDEO_ID, tail=1)
    inputs["pixel_values_videos"] = _stacked_videos(videos, generator)
    return transformers.LlavaOnevisionForConditionalGeneration(config), inputs, rows


def _llava_next_video(videos: Videos, generator: torch.Generator, **text):
    config = transformers.LlavaNextVideoConfig(
        text_config={**TEXT, "model_type": "llama", **text},
        vision_config=CLIP,
        image_token_index=IMAGE_ID,
        video_token_index=VIDEO_ID,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_grid_pinpoints=[[24, 24]],
    )
    inputs, rows = _frames_inputs(videos, generator, token=VIDEO_ID)
    inputs["pixel_values_videos"] = _stacked_videos(videos, generator)
    return transformers.LlavaNextVideoForConditionalGeneration(config), inputs, rows


def _internvl(videos: Videos, generator: torch.Generator, **text):
    vision = {k: v for k, v in TOWER.items() if k not in ("image_size", "patch_size")}
    config = transformers.InternVLConfig(
        text_config={**TEXT, "model_type": "qwen2", **text},
        vision_config={**vision, "image_size": [24, 24], "patch_size": [4, 4]},
        image_token_id=IMAGE_ID,
        image_seq_length=9,
    )
    inputs, rows = _frames_inputs(videos, generator, token=IMAGE_ID, wrapped=True)
    num_frames = sum(t for row in videos for t, _, _ in row)
    inputs["pixel_values"] = torch.randn(num_frames, 3, 24, 24, generator=generator)
    return transformers.InternVLForConditionalGeneration(config), inputs, rows


def _stacked_videos(videos: Videos, generator: torch.Generator) -> Tensor:
    frames = videos[0][0][0]
    return torch.randn(sum(map(len, videos)), frames, 3, 24, 24, generator=generator)


BUILDERS = {
    "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "llava_onevision": _llava_onevision,
    "llava_next_video": _llava_next_video,
    "internvl": _internvl,
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
