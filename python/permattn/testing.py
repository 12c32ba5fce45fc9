"""Random plans, the float64 bound and poisoned buffers, shared by tests/ and bench/."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from permattn.backends.reference import token_is_visible
from permattn.core import AttnPart, AttnPlan, BlockIndex, Permutation, TokenBand
from permattn.core.plan import block_token_range, ceil_div
from permattn.core.regions import RegionArgs, Sizes


def visible_pairs(plan: AttnPlan, batch: int, heads: int) -> Tensor:
    """How many parts show each (query token, key token) pair: int32 [B, H, Sq, Skv], 0 or 1.

    The dense oracle of small tests, written apart from every backend: it walks lists in Python.
    """
    sq, skv = plan.num_q_tokens, plan.num_kv_tokens
    count = torch.zeros(batch, heads, sq, skv, dtype=torch.int32)
    for part in plan.parts:
        index = part.index
        q_of, kv_of = part.q_perm.token_of_slot.cpu(), part.kv_perm.token_of_slot.cpu()
        lists = [x.cpu() for x in (index.kv_indices, index.row_offsets, index.kv_num_full)]
        for b in range(batch):
            for h in range(heads):
                pick = [x[min(b, x.shape[0] - 1), min(h, x.shape[1] - 1)] for x in lists]
                q_row = q_of[min(b, q_of.shape[0] - 1), min(h, q_of.shape[1] - 1)]
                kv_row = kv_of[min(b, kv_of.shape[0] - 1), min(h, kv_of.shape[1] - 1)]
                kv_indices, offsets, num_full = (x.tolist() for x in pick)
                for i in range(index.num_q_blocks):
                    q_token = q_row[i * index.block_q : (i + 1) * index.block_q]
                    for n, e in enumerate(range(offsets[i], offsets[i + 1])):
                        first = kv_indices[e] * index.block_kv
                        kv_token = kv_row[first : first + index.block_kv]
                        band = TokenBand() if n < num_full[i] else part.band
                        seen = token_is_visible(q_token[:, None], kv_token[None], band)
                        qi, ki = seen.nonzero(as_tuple=True)
                        count[b, h, q_token[qi].long(), kv_token[ki].long()] += 1
    return count


def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Dense masked attention in q's dtype: (out, lse); differentiable; empty rows give 0, -inf.

    Args: q [B, Hq, Sq, D], k, v [B, Hkv, Skv, D], visible bool broadcastable to [B, Hq, Sq, Skv].
    """
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    score = (q @ k.mT) * scale
    score = score.masked_fill(~visible, float("-inf"))
    dead = ~visible.any(-1, keepdim=True)
    p = torch.softmax(score.masked_fill(dead, 0.0), -1).masked_fill(dead, 0.0)
    lse = torch.logsumexp(score.masked_fill(dead, 0.0), -1).masked_fill(dead[..., 0], float("-inf"))
    return p @ v, lse


@dataclass(frozen=True)
class Error:
    """Distance from float64: of a result, and of plain torch in the same dtype."""

    ours: float
    torchs: float
    bound: float

    @property
    def ok(self) -> bool:
        return self.ours <= self.bound


def float64_bound(ours: Tensor, plain: Tensor, exact: Tensor, *, cancelled: float = 0.0) -> Error:
    """At most twice plain torch's error in the same dtype, plus a few float32 roundings.

    Args:
        ours: the result under test.
        plain: plain torch attention computed in the same dtype.
        exact: float64.
        cancelled: size of terms that cancel in the result (as in `p * (dp - delta)` where one key
            holds all mass); one rounding of it, in the dtype of `ours`, is allowed.
    """
    ours, plain, exact = ours.detach(), plain.detach(), exact.detach()
    slack = torch.finfo(ours.dtype).eps * cancelled
    finite = torch.isfinite(exact)
    if not torch.equal(finite, torch.isfinite(ours.double())):
        return Error(float("inf"), 0.0, 0.0)
    if not bool(finite.any()):
        return Error(0.0, 0.0, 0.0)
    exact, ours, plain = (x.double()[finite] for x in (exact, ours, plain))
    eps = torch.finfo(torch.float32).eps
    rounding = 4 * eps * float(exact.abs().max().clamp_min(1.0)) + slack
    torchs = float((plain - exact).abs().max())
    return Error(float((ours - exact).abs().max()), torchs, 2 * torchs + rounding)


