"""XAttention: key blocks chosen by sums along antidiagonals. See docs/patterns/xattention.md."""

from __future__ import annotations

import torch
from torch import Tensor

from permattn.core import AttnPlan, BlockIndex
from permattn.core.plan import ceil_div
from permattn.core.selection import causal_blocks, plan_causal_blocks, row_chunks, strongest_of


def plan_xattention(
    q: Tensor, k: Tensor, *, stride: int = 8, threshold: float = 0.9, block: int = 128
) -> AttnPlan:
    """The fewest key blocks whose antidiagonal scores hold a share of every query block's mass.

    Source: XAttention (arXiv 2503.16428), Algorithm 1. Deviations: query blocks stand at multiples
    of `block` by position, whatever the offset; GQA, batches and any length.

    Args:
        q: [B, Hq, Sq, D] after RoPE: the last Sq of the Skv positions.
        k: [B, Hkv, Skv, D] after RoPE.
        stride: an antidiagonal of every stride x stride square is summed: 1 / stride of the work of
            all scores.
        threshold: share of the estimated mass of a query block that its key blocks hold. 1 keeps
            all of them.
        block: tokens per block, a multiple of the stride.

    Returns: a plan of one part on q's device, a list for every query head; causality is
    lower-right. Its static capacity is (Sq / block) x (Skv / block) entries a head.

    Raises:
        ValueError: sizes that disagree; names the argument.

    Invariants: a query block's own key block and the first one are always kept; nothing waits for
    the device.
    """
    q_perm, stop = causal_blocks(q, k, block)
    if isinstance(stride, bool) or not isinstance(stride, int) or stride < 1 or block % stride:
        raise ValueError(f"stride: wants an integer that divides block {block}, got {stride!r}")
    if not 0.0 < threshold <= 1.0:
        raise ValueError(f"threshold: wants a share in (0, 1], got {threshold}")
    num_kv_blocks = ceil_div(k.shape[2], block)
    if q.shape[1] == 0 or len(stop) == 0:
        kv = stop.new_empty(*q.shape[:2], len(stop), num_kv_blocks, dtype=torch.int32)
    else:
        with torch.no_grad():
            kv = _chosen(q.detach(), k.detach(), stop, stride, threshold, block)
    # A row ascends and its own block comes last, so full blocks do come first.
    used = kv >= 0
    full = used & (kv < stop[:, None] - 1)
    index = BlockIndex.from_padded(kv, used.sum(-1), full.sum(-1), block, block)
    return plan_causal_blocks(q_perm, k.shape[2], index)


def _chosen(
    q: Tensor, k: Tensor, stop: Tensor, stride: int, threshold: float, block: int
) -> Tensor:
    """int32 [B, Hq, nQ, nK]: chosen key blocks, ascending, -1 past them."""
    batch, hq, num_q, _ = q.shape
    hkv, num_kv = k.shape[1:3]
    num_blocks = ceil_div(num_kv, block)
    offset = num_kv - num_q
    first = offset // block
    per_block = block // stride
    keys = _groups(k, 0, ceil_div(num_kv, stride), stride, reverse=False)
    kv = torch.empty(batch, hq, len(stop), num_blocks, dtype=torch.int32, device=q.device)
    column = torch.arange(num_blocks, device=q.device)
    # A GPU would wait for launches between small chunks.
    room = 8 if q.is_cuda else 1
    for i, end in row_chunks(batch * hq * keys.shape[2] * per_block, len(stop), room):
        # Positions of this chunk's groups; those before the first query or past the last are 0.
        start = (first + i) * block - offset
        rows = _groups(q, start, (end - i) * per_block, stride, reverse=True)
        keys_seen = min((first + end) * per_block, keys.shape[2])
        score = rows.unflatten(1, (hkv, hq // hkv)).flatten(2, 3) @ keys[:, :, :keys_seen].mT
        score = score.unflatten(2, (hq // hkv, -1)).flatten(1, 2).float()
        score *= q.shape[3] ** -0.5 / stride
        group = torch.arange((end - i) * per_block, device=q.device)
        place = group + (first + i) * per_block
        key = torch.arange(keys_seen, device=q.device)
        mass = score.masked_fill_(key > place[:, None], float("-inf")).softmax(-1)
        there = ((group + 1) * stride + start > 0) & (group * stride + start < num_q)
        mass = torch.where(there[:, None], mass, 0.0)
        whole = ceil_div(keys_seen, per_block)
        mass = torch.nn.functional.pad(mass, (0, whole * per_block - keys_seen))
        share = mass.unflatten(3, (whole, per_block)).unflatten(2, (-1, per_block)).sum((3, 5))
        share = torch.nn.functional.pad(share, (0, num_blocks - whole))
        limit = stop[i:end]
        forced = (column == 0) | (column == limit[:, None] - 1)
        kv[:, :, i:end] = strongest_of(
            share.log(), limit[None, None], num_blocks, threshold, num_blocks, forced
        )
    return kv


def _groups(x: Tensor, start: int, count: int, stride: int, *, reverse: bool) -> Tensor:
    """[B, H, count, stride * D]: `stride` tokens side by side, from token `start`; 0 outside x."""
    size = x.shape[2]
    low, high = max(start, 0), min(start + count * stride, size)
    x = x[:, :, low:high]
    if high - low < count * stride:
        x = torch.nn.functional.pad(x, (0, 0, low - start, start + count * stride - high))
    x = x.unflatten(2, (count, stride))
    return (x.flip(3) if reverse else x).flatten(3)
