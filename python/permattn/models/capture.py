"""Finds out what the tokens of every pass are, with hooks on one model instance.

    H1  pre-hook of the multimodal model   what it was called with: ids, token types, grids
    H1' its forward hook                   forgets that
    W1  get_{image,video}_features         grid sizes: generate() encodes vision before any forward
    W2  prepare_inputs_for_generation      static caches build their masks there
    W3  the family's splicing method       models with code of their own: rows of the embeddings
    H2  pre-hook of the text decoder       builds the layout and publishes it
    H2' its forward hook                   withdraws it, on exceptions too

The multimodal model (`base_model`) is hooked and not the wrapper with the language-model head: it
is entered through `__call__` whatever the user calls.
"""

from __future__ import annotations

import functools
import inspect
import warnings
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from permattn.models import context
from permattn.models.attention import LAYOUT_KEYWORD, NAME
from permattn.models.frames import (
    AUDIO,
    IMAGE,
    TEXT,
    VIDEO,
    GridPerVideo,
    Rows,
    Size,
    with_runs,
)
from permattn.models.layer import CallCounts, NotCopyable
from permattn.models.layout import Family, TokenLayout, padding_of_mask
from permattn.models.splice import Splice
from permattn.models.stated import check_labels, repeated

_GRID_KEYWORDS = {IMAGE: "image_grid_thw", VIDEO: "video_grid_thw"}
# Patches per token along height and width, image by image, where the model is told them.
_MERGE_KEYWORDS = {IMAGE: "image_merge_sizes", VIDEO: "video_merge_sizes"}
_KEPT_KEYWORD = "video_compression_mask"
_OBSERVED = (
    "input_ids",
    "mm_token_type_ids",
    _KEPT_KEYWORD,
    *_GRID_KEYWORDS.values(),
    *_MERGE_KEYWORDS.values(),
)

TOKENS_DROPPED = "video tokens were dropped (video_compression_mask)"

Sizes = tuple[Size, ...]


@dataclass
class _Seen:
    """What a cache's tokens were: chunked prefill and later turns start from it."""

    labels: Tensor | None = None
    coordinates: Tensor | None = None
    grids: dict[int, Sizes] = field(default_factory=dict)
    rows: Rows | None = None
    dropped: bool = False


