"""Choosing key blocks by score: pooled means, the strongest blocks of a row, lists out of them.

Nothing here waits for the device, and no score matrix of all query blocks by all key blocks exists.
"""

from __future__ import annotations

import torch
from torch import Tensor

from permattn.core.block_index import BlockIndex
from permattn.core.list_kernels import kernels_for
from permattn.core.permutation import Permutation
from permattn.core.plan import AttnPart, AttnPlan, TokenBand, ceil_div

# Scores of that many bytes are looked at together: at 1M tokens in blocks of 64, all scores of 28
# heads would take 30 GB.
_CHUNK_BYTES = 64 << 20
_LOW_32 = (1 << 32) - 1
_PARTIAL = 1 << 30


def pooled_blocks(x: Tensor, block: int, token_of_slot: Tensor | None = None) -> Tensor:
    """Mean of the rows of every block of slots.

    Args:
        x: [B, H, S, D], floating.
        block: slots per block.
        token_of_slot: int32 [Bx, Hx, num_slots], -1 = hole; None = slots in token order.

    Returns: float32 [B, H, ceil(num_slots / block), D]. Holes take no part; an empty block is 0.

    Raises:
        ValueError: x without 4 axes, a block below 1.
    """
    if x.dim() != 4 or block < 1:
        raise ValueError(
            f"pooled_blocks: wants x [B, H, S, D] and block >= 1, got {list(x.shape)}, {block}"
        )
    kernels = kernels_for(x)
    if kernels is not None and (means := kernels.pool(x, block, token_of_slot)) is not None:
        return means
    num_slots = x.shape[2] if token_of_slot is None else token_of_slot.shape[-1]
    num_blocks = ceil_div(num_slots, block)
    out = x.new_empty((*x.shape[:2], num_blocks, x.shape[3]), dtype=torch.float32)
    bytes_per_block = 4 * x.shape[0] * x.shape[1] * block * x.shape[3]
    step = max(1, _CHUNK_BYTES // max(bytes_per_block, 1))
    for i in range(0, num_blocks, step):
        stop = min(i + step, num_blocks)
        first, last = i * block, min(stop * block, num_slots)
        pad = stop * block - last
        if token_of_slot is None:
            rows = torch.nn.functional.pad(x[:, :, first:last].float(), (0, 0, 0, pad))
            sums = rows.unflatten(2, (stop - i, block)).sum(3)
            count = torch.full((stop - i, 1), block, device=x.device)
            if pad:
                count[-1] = block - pad
        else:
            token = token_of_slot[..., first:last].expand(*x.shape[:2], -1)
            token = torch.nn.functional.pad(token, (0, pad), value=-1)
            there = (token >= 0)[..., None]
            place = token.clamp_min(0).long()[..., None].expand(*token.shape, x.shape[3])
            rows = torch.where(there, x.gather(2, place).float(), 0.0)
            sums = rows.unflatten(2, (stop - i, block)).sum(3)
            count = there.unflatten(2, (stop - i, block)).sum(3).clamp_min(1)
        out[:, :, i:stop] = sums / count
    return out


def strongest_blocks(
    q_blocks: Tensor,
    k_blocks: Tensor,
    *,
    allowed_stop: Tensor,
    budget: Tensor | int,
    coverage: float | Tensor | None,
    max_blocks: int,
    scale: float,
    allowed_start: Tensor | None = None,
) -> Tensor:
    """The key blocks of highest pooled score of every query block.

    Source: MInference (arXiv 2407.02490), Algorithm 3. Deviation: a coverage may end a row before
    its budget does.

    Args:
        q_blocks, k_blocks: float32 [B, Hq, nQ, D] and [B, Hkv, nK, D], see `pooled_blocks`.
        allowed_stop: int64 [nQ] or [B, 1 or Hq, nQ]: row i may pick the key blocks
            [0, allowed_stop[i]).
        budget: at most that many blocks a row; an int, or an integer tensor [Hq].
        coverage: keep the fewest blocks that hold this share of softmax(score) over the allowed
            blocks, within the budget; a number, a tensor [Hq], or None. 1 = the budget alone.
        max_blocks: columns of the result, a bound on every budget known to the host.
        scale: multiplies the scores.
        allowed_start: int64 [B], the first block of every batch row that holds keys; None = 0.

    Returns: int32 [B, Hq, nQ, max_blocks], ascending, -1 past the chosen ones. Of equal scores the
    lower block wins.
    """
    batch, hq, num_rows = q_blocks.shape[:3]
    hkv, num_kv = k_blocks.shape[1:3]
    if hkv == 0 or hq % hkv or q_blocks.shape[3] != k_blocks.shape[3]:
        raise ValueError(
            "strongest_blocks: Hq % Hkv must be 0 and D equal, got q_blocks "
            f"{list(q_blocks.shape)}, k_blocks {list(k_blocks.shape)}"
        )
    if max_blocks < 0:
        raise ValueError(f"max_blocks: wants >= 0, got {max_blocks}")
    stop = allowed_stop if allowed_stop.dim() == 3 else allowed_stop[None, None]
    out = q_blocks.new_full((batch, hq, num_rows, max_blocks), -1, dtype=torch.int32)
    if max_blocks == 0 or num_kv == 0:
        return out
    keys, kernels = k_blocks.mT * scale, kernels_for(q_blocks)
    for i, end in row_chunks(batch * hq * num_kv, num_rows):
        if kernels is not None:
            score = kernels.scores(q_blocks[:, :, i:end], k_blocks, scale)
        else:
            # The query heads of one key head lie side by side: no key block is repeated for them.
            rows = q_blocks[:, :, i:end].unflatten(1, (hkv, hq // hkv)).flatten(2, 3)
            score = (rows @ keys).unflatten(2, (hq // hkv, end - i)).flatten(1, 2)
        if allowed_start is not None:
            before = torch.arange(num_kv, device=score.device) < allowed_start[:, None, None, None]
            score = score.masked_fill(before, float("-inf"))
        out[:, :, i:end] = strongest_of(score, stop[..., i:end], budget, coverage, max_blocks)
    return out


def row_chunks(scores_per_row: int, num_rows: int, chunks: int = 1) -> list[tuple[int, int]]:
    """Ranges of rows whose float32 scores fit a chunk, or a few chunks' room."""
    step = max(1, chunks * _CHUNK_BYTES // (4 * max(scores_per_row, 1)))
    return [(i, min(i + step, num_rows)) for i in range(0, num_rows, step)]


def strongest_of(
    score: Tensor,
    allowed_stop: Tensor,
    budget: Tensor | int,
    coverage: float | Tensor | None,
    max_blocks: int,
    forced: Tensor | None = None,
) -> Tensor:
    """`strongest_blocks` for given scores.

    Args:
        score: float32 [B, Hq, n, nK], natural logarithms of a weight.
        allowed_stop, budget, coverage, max_blocks: see `strongest_blocks`.
        forced: bool, broadcast to score's shape: allowed blocks that come first, whatever their
            score. What they hold counts towards the coverage.

    Returns: int32 [B, Hq, n, max_blocks].
    """
    kernels = kernels_for(score) if coverage is None and forced is None else None
    if kernels is not None:
        return kernels.strongest(score, allowed_stop, budget, max_blocks)
    num_kv = score.shape[-1]
    column = torch.arange(num_kv, device=score.device)
    score = score.masked_fill(column >= allowed_stop[..., None], float("-inf"))
    first = score if forced is None else score.masked_fill(forced, float("inf"))
    ranked = _ordered_key(first).topk(min(max_blocks, num_kv), dim=-1).values
    block = _LOW_32 - (ranked & _LOW_32)
    keep = (block < allowed_stop[..., None]) & (first.gather(-1, block) > float("-inf"))
    if not (isinstance(budget, int) and budget >= max_blocks):
        rank = torch.arange(block.shape[-1], device=score.device)
        keep &= rank < _per_head(budget)
    if coverage is not None:
        share = (score.gather(-1, block) - score.logsumexp(-1, keepdim=True)).exp()
        before = torch.nn.functional.pad(share[..., :-1].cumsum(-1), (1, 0))
        want = _per_head(coverage)
        # A share of 1 means all of them, however the sum is rounded.
        chosen = (before < want) | (want >= 1.0)
        if forced is not None:
            chosen |= forced.expand(score.shape).gather(-1, block)
        keep &= chosen
    block = torch.where(keep, block, num_kv).sort(-1).values
    block = torch.where(block < num_kv, block, -1).to(torch.int32)
    return torch.nn.functional.pad(block, (0, max_blocks - block.shape[-1]), value=-1)


def list_blocks(kv_blocks: Tensor, full: Tensor | None, block_q: int, block_kv: int) -> BlockIndex:
    """Rows of key blocks as an index: full blocks first, then partial ones, each ascending.

    Args:
        kv_blocks: integer [Bx, Hx, nQ, n]; -1 = unused, wherever it stands; no repeats in a row.
        full: bool of the same shape: entries that are full blocks; None = all partial.
        block_q, block_kv: slots per block.

    Returns: an index of capacity nQ * n.
    """
    used = kv_blocks >= 0
    is_full = torch.zeros_like(used) if full is None else used & full
    key = torch.where(is_full, kv_blocks, kv_blocks + _PARTIAL)
    key = torch.where(used, key, 2 * _PARTIAL - 1).to(torch.int32).sort(-1).values
    return BlockIndex.from_padded(
        key & (_PARTIAL - 1), used.sum(-1), is_full.sum(-1), block_q, block_kv
    )


def causal_blocks(q: Tensor, k: Tensor, block: int) -> tuple[Permutation, Tensor]:
    """Query blocks that start at multiples of `block` by position, as key blocks do.

    Args:
        q, k: [B, Hq, Sq, D] and [B, Hkv, Skv, D]; the queries are the last Sq of Skv positions.
        block: tokens per block.

    Returns: (queries, holes before the first where it does not start a block; int64 [nQ]: how many
    key blocks each query block may see, the last of them its own).

    Raises:
        ValueError: sizes that disagree; names the argument.
    """
    if q.dim() != 4 or k.dim() != 4 or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(
            "q, k: want [B, Hq, Sq, D] and [B, Hkv, Skv, D], got "
            f"{list(q.shape)} and {list(k.shape)}"
        )
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"k: Hq % Hkv must be 0, got Hq = {q.shape[1]}, Hkv = {k.shape[1]}")
    offset = k.shape[2] - q.shape[2]
    if offset < 0:
        raise ValueError(f"q: wants at most as many rows as keys ({k.shape[2]}), got {q.shape[2]}")
    if isinstance(block, bool) or not isinstance(block, int) or block < 1:
        raise ValueError(f"block: wants an integer >= 1, got {block!r}")
    pad = offset % block if q.shape[2] else 0
    perm = Permutation.identity(q.shape[2], q.device)
    if pad:
        token = torch.nn.functional.pad(perm.token_of_slot, (pad, 0), value=-1)
        perm = Permutation(token, perm.slot_of_token + pad)
    num_blocks = ceil_div(perm.num_slots, block)
    return perm, torch.arange(num_blocks, device=q.device) + (offset // block + 1)


def plan_causal_blocks(q_perm: Permutation, num_kv_tokens: int, index: BlockIndex) -> AttnPlan:
    """The lower-right causal plan of blocks from `causal_blocks`: one part, keys in token order."""
    kv_perm = Permutation.identity(num_kv_tokens, q_perm.token_of_slot.device)
    band = TokenBand(min_lag=q_perm.num_tokens - num_kv_tokens)
    return AttnPlan((AttnPart(q_perm, kv_perm, index, band),), validate=False)


def _ordered_key(score: Tensor) -> Tensor:
    """int64 of score's shape, all different in a row: first by score, then by lower index."""
    # Adding 0 turns -0 into 0. The bits of a negative float order it the wrong way round.
    bits = (score + 0.0).view(torch.int32)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    index = torch.arange(score.shape[-1], device=score.device)
    return (bits.long() << 32) | (_LOW_32 - index)


def _per_head(value: Tensor | float) -> Tensor | float:
    """A number, or a tensor [Hq] as [Hq, 1, 1]."""
    return value[:, None, None] if isinstance(value, Tensor) else value
