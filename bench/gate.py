"""The correctness gate: no number is published for a result that is not right.

A sample of queries (first, last, seeded random ones; every head) is compared with float64 attention
over exactly the keys that the plan shows them. The plan is read here by table look-up, apart from
every backend.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from permattn.backends.reference import token_is_visible
from permattn.core import AttnPart, AttnPlan, TokenBand
from permattn.testing import float64_bound, masked_attention
from torch import Tensor

# Relative error of the output, on heads that aggregate locally: (qk, pv) -> at most, beside the
# error that plain torch makes in the same dtype.
QUANTISED_LIMITS = {
    ("int8", "none"): 0.005,
    ("int8", "fp8"): 0.015,
    ("int8", "int8"): 0.005,
    ("int8", "int4"): 0.03,
    # 0.03 over the 40 heads of tests/bench; more where a few rows of a longer video are sampled.
    ("int4", "int4"): 0.04,
}


@dataclass(frozen=True)
class Verdict:
    """Largest distance from float64 over the sample, and what is allowed (twice plain torch's)."""

    error: float
    torchs: float
    bound: float
    finite: bool

    @property
    def ok(self) -> bool:
        return self.finite and self.error <= self.bound


def sample_rows(num_tokens: int, count: int = 48, seed: int = 0) -> Tensor:
    """int64 [n]: the first and last queries, and random ones between; ascending, no repeats."""
    if num_tokens <= count:
        return torch.arange(num_tokens)
    generator = torch.Generator().manual_seed(seed)
    middle = torch.randperm(num_tokens, generator=generator)[: count - 4]
    ends = torch.tensor([0, 1, num_tokens - 2, num_tokens - 1])
    return torch.cat([ends, middle]).unique()


def judge(
    out: Tensor, q: Tensor, k: Tensor, v: Tensor, plan: AttnPlan, rows: Tensor | None = None
) -> Verdict:
    """Compares `out` [B, Hq, Sq, Dv] with float64 on a sample of query rows.

    A quantised plan is judged by its relative error over all of them, against QUANTISED_LIMITS.
    """
    rows = sample_rows(q.shape[2]) if rows is None else rows
    batch, heads = q.shape[:2]
    seen = visible_rows(plan, rows, batch, heads)
    scale = q.shape[3] ** -0.5
    exact, plain = [], []
    for b in range(batch):  # one batch row at a time: K in float64 is the largest thing here
        some = q[b : b + 1, :, rows]
        keys, values, shown = k[b : b + 1], v[b : b + 1], seen[b : b + 1]
        plain.append(masked_attention(some, keys, values, shown, scale)[0])
        doubles = (some.double(), keys.double(), values.double())
        exact.append(masked_attention(*doubles, shown, scale)[0])
    finite = bool(torch.isfinite(out).all())
    if plan.quant.is_quantised:
        limit = QUANTISED_LIMITS[plan.quant.qk, plan.quant.pv]
        ours, torchs = (
            float((x.double() - torch.cat(exact)).norm() / torch.cat(exact).norm())
            for x in (out[:, :, rows], torch.cat(plain))
        )
        return Verdict(ours, torchs, limit + torchs, finite)
    error = float64_bound(out[:, :, rows], torch.cat(plain), torch.cat(exact))
    return Verdict(error.ours, error.torchs, error.bound, finite)


def visible_rows(plan: AttnPlan, rows: Tensor, batch: int, heads: int) -> Tensor:
    """bool [B, H, len(rows), Skv]: the keys that a plan shows to some queries."""
    skv = plan.num_kv_tokens
    seen = torch.zeros(batch, heads, len(rows), skv, dtype=torch.bool)
    bx, hx = plan.leading_sizes()
    for part in plan.parts:
        for b in range(bx):
            for h in range(hx):
                picked = _visible_in_part(part, rows, b, h)
                target = seen[b if bx > 1 else slice(None), h if hx > 1 else slice(None)]
                target |= picked
    return seen


def _visible_in_part(part: AttnPart, rows: Tensor, b: int, h: int) -> Tensor:
    """bool [len(rows), Skv] for one batch row and head."""

    def of(x: Tensor) -> Tensor:
        return x[min(b, x.shape[0] - 1), min(h, x.shape[1] - 1)].long()

    index = part.index
    kv_indices, offsets, num_full = (
        of(index.kv_indices),
        of(index.row_offsets),
        of(index.kv_num_full),
    )
    token_of_slot, num_slots = of(part.kv_perm.token_of_slot), part.kv_perm.num_slots
    seen = torch.zeros(len(rows), part.kv_perm.num_tokens, dtype=torch.bool)
    for n, (token, slot) in enumerate(
        zip(rows.tolist(), of(part.q_perm.slot_of_token)[rows].tolist(), strict=True)
    ):
        if slot < 0:
            continue
        i = slot // index.block_q
        blocks = kv_indices[offsets[i] : offsets[i + 1]]
        slots = blocks[:, None] * index.block_kv + torch.arange(index.block_kv)
        inside = slots < num_slots
        kv_token = torch.where(inside, token_of_slot[slots.clamp_max(num_slots - 1)], -1)
        visible = token_is_visible(torch.tensor(token), kv_token, part.band)
        full = torch.arange(len(blocks)) < num_full[i]
        visible |= full[:, None] & token_is_visible(torch.tensor(token), kv_token, TokenBand())
        seen[n, kv_token[visible]] = True
    return seen
