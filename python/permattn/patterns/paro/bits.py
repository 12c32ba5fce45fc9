"""Block masks as packed bits, one bit a block; rows of a head run on without padding."""

from __future__ import annotations

import torch
from torch import Tensor


def pack_bits(mask: Tensor) -> Tensor:
    """bool [..., nq, nk] as uint8 [..., ceil(nq * nk / 8)]; the first block is the lowest bit."""
    flat = mask.flatten(-2)
    flat = torch.nn.functional.pad(flat, (0, -flat.shape[-1] % 8)).unflatten(-1, (-1, 8))
    weight = torch.tensor([1 << i for i in range(8)], dtype=torch.uint8, device=mask.device)
    return (flat * weight).sum(-1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, num_q_blocks: int, num_kv_blocks: int) -> Tensor:
    """The inverse of pack_bits: bool [..., nq, nk], on the device of `packed`.

    Raises:
        ValueError: packed has another number of bytes.
    """
    size = num_q_blocks * num_kv_blocks
    if packed.dtype != torch.uint8 or packed.shape[-1] != -(-size // 8):
        raise ValueError(
            f"packed: wants uint8 [..., {-(-size // 8)}] for {num_q_blocks} x {num_kv_blocks} "
            f"blocks, got {packed.dtype} {list(packed.shape)}"
        )
    shift = torch.arange(8, dtype=torch.uint8, device=packed.device)
    bits = (packed[..., None] >> shift & 1).flatten(-2)[..., :size]
    return bits.bool().unflatten(-1, (num_q_blocks, num_kv_blocks))
