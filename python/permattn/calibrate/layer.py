"""One layer of one prompt: what exact attention gives, and how far a pattern is from it."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from permattn.api import sparse_attention_with_lse
from permattn.core import AttnPlan, Segment, TokenGrid, TokenRun
from permattn.patterns.mminference import HeadPattern, plan_prefill

Heads = Sequence[HeadPattern]


@dataclass(frozen=True, eq=False)
class LayerInput:
    """The tensors of one attention call, and what its tokens are.

    Args:
        q: [B, Hq, Sq, D] after RoPE: the last Sq of the Skv positions.
        k, v: [B, Hkv, Skv, D] and [B, Hkv, Skv, Dv].
        rows: segments per batch row, in key positions.
        left_pad, right_pad: padding keys per batch row.
        scale: of the softmax; None = 1 / sqrt(D).
        backend: see `permattn.sparse_attention`.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    rows: tuple[tuple[Segment, ...], ...]
    left_pad: tuple[int, ...] | None = None
    right_pad: tuple[int, ...] | None = None
    scale: float | None = None
    backend: str = "auto"

    @property
    def num_heads(self) -> int:
        return self.q.shape[1]

    @property
    def num_kv(self) -> int:
        return self.k.shape[2]

    @cached_property
    def probed(self) -> Tensor:
        """q as planners want it: they probe with 1 / sqrt(D)."""
        usual = self.q.shape[-1] ** -0.5
        if self.scale is None or math.isclose(self.scale, usual, rel_tol=1e-6):
            return self.q
        return self.q * (self.scale / usual)

    def plan(self, heads: Heads) -> AttnPlan:
        """The plan of these patterns, one per head."""
        with torch.no_grad():
            return plan_prefill(
                self.probed,
                self.k,
                self.rows,
                heads,
                left_pad=self.left_pad,
                right_pad=self.right_pad,
            )

    def attend(self, plan: AttnPlan) -> tuple[Tensor, Tensor]:
        """(out [B, Hq, Sq, Dv], lse [B, Hq, Sq])."""
        with torch.no_grad():
            return sparse_attention_with_lse(
                self.q, self.k, self.v, plan, scale=self.scale, backend=self.backend
            )

    def causal_pairs(self) -> int:
        """(query, key) pairs that dense attention computes, per head, mean over batch rows."""
        offset, total = self.num_kv - self.q.shape[2], 0
        for i in range(self.q.shape[0]):
            first, stop = _valid_range(self, i)
            low = max(offset, first)
            total += (stop * (stop + 1) - low * (low + 1)) // 2 - first * max(stop - low, 0)
        return total // self.q.shape[0]

    def modality_rows(self) -> dict[str, Tensor]:
        """Per modality of the prompt: bool [B, Sq], its queries (padding is in none)."""
        batch, num_q = self.q.shape[0], self.q.shape[2]
        masks: dict[str, Tensor] = {}
        for i in range(batch):
            names = _labels(self, i)
            for name in sorted(set(names)):
                if name:
                    mask = masks.setdefault(name, torch.zeros(batch, num_q, dtype=torch.bool))
                    mask[i] = torch.tensor([n == name for n in names])
        return {name: mask.to(self.q.device) for name, mask in sorted(masks.items())}


def _valid_range(layer: LayerInput, row: int) -> tuple[int, int]:
    left = layer.left_pad[row] if layer.left_pad else 0
    right = layer.right_pad[row] if layer.right_pad else 0
    return left, layer.num_kv - right


def _labels(layer: LayerInput, row: int) -> list[str]:
    """The modality of every query of a batch row; "" for padding."""
    names: list[str] = ["text"] * layer.num_kv
    for segment in layer.rows[row]:
        if isinstance(segment, TokenRun):
            stop = min(segment.stop, layer.num_kv)
            names[segment.start : stop] = [segment.modality] * (stop - segment.start)
        elif isinstance(segment, TokenGrid):
            starts = segment.frame_starts or (segment.start,)
            size = segment.num_tokens // len(starts)
            for start in starts:
                stop = min(start + size, layer.num_kv)
                names[start:stop] = [segment.modality] * (stop - start)
    first, stop = _valid_range(layer, row)
    names[:first] = [""] * first
    names[stop:] = [""] * (layer.num_kv - stop)
    return names[layer.num_kv - layer.q.shape[2] :]


