"""What a plan is checked against: names and sizes of a transformer, and what it holds."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from permattn.models.diffusion.families import family_of
from permattn.models.diffusion.pipes import transformer_of
from permattn.patterns.paro import TextPlace

_SAMPLES = 16
# Copies of other weights that `fuse_qkv_projections` adds.
_FUSED = ("to_qkv.", "to_kv.", "to_added_qkv.", "to_added_kv.")


@dataclass(frozen=True)
class ModelFacts:
    """A transformer, as plans know it.

    Args:
        model_class: its class name.
        num_layers, num_heads, head_dim: of self-attention.
        text: where text stands in self-attention.
        scheduler: class name of the pipeline's; "" without a pipeline.
        num_steps: of the scheduler's last `set_timesteps`; None before it.
        fingerprint: of the weights; "" where they are not plain tensors in memory.
    """

    model_class: str
    num_layers: int
    num_heads: int
    head_dim: int
    text: TextPlace
    scheduler: str
    num_steps: int | None
    fingerprint: str


def describe(pipe_or_transformer: Any, *, component: str = "transformer") -> ModelFacts:
    """The facts of a pipeline's transformer.

    Args:
        pipe_or_transformer: a diffusers pipeline or one of its transformers.
        component: which transformer of a pipeline with several (Wan 2.2: "transformer_2").

    Raises:
        TypeError: something else than a pipeline or a transformer.
        ValueError: an unsupported transformer.
    """
    model, scheduler = transformer_of(pipe_or_transformer, component)
    family = family_of(model)
    config: Any = model.config
    return ModelFacts(
        model_class=type(model).__name__,
        num_layers=len(family.attention_modules(model)),
        num_heads=int(config.num_attention_heads),
        head_dim=int(config.attention_head_dim),
        text=family.text,
        scheduler="" if scheduler is None else type(scheduler).__name__,
        num_steps=getattr(scheduler, "num_inference_steps", None),
        fingerprint=fingerprint_of(model),
    )


def fingerprint_of(model: nn.Module) -> str:
    """A name for the weights: the same for the same weights, another one after fine-tuning.

    A few values of every parameter, so that it costs no pass over a large model. Weights in
    another dtype are other weights; fused copies of projections do not count.
    """
    digest = hashlib.sha256()
    samples: dict[torch.device, list[Tensor]] = {}
    for name, parameter in sorted(model.named_parameters()):
        if any(part in name for part in _FUSED):
            continue
        if parameter.is_meta or type(parameter.detach()) is not Tensor:
            # Elsewhere, packed, or sharded.
            return ""
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        samples.setdefault(parameter.device, []).append(_some(parameter.detach()))
    for device in sorted(samples, key=str):
        # One copy from a device, not one for every parameter.
        digest.update(torch.cat(samples[device]).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _some(x: Tensor) -> Tensor:
    """Up to _SAMPLES values from all over a tensor."""
    flat = x.reshape(-1)
    return flat[:: max(1, flat.numel() // _SAMPLES)][:_SAMPLES].float()
