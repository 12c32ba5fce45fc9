"""The public calls: validate once, choose a backend, run the operator."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from permattn.backends import AUTO_ORDER, resolve
from permattn.core.packing import pack_plan
from permattn.core.plan import AttnPlan
from permattn.core.problem import Problem
from permattn.core.prologue import Prologue, pack_prologue
from permattn.ops import register_flop_formulas, sparse_attention_op

Pattern = AttnPlan | Callable[..., AttnPlan]


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: AttnPlan,
    *,
    scale: float | None = None,
    backend: str = "auto",
    prologue: Prologue | None = None,
) -> Tensor:
    """Attention of the (query, key) pairs that a plan lists, under one softmax.

    Args:
        q: [B, Hq, Sq, D], floating; any strides, last one 1.
        k: [B, Hkv, Skv, D], same dtype and device; Hq % Hkv == 0.
        v: [B, Hkv, Skv, Dv], same dtype and device.
        plan: made for Sq queries and Skv keys, on the same device.
        scale: multiplies q k^T; None = 1 / sqrt(D).
        backend: "auto", "cuda", "triton", "cpu" or "reference". A named backend never falls back.
        prologue: norm and rotary embedding that q and k still have to go through; a backend does it
            in the pass that permutes and quantises.

    Returns: [B, Hq, Sq, Dv] in q's dtype. A query that sees no key gets 0.

    Raises:
        ValueError: shapes, devices, plan or scale that do not fit; names what it got and wants.
        TypeError: a dtype that is not floating, or differs between q, k and v.
        NotImplementedError: no backend (or not the named one) can run it; lists why.

    Invariants: differentiable in q, k and v. Inputs are never modified. Two runs are bit-identical.
    """
    return sparse_attention_with_lse(
        q, k, v, plan, scale=scale, backend=backend, prologue=prologue
    )[0]


def sparse_attention_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: AttnPlan,
    *,
    scale: float | None = None,
    backend: str = "auto",
    prologue: Prologue | None = None,
) -> tuple[Tensor, Tensor]:
    """`sparse_attention`, and the log-sum-exp of the scaled scores of every query.

    Args, Raises, Invariants: see `sparse_attention`. Both results are differentiable.

    Returns: (out [B, Hq, Sq, Dv], lse [B, Hq, Sq], natural log; -inf where no key is
    seen). lse is float32 (float64 for float64 inputs).
    """
    _check_tensors(q, k, v)
    _check_plan(q, k, plan)
    scale = _check_scale(scale, q.shape[3])
    q, k, v = (x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous() for x in (q, k, v))
    _check_prologue(q, k, prologue)
    trained = [q, k, v, *pack_prologue(prologue)[0]]
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in trained)
    if needs_grad and prologue is not None:
        q, k = (x if t is None else t(x).to(x.dtype) for x, t in ((q, prologue.q), (k, prologue.k)))
        prologue = None
    name = resolve(Problem.of(q, k, v, plan, needs_grad=needs_grad), backend)
    tensors, ints = pack_plan(plan)
    if not torch.compiler.is_compiling():
        register_flop_formulas()
    return sparse_attention_op(q, k, v, tensors, ints, *pack_prologue(prologue), scale, name)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    pattern: Pattern | None = None,
    backend: str = "auto",
) -> Tensor:
    """torch's `scaled_dot_product_attention`, argument by argument, with an optional pattern.

    Args:
        query: [..., Hq, Sq, D] (any leading axes, as in torch).
        key, value: [..., Hkv, Skv, D] and [..., Hkv, Skv, Dv].
        attn_mask: bool (True = take part) or float (added), broadcast to [..., Hq, Sq, Skv]. An
            arbitrary mask has no block structure to use: torch's own kernel runs it.
        dropout_p: must be 0.
        is_causal: upper-left, as in torch: query i sees keys 0..i, whatever the lengths.
        scale: None = 1 / sqrt(D).
        enable_gqa: allow Hkv < Hq (Hq % Hkv == 0).
        pattern: None = dense; an `AttnPlan`; or a function (q, k, is_causal=...) -> AttnPlan that
            gets 4-D tensors. A plan carries its own causality: pass is_causal=False beside one.
        backend: see `sparse_attention`.

    Returns: [..., Hq, Sq, Dv].

    Raises:
        ValueError: what torch refuses; `is_causal` with `attn_mask` or with a plan.
        NotImplementedError: dropout, or a pattern together with attn_mask.
    """
    if dropout_p != 0.0:
        raise NotImplementedError(f"dropout_p: only 0.0 is supported, got {dropout_p}")
    if attn_mask is not None and is_causal:
        raise ValueError("is_causal: cannot be True when attn_mask is given (as in torch)")
    if attn_mask is not None:
        if pattern is not None:
            raise NotImplementedError("attn_mask cannot be combined with a pattern")
        if backend != "auto":
            raise NotImplementedError(f"backend {backend!r} cannot run an arbitrary attn_mask")
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask, scale=scale, enable_gqa=enable_gqa
        )
    if min(query.dim(), key.dim(), value.dim()) < 2:
        raise ValueError(
            "query, key, value: want at least 2 axes, got "
            f"{query.dim()}, {key.dim()}, {value.dim()}"
        )
    q, k, v, leading = _to_four_axes(query, key, value, enable_gqa)
    if isinstance(pattern, AttnPlan):
        if is_causal:
            raise ValueError("is_causal: a plan carries its own causality; pass is_causal=False")
        plan = pattern
    elif pattern is not None:
        plan = pattern(q, k, is_causal=is_causal)
    else:
        from permattn.patterns.dense import plan_dense

        plan = plan_dense(q.shape[2], k.shape[2], causal=is_causal, device=q.device)
    out = sparse_attention(q, k, v, plan, scale=scale, backend=backend)
    return out if len(leading) == 2 else out.reshape(*leading, *out.shape[2:])


def permute_tokens(x: Tensor, token_of_slot: Tensor) -> Tensor:
    """Rows of x in slot order; zeros in holes.

    Args:
        x: [B, H, S, D].
        token_of_slot: int32 [Bx, Hx, num_slots] (see `Permutation`); -1 = hole.

    Returns: [B, H, num_slots, D]. `permute_tokens(y, perm.slot_of_token)` puts the rows back.

    Raises:
        ValueError: x is not 4-D, token_of_slot not 3-D, or their leading axes do not broadcast.
    """
    if x.dim() != 4 or token_of_slot.dim() != 3:
        raise ValueError(
            "permute_tokens: wants x [B, H, S, D] and token_of_slot [Bx, Hx, n], got "
            f"{list(x.shape)} and {list(token_of_slot.shape)}"
        )
    for axis, name in ((0, "batch"), (1, "head")):
        if token_of_slot.shape[axis] not in (1, x.shape[axis]):
            raise ValueError(
                f"token_of_slot: {name} axis must be 1 or {x.shape[axis]}, "
                f"got {token_of_slot.shape[axis]}"
            )
    token = token_of_slot.expand(x.shape[0], x.shape[1], -1)
    row = token.clamp_min(0).long()[..., None].expand(*token.shape, x.shape[3])
    return torch.where((token >= 0)[..., None], x.gather(2, row), 0)


def check_backend(backend: str) -> None:
    """Raises ValueError unless it is "auto" or the name of a backend; what it can do is open."""
    if backend not in ("auto", *AUTO_ORDER):
        raise ValueError(f"backend: wants one of {['auto', *AUTO_ORDER]}, got {backend!r}")


def _check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise ValueError(f"{name}: wants 4 axes [B, H, S, D], got shape {list(x.shape)}")
        if not x.dtype.is_floating_point:
            raise TypeError(f"{name}: wants a floating dtype, got {x.dtype}")
        if x.dtype != q.dtype:
            raise TypeError(f"{name}: wants q's dtype {q.dtype}, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name}: wants q's device {q.device}, got {x.device}")
        if x.shape[0] != q.shape[0]:
            raise ValueError(f"{name}: wants q's batch size {q.shape[0]}, got {x.shape[0]}")
    if k.shape[3] != q.shape[3]:
        raise ValueError(f"k: wants q's head dim {q.shape[3]}, got {k.shape[3]}")
    if v.shape[1] != k.shape[1] or v.shape[2] != k.shape[2]:
        raise ValueError(
            f"v: wants k's heads and length {list(k.shape[1:3])}, got {list(v.shape[1:3])}"
        )
    if q.shape[3] < 1 or v.shape[3] < 1:
        raise ValueError(f"head dim: wants >= 1, got D = {q.shape[3]}, Dv = {v.shape[3]}")
    hq, hkv = q.shape[1], k.shape[1]
    if hkv == 0 or hq == 0 or hq % hkv:
        raise ValueError(f"k: Hq % Hkv must be 0, got Hq = {hq}, Hkv = {hkv}")


def _check_plan(q: Tensor, k: Tensor, plan: AttnPlan) -> None:
    if not isinstance(plan, AttnPlan):
        raise TypeError(f"plan: wants an AttnPlan, got {type(plan).__name__}")
    if plan.num_q_tokens != q.shape[2]:
        raise ValueError(f"plan: made for Sq = {plan.num_q_tokens}, got q of length {q.shape[2]}")
    if plan.num_kv_tokens != k.shape[2]:
        raise ValueError(f"plan: made for Skv = {plan.num_kv_tokens}, got k of length {k.shape[2]}")
    if plan.device != q.device:
        raise ValueError(f"plan: lies on {plan.device}, q on {q.device}; use plan.to(device)")
    for i, part in enumerate(plan.parts):
        for x in part.tensors():
            for axis, want, what in ((0, q.shape[0], "batch"), (1, q.shape[1], "head")):
                if x.shape[axis] not in (1, want):
                    raise ValueError(
                        f"plan.parts[{i}]: {what} axis must be 1 or {want}, got {x.shape[axis]}"
                    )


def _check_prologue(q: Tensor, k: Tensor, prologue: Prologue | None) -> None:
    if prologue is None:
        return
    if not isinstance(prologue, Prologue):
        raise TypeError(f"prologue: wants a Prologue or None, got {type(prologue).__name__}")
    for name, x, transform in (("q", q, prologue.q), ("k", k, prologue.k)):
        if transform is not None:
            transform.check(name, x)


def _check_scale(scale: float | None, head_dim: int) -> float:
    if scale is None:
        return head_dim**-0.5
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"scale: wants a float or None, got {type(scale).__name__}")
    if not math.isfinite(scale):
        raise ValueError(f"scale: wants a finite number, got {scale}")
    return float(scale)


def _to_four_axes(
    query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool
) -> tuple[Tensor, Tensor, Tensor, tuple[int, ...]]:
    """[..., H, S, D] as [B, H, S, D], leading axes broadcast as in torch; and the result's."""
    tensors = [x[None] if x.dim() == 2 else x for x in (query, key, value)]
    shapes = [x.shape for x in tensors]
    try:
        batch = torch.broadcast_shapes(*(x.shape[:-3] for x in tensors))
        if enable_gqa:
            # Query heads stand in groups; only key and value share theirs.
            heads = [shapes[0][-3], *2 * torch.broadcast_shapes(*(x[-3:-2] for x in shapes[1:]))]
        else:
            heads = 3 * list(torch.broadcast_shapes(*(x[-3:-2] for x in shapes)))
    except RuntimeError:
        raise ValueError(
            "query, key, value: leading axes must broadcast (heads apart only with "
            f"enable_gqa=True), got {[list(x.shape) for x in (query, key, value)]}"
        ) from None
    flat = [
        x.expand(*batch, h, *x.shape[-2:]).reshape(math.prod(batch), h, *x.shape[-2:])
        if len(batch) != 1
        else x.expand(*batch, h, *x.shape[-2:])
        for x, h in zip(tensors, heads, strict=True)
    ]
    deepest = max(query.dim(), key.dim(), value.dim())
    leading = (*batch, heads[0]) if deepest > 2 else ()
    return flat[0], flat[1], flat[2], leading