@dataclass(frozen=True, eq=False)
class Exact:
    """Dense attention of a layer, the judge of every pattern.

    Args:
        out, lse: as `LayerInput.attend` returns them.
        rows: see `LayerInput.modality_rows`.
        norm2: per modality float64 [Hq]: squared norm of the output over its queries.
    """

    out: Tensor
    lse: Tensor
    rows: dict[str, Tensor]
    norm2: dict[str, Tensor]

    @classmethod
    def of(cls, layer: LayerInput) -> Exact:
        """Computes it: every pair, and nothing of size Sq x Skv."""
        out, lse = layer.attend(layer.plan([HeadPattern("dense")] * layer.num_heads))
        rows = layer.modality_rows()
        return cls(out, lse, rows, _square_sums(out, None, rows))


@dataclass(frozen=True, eq=False)
class Score:
    """What a pattern did to the heads of a layer; all lists have one entry per query head.

    Args:
        err2: per modality: squared error of the output over its queries.
        kept: per modality: sum over its queries of the share of true attention mass kept.
        pairs: (query, key) pairs that the kernel computes, mean over batch rows.
    """

    err2: dict[str, list[float]]
    kept: dict[str, list[float]]
    pairs: list[float]

    def to_json(self) -> dict[str, Any]:
        return {"err2": self.err2, "kept": self.kept, "pairs": self.pairs}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Score:
        return cls(data["err2"], data["kept"], data["pairs"])


def score(layer: LayerInput, exact: Exact, plan: AttnPlan) -> Score:
    """Runs a plan and compares it with exact attention.

    The mass kept is exact and free: exp(lse of the plan - lse of everything).
    """
    out, lse = layer.attend(plan)
    err2 = _square_sums(out, exact.out, exact.rows)
    kept = {}
    share = (lse - exact.lse).exp().nan_to_num_(0.0).clamp_max_(1.0)
    for name, mask in exact.rows.items():
        kept[name] = (share * mask[:, None]).sum((0, 2), dtype=torch.float64).tolist()
    return Score(
        {name: x.tolist() for name, x in err2.items()}, kept, pairs_of(plan, layer).tolist()
    )


def pairs_of(plan: AttnPlan, layer: LayerInput) -> Tensor:
    """float64 [Hq] on the host: what the kernel computes per head, mean over batch rows."""
    pairs = plan.num_block_pairs().double()
    return pairs.expand(pairs.shape[0], layer.num_heads).mean(0).cpu()


def _square_sums(out: Tensor, minus: Tensor | None, rows: dict[str, Tensor]) -> dict[str, Tensor]:
    """float64 [Hq] per modality: squared norms, one head in float32 at a time."""
    sums = {name: torch.zeros(out.shape[1], dtype=torch.float64) for name in rows}
    for head in range(out.shape[1]):
        x = out[:, head].float()
        if minus is not None:
            x = x - minus[:, head].float()
        square = x.square().sum(-1)
        for name, mask in rows.items():
            sums[name][head] = (square * mask).sum(dtype=torch.float64).cpu()
    return sums


def time_patterns(
    layer: LayerInput,
    patterns: Mapping[str, Heads],
    *,
    rounds: int,
    on_step: Callable[[], object] = lambda: None,
) -> dict[str, float]:
    """Milliseconds per head, planning included: medians over rounds in which all take turns."""
    taken: dict[str, list[float]] = {name: [] for name in patterns}
    for _ in range(rounds):
        for name, heads in patterns.items():
            start = _now(layer.q.device)
            layer.attend(layer.plan(heads))
            taken[name].append(_now(layer.q.device) - start)
            on_step()
    count = layer.num_heads * layer.q.shape[0]
    return {name: 1000 * statistics.median(x) / count for name, x in taken.items()}


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
