"""Cases that the Triton kernels must get right, shared by the interpreter suite and the GPU
suite.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from permattn import sparse_attention_with_lse
from permattn.core import AttnPart, AttnPlan, BlockIndex, Permutation, TokenBand
from permattn.patterns.dense import plan_dense
from permattn.testing import (
    assert_within,
    crossed_plan,
    masked_attention,
    random_index,
    random_permutation,
    random_plan,
    split_plan,
    visible_pairs,
)
from torch import Tensor

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32


@dataclass(frozen=True)
class Case:
    """A plan, and the tensors it is run with.

    Args:
        layout: "plain"; "views" = q a transposed [B, S, H, D] view, k and v slices of one packed
            tensor; "expanded" = k and v shared by all batch rows with stride 0.
    """

    name: str
    plan: Callable[[], AttnPlan]
    batch: int = 1
    heads: int = 2
    kv_heads: int = 1
    dim: int = 32
    dim_v: int = 32
    dtype: torch.dtype = SINGLE
    layout: str = "plain"
    scale: float = 0.2

    def __str__(self) -> str:
        return self.name

    def inputs(self, plan: AttnPlan, device: str = "cpu", seed: int = 0) -> list[Tensor]:
        """q, k, v and the two output gradients."""
        g = torch.Generator().manual_seed(seed)

        def rand(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g).to(self.dtype)

        sq, skv = plan.num_q_tokens, plan.num_kv_tokens
        batch, width = self.batch, self.dim + self.dim_v
        if self.layout == "views":
            q = rand(batch, sq, self.heads, self.dim).transpose(1, 2)
            packed = rand(batch, skv, self.kv_heads, width).transpose(1, 2)
            k, v = packed[..., : self.dim], packed[..., self.dim :]
        elif self.layout == "expanded":
            q = rand(batch, self.heads, sq, self.dim)
            k = rand(1, self.kv_heads, skv, self.dim).expand(batch, -1, -1, -1)
            v = rand(1, self.kv_heads, skv, self.dim_v).expand(batch, -1, -1, -1)
        else:
            q = rand(batch, self.heads, sq, self.dim)
            k = rand(batch, self.kv_heads, skv, self.dim)
            v = rand(batch, self.kv_heads, skv, self.dim_v)
        dout = rand(batch, self.heads, sq, self.dim_v)
        dlse = torch.randn(batch, self.heads, sq, generator=g)
        made = [q, k, v, dout, dlse]
        if device == "cpu":
            return made
        # `to` would make an expanded tensor dense; its one row travels instead.
        return [
            x[:1].to(device).expand(batch, -1, -1, -1) if x.stride(0) == 0 else x.to(device)
            for x in made
        ]


def all_partial(sq: int, skv: int) -> AttnPlan:
    """Causal, and no block marked full although many are."""
    g = torch.Generator().manual_seed(3)
    q_perm, kv_perm, band = Permutation.identity(sq), Permutation.identity(skv), TokenBand(0)
    index = random_index(
        q_perm,
        kv_perm,
        band,
        block_q=32,
        block_kv=32,
        density=0.6,
        heads=2,
        mark_full=False,
        generator=g,
    )
    return AttnPlan((AttnPart(q_perm, kv_perm, index, band),))


def a_shape(tokens: int, *, window: int = 48, sink: int = 32) -> AttnPlan:
    """Local window and sink in token order: two parts that share one launch; different block_q."""
    order = Permutation.identity(tokens)
    parts = []
    for block_q, band, columns in (
        (64, TokenBand(0, window), order),
        (128, TokenBand(window), Permutation.from_token_of_slot(torch.arange(sink), tokens)),
    ):
        rows, cols = -(-tokens // block_q), -(-columns.num_slots // 16)
        mask = torch.ones(rows, cols, dtype=torch.bool)
        index = BlockIndex.from_block_mask(mask, block_q, 16)
        parts.append(AttnPart(order, columns, index, band))
    return AttnPlan(tuple(parts))


def shared_key_order(tokens: int) -> AttnPlan:
    """One permutation for all heads, lists that differ: the heads of a group share a key tile."""
    g = torch.Generator().manual_seed(5)
    q_perm = random_permutation(tokens, holes=3, generator=g)
    kv_perm = random_permutation(tokens, keep=0.8, holes=5, generator=g)
    index = random_index(
        q_perm,
        kv_perm,
        TokenBand(),
        block_q=32,
        block_kv=32,
        density=0.5,
        heads=4,
        generator=g,
    )
    return AttnPlan((AttnPart(q_perm, kv_perm, index, TokenBand()),))


def reordered(plan: AttnPlan, order: tuple[int, ...]) -> AttnPlan:
    return AttnPlan(tuple(plan.parts[i] for i in order))


def dense(sq: int, skv: int, **options: bool) -> Callable[[], AttnPlan]:
    return lambda: plan_dense(sq, skv, block_q=64, block_kv=32, **{"causal": True, **options})


def drawn(sq: int, skv: int, **options) -> Callable[[], AttnPlan]:
    return lambda: random_plan(sq, skv, **options)


def three_parts(*order: int) -> Callable[[], AttnPlan]:
    return lambda: reordered(split_plan(90, 101, heads=2, batch=2, seed=2), order)


WINDOW = TokenBand(-20, 25)
CASES = (
    Case("one-token", dense(1, 1)),
    Case("one-query-many-keys", dense(1, 77, lower_right=True), dtype=BRAIN),
    Case("tails-causal-bfloat16", dense(131, 131), heads=4, kv_heads=2, dim=64, dtype=BRAIN),
    Case("tails-causal-float16", dense(131, 131), dim=64, dim_v=64, dtype=HALF),
    Case("not-causal", dense(70, 130, causal=False)),
    Case("longer-keys-upper-left", dense(70, 130)),
    Case("longer-keys-lower-right", dense(70, 130, lower_right=True)),
    Case("longer-queries-lower-right", dense(130, 70, lower_right=True)),
    Case("empty-rows", drawn(130, 130, heads=2, density=0.2, block_q=32, block_kv=32), dtype=BRAIN),
    Case("no-entry-at-all", drawn(70, 70, density=0.0)),
    Case("all-partial-blocks", lambda: all_partial(100, 100)),
    Case(
        "gqa-different-lists",
        drawn(130, 150, heads=4, density=0.4, band=TokenBand(0), block_q=32),
        heads=4,
        kv_heads=2,
        dtype=BRAIN,
    ),
    Case(
        "gqa-different-orders",
        drawn(70, 90, heads=4, permuted=True, holes=5, block_q=32, block_kv=16, band=WINDOW),
        heads=4,
        kv_heads=2,
        dtype=HALF,
    ),
    Case("gqa-shared-order", lambda: shared_key_order(100), heads=4, kv_heads=1, dtype=BRAIN),
    Case("plan-without-batch-axis", drawn(70, 70, heads=2, block_q=32), batch=2),
    Case("plan-without-head-axis", drawn(70, 70, batch=2, block_q=32, permuted=True), batch=2),
    Case("views", drawn(100, 100, heads=2, permuted=True), batch=2, layout="views"),
    Case("expanded-keys", drawn(70, 70, batch=2), batch=2, layout="expanded", dtype=BRAIN),
    Case("three-parts", three_parts(0, 1, 2), batch=2),
    Case("three-parts-reversed", three_parts(2, 1, 0), batch=2, dtype=BRAIN),
    Case("three-parts-rotated", three_parts(1, 2, 0), batch=2, dtype=HALF),
    Case("two-orders-share-queries", lambda: crossed_plan(90, 101, heads=2, batch=2), batch=2),
    Case("two-parts-one-launch", lambda: a_shape(200), dtype=BRAIN),
    Case(
        "band-of-two-ends-out-of-order",
        drawn(100, 100, heads=2, permuted=True, band=WINDOW, block_q=64, density=0.8),
    ),
    Case("blocks-of-4", drawn(50, 50, permuted=True, block_q=4, block_kv=4), dtype=BRAIN),
    Case("blocks-of-1-and-100", drawn(20, 230, block_q=1, block_kv=100)),
    Case("blocks-of-48-and-24", drawn(130, 130, block_q=48, block_kv=24, band=TokenBand(0))),
    Case("head-dim-16", dense(64, 64), dim=16, dim_v=16, dtype=BRAIN),
    Case("head-dim-80", dense(64, 64), dim=80, dim_v=80, dtype=BRAIN),
    Case("head-dims-40-and-24", drawn(64, 64, permuted=True), dim=40, dim_v=24),
    Case("head-dims-128-and-64", dense(64, 64), dim=128, dim_v=64, dtype=HALF),
    Case("head-dim-256", dense(64, 64), dim=256, dim_v=256, dtype=BRAIN),
    Case("head-dim-256-float32", dense(40, 40), dim=256, dim_v=256),
    Case("negative-scale", dense(64, 64), scale=-0.3),
)


def banded(**options) -> AttnPlan:
    return random_plan(100, 120, heads=2, batch=1, density=0.5, block_q=32, block_kv=32, **options)


def holes_in_two_orders(tokens: int) -> AttnPlan:
    """Near keys in token order and far ones permuted; both leave out keys 30..39."""
    dropped = torch.zeros(1, 1, tokens, dtype=torch.bool)
    dropped[..., 30:40] = True
    g = torch.Generator().manual_seed(1)
    parts = []
    for q_perm, kv_perm, band in (
        (Permutation.identity(tokens), Permutation.identity(tokens), TokenBand(0, 20)),
        (
            random_permutation(tokens, generator=g),
            random_permutation(tokens, generator=g),
            TokenBand(20),
        ),
    ):
        kept = kv_perm.without_tokens(dropped)
        index = random_index(
            q_perm, kept, band, block_q=32, block_kv=16, density=0.9, heads=2, generator=g
        )
        parts.append(AttnPart(q_perm, kept, index, band))
    return AttnPlan(tuple(parts))


# Plans whose keys are not all seen by every head.
POISONED = {
    "unlisted-blocks": random_plan(100, 120, heads=2, density=0.1, block_q=32, block_kv=32),
    "causal": banded(band=TokenBand(0)),
    "inside-window": banded(band=TokenBand(None, -10)),
    "window-of-two-ends": banded(band=TokenBand(-20, -5)),
    "window-out-of-order": banded(band=WINDOW, permuted=True, holes=7),
    "empty-band": banded(band=TokenBand(5, 5)),
    "holes-among-queries": banded(permuted=True, holes=40, band=TokenBand(-8, -1)),
    "holes-in-two-orders": holes_in_two_orders(110),
}


def gradients(out: Tensor, lse: Tensor, inputs: list[Tensor], dout: Tensor, dlse: Tensor):
    """dq, dk, dv of both results; lse counts only where a key was seen."""
    seen = torch.isfinite(lse)
    pull = [dout.to(out.dtype), torch.where(seen, dlse.to(lse.dtype), 0)]
    return torch.autograd.grad([out, lse], inputs, pull)


def run_all(attend, q, k, v, dout, dlse) -> dict[str, Tensor]:
    """out, lse and the gradients of an attention function of (q, k, v)."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out, lse = attend(*leaves)
    names = ("out", "lse", "dq", "dk", "dv")
    grads = gradients(out, lse, leaves, dout, dlse)
    return dict(zip(names, (out.detach(), lse.detach(), *grads), strict=True))


