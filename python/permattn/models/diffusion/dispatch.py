"""The way into diffusers' attention: one registered backend, and what its calls do.

A processor names the layer that it runs for; diffusers' dispatcher then calls our backend with the
tensors, and the layer decides what happens. Under torch.compile an opaque operator does that at
run time: steps, bins and plans never enter a graph, so that all blocks share one.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from diffusers.models.attention_dispatch import AttentionBackendName
from diffusers.models.attention_dispatch import _AttentionBackendRegistry as Registry
from torch import Tensor, nn

from permattn.core.prologue import Norm, Prologue, RowTransform

BACKEND = "permattn"
_LAYER = "_permattn_layer"
_KEY = "_permattn_key"


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """One call of self-attention, as diffusers' dispatcher makes it.

    Args:
        q, k, v: [B, S, H, D]; q and k before `prologue`, where there is one.
        mask: as the processor made it.
        plain: no dropout, causality or grouped heads: nothing that a plan cannot express.
        parallel: diffusers' ParallelConfig, where context parallelism runs.
        dense_of: runs it as it would have run without permattn, given q and k after the prologue.
        prologue: norm and rotation that are still to be done.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    scale: float | None
    plain: bool
    parallel: Any
    dense_of: Callable[[Tensor, Tensor], Tensor]
    prologue: Prologue | None = None

    def after_prologue(self) -> AttentionCall:
        """The call with norm and rotation done."""
        if self.prologue is None:
            return self
        q, k = _after(self.q, self.prologue.q), _after(self.k, self.prologue.k)
        return replace(self, q=q, k=k, prologue=None)

    def dense(self) -> Tensor:
        """What diffusers would have computed."""
        done = self.after_prologue()
        return self.dense_of(done.q, done.k)


def _after(x: Tensor, transform: RowTransform | None) -> Tensor:
    """x [B, S, H, D] transformed, in its own dtype."""
    if transform is None:
        return x
    return transform(x.transpose(1, 2)).transpose(1, 2).to(x.dtype)


class Layer:
    """One self-attention layer of a transformer that is watched.

    Args:
        number: of the layer.
        run: what its attention calls do.
        dense_backend: the backend that diffusers ran before; None = the active one.
        takes_prologue: whether the call that runs now wants norm and rotation left to it.
    """

    _keys = itertools.count()

    def __init__(
        self,
        number: int,
        run: Callable[[Layer, AttentionCall], Tensor],
        dense_backend: Any,
        takes_prologue: Callable[[int], bool],
    ) -> None:
        self.number, self.run, self.dense_backend = number, run, dense_backend
        self.takes_prologue = takes_prologue
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
TRACED = _Traced()


def mark(attention: nn.Module, layer: Layer) -> None:
    """Makes an attention module known as a layer."""
    attention.__dict__[_LAYER], attention.__dict__[_KEY] = layer, layer.key


def unmark(attention: nn.Module) -> None:
    """Forgets it."""
    for name in (_LAYER, _KEY):
        attention.__dict__.pop(name, None)


@contextmanager
def running(attention: nn.Module) -> Iterator[None]:
    """While the processor of a marked module runs (not under torch.compile)."""
    outer, _ENTERED.layer = _ENTERED.layer, layer_of(attention)
    try:
        yield
    finally:
        _ENTERED.layer = outer


def layer_of(attention: nn.Module) -> Layer | None:
    """The layer that `mark` made of a module."""
    return attention.__dict__.get(_LAYER)


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
    query, key, value = (_autocast(x) for x in (query, key, value))
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
    if not torch.compiler.is_compiling() or TRACED.key is None:
        return _run(_ENTERED.layer, given)
    trained = torch.is_grad_enabled() and query.requires_grad
    if dropout_p or is_causal or enable_gqa or _parallel_config is not None or trained:
        return _run_untraced(TRACED.key, given)
    return attention_op(query, key, value, attn_mask, TRACED.key, scale)


