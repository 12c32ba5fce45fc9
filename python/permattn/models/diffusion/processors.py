"""The way into diffusers' attention: one registered backend, and wrapped attention processors.

A wrapped processor says which layer it runs for; diffusers' dispatcher then calls our backend with
the tensors, and the layer decides what happens. Under torch.compile an opaque operator does that
at run time: steps, bins and plans never enter a graph, so that all blocks share one.
"""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from diffusers.models.attention_dispatch import _AttentionBackendRegistry as Registry
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor, nn

BACKEND = "permattn"
_LAYER = "_permattn_layer"
_KEY = "_permattn_key"


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """One call of self-attention, as diffusers' dispatcher makes it.

    Args:
        q, k, v: [B, S, H, D].
        mask: as the processor made it.
        plain: no dropout, causality or grouped heads: nothing that a plan cannot express.
        parallel: diffusers' ParallelConfig, where context parallelism runs.
        dense: runs the call as it would have run without permattn.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    scale: float | None
    plain: bool
    parallel: Any
    dense: Callable[[], Tensor]


class Layer:
    """One self-attention layer of a transformer that is watched.

    Args:
        number: of the layer.
        run: what its attention calls do.
        dense_backend: the backend that diffusers ran before; None = the active one.
    """

    _keys = itertools.count()

    def __init__(
        self, number: int, run: Callable[[Layer, AttentionCall], Tensor], dense_backend: Any
    ) -> None:
        self.number, self.run, self.dense_backend = number, run, dense_backend
        key = next(Layer._keys)
        # On the CPU: reading it waits for nobody. A tensor: dynamo does not guard on its value.
        self.key = torch.tensor(key)
        _LAYERS[key] = self

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "a transformer with permattn in it cannot be pickled or deep-copied: call "
            "handle.remove() first (save_pretrained and state_dict work as they are)"
        )


_LAYERS: weakref.WeakValueDictionary[int, Layer] = weakref.WeakValueDictionary()


class _Entered(threading.local):
    """The layer whose processor runs in this thread."""

    layer: Layer | None = None


class _Traced:
    """The same while dynamo traces, which cannot follow thread-local attributes.

    An attribute from the start: dynamo guards on whether there is one.
    """

    def __init__(self) -> None:
        self.key: Tensor | None = None


_ENTERED = _Entered()
_TRACED = _Traced()


def mark(attention: nn.Module, layer: Layer) -> None:
    """Makes an attention module known as a layer."""
    attention.__dict__[_LAYER], attention.__dict__[_KEY] = layer, layer.key


def unmark(attention: nn.Module) -> None:
    """Forgets it."""
    for name in (_LAYER, _KEY):
        attention.__dict__.pop(name, None)


def layer_of(attention: nn.Module) -> Layer | None:
    """The layer that `mark` made of a module."""
    return attention.__dict__.get(_LAYER)


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

    @functools.wraps(stock)
    def call(self: Any, attn: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            before, _TRACED.key = _TRACED.key, attn._permattn_key  # type: ignore[assignment]
            try:
                return stock(self, attn, *args, **kwargs)
            finally:
                _TRACED.key = before
        outer, _ENTERED.layer = _ENTERED.layer, layer_of(attn)
        try:
            return stock(self, attn, *args, **kwargs)
        finally:
            _ENTERED.layer = outer

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


def _backend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    _parallel_config: Any = None,
) -> Tensor:
    """The backend that diffusers' dispatcher calls; the processor has named its layer."""
    given = {
        "query": query,
        "key": key,
        "value": value,
        "attn_mask": attn_mask,
        "dropout_p": dropout_p,
        "is_causal": is_causal,
        "scale": scale,
        "enable_gqa": enable_gqa,
        "_parallel_config": _parallel_config,
    }
    if not torch.compiler.is_compiling() or _TRACED.key is None:
        return _run(_ENTERED.layer, given)
    trained = torch.is_grad_enabled() and query.requires_grad
    if dropout_p or is_causal or enable_gqa or _parallel_config is not None or trained:
        return _run_untraced(_TRACED.key, given)
    return attention_op(query, key, value, attn_mask, _TRACED.key, scale)


def _run(layer: Layer | None, given: dict[str, Any]) -> Tensor:
    """Runs a call for its layer; without one (somebody chose our name by hand) it is dense."""
    dense = functools.partial(_dense, None if layer is None else layer.dense_backend, given)
    if layer is None:
        return dense()
    call = AttentionCall(
        given["query"],
        given["key"],
        given["value"],
        mask=given["attn_mask"],
        scale=given["scale"],
        plain=not (given["dropout_p"] or given["is_causal"] or given["enable_gqa"]),
        parallel=given["_parallel_config"],
        dense=dense,
    )
    return layer.run(layer, call)


@torch.compiler.disable
def _run_untraced(key: Tensor, given: dict[str, Any]) -> Tensor:
    return _run(_LAYERS.get(int(key)), given)


@torch.library.custom_op("permattn::diffusion_attention", mutates_args=())
def attention_op(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, key: Tensor, scale: float | None
) -> Tensor:
    """One call of the layer that `key` names, decided at run time."""
    given = {"query": q, "key": k, "value": v, "attn_mask": mask, "scale": scale}
    rest = dict.fromkeys(("dropout_p", "is_causal", "enable_gqa"), False)
    return _run(_LAYERS[int(key)], given | rest | {"_parallel_config": None}).contiguous()


@attention_op.register_fake
def _(q, k, v, mask, key, scale):
    return q.new_empty(*q.shape[:3], v.shape[3])


def _dense(backend: Any, given: dict[str, Any]) -> Tensor:
    """The call as diffusers would have run it."""
    name = Registry.get_active_backend()[0] if backend is None else AttentionBackendName(backend)
    if name == BACKEND:
        name = AttentionBackendName.NATIVE
    supported = Registry._supported_arg_names[name]
    return Registry._backends[name](**{k: v for k, v in given.items() if k in supported})


@functools.lru_cache(maxsize=1)
def backend_member() -> Any:
    """Our member of diffusers' backend names, registered on first use.

    diffusers has no public way to add one; other packages extend the enumeration alike.
    """
    member = str.__new__(AttentionBackendName, BACKEND)
    member._name_, member._value_ = BACKEND.upper(), BACKEND
    AttentionBackendName._member_map_[member._name_] = member
    AttentionBackendName._value2member_map_[BACKEND] = member
    Registry._backends[member] = _backend
    Registry._constraints[member] = []
    Registry._supported_arg_names[member] = set(inspect.signature(_backend).parameters)
    Registry._supports_context_parallel.add(BACKEND)
    return member
