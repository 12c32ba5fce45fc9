"""What permattn is measured against: dense torch, and FlexAttention with the same blocks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from permattn.core import AttnPlan, BlockIndex
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

Call = Callable[[], Tensor]


def sdpa(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Call:
    """`F.scaled_dot_product_attention`, dense: what everybody has."""
    grouped = q.shape[1] != k.shape[1]

    def call() -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=causal, enable_gqa=grouped
        )

    return call


def flex(q: Tensor, k: Tensor, v: Tensor, plan: AttnPlan) -> Call:
    """Compiled FlexAttention with the block mask of a one-part plan in token order.

    Raises:
        NotImplementedError: a plan that FlexAttention's block mask cannot say.
    """
    mask = block_mask(plan)
    compiled = torch.compile(flex_attention, dynamic=False)
    grouped = q.shape[1] != k.shape[1]

    @torch.no_grad()
    def call() -> Tensor:
        return compiled(q, k, v, block_mask=mask, enable_gqa=grouped)

    return call


def block_mask(plan: AttnPlan) -> BlockMask:
    """The same full and partial blocks as FlexAttention's lists; the band as its mask_mod."""
    part = plan.parts[0]
    simple = part.q_perm.is_identity and part.kv_perm.is_identity
    if len(plan.parts) != 1 or not simple:
        raise NotImplementedError("FlexAttention has no permuted keys and no second part")
    count, padded = _padded(part.index, plan.num_kv_tokens)
    num_full = part.index.kv_num_full
    column = torch.arange(padded.shape[-1], device=padded.device)
    # Full entries stand first in our rows: the partial ones are the row moved left by their number.
    shifted = (column + num_full[..., None]).clamp_max(padded.shape[-1] - 1)
    partial = padded.gather(-1, shifted.long())
    low, high = part.band.min_lag, part.band.max_lag

    def band(b: Tensor, h: Tensor, q_token: Tensor, kv_token: Tensor) -> Tensor:
        seen = kv_token >= 0
        if low is not None:
            seen = seen & (q_token - kv_token >= low)
        if high is not None:
            seen = seen & (q_token - kv_token < high)
        return seen

    has_band = low is not None or high is not None
    return BlockMask.from_kv_blocks(
        (count - num_full).int(),
        partial.int(),
        num_full.int(),
        padded.int(),
        BLOCK_SIZE=(part.index.block_q, part.index.block_kv),
        mask_mod=band if has_band else None,
        seq_lengths=(plan.num_q_tokens, plan.num_kv_tokens),
    )


def _padded(index: BlockIndex, num_kv_tokens: int) -> tuple[Tensor, Tensor]:
    """Compressed rows as (counts [Bx, Hx, nQ], padded [Bx, Hx, nQ, nKV]), order kept."""
    count = index.row_offsets[..., 1:] - index.row_offsets[..., :-1]
    width = -(-num_kv_tokens // index.block_kv)
    place = index.row_offsets[..., :-1, None] + torch.arange(width, device=count.device)
    place = place.clamp_max(max(index.capacity - 1, 0)).long()
    rows = index.kv_indices[:, :, None].expand(*count.shape, -1)
    return count, rows.gather(-1, place)