def _autocast(x: Tensor) -> Tensor:
    """x as torch's own attention would take it under autocast: norms leave float32 behind."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


def _run(layer: Layer | None, given: dict[str, Any], prologue: Prologue | None = None) -> Tensor:
    """Runs a call for its layer; without one (somebody chose our name by hand) it is dense."""
    backend = None if layer is None else layer.dense_backend

    def dense_of(q: Tensor, k: Tensor) -> Tensor:
        return _dense(backend, given | {"query": q, "key": k})

    if layer is None:
        return dense_of(given["query"], given["key"])
    call = AttentionCall(
        given["query"],
        given["key"],
        given["value"],
        mask=given["attn_mask"],
        scale=given["scale"],
        plain=not (given["dropout_p"] or given["is_causal"] or given["enable_gqa"]),
        parallel=given["_parallel_config"],
        dense_of=dense_of,
        prologue=prologue,
    )
    return layer.run(layer, call)


def _given(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> dict:
    """Arguments of a plain call, by diffusers' names."""
    given = {"query": q, "key": k, "value": v, "attn_mask": mask, "scale": scale}
    rest = dict.fromkeys(("dropout_p", "is_causal", "enable_gqa"), False)
    return given | rest | {"_parallel_config": None}


@torch.compiler.disable
def _run_untraced(key: Tensor, given: dict[str, Any]) -> Tensor:
    return _run(_LAYERS.get(int(key)), given)


@torch.library.custom_op("permattn::diffusion_attention", mutates_args=())
def attention_op(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, key: Tensor, scale: float | None
) -> Tensor:
    """One call of the layer that `key` names, decided at run time."""
    return _run(_LAYERS[int(key)], _given(q, k, v, mask, scale)).contiguous()


@attention_op.register_fake
def _(q, k, v, mask, key, scale):
    return q.new_empty(*q.shape[:3], v.shape[3])


def attend_raw(
    attention: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    form: PrologueForm,
    mask: Tensor | None = None,
) -> Tensor:
    """Attention of projections that still have to be normed and rotated, [B, S, H, D]."""
    q, k, v = (_autocast(x) for x in (q, k, v))
    if not torch.compiler.is_compiling():
        layer = layer_of(attention)
        return _run(layer, _given(q, k, v, mask, None), form.prologue())
    key: Any = attention._permattn_key
    return raw_attention_op(q, k, v, mask, key, *form)


class PrologueForm(NamedTuple):
    """A prologue as operators take it: the same norm and rotation for q and k."""

    norm: Norm
    q_weight: Tensor | None
    q_bias: Tensor | None
    q_eps: float
    k_weight: Tensor | None
    k_bias: Tensor | None
    k_eps: float
    across_heads: bool
    cos: Tensor | None
    sin: Tensor | None
    rope_start: int

    def prologue(self) -> Prologue:
        """The prologue of one call."""
        shared: dict[str, Any] = {
            "across_heads": self.across_heads,
            "cos": self.cos,
            "sin": self.sin,
            "rope_start": self.rope_start,
        }
        return Prologue(
            RowTransform(self.norm, self.q_weight, self.q_bias, self.q_eps, **shared),
            RowTransform(self.norm, self.k_weight, self.k_bias, self.k_eps, **shared),
        )


@torch.library.custom_op("permattn::diffusion_attention_raw", mutates_args=())
def raw_attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    key: Tensor,
    norm: str,
    q_weight: Tensor | None,
    q_bias: Tensor | None,
    q_eps: float,
    k_weight: Tensor | None,
    k_bias: Tensor | None,
    k_eps: float,
    across_heads: bool,
    cos: Tensor | None,
    sin: Tensor | None,
    rope_start: int,
) -> Tensor:
    """`attention_op` of q and k before a prologue."""
    form = PrologueForm(
        *(norm, q_weight, q_bias, q_eps, k_weight, k_bias, k_eps, across_heads),  # type: ignore[arg-type]
        *(cos, sin, rope_start),
    )
    return _run(_LAYERS[int(key)], _given(q, k, v, mask, None), form.prologue()).contiguous()


@raw_attention_op.register_fake
def _(q, k, v, mask, key, *form):
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
