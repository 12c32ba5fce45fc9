"""`patch(model)` and `unpatch(model)`: permattn inside an unmodified transformers model."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from permattn.core import AttnPlan, Segment
from permattn.models import context
from permattn.models.attention import LAYER, NAME, NO_LAYOUT, mark_layer, unmark_layer
from permattn.models.capture import LayoutCapture
from permattn.models.config import PrefillConfig
from permattn.models.families import family_of
from permattn.models.layer import CallCounts, NotCopyable, Observer, Planner, Watch
from permattn.models.layout import Family, TokenLayout
from permattn.models.stated import StatedRows
from permattn.patterns.mminference import plan_prefill

_HANDLE = "_permattn_handle"

Config = PrefillConfig | dict[str, Any] | str | Path | None


def patch(
    model: nn.Module,
    config: Config = None,
    *,
    backend: str = "auto",
    planner: Planner = plan_prefill,
) -> Handle:
    """Makes the prefill of a transformers model sparse, in place.

    The text decoder alone changes: the vision tower, decoding steps and everything a plan cannot
    express run torch's own attention. `handle.stats` tells which calls were which.

    Args:
        model: a `PreTrainedModel`; PEFT and torch.compile wrappers are looked through.
        config: a `PrefillConfig`, a dict, a path to a JSON file, "shipped" (the package's own for
            this type of model), or None: "auto" for every head.
        backend: see `permattn.sparse_attention`.
        planner: a pattern of your own, called as `plan_prefill` is: (q, k, rows, heads,
            left_pad=..., right_pad=...) -> AttnPlan, once per layer and pass.

    Returns: the handle; also a context manager that unpatches at its end.

    Raises:
        TypeError: not a transformers model, or a config of the wrong type.
        ValueError: patched already; a config for another model; a model that cannot be right (its
            attention bypasses transformers' attention interface, or SDPA would change its results).
    """
    model = _unwrapped(model)
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model: wants a transformers PreTrainedModel, got {type(model).__name__}")
    loaded = PrefillConfig.load(config, model.config.model_type)
    handle = Handle(model, loaded, backend=backend, planner=planner)
    model.__dict__[_HANDLE] = handle
    return handle


def unpatch(model: nn.Module) -> None:
    """Undoes `patch`. Raises ValueError when the model is not patched."""
    handle = _unwrapped(model).__dict__.get(_HANDLE)
    if handle is None:
        raise ValueError(f"model: this {type(model).__name__} is not patched")
    handle.unpatch()


class Handle(NotCopyable):
    """A patched model. Made by `patch`.

    Attributes:
        sizes: what a config is checked against: model_type, num_layers, num_heads, num_kv_heads.
        attention_layers: numbers of the layers with softmax attention; a hybrid has others too.
        last_layout: the layout of the last prefill pass (any thread), or None.
        on_plan: set to a function (layer, plan) to see every plan; plans are not kept otherwise.
    """

    def __init__(
        self, model: PreTrainedModel, config: PrefillConfig, *, backend: str, planner: Planner
    ) -> None:
        family = family_of(model.config)
        outer, model = model, _language_model(model, family)
        text = _text_decoder(model)
        layers = _attention_layers(text)
        sizes = text.config
        num_heads = getattr(sizes, "num_attention_heads", None)
        if num_heads is None:
            raise ValueError(f"model: {type(sizes).__name__} has no num_attention_heads")
        self.sizes: dict[str, Any] = {
            "model_type": outer.config.model_type,
            "num_layers": sizes.num_hidden_layers,
            "num_heads": num_heads,
            "num_kv_heads": getattr(sizes, "num_key_value_heads", None) or num_heads,
        }
        config.check_model(**self.sizes)
        soft = sorted(layer.layer_idx for layer in layers)
        self.attention_layers = tuple(soft)
        for number in config.layers:
            if number not in soft:
                raise ValueError(
                    f"config.layers.{number}: softmax attention is in layers {soft} only"
                )
        self.config = config
        self.last_layout: TokenLayout | None = None
        self.on_plan: Callable[[int, AttnPlan], None] | None = None
        self._outer = outer
        self._model: PreTrainedModel | None = model
        # A key of its own: state left in another thread's context must not keep the model alive.
        self._owner = object()
        self._counts = CallCounts()
        self._watch = Watch()
        self._warned = False
        self._layers = layers
        self._capture = LayoutCapture(
            model,
            model.base_model,
            text,
            family,
            outer=outer,
            owner=self._owner,
            counts=self._counts,
            on_layout=self._see_layout,
        )
        for layer in layers:
            mark_layer(
                layer,
                owner=self._owner,
                index=layer.layer_idx,
                heads=config.heads_of(layer.layer_idx, num_heads),
                min_q_len=config.min_q_len,
                heads_per_pass=config.heads_per_pass,
                planner=planner,
                backend=backend,
                counts=self._counts,
                report_plan=self._see_plan,
                watch=self._watch,
                forced=_why_not_whole(family, layer.layer_idx),
            )
        try:
            _switch_on(model, text)
        except Exception:
            self._remove_hooks()
            raise

    @property
    def stats(self) -> dict[str, Any]:
        """Attention calls so far, one per layer and pass.

        Returns: {"sparse": n, "dense": n, "dense_reasons": {reason: n}, "no_labels": n}; the last
        counts passes in which nothing told what the tokens were.
        """
        counts = self._counts
        if counts.dense_reasons[NO_LAYOUT] and not self._warned:
            self._warned = True
            warnings.warn(
                "permattn: some passes ran dense because no hook saw them. torch.compile(model) "
                "traces over the hooks; compile the layers instead (layer.compile())",
                stacklevel=2,
            )
        reasons = {reason: n for reason, n in counts.dense_reasons.items() if n}
        return {
            "sparse": counts.sparse,
            "dense": sum(reasons.values()),
            "dense_reasons": reasons,
            "no_labels": counts.no_labels,
        }

    @contextmanager
    def layout(self, rows: Sequence[Sequence[Segment]]) -> Iterator[Handle]:
        """States what the tokens are, for code that splices visual tokens in by itself.

        Args:
            rows: segments per batch row, at positions in the padded sequence (left padding counts).

        Passes inside the `with` block use these rows, chunks of one prompt included; so do later
        passes over the same cache.

        Raises:
            TypeError: something else than segments.
            ValueError: segments that share a token, stand in padding, claim text (where ids tell),
                or end past the prompt. The last one is known when the prompt has ended: in the pass
                itself without a cache, else at the first decoding step or the end of the block.
        """
        stated = StatedRows(tuple(tuple(row) for row in rows))
        context.set_explicit(self._owner, stated)
        try:
            yield self
            stated.check_reached()
        finally:
            context.set_explicit(self._owner, None)

    @contextmanager
    def observe(self, callback: Observer) -> Iterator[Handle]:
        """Shows the tensors of every prefill attention call, right before it runs.

        Args:
            callback: called as (layer, q, k, v, layout, scale, module): q [B, Hq, Sq, D], k and v
                [B, Hkv, Skv, D] after RoPE, cut to the keys that exist, as they are and not
                copies; the layer's number, its `TokenLayout`, softmax scale and attention module.
                Layers that the config makes dense are shown too; calls that no plan could run
                (decoding steps, sliding windows, 4-D masks) are not. A tensor [B, Sq, Hq, Dv] that
                it returns becomes the layer's attention output, and the layer's own does not run.

        Raises:
            ValueError: an observer stands there already.
        """
        if self._watch.observer is not None:
            raise ValueError("callback: this model is observed already")
        self._watch.observer = callback
        try:
            yield self
        finally:
            self._watch.observer = None

    def unpatch(self) -> None:
        """Restores the model: hooks, methods, marks and attention implementation. Idempotent."""
        if self._model is None:
            return
        self._remove_hooks()
        _switch_off(self._model, _text_decoder(self._model))
        self._outer.__dict__.pop(_HANDLE, None)
        self._model = None

    remove = unpatch

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *exception: object) -> None:
        self.unpatch()

    def _remove_hooks(self) -> None:
        self._capture.remove()
        for layer in self._layers:
            unmark_layer(layer)
        self._layers = []

    def _see_layout(self, layout: TokenLayout) -> None:
        self.last_layout = layout

    def _see_plan(self, layer: int, plan: AttnPlan) -> None:
        if self.on_plan is not None:
            self.on_plan(layer, plan)


@dataclass
class _Switch:
    """A config object that runs "permattn", for how many handles, and what it ran before."""

    config: Any
    before: str
    users: int = 0


# By id: configs compare by value, and models built from one object share it.
_switches: dict[int, _Switch] = {}


def _switch_on(model: PreTrainedModel, text: Any) -> None:
    config = text.config
    switch = _switches.get(id(config))
    if switch is None:
        switch = _Switch(config, config._attn_implementation)
        _set_implementation(model, text, NAME)
        _switches[id(config)] = switch
    switch.users += 1


def _switch_off(model: PreTrainedModel, text: Any) -> None:
    switch = _switches[id(text.config)]
    switch.users -= 1
    if switch.users == 0:
        del _switches[id(text.config)]
        if text.config._attn_implementation == NAME:
            _set_implementation(model, text, switch.before)


def _set_implementation(model: PreTrainedModel, text: Any, name: str) -> None:
    """Sets the text sub-config alone: a plain string would switch the vision tower too."""
    config = text.config
    keys = [key for key in model.config.sub_configs if getattr(model.config, key) is config]
    model.set_attn_implementation({keys[0]: name} if keys else name)
    if config._attn_implementation != name:
        raise ValueError(f"model: {type(text).__name__} does not accept attention {name!r}")


def _unwrapped(model: Any) -> Any:
    """The transformers model below PEFT and torch.compile wrappers."""
    while True:
        if hasattr(model, "get_base_model"):
            model = model.get_base_model()
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        else:
            return model


def _language_model(model: PreTrainedModel, family: Family) -> PreTrainedModel:
    """The model that holds the decoder: a part of models with code of their own."""
    if family.decoder is None:
        return model
    inner = getattr(model, family.decoder, None)
    if not isinstance(inner, PreTrainedModel):
        raise ValueError(
            f"model: {type(model).__name__} wants a transformers model in .{family.decoder}, got "
            f"{type(inner).__name__}"
        )
    return inner


def _why_not_whole(family: Family, layer: int) -> str | None:
    if family.whole_layers is None or layer < family.whole_layers:
        return None
    return f"tokens are dropped from layer {family.whole_layers} on"


def _text_decoder(model: PreTrainedModel) -> Any:
    text = model.get_decoder() if hasattr(model, "get_decoder") else None
    if text is None:
        raise ValueError(f"model: {type(model).__name__} has no text decoder (get_decoder)")
    return text


def _attention_layers(text: Any) -> list[Any]:
    """The decoder's attention modules. Raises ValueError where sparse attention cannot be right."""
    name = type(text).__name__
    layers = [
        module
        for module in text.modules()
        if isinstance(getattr(module, "layer_idx", None), int) and hasattr(module, "is_causal")
    ]
    if not layers:
        raise ValueError(f"model: {name} has no attention module with layer_idx and is_causal")
    if any(LAYER in layer.__dict__ for layer in layers):
        raise ValueError(f"model: {name} is patched already; call permattn.unpatch(model) first")
    strangers = sorted({type(m).__name__ for m in layers if not _uses_interface(type(m))})
    if strangers:
        raise ValueError(
            f"model: {', '.join(strangers)} does not call transformers' attention interface, so "
            "nothing here would reach it and its padding would be lost"
        )
    if getattr(text, "_supports_sdpa", True) is False:
        raise ValueError(
            f"model: {name} does not support SDPA, which calls that stay dense would run"
        )
    return layers


def _uses_interface(attention: type) -> bool:
    owner = next((c for c in attention.__mro__ if "forward" in c.__dict__), attention)
    try:
        return "get_interface(" in inspect.getsource(owner)
    except (OSError, TypeError):
        return False
