"""Attention processors that say which layer they run for and end in our backend."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor

from permattn.models.diffusion.dispatch import TRACED, backend_member, running
from permattn.models.diffusion.fused import run_fused


def wrapped(processor: Any) -> Any:
    """A private copy of a processor (they may be shared) that ends in our backend."""
    port = _PORTS.get(type(processor).__name__)
    new = copy.copy(processor) if port is None else port()
    base: Any = type(new)
    new.__class__ = _wrapped_class(base)
    new._attention_backend = backend_member()
    return new


def dense_backend_of(processor: Any) -> Any:
    """What a processor runs today: a backend's name, or None for the active one."""
    if type(processor).__name__ in _PORTS:
        return AttentionBackendName.NATIVE
    return processor._attention_backend


@functools.cache
def _wrapped_class(base: Any) -> Any:
    # One class for all layers: dynamo guards on the type of a processor. The signature stays,
    # because `Attention.forward` drops arguments that it does not name.
    stock = base.__call__
    ours = backend_member()

    @functools.wraps(stock)
    def call(self: Any, attn: Any, *args: Any, **kwargs: Any) -> Any:
        if self._attention_backend is ours:
            fused = run_fused(self, base, attn, args, kwargs)
            if fused is not None:
                return fused
        if not torch.compiler.is_compiling():
            with running(attn):
                return stock(self, attn, *args, **kwargs)
        before, TRACED.key = TRACED.key, attn._permattn_key
        try:
            return stock(self, attn, *args, **kwargs)
        finally:
            TRACED.key = before

    return type(
        f"Permattn{base.__name__}",
        (base,),
        {"__call__": call, "__module__": __name__},
    )


class CogVideoXProcessor:
    """CogVideoX's attention by way of the dispatcher, which diffusers' own does not use."""

    _attention_backend: Any = None
    _parallel_config: Any = None
    _fused = False

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> tuple[Tensor, Tensor]:
        num_text = encoder_hidden_states.shape[1]
        hidden = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        batch, tokens, _ = hidden.shape
        if attention_mask is not None:
            attention_mask = attn.prepare_attention_mask(attention_mask, tokens, batch)
            attention_mask = attention_mask.view(batch, attn.heads, -1, attention_mask.shape[-1])
        if self._fused:
            projections = attn.to_qkv(hidden).chunk(3, dim=-1)
        else:
            projections = (attn.to_q(hidden), attn.to_k(hidden), attn.to_v(hidden))
        q, k, v = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in projections)
        if attn.norm_q is not None:
            q = attn.norm_q(q)
        if attn.norm_k is not None:
            k = attn.norm_k(k)
        if image_rotary_emb is not None:
            q, k = (_rotated_behind(x, num_text, image_rotary_emb) for x in (q, k))
        out = dispatch_attention_fn(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=attention_mask,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        out = attn.to_out[1](attn.to_out[0](out.flatten(2)))
        return out[:, num_text:], out[:, :num_text]


def _rotated_behind(x: Tensor, num_text: int, rotary: Any) -> Tensor:
    """x [B, H, S, D] with its vision part rotated."""
    vision: Any = apply_rotary_emb(x[:, :, num_text:], rotary)
    return torch.cat([x[:, :, :num_text], vision], dim=2)


class FusedCogVideoXProcessor(CogVideoXProcessor):
    """The same after `fuse_qkv_projections`."""

    _fused = True


# Processors that call SDPA themselves -> ours that ask the dispatcher.
_PORTS: dict[str, Callable[[], Any]] = {
    "CogVideoXAttnProcessor2_0": CogVideoXProcessor,
    "FusedCogVideoXAttnProcessor2_0": FusedCogVideoXProcessor,
}
