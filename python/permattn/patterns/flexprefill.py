"""FlexPrefill: lines or pooled blocks, chosen per head online. See docs/patterns/flexprefill.md."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from permattn.core import AttnPlan, BlockIndex
from permattn.core.plan import ceil_div
from permattn.core.selection import causal_blocks, plan_causal_blocks, pooled_blocks


def plan_flexprefill(
    q: Tensor,
    k: Tensor,
    *,
    gamma: float = 0.9,
    tau: float = 0.1,
    block: int = 128,
    min_budget: int = 1024,
) -> AttnPlan:
    """Query-aware blocks where pooled scores can be trusted, else columns and diagonals of blocks.

    Source: FlexPrefill (arXiv 2502.20766), Algorithms 1 to 4. Deviations: columns and diagonals are
    chosen in blocks, and a chosen group of diagonals lists both key blocks that it crosses; query
    blocks stand at multiples of `block` by position; GQA, batches and any length.

    Args:
        q: [B, Hq, Sq, D] after RoPE: the last Sq of the Skv positions.
        k: [B, Hkv, Skv, D] after RoPE.
        gamma: share of the mass that chosen blocks (or columns, or diagonals) hold. 1 keeps all.
        tau: a head whose pooled scores lie within this distance (square root of the Jensen-Shannon
            divergence) of the true ones, over the last `block` queries, is query-aware.
        block: tokens per block.
        min_budget: tokens of columns, and of diagonals, that every head keeps at least.

    Returns: a plan of one part on q's device, a list for every query head; causality is
    lower-right. Its static capacity is (Sq / block) x (Skv / block) entries a head.

    Raises:
        ValueError: sizes that disagree; names the argument.

    Invariants: a query block's own key block, the one before it and the first one are always kept;
    nothing waits for the device.
    """
    q_perm, stop = causal_blocks(q, k, block)
    if not 0.0 < gamma <= 1.0:
        raise ValueError(f"gamma: wants a share in (0, 1], got {gamma}")
    if not tau >= 0.0:
        raise ValueError(f"tau: wants a distance >= 0, got {tau}")
    if isinstance(min_budget, bool) or not isinstance(min_budget, int) or min_budget < 0:
        raise ValueError(f"min_budget: wants an integer >= 0, got {min_budget!r}")
    rule = _Rule(gamma, tau, block, ceil_div(min_budget, block))
    shape = (q.shape[0], len(stop), ceil_div(k.shape[2], block))
    heads = []
    with torch.no_grad():
        token = None if q_perm.is_identity else q_perm.token_of_slot
        q_blocks, k_blocks = pooled_blocks(q, block, token), pooled_blocks(k, block)
        # Head by head: the last rows' weights of one head take half a gigabyte at 1M tokens.
        for h in range(q.shape[1] if q.shape[2] else 0):
            g = h * k.shape[1] // q.shape[1]
            pooled = q_blocks[:, h], k_blocks[:, g]
            heads.append(_kept_blocks(q[:, h, -block:], k[:, g], *pooled, stop, rule))
    kept = stop.new_zeros(shape[0], q.shape[1], *shape[1:], dtype=torch.bool)
    kept = torch.stack(heads, 1) if heads else kept
    index = BlockIndex.from_block_mask(kept, block, block)
    # Blocks before a row's own are full, and they do come first.
    column = torch.arange(kept.shape[-1], device=kept.device)
    full = (kept & (column < stop[:, None] - 1)).sum(-1, dtype=torch.int32)
    return plan_causal_blocks(q_perm, k.shape[2], replace(index, kv_num_full=full))


@dataclass(frozen=True)
class _Rule:
    """`least`: blocks of columns, and groups of diagonals, that every head keeps."""

    gamma: float
    tau: float
    block: int
    least: int


def _kept_blocks(
    last: Tensor, keys: Tensor, q_blocks: Tensor, k_blocks: Tensor, stop: Tensor, rule: _Rule
) -> Tensor:
    """bool [B, nQ, nK] of one head.

    Args:
        last: [B, R, D], its last queries.
        keys: [B, Skv, D].
        q_blocks, k_blocks: float32 [B, nQ, D] and [B, nK, D], pooled.
        stop: int64 [nQ], see `causal_blocks`.
    """
    scale = keys.shape[-1] ** -0.5
    columns, diagonals = _line_mass(last, keys, rule.block)
    guess = (last.float().mean(1, keepdim=True) @ k_blocks.mT * scale).softmax(-1)[:, 0]
    aware = (_distance(guess, columns) < rule.tau)[:, None, None]
    lines = _on_lines(columns, diagonals, stop, rule.gamma, rule.least)
    allowed = torch.arange(k_blocks.shape[1], device=stop.device) < stop[:, None]
    score = (q_blocks @ k_blocks.mT * scale).masked_fill(~allowed, float("-inf")).softmax(-1)
    pooled = _fewest(score.flatten(1), rule.gamma, 0).unflatten(1, allowed.shape)
    pooled |= _on_lines(columns, diagonals, stop, 0.0, rule.least)
    return torch.where(aware, pooled, lines) & allowed


def _line_mass(last: Tensor, keys: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Mean mass of the last queries on every key block, and on every group of `block` lags.

    Returns: float32 [B, nK] twice; group g holds the lags [g * block, (g + 1) * block).
    """
    rows, num_kv = last.shape[1], keys.shape[1]
    score = (last @ keys.mT).float() * keys.shape[-1] ** -0.5
    row, key = (torch.arange(n, device=keys.device) for n in (rows, num_kv))
    p = score.masked_fill_(key > row[:, None] + (num_kv - rows), float("-inf")).softmax(-1)
    # Keys from last to first, and `rows` zeros: read with one column less a row, row r moves r to
    # the left of row 0, and equal lags stand in one column.
    flat = torch.nn.functional.pad(p.flip(-1), (0, rows)).flatten(1)
    width = num_kv + rows - 1
    lag = flat[:, rows - 1 : rows - 1 + rows * width].unflatten(1, (rows, width))[..., :num_kv]
    pad = (0, -num_kv % block)
    columns, diagonals = (torch.nn.functional.pad(x.mean(1), pad) for x in (p, lag))
    return columns.unflatten(1, (-1, block)).sum(-1), diagonals.unflatten(1, (-1, block)).sum(-1)


