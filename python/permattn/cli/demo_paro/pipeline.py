"""The constructed model inside a diffusers pipeline, with a scheduler and a noised video to start
from. Nothing is downloaded."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from permattn.cli.demo_paro.constructed import PATCH, TEXT_DIM, Sizes, build
from permattn.cli.demo_paro.latents import PIXELS, encode, film
from permattn.cli.errors import UserError

NOTE = (
    "Constructed weights, not trained: every head averages around its own place by construction, "
    "and the model denoises; the prompt has no say."
)
GRID = (13, 19, 33)
# Where denoising starts: this share of all noise levels is left out.
_SKIPPED = 0.35
_TEXT_TOKENS = 16
# The photograph that the output weights are fitted on; other ones are denoised.
_FIT_PHOTO = 1
# Tokens of a side of the video that weights are fitted on.
_FIT_SIDE = 16


@dataclass(frozen=True, eq=False)
class ConstructedWan:
    """A pipeline that needs neither text encoder nor VAE, and what to call it with.

    Args:
        pipe: a diffusers `WanVideoToVideoPipeline` around a constructed `WanTransformer3DModel`.
        grid: (frames, height, width) in tokens.
        steps: denoising steps of a run.
        note: says that the weights are constructed, and how.
    """

    pipe: Any
    grid: tuple[int, int, int]
    steps: int
    note: str = NOTE

    @property
    def num_tokens(self) -> int:
        return math.prod(self.grid)

    def clean(self, photo: int = 0) -> Tensor:
        """float32 [1, 16, F, 2 H, 2 W]: latents of the video of one photograph."""
        frames, height, width = self.grid
        return encode(film(photo, frames, *self._pixels(height, width)))

    def call(self, photo: int = 0, seed: int = 0) -> dict[str, Any]:
        """Keywords for `pipe(**keywords)`: the video of one photograph, noised, to be denoised.

        The latents of the result are `pipe(**call).frames`.
        """
        _, height, width = self.grid
        generator = torch.Generator().manual_seed(seed)
        clean = self.clean(photo)
        noise = torch.randn(clean.shape, generator=generator)
        prompt = torch.randn(1, _TEXT_TOKENS, TEXT_DIM, generator=generator)
        skipped = max(1, round(self.steps * _SKIPPED / (1 - _SKIPPED)))
        total = self.steps + skipped
        self.pipe.scheduler.set_timesteps(total)
        level = float(self.pipe.scheduler.sigmas[skipped])
        height, width = self._pixels(height, width)
        return {
            "prompt_embeds": prompt.to(self.pipe.transformer.device),
            "latents": (1 - level) * clean + level * noise,
            "height": height,
            "width": width,
            "num_inference_steps": total,
            # The pipeline rounds down: half a step more keeps it from losing one.
            "strength": (self.steps + 0.5) / total,
            "guidance_scale": 1.0,
            "output_type": "latent",
        }

    @staticmethod
    def _pixels(height: int, width: int) -> tuple[int, int]:
        return height * PATCH[1] * PIXELS, width * PATCH[2] * PIXELS


def build_demo_pipeline(
    grid: tuple[int, int, int] = GRID,
    *,
    steps: int = 8,
    sizes: Sizes = Sizes(),
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
) -> ConstructedWan:
    """Builds the constructed Wan pipeline: the same weights for the same sizes.

    Calibration needs `made.pipe`, `[made.call(photo=2, seed=1)]` as prompts, and `made.steps`; the
    demo itself denoises photograph 0 with seed 0.

    Args:
        grid: (frames, height, width) in tokens; a token is 16 x 16 pixels of one frame.
        steps: denoising steps of a run.
        sizes: of the model.
        dtype, device: of the transformer.

    Raises:
        UserError: a library is missing; says which and how to install it.
    """
    try:
        from diffusers import UniPCMultistepScheduler, WanVideoToVideoPipeline
    except ImportError as e:
        raise UserError(
            f"a Wan transformer needs diffusers ({e}): pip install 'permattn[cli]'"
        ) from e
    frames, height, width = grid
    side = [min(size, _FIT_SIDE) for size in (height, width)]
    pixels = ConstructedWan._pixels(*side)
    model = build(encode(film(_FIT_PHOTO, min(frames, 9), *pixels)), sizes)
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=1.0,
        num_train_timesteps=1000,
    )
    pipe: Any = WanVideoToVideoPipeline(
        tokenizer=None,
        text_encoder=None,
        transformer=_cast(model, dtype).to(device),
        vae=None,
        scheduler=scheduler,
    )
    pipe.set_progress_bar_config(disable=True)
    return ConstructedWan(pipe, grid, steps)


def _cast(model: Any, dtype: torch.dtype) -> Any:
    """Parameters in `dtype`, but for those that the class keeps in float32, as from_pretrained."""
    for name, parameter in model.named_parameters():
        if not any(part in name for part in model._keep_in_fp32_modules):
            parameter.data = parameter.data.to(dtype)
    return model
