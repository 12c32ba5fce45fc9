"""The attention and mask functions that transformers calls under the name "permattn".

Registered once, when this module is imported. Only modules that a handle has marked are ever
sparse: models that share a config object with a patched one meet this code too and get plain SDPA.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from permattn.models import context
from permattn.models.layer import LayerState, attend_planned, checked_output, local_heads
from permattn.models.layout import TokenLayout

# Not with "flash", "sdpa", "flex_attention", "/", "|" or ":": transformers reads meaning into them.
NAME = "permattn"

# Where a patched attention module keeps its LayerState.
LAYER = "_permattn_layer"

# The keyword that carries a layout through the layers when checkpointing may replay them.
LAYOUT_KEYWORD = "permattn_layout"

NO_LAYOUT = "no layout (torch.compile of the whole model, or a decoder called past its hooks)"

FOUR_D_MASK = "4-D mask (sliding window, packed or bidirectional tokens)"

# Arguments with a meaning that plans do not carry. A set one sends the call to SDPA untouched.
_UNSUPPORTED = (
    "sliding_window",
    "position_bias",
    "softcap",
    "s_aux",
    "sinks",
    "cache",
    "cu_seq_lens_q",
    "head_mask",
    "indices",
)

DENSE_LAYER = "dense layer (config)"

OBSERVED = "output of the observer"

_keys = itertools.count(1)
_modules: weakref.WeakValueDictionary[int, torch.nn.Module] = weakref.WeakValueDictionary()


def mark_layer(module: torch.nn.Module, **state: Any) -> None:
    """Makes an attention module sparse; the keywords are `LayerState`'s."""
    number = next(_keys)
    module.__dict__[LAYER] = LayerState(key=torch.tensor(number), **state)
    _modules[number] = module


def unmark_layer(module: torch.nn.Module) -> None:
    """Undoes `mark_layer`."""
    layer = module.__dict__.pop(LAYER, None)
    if layer is not None:
        _modules.pop(int(layer.key), None)


def compact_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    **kwargs: Any,
) -> Tensor | None:
    """The mask of a plain causal prefill in at most B x S values; anything else is SDPA's 4-D mask.

    Compact masks exist only inside a hooked pass or a wrapped `prepare_inputs_for_generation`:
    another model may share the config object, and it would misread them.

    Returns: None (no padding), bool [B, q_offset + q_length], or SDPA's mask.
    """
    preparing = context.is_preparing()
    plain_causal = (
        mask_function is causal_mask_function
        and local_size is None
        and not use_vmap
        and kv_offset == 0
        and q_length > 1
        and (attention_mask is None or attention_mask.shape[-1] >= q_offset + q_length)
    )
    if plain_causal and not torch.compiler.is_compiling() and (preparing or context.in_prefill()):
        # A static cache is longer than what it holds.
        live = int(q_offset) + q_length
        padding = None if attention_mask is None else attention_mask[:, :live].bool()
        if preparing:
            # generate() may compile the pass that uses this mask, and hooks do not run then: the
            # mask's width is what tells the offset.
            if padding is None:
                return torch.ones(batch_size, live, dtype=torch.bool, device=kwargs.get("device"))
            return padding
        return None if padding is None or bool(padding.all()) else padding
    return sdpa_mask(
        batch_size,
        q_length,
        kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        use_vmap=use_vmap,
        **kwargs,
    )


