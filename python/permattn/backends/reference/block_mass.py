"""Block masses in plain torch: one (batch row, head) and a few query blocks at a time."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from permattn.core.block_mass import BlockMassArgs, Blocks, empty_blocks

# Entries of one chunk of scores: on a CPU several passes read them, so they stay in its caches.
_CHUNK = {"cpu": 1 << 20}
_CHUNK_ELSEWHERE = 1 << 24


def block_mass(args: BlockMassArgs) -> Blocks:
    """See `BlockMassBackend.block_mass`. float32 inside, float64 for float64 inputs."""
    q, k = args.q, args.k
    batch, heads = q.shape[:2]
    found = empty_blocks(q, args.q_blocks.shape[0], args.num_kv_blocks, args.eps)
    if not found[0].numel():
        return found
    if q.shape[2] == 0 or k.shape[2] == 0:
        # Every slot is a hole.
        for x in found:
            x.zero_()
        return found
    slot = args.q_blocks[:, None] * args.block_q + _arange(args.block_q, q)
    group = heads // k.shape[1]
    for b in range(batch):
        for h in range(heads):
            token = _pick(args.token_of_q_slot, b, h)
            rows = _query_rows(args, q[b, h], args.lse[b, h], _tokens_at(token, slot))
            columns = _key_columns(args, k[b, h // group], _pick(args.token_of_kv_slot, b, h))
            sums, maxima, small = (x[b, h] if x.dim() > 1 else x for x in found)
            _measure(args, rows, columns, (sums, maxima, small))
    return found


def _measure(args: BlockMassArgs, rows: Tensor, columns: Tensor, found: Blocks) -> None:
    """Fills sums, maxima and small counts [n, nk] of one head.

    Args:
        rows: [n, block_q, D + 2], `_query_rows`.
        columns: [D + 2, nk * block_kv], `_key_columns`.
    """
    sums, maxima, small = found
    block_q, block_kv = args.block_q, args.block_kv
    size = _CHUNK.get(rows.device.type, _CHUNK_ELSEWHERE)
    step = max(1, size // max(1, block_q * columns.shape[1]))
    seen = (rows[..., -2] > -math.inf).sum(1)[:, None] * (
        (columns[-1] == 0).view(-1, block_kv).sum(1)
    )
    for first in range(0, rows.shape[0], step):
        here = slice(first, first + step)
        p = (rows[here].flatten(0, 1) @ columns).exp2_().view(-1, block_q, columns.shape[1])
        sums[here] = p.sum(1).unflatten(-1, (-1, block_kv)).sum(-1)
        if args.eps is None:
            continue
        maxima[here] = p.amax(1).unflatten(-1, (-1, block_kv)).amax(-1)
        below = (p < args.eps).sum(1, dtype=torch.int32).unflatten(-1, (-1, block_kv)).sum(-1)
        # Pairs with a hole have p = 0 and were counted.
        small[here] = (below - (block_q * block_kv - seen[here])).float()


def _query_rows(args: BlockMassArgs, q: Tensor, lse: Tensor, token: Tensor) -> Tensor:
    """[n, block_q, D + 2]: scaled rows, -lse and 1, so that one product gives score - lse.

    Everything is in units of log 2. A row that is a hole, or sees nothing, has -inf there.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    at = token.clamp_min(0).long()
    known = (token >= 0) & (lse[at] > -math.inf)
    rows = q.new_empty(*token.shape, q.shape[-1] + 2, dtype=dtype)
    rows[..., :-2] = (q[at].to(dtype) * (args.scale * math.log2(math.e))).where(known[..., None], 0)
    rows[..., -2] = (lse[at].to(dtype) * -math.log2(math.e)).where(known, -math.inf)
    rows[..., -1] = 1.0
    return rows


def _key_columns(args: BlockMassArgs, k: Tensor, token: Tensor) -> Tensor:
    """[D + 2, nk * block_kv]: keys, 1, and 0 or (a hole) -inf, as columns."""
    dtype = torch.promote_types(k.dtype, torch.float32)
    slot = _arange(args.num_kv_blocks * args.block_kv, k)
    token = _tokens_at(token, slot)
    known = token >= 0
    columns = k.new_empty(token.shape[0], k.shape[-1] + 2, dtype=dtype)
    columns[:, :-2] = k[token.clamp_min(0).long()].to(dtype).where(known[:, None], 0)
    columns[:, -2] = 1.0
    columns[:, -1] = torch.where(known, 0.0, -math.inf)
    return columns.T


def _tokens_at(token: Tensor, slot: Tensor) -> Tensor:
    """The tokens at slots; -1 past the last slot."""
    last = token.shape[0] - 1
    return torch.where(slot <= last, token[slot.clamp_max(last)], -1)


def _pick(token: Tensor, b: int, h: int) -> Tensor:
    return token[min(b, token.shape[0] - 1), min(h, token.shape[1] - 1)]


def _arange(count: int, x: Tensor) -> Tensor:
    return torch.arange(count, dtype=torch.int32, device=x.device)