class LayoutCapture(NotCopyable):
    """Hooks of one model. `remove()` leaves no trace of them.

    Args:
        model: the model with `prepare_inputs_for_generation`.
        base, text: the multimodal model below it and its text decoder (may be the same module).
        outer: the module whose method splices visual tokens in, where the family has one.
        owner: key of this model's entries in `context`.
        on_layout: called with every layout.
    """

    def __init__(
        self,
        model: nn.Module,
        base: nn.Module,
        text: nn.Module,
        family: Family,
        *,
        outer: nn.Module,
        owner: object,
        counts: CallCounts,
        on_layout: Callable[[TokenLayout], None],
    ) -> None:
        self._base, self._text, self._family = base, text, family
        self._owner, self._counts, self._on_layout = owner, counts, on_layout
        self._warned = False
        self._seen: weakref.WeakKeyDictionary[Any, _Seen] = weakref.WeakKeyDictionary()
        self._wrapped: list[tuple[nn.Module, str, Any]] = []
        self._hooks = [
            text.register_forward_pre_hook(self._enter_text, with_kwargs=True),
            text.register_forward_hook(self._leave_text, always_call=True),
        ]
        if base is not text:
            self._hooks += [
                base.register_forward_pre_hook(self._enter_base, with_kwargs=True),
                base.register_forward_hook(self._leave_base, always_call=True),
            ]
        for kind, name in ((IMAGE, "get_image_features"), (VIDEO, "get_video_features")):
            self._wrap(base, name, functools.partial(self._around_vision_call, kind))
        self._wrap(model, "prepare_inputs_for_generation", self._around_preparation)
        if family.splice is not None:
            around = functools.partial(self._around_splice, family.splice, outer)
            self._wrap(outer, family.splice.method, around)
        parameters = inspect.signature(text.forward).parameters.values()
        self._takes_keywords = any(p.kind is p.VAR_KEYWORD for p in parameters)

    def remove(self) -> None:
        """Takes off every hook and wrapper, and forgets pending state."""
        for hook in self._hooks:
            hook.remove()
        for module, name, before in reversed(self._wrapped):
            module.__dict__.pop(name, None)
            if before is not None:
                module.__dict__[name] = before
        self._hooks, self._wrapped = [], []
        context.forget_layouts(self._owner)
        context.observe(None)
        context.take_pending(self._owner)
        context.take_spliced(self._owner)
        context.set_explicit(self._owner, None)

    def _wrap(self, module: nn.Module, name: str, around: Callable[..., Any]) -> None:
        """Replaces a method of this instance by `around(original, *args, **kwargs)`."""
        original = getattr(module, name, None)
        if original is None:
            return

        @functools.wraps(original)  # generate() inspects the signature
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            return around(original, *args, **kwargs)

        self._wrapped.append((module, name, module.__dict__.get(name)))
        module.__dict__[name] = wrapper

    def _around_vision_call(
        self, kind: int, original: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        if torch.compiler.is_compiling():
            return original(*args, **kwargs)
        arguments = inspect.signature(original).bind_partial(*args, **kwargs).arguments
        with context.vision_call() as is_outer:
            if is_outer:
                sizes = _sizes(arguments, kind)
                context.add_pending(
                    [context.PendingGrid(self._owner, kind, size) for size in sizes]
                )
            return original(*args, **kwargs)

    def _around_splice(
        self,
        splice: Splice,
        outer: nn.Module,
        original: Callable[..., Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        result = original(*args, **kwargs)
        # Whatever an earlier call told is not about the next pass any more.
        context.take_spliced(self._owner)
        arguments = inspect.signature(original).bind_partial(*args, **kwargs).arguments
        told = splice.rows(outer, arguments, result)
        if told is not None:
            context.set_spliced(context.SplicedRows(self._owner, *told))
        return result

    @staticmethod
    def _around_preparation(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with context.preparing():
            return original(*args, **kwargs)

    def _enter_base(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            return
        inputs = dict(kwargs)
        if args:
            inputs.update(zip(inspect.signature(module.forward).parameters, args, strict=False))
        context.observe({name: inputs.get(name) for name in _OBSERVED})

    def _leave_base(self, module: nn.Module, args: tuple, out: Any) -> None:
        if not torch.compiler.is_compiling():
            context.observe(None)

    def _enter_text(
        self, module: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]] | None:
        if torch.compiler.is_compiling():
            return None
        self._warn_if_switched(module)
        if args:
            names = inspect.signature(module.forward).parameters
            inputs = {**kwargs, **dict(zip(names, args, strict=False))}
        else:
            inputs = kwargs
        may_replay = torch.is_grad_enabled() and module.training
        layout = self._layout_of(inputs, can_be_sparse=self._takes_keywords or not may_replay)
        context.push_layout(self._owner, layout)
        if layout is None:
            return None
        self._on_layout(layout)
        if may_replay and self._takes_keywords:
            # Gradient checkpointing runs the layers again after this pass is over.
            return args, {**kwargs, LAYOUT_KEYWORD: layout}
        return None

    def _warn_if_switched(self, text: Any) -> None:
        """Says once that the user's own set_attn_implementation undid the patch."""
        if text.config._attn_implementation != NAME and not self._warned:
            self._warned = True
            warnings.warn(
                f"permattn: set_attn_implementation({text.config._attn_implementation!r}) switched "
                "permattn off; call permattn.unpatch(model), and patch again to switch it on",
                stacklevel=2,
            )

    def _leave_text(self, module: nn.Module, args: tuple, out: Any) -> None:
        if not torch.compiler.is_compiling():
            context.pop_layout(self._owner)

    def _layout_of(self, inputs: dict[str, Any], *, can_be_sparse: bool) -> TokenLayout | None:
        """Geometry of a pass with more than one query; rows are empty where modality is unknown."""
        tokens = inputs.get("inputs_embeds")
        if tokens is None:
            tokens = inputs.get("input_ids")
        if tokens is None or tokens.shape[1] <= 1:
            stated = context.explicit(self._owner)
            if stated is not None:
                # Decoding: the prompt has ended, with all of its chunks.
                stated.check_reached()
            return None
        batch, q_len = tokens.shape[:2]
        # transformers 5.24 renamed the argument.
        cache = inputs.get("cache")
        cache = inputs.get("past_key_values") if cache is None else cache
        if cache is not None and not hasattr(cache, "get_seq_length"):
            return None
        q_offset = int(cache.get_seq_length()) if cache is not None else 0
        mask = inputs.get("attention_mask")
        if isinstance(mask, dict):
            mask = next((m for m in mask.values() if m is not None and m.ndim == 2), None)
        reason = None if can_be_sparse else "training, and the decoder takes no extra keywords"
        left_pad = right_pad = (0,) * batch
        has_gaps = False
        if mask is not None and mask.ndim == 2:
            left_pad, right_pad, has_gaps = padding_of_mask(mask[:, : q_offset + q_len])
        stated = context.explicit(self._owner)
        if stated is not None:
            stated.check_pass(left_pad, q_offset + q_len, is_whole=cache is None)
        rows, dropped = self._rows_of(inputs, cache, batch, q_len, q_offset)
        if dropped:
            reason = reason or TOKENS_DROPPED
        return TokenLayout(rows, left_pad, right_pad, q_offset, q_len, has_gaps, reason)

    def _rows_of(
        self, inputs: dict[str, Any], cache: Any, batch: int, q_len: int, q_offset: int
    ) -> tuple[Rows, bool]:
        """Segments per row, and whether tokens of a video are missing from the prompt."""
        seen = self._seen.get(cache) if cache is not None and q_offset else None
        seen = seen if seen is not None else _Seen()
        if cache is not None:
            self._seen[cache] = seen
        pending = context.take_pending(self._owner)
        spliced, stated = context.take_spliced(self._owner), context.explicit(self._owner)
        inputs = {**inputs, **(context.observed() or {})}
        if stated is not None:
            seen.rows = stated.rows
        elif spliced is not None and inputs.get("inputs_embeds") is not None:
            # A chunk may be shorter; a later turn counts its positions from elsewhere.
            is_start = q_offset == 0 and q_len <= spliced.length
            seen.rows = spliced.rows if is_start else seen.rows
        if seen.rows is not None:
            rows = repeated(seen.rows, batch, q_offset + q_len)
            labels = self._labels_of(inputs, batch, q_len) if stated is not None else None
            if labels is not None and self._family.names_placeholders:
                check_labels(rows, labels, q_offset)
            return rows, False
        kept = inputs.get(_KEPT_KEYWORD)
        if kept is not None and not bool(kept.all()):
            seen.dropped = True
        labels = self._labels_of(inputs, batch, q_len)
        if labels is None:
            self._counts.count_no_labels()
            labels = torch.full((batch, q_len), TEXT)
        seen.labels = _append(seen.labels, labels, q_offset)
        rule = self._family.frames
        if rule is None or seen.dropped:
            return with_runs(((),) * batch, seen.labels), seen.dropped
        positions = inputs.get("position_ids")
        if positions is not None and positions.ndim == 3 and positions.shape[1] == batch:
            # M-RoPE: (frame, height, width), or (text, frame, height, width).
            place = positions[-2:].permute(1, 2, 0).cpu().int()
            seen.coordinates = _append(seen.coordinates, place, q_offset)
        grids = {}
        for kind in _GRID_KEYWORDS:
            new = _sizes(inputs, kind) or tuple(grid.size for grid in pending if grid.kind == kind)
            grids[kind] = self._choose(seen.labels, kind, seen.grids.get(kind, ()), new)
        seen.grids = grids
        return with_runs(rule.rows(seen.labels, grids, seen.coordinates), seen.labels), False

    def _labels_of(self, inputs: dict[str, Any], batch: int, q_len: int) -> Tensor | None:
        """int64 [B, q_len] on the CPU; None where nothing tells."""
        types = inputs.get("mm_token_type_ids")
        if types is not None and types.shape[0] == batch and types.shape[-1] >= q_len:
            labels = types[:, -q_len:].cpu().long()
            return torch.where(labels > AUDIO, TEXT, labels)
        ids = inputs.get("input_ids")
        if ids is None or ids.shape != (batch, q_len):
            return None
        return self._family.labels_of_ids(ids)

    def _choose(self, labels: Tensor, kind: int, old: Sizes, new: Sizes) -> Sizes:
        """Callers pass the sizes of a turn's new videos, or those of every turn, again."""
        rule = self._family.frames
        if not isinstance(rule, GridPerVideo):
            return old + new
        want = int((labels == kind).sum())
        for sizes in (old + new, new, old):
            if sizes and rule.num_tokens(sizes) == want:
                return sizes
        # A chunk of a prompt: not every token is here yet.
        repeats_old = new[: len(old)] == old and rule.num_tokens(new) >= want
        return new if repeats_old else old + new


def _sizes(inputs: Mapping[str, Any], kind: int) -> Sizes:
    """(frames, height, width) of every image or video, in tokens where merge sizes are given."""
    grid, merge = inputs.get(_GRID_KEYWORDS[kind]), inputs.get(_MERGE_KEYWORDS[kind])
    if grid is None:
        return ()
    merges = [1] * len(grid) if merge is None else torch.as_tensor(merge).tolist()
    return tuple((t, h // m, w // m) for (t, h, w), m in zip(grid.tolist(), merges, strict=False))


def _append(before: Tensor | None, new: Tensor, q_offset: int) -> Tensor:
    """[B, S, ...]: what is known of the tokens in the cache, then the new ones. Unknown is 0."""
    batch = new.shape[0]
    known = new.new_full((batch, q_offset, *new.shape[2:]), TEXT)
    if before is not None and q_offset:
        n = min(before.shape[1], q_offset)
        known[:, :n] = before[:, :n].repeat_interleave(batch // before.shape[0], 0)
    return torch.cat((known, new), 1)