def permattn_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    permattn_layout: TokenLayout | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Sparse attention where the layer, the pass and the mask allow it, SDPA everywhere else.

    Args:
        query: [B, Hq, Sq, D].
        key, value: [B, Hkv, Skv, D] and [B, Hkv, Skv, Dv], the cache's rows included.
        attention_mask: None, bool [B, q_offset + Sq] (`compact_mask`) or SDPA's 4-D mask.
        permattn_layout: the layout, where it travels with the call (training).

    Returns: (out [B, Sq, Hq, Dv], None).
    """
    layer: LayerState | None = getattr(module, LAYER, None)
    compiling = torch.compiler.is_compiling()
    layout = permattn_layout
    if layout is None and layer is not None and not compiling:
        layout = context.current_layout(layer.owner)
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    reason = _why_dense_call(query, causal, module.training and dropout, kwargs)
    needs_grad = torch.is_grad_enabled() and query.requires_grad
    if compiling and needs_grad and attention_mask is not None and attention_mask.ndim != 2:
        # Known to be dense: SDPA may as well be traced.
        reason = reason or FOUR_D_MASK
    if layer is not None and layer.forced is not None:
        reason = reason or layer.forced
    if layer is not None and layer.always_dense and (compiling or layer.watch.observer is None):
        # An observer is to see these calls too; the others need not go further.
        reason = reason or DENSE_LAYER
    if layer is None or reason is not None:
        if layer is not None and reason is not None and not compiling:
            layer.counts.count_dense(reason)
        out = dense_attention(
            module, query, key, value, attention_mask, layout, scaling, dropout, is_causal, **kwargs
        )
        return out, None
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    if not compiling:
        return run_layer(module, query, key, value, attention_mask, layout, scale), None
    if needs_grad:
        # The opaque operator has no gradient; a break in the graph has one, and stays sparse.
        return _run_layer_uncompiled(module, query, key, value, attention_mask, layout, scale), None
    out = torch.ops.permattn.prefill_attention(query, key, value, attention_mask, layer.key, scale)
    return out, None


def run_layer(
    module: torch.nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    layout: TokenLayout | None,
    scale: float,
) -> Tensor:
    """Plans and attends, or attends densely and counts why: [B, Sq, Hq, Dv]."""
    layer: LayerState = getattr(module, LAYER)
    reason = _why_dense_pass(q, k, mask, layout)
    if reason is None and layout is not None and layer.watch.observer is not None:
        live_k, live_v = k[:, :, : layout.kv_len], v[:, :, : layout.kv_len]
        seen = layer.watch.observer(layer.index, q, live_k, live_v, layout, scale, module)
        if isinstance(seen, Tensor):
            layer.counts.count_dense(OBSERVED)
            return checked_output(seen, q, v)
    reason = reason or _why_dense_config(layer, q)
    if reason is not None or layout is None:
        layer.counts.count_dense(reason or NO_LAYOUT)
        return dense_attention(module, q, k, v, mask, layout, scale, 0.0, None)
    # A static cache's rows past the live ones are not keys.
    k, v = k[:, :, : layout.kv_len], v[:, :, : layout.kv_len]
    heads = local_heads(module, layer.heads, q.shape[1])
    out = attend_planned(layer, q, k, v, layout, heads, scale)
    layer.counts.count_sparse()
    return out


@torch.compiler.disable
def _run_layer_uncompiled(*args: Any) -> Tensor:
    return run_layer(*args)


@torch.library.custom_op("permattn::prefill_attention", mutates_args=())
def _prefill_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, key: Tensor, scale: float
) -> Tensor:
    """Opaque to torch.compile: layer and layout are read when it runs, so no layout recompiles."""
    module = _modules[int(key)]
    layout = context.current_layout(getattr(module, LAYER).owner)
    return run_layer(module, q, k, v, mask, layout, scale).contiguous()


@_prefill_attention.register_fake
def _(q, k, v, mask, key, scale):
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[-1])


def dense_attention(
    module: torch.nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    layout: TokenLayout | None,
    scaling: float | None,
    dropout: float,
    is_causal: bool | None,
    **kwargs: Any,
) -> Tensor:
    """transformers' own SDPA function; compact masks are spelled out first: [B, Sq, Hq, Dv]."""
    sq = q.shape[2]
    offset = 0
    if layout is not None and sq != layout.q_len:
        # The model dropped tokens on its way: the cache of this layer tells the offset.
        layout, offset = None, k.shape[2] - sq
    if mask is not None and mask.ndim == 2 and layout is not None and not layout.is_padded:
        mask = None
    if mask is not None and mask.ndim == 2:
        offset = mask.shape[1] - sq
    elif mask is None and layout is not None:
        offset = layout.q_offset
    if sq > 1 and (mask is None or mask.ndim == 2):
        if mask is not None or layout is not None:
            k, v = k[:, :, : offset + sq], v[:, :, : offset + sq]
        if mask is not None or offset:
            causal = torch.ones(sq, offset + sq, dtype=torch.bool, device=q.device).tril(offset)
            mask = causal[None, None] if mask is None else causal & mask[:, None, None].bool()
    out, _ = sdpa_attention_forward(
        module, q, k, v, mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
    )
    return out


def _why_dense_call(
    query: Tensor,
    causal: bool,
    dropout: float | bool,
    keywords: dict[str, Any],
) -> str | None:
    """Why this call must be dense, from facts that torch.compile may specialise on."""
    if not causal:
        return "not causal"
    if dropout:
        return "attention dropout"
    if query.shape[2] == 1:
        return "decode step (one query)"
    for name in _UNSUPPORTED:
        if keywords.get(name) is not None:
            return f"{name} is set"
    return None


def _why_dense_config(layer: LayerState, q: Tensor) -> str | None:
    """Why the config wants this call dense."""
    if layer.always_dense:
        return DENSE_LAYER
    return "q_len below min_q_len" if q.shape[2] < layer.min_q_len else None


def _why_dense_pass(
    q: Tensor, k: Tensor, mask: Tensor | None, layout: TokenLayout | None
) -> str | None:
    """Why this pass must be dense, from facts of the pass."""
    if layout is None:
        return NO_LAYOUT
    if mask is not None and mask.ndim != 2:
        return FOUR_D_MASK
    if layout.dense_reason is not None:
        return layout.dense_reason
    if layout.has_gaps:
        return "padding between tokens"
    if q.shape[2] != layout.q_len or k.shape[2] < layout.kv_len:
        return "queries or keys do not match the layout"
    return None


AttentionInterface.register(NAME, permattn_attention)
AttentionMaskInterface.register(NAME, compact_mask)
