"""Sparse beside dense: errors layer by layer, and how much mass a plan keeps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from permattn import sparse_attention_with_lse
from permattn.cli.demo.measure import Result, relative_error
from permattn.cli.demo.report import Agreement
from permattn.cli.demo.subject import SheetHead
from permattn.core import AttnPlan

LAST = 64
RECALL_STEP = 4


@dataclass(frozen=True, eq=False)
class Drawn:
    """A layer that the picture shows: its queries and keys in the dense pass, and its plan."""

    q: Tensor
    k: Tensor
    plan: AttnPlan
    scale: float


class Audit:
    """Stands in for every attention call of a pass: compares sparse with dense, returns dense.

    Attributes:
        errors: per layer (norm of the difference, norm of the dense output).
        densities: per layer.
        layers: what the picture needs, for the wanted layers.
    """

    def __init__(self, handle: Any, wanted: set[int]) -> None:
        self.errors: dict[int, tuple[float, float]] = {}
        self.densities: dict[int, float] = {}
        self.layers: dict[int, Drawn] = {}
        self._wanted = wanted
        self._plan: AttnPlan | None = None
        handle.on_plan = self._see

    def _see(self, layer: int, plan: AttnPlan) -> None:
        self._plan = plan

    def __call__(
        self,
        attention: Callable[..., Any],
        module: nn.Module,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *rest: Any,
        **keywords: Any,
    ) -> Any:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        self._plan = None
        out = attention(module, q, k, v, *rest, **keywords)
        if self._plan is None:
            return out
        scale = keywords.get("scaling") or q.shape[-1] ** -0.5
        exact = sdpa_attention_forward(module, q, k, v, None, scaling=scale)
        layer = int(module.layer_idx)
        difference = (out[0] - exact[0]).float().norm()
        self.errors[layer] = (float(difference), float(exact[0].float().norm()))
        self.densities[layer] = self._plan.density()
        if layer in self._wanted:
            self.layers[layer] = Drawn(q, k, self._plan, float(scale))
        return exact


def agreement(audit: Audit, exact: Result, sparse: Result) -> Agreement:
    """Errors of the sparse pass; `exact` is the pass that the audit ran in."""
    assert exact.hidden is not None and sparse.hidden is not None
    assert exact.logits is not None and sparse.logits is not None
    pairs = [audit.errors[n] for n in sorted(audit.errors)]
    total = sum(d * d for d, _ in pairs) ** 0.5 / sum(e * e for _, e in pairs) ** 0.5
    same = exact.logits.argmax(-1) == sparse.logits.argmax(-1)
    return Agreement(
        attention_error=total,
        attention_error_per_layer=[d / e for d, e in pairs],
        hidden_error=relative_error(sparse.hidden, exact.hidden),
        hidden_error_last=relative_error(sparse.hidden[:, -LAST:], exact.hidden[:, -LAST:]),
        top1=float(same[-LAST:].float().mean()),
    )


def choose_heads(number: int, layer: Drawn, count: int = 6) -> list[SheetHead]:
    """Heads of a layer whose densities lie evenly between the lowest and the highest."""
    heads = layer.q.shape[1]
    order = layer.plan.num_block_pairs()[0].expand(heads).argsort().tolist()
    picks = torch.linspace(0, heads - 1, min(count, heads)).long().unique().tolist()
    return [SheetHead(number, order[i], "") for i in picks]


def describe_head(layer: Drawn, head: SheetHead, backend: str) -> dict[str, Any]:
    """Density of one head, and the share of attention mass that its plan keeps.

    The share is the mean over every RECALL_STEP-th row.
    """
    heads, rows = layer.q.shape[1], layer.q.shape[2]
    group = heads // layer.k.shape[1]
    q, k = layer.q[:, head.head], layer.k[:, head.head // group]
    _, lse = sparse_attention_with_lse(
        layer.q, layer.k, layer.k, layer.plan, scale=layer.scale, backend=backend
    )
    key = torch.arange(rows, device=q.device)
    kept = []
    for row in key[::RECALL_STEP].split(max(1, (1 << 22) // rows)):
        last = int(row[-1]) + 1
        score = (q[0, row].float() @ k[0, :last].float().mT) * layer.scale
        score.masked_fill_(key[:last] > row[:, None], float("-inf"))
        kept.append(lse[0, head.head, row] - score.logsumexp(-1))
    pairs = layer.plan.num_block_pairs()[0].expand(heads)[head.head]
    return {
        "layer": head.layer,
        "head": head.head,
        "kind": head.label,
        "density": float(pairs) / (rows * (rows + 1) / 2),
        "recall": float(torch.cat(kept).exp().clamp_max(1.0).mean()),
    }