def _on_lines(columns: Tensor, diagonals: Tensor, stop: Tensor, gamma: float, least: int) -> Tensor:
    """bool [B, nQ, nK]: blocks on the strongest columns, or crossed by the strongest diagonals."""
    column, group = (_fewest(x, gamma, least) for x in (columns, diagonals))
    column[:, 0] = group[:, 0] = True
    # A diagonal with a lag in group g runs through the g-th key block before a row's own, and
    # through the one before that.
    crossed = group | torch.nn.functional.pad(group[:, :-1], (1, 0))
    before = stop[:, None] - 1 - torch.arange(columns.shape[1], device=stop.device)
    return column[:, None] | crossed[:, before.clamp_min(0)]


def _fewest(mass: Tensor, share: float, least: int) -> Tensor:
    """bool like mass [B, n]: the fewest entries that hold `share` of a row, at least `least`.

    Of equal entries the first one wins.
    """
    order = mass.sort(dim=-1, descending=True, stable=True)
    total = order.values.cumsum(-1, dtype=torch.float64)
    before = torch.nn.functional.pad(total[:, :-1], (1, 0))
    rank = torch.arange(mass.shape[1], device=mass.device)
    # A share of 1 means all of them, however the sum is rounded.
    keep = (before < share * total[:, -1:]) | (rank < least) | (share >= 1.0)
    return torch.zeros_like(keep).scatter_(-1, order.indices, keep)


def _distance(p: Tensor, q: Tensor) -> Tensor:
    """Square root of the Jensen-Shannon divergence of distributions [B, n], in nats: [B]."""
    middle = ((p + q) / 2).log()
    both = torch.special.xlogy(p, p) - p * middle + torch.special.xlogy(q, q) - q * middle
    # Where both are 0 the logarithm is not finite, and the entry adds nothing.
    return (both.where(p + q > 0, 0.0).sum(-1) / 2).clamp_min(0.0).sqrt()
