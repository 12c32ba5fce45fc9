"""Dense attention as a plan: every key, or every key up to the query."""

from __future__ import annotations

import torch

from permattn.core import AttnPart, AttnPlan, BlockIndex, Permutation, TokenBand
from permattn.core.plan import ceil_div


def plan_dense(
    num_q_tokens: int,
    num_kv_tokens: int,
    *,
    causal: bool,
    lower_right: bool = False,
    block_q: int = 128,
    block_kv: int = 128,
    device: torch.device | str | None = None,
) -> AttnPlan:
    """The plan that keeps everything.

    Source: torch's `scaled_dot_product_attention` (upper-left causality).

    Args:
        num_q_tokens, num_kv_tokens: Sq and Skv.
        causal: query i sees keys 0..i.
        lower_right: query i sees keys 0..i + Skv - Sq instead (chunked prefill).
        block_q, block_kv: pattern blocks.

    Returns: a plan of one part, shared by every batch row and head.
    """
    if num_q_tokens < 0 or num_kv_tokens < 0:
        raise ValueError(f"plan_dense: lengths must be >= 0, got {num_q_tokens}, {num_kv_tokens}")
    shift = num_kv_tokens - num_q_tokens if lower_right else 0
    num_q_blocks = ceil_div(num_q_tokens, block_q)
    num_kv_blocks = ceil_div(num_kv_tokens, block_kv)
    # Sizes alone decide, so the lists are made on the host: no device ever waits for the capacity.
    row = torch.arange(num_q_blocks)
    if causal:
        first = row * block_q + shift
        last = (first + block_q - 1).clamp_max(num_q_tokens - 1 + shift)
        stop = ((last + block_kv) // block_kv).clamp(0, num_kv_blocks)
        full = ((first + 1) // block_kv).clamp(0, num_kv_blocks)
    else:
        stop = full = torch.full_like(row, num_kv_blocks)
    zero = torch.zeros_like(row)
    starts = torch.stack((zero, full), -1)[None, None]
    stops = torch.stack((full, stop), -1)[None, None]
    index = BlockIndex.from_ranges(
        starts.to(device),
        stops.to(device),
        num_full_ranges=1,
        capacity=int(stop.sum()),
        block_q=block_q,
        block_kv=block_kv,
    )
    part = AttnPart(
        Permutation.identity(num_q_tokens, device),
        Permutation.identity(num_kv_tokens, device),
        index,
        TokenBand(min_lag=-shift if causal else None),
    )
    return AttnPlan((part,), validate=False)
