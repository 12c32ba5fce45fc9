"""How far a sparse run's video is from the dense run's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from permattn.cli.errors import UserError


@dataclass(frozen=True)
class Quality:
    """Closeness of two videos.

    Args:
        psnr: of the frames, in dB, peak 1; None = no difference at all.
        ssim: structural similarity, mean over frames.
        cosine: of the final latents.
    """

    psnr: float | None
    ssim: float
    cosine: float


def compare(
    frames: Tensor, latents: Tensor, dense_frames: Tensor, dense_latents: Tensor
) -> Quality:
    """Quality of a run against the dense one.

    Args:
        frames, dense_frames: float32 [F, H, W, 3] in [0, 1].
        latents, dense_latents: alike shapes.
    """
    try:
        from skimage.metrics import structural_similarity
    except ImportError as e:
        raise UserError("SSIM needs scikit-image: pip install 'permattn[cli]'") from e
    error = float((frames - dense_frames).double().square().mean())
    ssim = [
        structural_similarity(a.numpy(), b.numpy(), channel_axis=2, data_range=1.0)
        for a, b in zip(frames, dense_frames, strict=True)
    ]
    cosine = torch.nn.functional.cosine_similarity(
        latents.double().flatten(), dense_latents.double().flatten(), dim=0
    )
    psnr = None if error == 0.0 else -10 * float(torch.tensor(error).log10())
    return Quality(psnr, sum(map(float, ssim)) / len(ssim), float(cosine))