def assert_within(
    ours: Tensor, plain: Tensor, exact: Tensor, what: str, *, cancelled: float = 0.0
) -> None:
    """Raises AssertionError unless `float64_bound` holds."""
    error = float64_bound(ours, plain, exact, cancelled=cancelled)
    if not error.ok:
        raise AssertionError(
            f"{what}: error {error.ours:.3e} from float64, bound {error.bound:.3e} "
            f"(plain torch: {error.torchs:.3e})"
        )


def random_permutation(
    num_tokens: int,
    *,
    heads: int = 1,
    batch: int = 1,
    holes: int = 0,
    keep: float = 1.0,
    generator: torch.Generator | None = None,
) -> Permutation:
    """A random order of a random `keep` share of the tokens, `holes` padding slots mixed in."""
    rows = []
    for _ in range(batch * heads):
        order = torch.randperm(num_tokens, generator=generator)
        order = order[: max(1, round(keep * num_tokens))] if num_tokens else order
        order = torch.cat([order, torch.full((holes,), -1)])
        rows.append(order[torch.randperm(len(order), generator=generator)])
    token = torch.stack(rows).view(batch, heads, -1)
    return Permutation.from_token_of_slot(token, num_tokens)


def random_index(
    q_perm: Permutation,
    kv_perm: Permutation,
    band: TokenBand,
    *,
    block_q: int,
    block_kv: int,
    density: float,
    heads: int = 1,
    batch: int = 1,
    mark_full: bool = True,
    generator: torch.Generator | None = None,
) -> BlockIndex:
    """Random lists of key blocks in random order, full blocks first where they really are full."""
    nq, nkv = ceil_div(q_perm.num_slots, block_q), ceil_div(kv_perm.num_slots, block_kv)
    mask = torch.rand(batch, heads, nq, nkv, generator=generator) < density
    order = torch.rand(batch, heads, nq, nkv, generator=generator)
    q_low, q_high, _ = block_token_range(q_perm.token_of_slot, block_q)
    kv_low, kv_high, kv_hole = block_token_range(kv_perm.token_of_slot, block_kv)
    full = ~kv_hole[..., None, :] & (q_high >= 0)[..., None] & mask
    if band.min_lag is not None:
        full &= q_low[..., None].long() - kv_high[..., None, :].long() >= band.min_lag
    if band.max_lag is not None:
        full &= q_high[..., None].long() - kv_low[..., None, :].long() < band.max_lag
    full &= mark_full
    # Full first, then partial, then unused; random inside each.
    key = torch.where(mask, torch.where(full, 0.0, 1.0), 2.0) + 0.999 * order
    kv = key.argsort(-1).int()
    return BlockIndex.from_padded(kv, mask.sum(-1), full.sum(-1), block_q, block_kv)


def random_plan(
    sq: int,
    skv: int,
    *,
    batch: int = 1,
    heads: int = 1,
    block_q: int = 64,
    block_kv: int = 64,
    density: float = 0.5,
    band: TokenBand = TokenBand(),
    permuted: bool = False,
    holes: int = 0,
    seed: int = 0,
) -> AttnPlan:
    """A plan of one part with random lists (and, if `permuted`, random orders with holes)."""
    g = torch.Generator().manual_seed(seed)
    if permuted:
        q_perm = random_permutation(sq, heads=heads, batch=batch, holes=holes, generator=g)
        kv_perm = random_permutation(skv, heads=heads, batch=batch, holes=holes, generator=g)
    else:
        q_perm, kv_perm = Permutation.identity(sq), Permutation.identity(skv)
    index = random_index(
        q_perm,
        kv_perm,
        band,
        block_q=block_q,
        block_kv=block_kv,
        density=density,
        heads=heads,
        batch=batch,
        generator=g,
    )
    return AttnPlan((AttnPart(q_perm, kv_perm, index, band),))


def split_plan(
    sq: int,
    skv: int,
    *,
    heads: int = 1,
    batch: int = 1,
    window: int = 40,
    causal: bool = True,
    density: float = 0.5,
    seed: int = 0,
) -> AttnPlan:
    """Three disjoint parts in three orders: local window, permuted columns outside it, own rows.

    Every tenth query is a hole in the first two parts and served by the third, compact one.
    """
    g = torch.Generator().manual_seed(seed)
    shift = skv - sq
    own = torch.rand(batch, heads, sq, generator=g) < 0.1
    count = int(own.sum(-1).max()) if sq else 0
    order = torch.where(own, 0, 1).sort(dim=-1, stable=True).indices[..., :count].int()
    order = torch.where(own.gather(-1, order.long()), order, -1)
    own_rows = Permutation.from_token_of_slot(order, sq)
    rest = Permutation.identity(sq).without_tokens(own)
    columns = random_permutation(skv, heads=heads, batch=batch, keep=0.4, holes=3, generator=g)
    low = -shift if causal else None
    inner = TokenBand(low, window - shift)
    outer = TokenBand(window - shift)

    def part(q_perm, kv_perm, band, block_q, block_kv, share):
        index = random_index(
            q_perm,
            kv_perm,
            band,
            block_q=block_q,
            block_kv=block_kv,
            density=share,
            heads=heads,
            batch=batch,
            generator=g,
        )
        return AttnPart(q_perm, kv_perm, index, band)

    whole = Permutation.identity(skv)
    return AttnPlan(
        (
            part(rest, whole, inner, 32, 16, 0.9),
            part(rest, columns, outer, 64, 32, density),
            part(own_rows, whole, TokenBand(low), 16, 64, density),
        )
    )


