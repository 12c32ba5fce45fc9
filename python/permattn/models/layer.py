"""One patched attention layer: what it knows, and how it plans and attends."""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from permattn.api import sparse_attention
from permattn.core import AttnPlan
from permattn.models.layout import TokenLayout
from permattn.patterns.mminference import HeadPattern

Planner = Callable[..., AttnPlan]

# Called as (layer, q, k, v, layout, scale, module); a returned tensor [B, Sq, Hq, Dv] is the
# attention output that the layer goes on with.
Observer = Callable[[int, Tensor, Tensor, Tensor, TokenLayout, float, torch.nn.Module], Any]


class NotCopyable:
    """Holds hooks of one model instance: copies and pickles would act on the wrong one."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "a patched model cannot be pickled or deep-copied: call permattn.unpatch(model) first "
            "(save_pretrained and state_dict work as they are)"
        )


class CallCounts:
    """Attention calls of one handle, counted from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.sparse = 0
        self.no_labels = 0
        self.dense_reasons: Counter[str] = Counter()

    def count_sparse(self) -> None:
        """One call ran sparse."""
        with self._lock:
            self.sparse += 1

    def count_dense(self, reason: str) -> None:
        """One call ran dense, and why."""
        with self._lock:
            self.dense_reasons[reason] += 1

    def count_no_labels(self) -> None:
        """One pass came without anything that tells text from video."""
        with self._lock:
            self.no_labels += 1


class Watch:
    """What looks on while a model runs; shared by its layers. None = nothing does."""

    observer: Observer | None = None


@dataclass(eq=False)
class LayerState(NotCopyable):
    """What the attention function knows about one patched layer.

    Args:
        owner: key of the handle's entries in `context`.
        heads: one pattern per query head, globally numbered.
        heads_per_pass: query heads planned and attended at a time; None = all.
        forced: why this layer is dense whatever the config says; None = it is not.
        key: a 0-dim CPU tensor: compiled graphs take it as an input, where a plain integer would
            become a guard and compile every layer anew.
        report_plan: called with (layer, plan) after planning.
        watch: where an observer may stand.
    """

    owner: object
    index: int
    heads: tuple[HeadPattern, ...]
    min_q_len: int
    planner: Planner
    backend: str
    counts: CallCounts
    key: Tensor
    report_plan: Callable[[int, AttnPlan], None]
    watch: Watch = field(default_factory=Watch)
    heads_per_pass: int | None = None
    forced: str | None = None

    @property
    def always_dense(self) -> bool:
        """Whether the config leaves nothing to plan."""
        return all(head.is_dense for head in self.heads)


def attend_planned(
    layer: LayerState,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: TokenLayout,
    heads: tuple[HeadPattern, ...],
    scale: float,
) -> Tensor:
    """Sparse attention, `heads_per_pass` query heads after each other.

    Args:
        q, k, v: [B, Hq, Sq, D] and [B, Hkv, Skv, D or Dv] of this rank; sliced, never copied.
        heads: the patterns of these query heads.

    Returns: [B, Sq, Hq, Dv].
    """
    num_kv_heads = k.shape[1]
    group = q.shape[1] // num_kv_heads
    step = num_kv_heads
    if layer.heads_per_pass is not None:
        step = max(layer.heads_per_pass // group, 1)
    if step >= num_kv_heads:
        return _attend_heads(layer, q, k, v, layout, heads, scale)
    out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[-1])
    for first in range(0, num_kv_heads, step):
        kv = slice(first, first + step)
        mine = slice(first * group, (first + step) * group)
        out[:, :, mine] = _attend_heads(
            layer, q[:, mine], k[:, kv], v[:, kv], layout, heads[mine], scale
        )
    return out


def _attend_heads(
    layer: LayerState,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: TokenLayout,
    heads: tuple[HeadPattern, ...],
    scale: float,
) -> Tensor:
    # Planners probe with 1 / sqrt(D); a model with another scale is probed with its own.
    factor = scale * q.shape[-1] ** 0.5
    with torch.no_grad():
        plan = layer.planner(
            q if math.isclose(factor, 1.0, rel_tol=1e-6) else q * factor,
            k,
            layout.rows,
            heads,
            left_pad=layout.left_pad,
            right_pad=layout.right_pad,
        )
    layer.report_plan(layer.index, plan)
    out = sparse_attention(q, k, v, plan, scale=scale, backend=layer.backend)
    return out.transpose(1, 2)


def local_heads(
    module: torch.nn.Module, heads: Sequence[HeadPattern], num_local: int
) -> tuple[HeadPattern, ...]:
    """The patterns of this rank's query heads under tensor parallelism; all of them without.

    Raises:
        RuntimeError: heads are split in a way that does not tell which ones are here.
    """
    if num_local == len(heads):
        return tuple(heads)
    if len(set(heads)) == 1:
        return (heads[0],) * num_local
    weight = getattr(getattr(module, "q_proj", None), "weight", None)
    mesh = getattr(weight, "device_mesh", None)
    if mesh is None:
        raise RuntimeError(
            f"config: layer has {len(heads)} head patterns, got {num_local} heads and no sharded "
            "q_proj that tells which; use the same pattern for every head"
        )
    per_rank = -(-len(heads) // mesh.size())
    first = mesh.get_local_rank() * per_rank
    mine = tuple(heads[first : first + per_rank])
    if len(mine) != num_local:
        raise RuntimeError(
            f"config: rank {mesh.get_local_rank()} of {mesh.size()} wants {len(mine)} of "
            f"{len(heads)} heads, got {num_local}"
        )
    return mine


def checked_output(out: Tensor, q: Tensor, v: Tensor) -> Tensor:
    """What an observer returned. Raises ValueError unless it can stand for the attention output."""
    want = (q.shape[0], q.shape[2], q.shape[1], v.shape[-1])
    if out.shape != want or out.dtype != q.dtype or out.device != q.device:
        raise ValueError(
            f"observer: wants None or a tensor [B, Sq, Hq, Dv] = {list(want)} of {q.dtype} on "
            f"{q.device}, got {list(out.shape)} of {out.dtype} on {out.device}"
        )
    return out
