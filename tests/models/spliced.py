"""Models of the shape of LLaVA-Video, VILA and VideoChat-Flash: they splice videos in themselves.

Written from what their classes look like from outside; towers are single projections.
"""

from __future__ import annotations

from collections import deque
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Model,
)
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast

from .tiny import TEXT

PLACEHOLDER = -200


def padded(rows: list[Tensor], side: str) -> tuple[Tensor, Tensor]:
    """[B, S, D] and bool [B, S]."""
    length = max(map(len, rows))
    embeds, masks = [], []
    for row in rows:
        pad = length - len(row)
        pads = (pad, 0) if side == "left" else (0, pad)
        embeds.append(nn.functional.pad(row, (0, 0, *pads)))
        masks.append(nn.functional.pad(torch.ones(len(row), dtype=torch.bool), pads))
    return torch.stack(embeds), torch.stack(masks)


class LlavaQwenConfig(Qwen2Config):
    model_type = "llava_qwen"
    mm_newline_position: str = "grid"
    mm_patch_merge_type: str = "spatial_unpad"
    tokenizer_padding_side: str = "left"


class LlavaQwenForCausalLM(Qwen2ForCausalLM):
    """LLaVA-Video: `generate` splices and calls Qwen2's with embeddings."""

    config_class = LlavaQwenConfig

    def __init__(self, config: LlavaQwenConfig) -> None:
        super().__init__(config)
        self.mm_projector = nn.Linear(8, config.hidden_size)
        self.image_newline = nn.Parameter(torch.zeros(config.hidden_size))
        self.post_init()

    def encode(self, video: Tensor) -> Tensor:
        """[T, h, w, 8] with its newlines, flat."""
        frames = self.mm_projector(video)
        newline = self.image_newline
        position = self.config.mm_newline_position
        if position == "grid":
            newlines = newline.expand(*frames.shape[:2], 1, -1)
            return torch.cat((frames, newlines), 2).flatten(0, 2)
        flat = frames.flatten(1, 2)
        if position == "frame":
            return torch.cat((flat, newline.expand(len(flat), 1, -1)), 1).flatten(0, 1)
        flat = flat.flatten(0, 1)
        return torch.cat((flat, newline[None])) if position == "one_token" else flat

    def prepare_inputs_labels_for_multimodal(
        self,
        input_ids,
        position_ids,
        attention_mask,
        past_key_values,
        labels,
        images,
        modalities=("image",),
        image_sizes=None,
    ):
        if images is None or input_ids.shape[1] == 1:
            return input_ids, position_ids, attention_mask, past_key_values, None, labels
        videos = iter(images)
        rows = []
        for i, padded_ids in enumerate(input_ids):
            ids = padded_ids if attention_mask is None else padded_ids[attention_mask[i].bool()]
            parts, begin = [], 0
            for place in [*(ids == PLACEHOLDER).nonzero().flatten().tolist(), len(ids)]:
                parts.append(self.model.embed_tokens(ids[begin:place]))
                begin = place + 1
                if place < len(ids):
                    parts.append(self.encode(next(videos)))
            rows.append(torch.cat(parts))
        embeds, mask = padded(rows, self.config.tokenizer_padding_side)
        mask = None if attention_mask is None else mask
        return None, None, mask, past_key_values, embeds, labels

    @torch.no_grad()
    def generate(self, inputs=None, images=None, attention_mask=None, modalities=("video",), **kw):
        if images is None:
            return super().generate(inputs, attention_mask=attention_mask, **kw)
        _, _, mask, _, embeds, _ = self.prepare_inputs_labels_for_multimodal(
            inputs, None, attention_mask, None, None, images, modalities
        )
        return super().generate(inputs_embeds=embeds, attention_mask=mask, **kw)


class VilaConfig(PreTrainedConfig):
    model_type = "llava_llama"
    llm_cfg: Any = None


class VilaModel(PreTrainedModel):
    """VILA and LongVILA: the language model is a part; frames and images end with a newline."""

    config_class = VilaConfig
    VIDEO, IMAGE = 90, 91

    def __init__(self, config: VilaConfig) -> None:
        super().__init__(config)
        self.llm = Qwen2ForCausalLM(Qwen2Config(**TEXT))
        self.mm_projector = nn.Linear(8, 64)
        self.tokenizer = SimpleNamespace(
            media_token_ids={"image": self.IMAGE, "video": self.VIDEO}, padding_side="left"
        )

    def encode(self, item: Tensor) -> Tensor:
        frames = self.mm_projector(item if item.ndim == 4 else item[None]).flatten(1, 2)
        newline = self.llm.model.embed_tokens(torch.tensor([11]))
        return torch.cat((frames, newline.expand(len(frames), 1, -1)), 1).flatten(0, 1)

    def _embed(self, input_ids, media, media_config, labels, attention_mask):
        queues = {name: deque(map(self.encode, items)) for name, items in media.items()}
        names = {token: name for name, token in self.tokenizer.media_token_ids.items()}
        rows = []
        for ids, mask in zip(input_ids, attention_mask, strict=True):
            parts = []
            for token in ids[mask].tolist():
                if token in names:
                    parts.append(queues[names[token]].popleft())
                else:
                    parts.append(self.llm.model.embed_tokens(torch.tensor([token])))
            rows.append(torch.cat(parts))
        embeds, mask = padded(rows, self.tokenizer.padding_side)
        return embeds, labels, mask

    @torch.no_grad()
    def generate(self, input_ids, media, attention_mask, **options):
        embeds, _, mask = self._embed(input_ids, media, {}, None, attention_mask)
        return self.llm.generate(inputs_embeds=embeds, attention_mask=mask, **options)


class FlashConfig(LlavaQwenConfig):
    model_type = "videochat_flash_qwen"
    mm_newline_position: str = "no_token"
    mm_llm_compress: bool = True
    llm_compress_layer_list: Any = (1,)


class FlashModel(Qwen2Model):
    """Drops every other token of the middle of a prompt before the layers of the list."""

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        use_cache=None,
        cache=None,
        **kwargs,
    ):
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        # transformers 5.24 renamed the argument, here and in what this class calls.
        past = {"past_key_values": past_key_values} if cache is None else {"cache": cache}
        (held,) = past.values()
        offset = held.get_seq_length()
        position_ids = torch.arange(offset, offset + hidden.shape[1])[None]
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=hidden,
            attention_mask=None,
            position_ids=position_ids,
            **past,
        )
        for number, layer in enumerate(self.layers):
            layers = self.config.llm_compress_layer_list if self.config.mm_llm_compress else ()
            if number in layers and hidden.shape[1] > 4:
                keep = torch.ones(hidden.shape[1], dtype=torch.bool)
                keep[4:-4:2] = False
                hidden, position_ids = hidden[:, keep], position_ids[:, keep]
            hidden = layer(
                hidden,
                attention_mask=mask,
                position_ids=position_ids,
                use_cache=use_cache,
                position_embeddings=self.rotary_emb(hidden, position_ids),
                **past,
                **kwargs,
            )
        return BaseModelOutputWithPast(self.norm(hidden), held)


class FlashForCausalLM(LlavaQwenForCausalLM):
    """VideoChat-Flash."""

    config_class = FlashConfig

    def __init__(self, config: FlashConfig) -> None:
        super().__init__(config)
        self.model = FlashModel(config)
        self.post_init()