def crossed_plan(
    sq: int, skv: int, *, heads: int = 1, batch: int = 1, causal: bool = True, seed: int = 0
) -> AttnPlan:
    """Two parts in different query orders that show every query different keys.

    What one part sums for a query must be merged with what the other does.
    """
    g = torch.Generator().manual_seed(seed)
    first = torch.rand(batch, heads, skv, generator=g) < 0.5
    whole = Permutation.identity(skv)
    band = TokenBand(sq - skv) if causal else TokenBand()
    parts = []
    for q_perm, dropped, block_q in (
        (Permutation.identity(sq), first, 32),
        (random_permutation(sq, heads=heads, batch=batch, holes=5, generator=g), ~first, 16),
    ):
        kv_perm = whole.without_tokens(dropped)
        index = random_index(
            q_perm,
            kv_perm,
            band,
            block_q=block_q,
            block_kv=16,
            density=0.7,
            heads=heads,
            batch=batch,
            generator=g,
        )
        parts.append(AttnPart(q_perm, kv_perm, index, band))
    return AttnPlan(tuple(parts))


def poison_unseen(x: Tensor, seen: Tensor) -> Tensor:
    """x [B, Hkv, Skv, D] with NaN in every row that `seen` (bool [B, Hkv, Skv]) leaves out."""
    return torch.where(seen[..., None], x, float("nan"))


def dense_regions(args: RegionArgs) -> tuple[Tensor, Tensor]:
    """Attention from region to region as dense attention in q's dtype: (out, lse); differentiable.

    Written apart from every backend: a score for every (query token, place of the graph, key cell),
    of which those of other regions, and cells outside the map, are struck out.
    """
    q, k, v = args.q.flatten(2, 4), args.k.flatten(2, 4), args.v.flatten(2, 4)
    batch, heads = q.shape[:2]
    q_region, _ = _region_of_token(args.q, args.q_box)
    kv_region, kv_counts = _region_of_token(args.k, args.kv_box)
    num_kv = kv_counts[0] * kv_counts[1] * kv_counts[2]
    listed = args.graph.expand(batch, heads, -1, -1)[:, :, q_region].long()
    weights = q.new_ones(1) if args.weights is None else args.weights.to(q.dtype)
    weights = weights.expand(batch, heads, *args.graph.shape[2:])[:, :, q_region, :, None]
    seen = listed[..., None] == kv_region
    dots = ((q @ k.mT) * args.scale)[:, :, :, None]
    scores = torch.where(seen, dots * weights, float("-inf")).flatten(3)
    if args.count_padding:
        held = torch.bincount(kv_region, minlength=num_kv)
        cells = args.kv_box[0] * args.kv_box[1] * args.kv_box[2]
        missing = (cells - held)[listed].to(q.dtype)
        scores = torch.cat([scores, missing.log()], -1)
    lse = torch.logsumexp(scores, -1)
    p = torch.softmax(scores, -1)[..., : seen.shape[3] * seen.shape[4]].unflatten(3, seen.shape[3:])
    out = (p * weights).sum(3) @ v
    size = args.q.shape[2:5]
    return out.unflatten(2, size), lse.unflatten(2, size)


def _region_of_token(x: Tensor, box: Sizes) -> tuple[Tensor, list[int]]:
    """int64 [T * H * W] for a map [B, M, T, H, W, D], and regions per axis."""
    counts = [ceil_div(n, b) for n, b in zip(x.shape[2:5], box, strict=True)]
    t, h, w = (
        torch.arange(n, device=x.device) // b for n, b in zip(x.shape[2:5], box, strict=True)
    )
    number = (t[:, None, None] * counts[1] + h[:, None]) * counts[2] + w
    return number.flatten(), counts
