"""The planners: one pattern for all heads, or one per head in one plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from permattn.core import AttnPart, AttnPlan, Segment
from permattn.patterns.mminference.config import HeadPattern
from permattn.patterns.mminference.lines import choose_lines
from permattn.patterns.mminference.parts import no_parts, stream_parts
from permattn.patterns.mminference.probing import Prober
from permattn.patterns.mminference.prompt import describe_prompt
from permattn.patterns.mminference.streams import describe_streams


def plan_prefill(
    q: Tensor,
    k: Tensor,
    rows: Sequence[Sequence[Segment]] | None,
    heads: Sequence[HeadPattern],
    *,
    left_pad: Sequence[int] | None = None,
    right_pad: Sequence[int] | None = None,
) -> AttnPlan:
    """Plans a causal prefill, every head by its own pattern, all heads in one plan.

    Source: MMInference, sections 3.1-3.3; MInference (2407.02490) for A-shape, vertical-slash and
    block-sparse.

    Args:
        q: [B, Hq, Sq, D] after RoPE: the last Sq of the Skv positions.
        k: [B, Hkv, Skv, D] after RoPE.
        rows: segments of every batch row, in key positions; None = text only.
        heads: Hq patterns.
        left_pad, right_pad: padding keys of every batch row. Padding queries give 0.

    Returns: a plan on q's device. Causality is lower-right: query i sees keys 0..i + Skv - Sq.

    Raises:
        ValueError: sizes that disagree, segments that overlap or do not fit; names the argument.
        TypeError: a dtype or a segment of the wrong kind.

    Invariants: parts are disjoint; every valid query sees at least itself; nothing of size Sq x Skv
    is made; nothing waits for the device.
    """
    for name, x in (("q", q), ("k", k)):
        if x.dim() != 4:
            raise ValueError(f"{name}: wants [B, H, S, D], got shape {list(x.shape)}")
    batch, num_heads, num_q, head_dim = q.shape
    num_kv = k.shape[2]
    if (k.shape[0], k.shape[3], k.device) != (batch, head_dim, q.device):
        raise ValueError(
            f"k: wants q's batch, head dim and device ({batch}, {head_dim}, {q.device}), "
            f"got {k.shape[0]}, {k.shape[3]}, {k.device}"
        )
    if num_q > num_kv:
        raise ValueError(f"q: wants at most as many rows as keys ({num_kv}), got {num_q}")
    if num_heads % max(k.shape[1], 1) or k.shape[1] == 0:
        raise ValueError(f"k: Hq % Hkv must be 0, got Hq = {num_heads}, Hkv = {k.shape[1]}")
    if len(heads) != num_heads:
        raise ValueError(f"heads: wants {num_heads} patterns, got {len(heads)}")
    rows = [()] * batch if rows is None else rows
    for name, value in (("rows", rows), ("left_pad", left_pad), ("right_pad", right_pad)):
        if value is not None and len(value) != batch:
            raise ValueError(f"{name}: wants one entry per batch row ({batch}), got {len(value)}")
    prompt = describe_prompt(
        tuple(tuple(r) for r in rows),
        num_q,
        num_kv,
        tuple(left_pad or [0] * batch),
        tuple(right_pad or [0] * batch),
        q.device,
    )
    parts: list[AttnPart] = []
    with torch.no_grad():
        prober = Prober(q.detach(), k.detach(), prompt, heads)
        for stream in describe_streams(prompt, tuple(heads)):
            lines = choose_lines(prober, stream)
            parts += stream_parts(prompt, stream, lines, prober.q, prober.k)
    return AttnPlan(tuple(parts) or (no_parts(prompt),), validate=False)


def plan_a_shape(
    num_tokens: int,
    *,
    sink: int = 128,
    local: int = 3968,
    num_kv_tokens: int | None = None,
    device: torch.device | str | None = None,
) -> AttnPlan:
    """The first `sink` keys and the last `local` ones.

    Source: StreamingLLM's A-shape as used by MInference (2407.02490), section 3.1.

    Args:
        num_tokens: Sq.
        num_kv_tokens: Skv; None = Sq.
    """
    head = HeadPattern("a_shape", sink=sink, local=local)
    return _static(num_tokens, num_kv_tokens, head, device)


def plan_tri_shape(
    num_tokens: int,
    *,
    sink: int = 128,
    local: int = 3968,
    last: int = 100,
    num_kv_tokens: int | None = None,
    device: torch.device | str | None = None,
) -> AttnPlan:
    """A-shape, and `last` dense rows at the end.

    Source: the Tri-shape of SCBench; MMInference, Table 4.
    """
    head = HeadPattern("tri_shape", sink=sink, local=local, last=last)
    return _static(num_tokens, num_kv_tokens, head, device)


def plan_vertical_slash(
    q: Tensor, k: Tensor, *, vertical: int = 1000, slash: int = 64, local: int = 100, sink: int = 30
) -> AttnPlan:
    """The strongest columns and diagonals of the last 64 queries.

    Source: MInference (2407.02490), Algorithm 2. Deviation: a diagonal covers whole granules of 16
    keys, the window `local` replaces the forced nearest diagonals.
    """
    head = HeadPattern("vertical_slash", vertical=vertical, slash=slash, local=local, sink=sink)
    return plan_prefill(q, k, None, [head] * q.shape[1])


def plan_grid_prefill(
    q: Tensor,
    k: Tensor,
    segments: Sequence[Segment] | Sequence[Sequence[Segment]],
    config: HeadPattern | None = None,
) -> AttnPlan:
    """Grid lines whose stride and phase are found online, for every head.

    Source: MMInference, Algorithms 1 and 5.

    Args:
        q, k: see `plan_prefill`.
        segments: of one prompt (shared by all batch rows), or one sequence per batch row.
        config: budgets and flags; its `pattern` is taken as "grid".
    """
    head = replace(config or HeadPattern(), pattern="grid")
    shared = all(not isinstance(s, (list, tuple)) for s in segments)
    rows = [segments] * q.shape[0] if shared else segments
    return plan_prefill(q, k, rows, [head] * q.shape[1])  # type: ignore[arg-type]


def _static(
    num_tokens: int,
    num_kv_tokens: int | None,
    head: HeadPattern,
    device: torch.device | str | None,
) -> AttnPlan:
    """A plan that no data decides, shared by all batch rows and heads."""
    num_kv = num_tokens if num_kv_tokens is None else num_kv_tokens
    if num_tokens < 0 or num_kv < num_tokens:
        raise ValueError(f"num_tokens: wants 0 <= Sq <= Skv, got Sq = {num_tokens}, Skv = {num_kv}")
    q, k = (
        torch.empty(1, 1, num_tokens, 1, device=device),
        torch.empty(1, 1, num_kv, 1, device=device),
    )
    return plan_prefill(q, k, None, [head])