def run_kernels(
    plan: AttnPlan, inputs: list[Tensor], scale: float, backend: str = "triton"
) -> dict[str, Tensor]:
    """The results of the kernels; q, k and v keep their strides."""

    def attend(q, k, v):
        return sparse_attention_with_lse(q, k, v, plan, scale=scale, backend=backend)

    return run_all(attend, *inputs)


def expected(
    plan: AttnPlan, inputs: list[Tensor], scale: float
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Plain torch in the dtype of the inputs, and float64: what `assert_within` wants."""
    q, k, v, dout, dlse = inputs
    seen = visible_pairs(plan, q.shape[0], q.shape[1]).to(q.device) > 0

    def attend(q, k, v):
        return masked_attention(q, k, v, seen, scale)

    plain = run_all(attend, q, k, v, dout, dlse)
    exact = run_all(attend, q.double(), k.double(), v.double(), dout, dlse)
    return plain, exact


def cancelled(inputs: list[Tensor], scale: float) -> dict[str, float]:
    """Size of p * (dp - delta) before it cancels, as where one key holds all mass. A rounding of it
    shows in float32; in 16 bits it is far below one of the result.
    """
    q, k, v, dout, _ = (x.float() for x in inputs)
    if inputs[0].dtype != SINGLE or v.numel() == 0:
        return {}
    dp = dout @ v.repeat_interleave(q.shape[1] // v.shape[1], 1).mT
    size = scale * float(dp.abs().max())
    return {"dq": abs(size) * float(k.abs().max()), "dk": abs(size) * float(q.abs().max())}


def check_case(case: Case, device: str = "cpu") -> None:
    """Forward, lse and gradients within the float64 bound."""
    plan = case.plan()
    inputs = case.inputs(plan, device)
    plain, exact = expected(plan, inputs, case.scale)
    ours = run_kernels(plan.to(device), inputs, case.scale)
    sizes = cancelled(inputs, case.scale)
    for name, value in ours.items():
        assert value.shape == exact[name].shape, name
        what = f"{case.name} {name}"
        assert_within(value, plain[name], exact[name], what, cancelled=sizes.get(name, 0.0))
