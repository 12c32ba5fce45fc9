"""Ulysses sequence parallelism of diffusers, around sparse attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffusers.models.attention_dispatch import _templated_context_parallel_attention
from torch import Tensor

from permattn.models.diffusion.dispatch import AttentionCall

Local = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def context_of(parallel: Any) -> Any:
    """The context-parallel part of a ParallelConfig; None where none runs."""
    return getattr(parallel, "context_parallel_config", None)


def why_not_ulysses(context: Any, num_heads: int) -> str | None:
    """Why a plan cannot run under this context parallelism; None = it can."""
    if context.ring_degree > 1:
        return (
            "ring attention gives a rank a part of the keys, and a plan wants them all: use "
            "ulysses_degree"
        )
    if context.ulysses_anything:
        return "ulysses_anything cuts tokens unevenly: use plain Ulysses"
    if num_heads % context.ulysses_degree:
        return f"{num_heads} heads do not divide by ulysses_degree {context.ulysses_degree}"
    return None


def heads_of_rank(context: Any, num_heads: int) -> tuple[int, int]:
    """(first, one past the last) head of this rank."""
    local = num_heads // context.ulysses_degree
    rank = context._ulysses_mesh.get_local_rank()
    return rank * local, (rank + 1) * local


def run_ulysses(call: AttentionCall, local: Local) -> Tensor:
    """All tokens of a share of the heads, attention by `local`, and back.

    Args:
        call: with the tokens of this rank, [B, S / ranks, H, D].
        local: (q, k, v, mask) -> out, all [B, S, H / ranks, D]; it runs without gradients.
    """

    def forward(_: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *__: Any, **___: Any):
        return local(q, k, v, mask)

    return _templated_context_parallel_attention(
        call.q,
        call.k,
        call.v,
        call.mask,
        scale=call.scale,
        forward_op=forward,
        backward_op=None,
        _parallel_config=call.parallel,
    )
