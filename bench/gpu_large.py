"""Sections about size: long sequences, and tensors with more elements than 32 bits count."""

from __future__ import annotations

from dataclasses import dataclass

import permattn
import torch
from permattn import testing
from permattn.core import AttnPart, AttnPlan, BlockIndex, Permutation, QuantSpec, TokenBand
from permattn.core.quant import PRECISIONS
from torch import Tensor

from bench.gate import sample_rows, visible_rows
from bench.gpu_suite import Suite


@dataclass(frozen=True)
class Large:
    """Attention of seeded random lists that all heads share.

    Args:
        entries: listed blocks of a row.
        quant: "none" or a name of `quant.PRECISIONS`, without smoothing.
    """

    name: str
    batch: int
    q_heads: int
    kv_heads: int
    tokens: int
    head_dim: int
    block: int
    entries: int
    permuted: bool = False
    quant: str = "none"

    @property
    def elements(self) -> int:
        return self.batch * self.q_heads * self.tokens * self.head_dim


LONG = 262_144
CASES = (
    Large("long", 1, 4, 2, LONG, 128, 128, 40),
    Large("long-block-64", 1, 2, 1, LONG, 64, 64, 64),
    Large("long-permuted", 1, 2, 2, LONG, 128, 128, 40, permuted=True),
    Large("past-32-bits", 2, 33, 33, LONG, 128, 128, 3),
    Large("past-32-bits-permuted", 2, 33, 33, LONG, 128, 128, 2, permuted=True),
)
# Where numbers are rounded to a few bits, heads by themselves stand for the oracle.
QUANTISED = (
    Large("long-int8+int8", 1, 2, 2, LONG, 128, 128, 20, quant="int8+int8"),
    Large("past-32-bits-int8+fp8", 2, 33, 33, LONG, 128, 128, 2, quant="int8+fp8"),
)


def large(suite: Suite) -> None:
    """A sample of queries of some heads against float64; quantised heads against themselves."""
    for case in CASES:
        small = _small(case) if suite.rehearsal else case

        def exact(case: Large = small) -> tuple[float, float]:
            return _against_float64(suite, case)

        suite.check(case.name, exact)
        _free(suite)
    for case in QUANTISED:
        small = _small(case) if suite.rehearsal else case

        def alone(case: Large = small) -> tuple[float, float]:
            return _against_itself(suite, case)

        suite.check(case.name, alone)
        _free(suite)


def _small(case: Large) -> Large:
    heads = 2 * case.q_heads // case.kv_heads
    quant = "int8+int8" if case.quant != "none" else "none"
    facts = (case.head_dim, 64, 2, case.permuted, quant)
    return Large(case.name, case.batch, heads, 2, 256, *facts)


def plan_of(case: Large, device: torch.device) -> AttnPlan:
    """Random lists made on the device, the same for all heads."""
    generator = torch.Generator(device).manual_seed(0)
    blocks = -(-case.tokens // case.block)
    score = torch.rand(1, 1, blocks, blocks, generator=generator, device=device)
    kept = score.topk(min(case.entries, blocks), -1).indices.sort(-1).values
    count = torch.full((1, 1, blocks), kept.shape[-1], device=device)
    index = BlockIndex.from_padded(kept, count, count, case.block, case.block)
    perm = Permutation.identity(case.tokens)
    if case.permuted:
        order = torch.randperm(case.tokens, generator=torch.Generator().manual_seed(1))
        perm = Permutation.from_token_of_slot(order, case.tokens)
    part = AttnPart(perm, perm, index, TokenBand())
    # Means of keys would be sums in another order where a head is alone.
    quant = QuantSpec() if case.quant == "none" else QuantSpec(*PRECISIONS[case.quant])
    return AttnPlan((part,), quant, validate=False).to(device)


def _draw(case: Large, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(2)

    def tensor(heads: int) -> Tensor:
        shape = (case.batch, heads, case.tokens, case.head_dim)
        x = torch.empty(shape, dtype=torch.bfloat16, device=device)
        return x.normal_(generator=generator)

    return tensor(case.q_heads), tensor(case.kv_heads), tensor(case.kv_heads)


def _against_float64(suite: Suite, case: Large) -> tuple[float, float]:
    """(error, bound) of the worst of four heads, the last ones of the last batch row among them."""
    plan, (q, k, v) = plan_of(case, suite.device), _draw(case, suite.device)
    out = permattn.sparse_attention(q, k, v, plan, backend=suite.asked)
    rows = sample_rows(case.tokens, 12)
    seen = visible_rows(plan.to("cpu"), rows, 1, 1)[0, 0].to(suite.device)
    rows = rows.to(suite.device)
    worst = (0.0, 0.0)
    group = case.q_heads // case.kv_heads
    for b, h in {(0, 0), (0, case.q_heads - 1), (case.batch - 1, case.q_heads - 1)}:
        some = q[b, h, rows][None, None]
        keys, values = k[b, h // group][None, None], v[b, h // group][None, None]
        scale = case.head_dim**-0.5
        plain = testing.masked_attention(some, keys, values, seen, scale)[0]
        wide = (some.double(), keys.double(), values.double())
        exact = testing.masked_attention(*wide, seen, scale)[0]
        error = testing.float64_bound(out[b, h, rows][None, None], plain, exact)
        if error.ours - error.bound >= worst[0] - worst[1]:
            worst = (error.ours, error.bound)
    return worst


def _against_itself(suite: Suite, case: Large) -> tuple[float, float]:
    """How many numbers of the last head differ from a call with that head alone; none may."""
    plan, (q, k, v) = plan_of(case, suite.device), _draw(case, suite.device)
    out = permattn.sparse_attention(q, k, v, plan, backend=suite.asked)
    a, b, c = (x[-1:, -1:].contiguous() for x in (q, k, v))
    alone = permattn.sparse_attention(a, b, c, plan, backend=suite.asked)
    return float((out[-1:, -1:] != alone).sum()), 0.0


def _free(suite: Suite) -> None:
    if suite.device.type == "cuda":
        torch.cuda.empty_cache()
