"""Puts wrapped processors into a transformer and takes them out again."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from permattn.models.diffusion.call import CallTracker, TransformerCall
from permattn.models.diffusion.dispatch import (
    AttentionCall,
    Layer,
    backend_member,
    mark,
    unmark,
)
from permattn.models.diffusion.families import family_of
from permattn.models.diffusion.processors import dense_backend_of, wrapped

PATCHED = "_permattn_patch"

Runner = Callable[[TransformerCall, Layer, AttentionCall], Tensor]


@dataclass
class _Place:
    """An attention module, the processor that we put there and the one that was there."""

    attention: Any
    ours: Any
    before: Any


class Patch:
    """A transformer whose self-attention calls go through `run`.

    Args:
        model: the transformer.
        run: (transformer call, layer, attention call) -> output [B, S, H, D].
        scheduler: of the pipeline, where there is one.
        on_call: is told every transformer call before it runs.
        takes_prologue: whether a layer's call is to get q and k before norm and rotation, where
            its processor can leave them to us. Compiled blocks always ask for it.

    Raises:
        ValueError: a class or a processor that is not supported, or a model that is patched.
    """

    def __init__(
        self,
        model: nn.Module,
        run: Runner,
        *,
        scheduler: Any = None,
        on_call: Callable[[TransformerCall], None] | None = None,
        takes_prologue: Callable[[int], bool] = lambda layer: False,
    ) -> None:
        self.family = family_of(model)
        self.model = model
        self.call: TransformerCall | None = None
        self.is_bypassed = False
        self._run, self._on_call = run, on_call
        self._warned = False
        self.on_stray: Callable[[], None] = lambda: None
        if PATCHED in model.__dict__:
            raise ValueError(
                f"transformer: this {type(model).__name__} is in use by permattn already; call "
                "remove() on its handle (or leave the `with`) first"
            )
        modules = self.family.attention_modules(model)
        for module in modules:
            self._check(module.processor)
        self._places: list[_Place] = []
        # diffusers keeps processors and puts them back later: ours, and what stood there, by id.
        self._made: dict[int, tuple[Any, Any]] = {}
        for number, module in enumerate(modules):
            backend = dense_backend_of(module.processor)
            layer = Layer(number, self._attend, backend, takes_prologue)
            mark(module, layer)
            self._places.append(self._wrap(module))
        self._tracker = CallTracker(model, self.family, scheduler, self._enter)
        model.__dict__[PATCHED] = self

    @property
    def num_layers(self) -> int:
        return len(self._places)

    def remove(self) -> None:
        """Restores the model; keeps what the user changed meanwhile. Idempotent."""
        if self.model.__dict__.get(PATCHED) is not self:
            return
        self._tracker.remove()
        for place in self._places:
            if place.attention.processor is place.ours:
                _carry_over(place.ours, place.before)
                place.attention.set_processor(place.before)
            unmark(place.attention)
        self._forget_kept_processors()
        del self.model.__dict__[PATCHED]

    def _check(self, processor: Any) -> None:
        names = self.family.processors
        if type(processor).__name__ not in names:
            raise ValueError(
                f"transformer: wants attention processors {' or '.join(names)}, got "
                f"{type(processor).__name__}"
            )

    def _wrap(self, attention: Any) -> _Place:
        before = attention.processor
        ours = wrapped(before)
        attention.set_processor(ours)
        self._made[id(ours)] = (ours, before)
        return _Place(attention, ours, before)

    def _enter(self, call: TransformerCall) -> None:
        self._adopt_new_processors()
        ours = backend_member()
        self.is_bypassed = any(p.ours._attention_backend is not ours for p in self._places)
        if self.is_bypassed and not self._warned:
            self._warned = True
            warnings.warn(
                "permattn: set_attention_backend (or reset_attention_backend) ran after permattn "
                "was put in, so the transformer runs that backend, dense. Call remove() and apply "
                "again to get sparse attention back",
                stacklevel=2,
            )
        self.call = call
        if self._on_call is not None:
            self._on_call(call)

    def _adopt_new_processors(self) -> None:
        """CogVideoX's fuse_qkv_projections replaces processors: wraps what it put there."""
        for i, place in enumerate(self._places):
            processor = place.attention.processor
            if processor is not place.ours:
                if id(processor) in self._made:
                    place.ours, place.before = self._made[id(processor)]
                    continue
                self._check(processor)
                self._places[i] = self._wrap(place.attention)

    def _attend(self, layer: Layer, call: AttentionCall) -> Tensor:
        if self.call is None:
            self.on_stray()
            return call.dense()
        return self._run(self.call, layer, call)

    def _forget_kept_processors(self) -> None:
        """unfuse_qkv_projections puts back processors that it kept: not ours, after us."""
        kept: Any = getattr(self.model, "original_attn_processors", None)
        for name, processor in (kept or {}).items():
            kept[name] = self._made.get(id(processor), (None, processor))[1]


def _carry_over(ours: Any, before: Any) -> None:
    """Settings that diffusers wrote on our copies: context parallelism, another backend."""
    if hasattr(before, "_parallel_config"):
        before._parallel_config = ours._parallel_config
    if hasattr(before, "_attention_backend") and ours._attention_backend is not backend_member():
        before._attention_backend = ours._attention_backend
