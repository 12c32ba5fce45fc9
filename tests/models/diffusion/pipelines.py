"""Real diffusers pipelines around tiny transformers; prompts come as embeddings."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers import CogVideoXDDIMScheduler, UniPCMultistepScheduler
from torch import Tensor

from .tiny import NUM_TEXT, Case


def _embedding(seed: int) -> Tensor:
    return torch.randn(1, NUM_TEXT, 16, generator=torch.Generator().manual_seed(seed))


def wan_pipeline(case: Case, second: Any = None, **config: Any) -> Any:
    """Wan's pipeline without VAE and text encoder."""
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    return diffusers.WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        scheduler=scheduler,
        transformer=case.model,
        transformer_2=second,
        **config,
    )


def cogvideox_pipeline(case: Case) -> Any:
    """CogVideoX's, likewise; its CFG runs as one batch."""
    return diffusers.CogVideoXPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        transformer=case.model,
        scheduler=CogVideoXDDIMScheduler(),
    )


def run(pipe: Any, steps: int = 4, **changed: Any) -> Tensor:
    """Latents of one video: 13 frames of 64 x 96, with guidance."""
    pipe.set_progress_bar_config(disable=True)
    arguments: dict[str, Any] = {
        "prompt": None,
        "prompt_embeds": _embedding(0),
        "negative_prompt_embeds": _embedding(1),
        "height": 64,
        "width": 96,
        "num_frames": 13,
        "num_inference_steps": steps,
        "guidance_scale": 3.0,
        "output_type": "latent",
        "generator": torch.Generator().manual_seed(0),
        "return_dict": False,
    }
    return pipe(**(arguments | changed))[0]
