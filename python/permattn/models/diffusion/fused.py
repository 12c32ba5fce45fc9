"""Self-attention that leaves norm and rotation to the backend, which fuses them with permutation
and quantisation: one pass over memory.

For processors in which q and k of all tokens share one norm, per head or across heads. Where text
has a norm of its own (the double blocks of FLUX and HunyuanVideo, Qwen-Image) and in LTX-Video,
whose rotation differs from head to head, the wrapped processor does both.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers.models.normalization import RMSNorm
from torch import Tensor, nn

from permattn.models.diffusion.dispatch import PrologueForm, attend_raw, layer_of
from permattn.models.diffusion.family import version_of

Fused = Callable[..., Any]
# Of diffusers (leaf-level offload, layerwise casting) and of accelerate (sequential offload).
_HOOKS = ("_diffusers_hook", "_hf_hook")
Norms = tuple[Tensor | None, Tensor | None, float, Tensor | None, Tensor | None, float]
"""Weight, bias and eps of q's norm, and of k's."""


def run_fused(
    processor: Any, base: type, attention: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Any:
    """The processor's result with norm and rotation fused; None where the stock one has to run.

    Args:
        base: the class that was wrapped.
        args, kwargs: of the call, after the attention module.
    """
    is_stock = base.__module__.split(".")[0] in ("diffusers", "permattn")
    run = _FUSED.get(base.__name__) if is_stock else None
    if run is None or processor._parallel_config is not None:
        return None
    if torch.compiler.is_compiling():
        # Step and layer are not known here: the operator decides, and does the norm if dense.
        if torch.is_grad_enabled():
            return None
    else:
        layer = layer_of(attention)
        if layer is None or not layer.takes_prologue(layer.number):
            return None
    return run(attention, *args, **kwargs)


def _wan(
    attention: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
    rotary_emb: tuple[Tensor, Tensor] | None = None,
) -> Tensor | None:
    """Wan: RMS norm across all heads, then rotation of every token."""
    norms = _norms(attention, nn.RMSNorm, attention.to_q.out_features)
    strange = encoder_hidden_states is not None or attention_mask is not None
    if norms is None or strange or rotary_emb is None or attention.add_k_proj is not None:
        return None
    if attention.fused_projections:
        projections = attention.to_qkv(hidden_states).chunk(3, dim=-1)
    else:
        projections = _projections(attention, hidden_states)
    q, k, v = (x.unflatten(2, (attention.heads, -1)) for x in projections)
    cos, sin = _halves(*rotary_emb)
    form = PrologueForm("rms", *norms, True, cos, sin, 0)
    out = attend_raw(attention, q, k, v, form).flatten(2, 3).type_as(q)
    return attention.to_out[1](attention.to_out[0](out))


def _cogvideox(
    attention: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    *,
    fused: bool = False,
) -> tuple[Tensor, Tensor] | None:
    """CogVideoX: layer norm in every head, then rotation of the vision tokens."""
    norms = _norms(attention, nn.LayerNorm, attention.to_q.out_features // attention.heads)
    if norms is None or attention_mask is not None:
        return None
    num_text = encoder_hidden_states.shape[1]
    hidden = torch.cat([encoder_hidden_states, hidden_states], dim=1)
    if fused:
        projections = attention.to_qkv(hidden).chunk(3, dim=-1)
    else:
        projections = _projections(attention, hidden)
    q, k, v = (x.unflatten(2, (attention.heads, -1)) for x in projections)
    cos, sin = (None, None) if image_rotary_emb is None else _halves(*image_rotary_emb)
    form = PrologueForm("layer", *norms, False, cos, sin, num_text)
    out = attend_raw(attention, q, k, v, form).flatten(2)
    out = attention.to_out[1](attention.to_out[0](out))
    return out[:, num_text:], out[:, :num_text]


def _cogvideox_fused(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor] | None:
    return _cogvideox(*args, **kwargs, fused=True)


def _flux(
    attention: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
) -> Tensor | None:
    """A single block of FLUX: text and image in one sequence, RMS norm in every head."""
    norms = _norms(attention, nn.RMSNorm, attention.head_dim)
    joint = attention.added_kv_proj_dim is not None or encoder_hidden_states is not None
    if norms is None or joint or attention_mask is not None or image_rotary_emb is None:
        return None
    if attention.fused_projections:
        projections = attention.to_qkv(hidden_states).chunk(3, dim=-1)
    else:
        projections = _projections(attention, hidden_states)
    q, k, v = (x.unflatten(2, (-1, attention.head_dim)) for x in projections)
    form = PrologueForm("rms", *norms, False, *_halves(*image_rotary_emb), 0)
    return attend_raw(attention, q, k, v, form).flatten(2, 3).to(q.dtype)


def _hunyuan_video(
    attention: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor] | None:
    """A single block of HunyuanVideo: RMS norm in every head, then rotation of the video."""
    norms = _norms(attention, RMSNorm, attention.to_q.out_features // attention.heads)
    # Blocks that project text apart have norms apart; refiners see no text beside them.
    if encoder_hidden_states is None or attention.add_q_proj is not None:
        return None
    if norms is None or image_rotary_emb is None or attention.to_out is not None:
        return None
    num_vision = hidden_states.shape[1]
    hidden = torch.cat([hidden_states, encoder_hidden_states], dim=1)
    projections = _projections(attention, hidden)
    q, k, v = (x.unflatten(2, (attention.heads, -1)) for x in projections)
    form = PrologueForm("rms", *norms, False, *_halves(*image_rotary_emb), 0)
    out = attend_raw(attention, q, k, v, form, attention_mask).flatten(2, 3).to(q.dtype)
    return out[:, :num_vision], out[:, num_vision:]


_FUSED: dict[str, Fused] = {
    "WanAttnProcessor": _wan,
    "FluxAttnProcessor": _flux,
    "HunyuanVideoAttnProcessor2_0": _hunyuan_video,
    "CogVideoXProcessor": _cogvideox,
    "FusedCogVideoXProcessor": _cogvideox_fused,
}


def _projections(attention: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return attention.to_q(x), attention.to_k(x), attention.to_v(x)


def _norms(attention: Any, kind: type, width: int) -> Norms | None:
    """The norms of an attention module; None unless both are of a kind and width."""
    q, k = attention.norm_q, attention.norm_k
    for norm in (q, k):
        if type(norm) is not kind or not _is_plain(norm, width):
            return None
    q_bias, k_bias = getattr(q, "bias", None), getattr(k, "bias", None)
    return q.weight, q_bias, q.eps, k.weight, k_bias, k.eps


def _is_plain(norm: Any, width: int) -> bool:
    """Whether its weights may be read around it: no hook brings them to the device first."""
    # torch's norms call their width normalized_shape, diffusers' own dim.
    shape = getattr(norm, "normalized_shape", getattr(norm, "dim", ()))
    is_hooked = norm._forward_pre_hooks or any(hasattr(norm, hook) for hook in _HOOKS)
    return tuple(shape) == (width,) and norm.eps is not None and not is_hooked


def _halves(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """float32 [tokens, pairs] of tables in which every pair of columns holds one number twice."""
    if torch.compiler.is_compiling():
        return _every_second(cos, 0), _every_second(sin, 1)
    return _HALVES.of(cos, sin)


def _every_second(table: Tensor, first: int) -> Tensor:
    return table.flatten(0, -2)[:, first::2].float().contiguous()


class _Halves:
    """Of the tables seen last: all layers of a transformer call share one pair."""

    def __init__(self) -> None:
        self._seen: list[tuple[weakref.ref[Tensor], weakref.ref[Tensor], int, tuple]] = []

    def of(self, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        version = version_of(cos) + version_of(sin)
        alive = [e for e in self._seen if e[0]() is not None and e[1]() is not None]
        for kept_cos, kept_sin, kept_version, halves in alive:
            if kept_cos() is cos and kept_sin() is sin and kept_version == version:
                return halves
        halves = (_every_second(cos, 0), _every_second(sin, 1))
        entry = (weakref.ref(cos), weakref.ref(sin), version, halves)
        self._seen = [*alive[-3:], entry]
        return halves


_HALVES = _Halves()
