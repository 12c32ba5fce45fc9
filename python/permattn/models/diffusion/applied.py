"""A ParoPlan at work in one transformer."""

from __future__ import annotations

import threading
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from permattn.api import sparse_attention
from permattn.core import QuantSpec
from permattn.models.diffusion.call import TransformerCall
from permattn.models.diffusion.dispatch import AttentionCall, Layer
from permattn.models.diffusion.facts import ModelFacts
from permattn.models.diffusion.masks import NotPadding, text_visible_of
from permattn.models.diffusion.parallel import (
    context_of,
    heads_of_rank,
    run_ulysses,
    why_not_ulysses,
)
from permattn.models.diffusion.patching import Patch
from permattn.models.diffusion.store import PlanKey, PlanStore, interleaved
from permattn.models.diffusion.watch import Observation, observation_of
from permattn.patterns.paro import ParoPlan

OnMismatch = Literal["raise", "dense"]
FIRST_STEPS = "dense_first_steps"
DENSE_LAYER = "dense_layers"
OTHER_BACKEND = "set_attention_backend"
NO_CALL = "no hook saw the call: torch.compile ran before apply_paro"


@dataclass(frozen=True)
class ApplyOptions:
    """How plans run; see `apply_paro`."""

    quant: QuantSpec
    backend: str
    dense_first_steps: int
    dense_layers: frozenset[int]
    match_steps: bool
    on_mismatch: OnMismatch


class Applied:
    """One transformer that runs a plan.

    Args:
        model: the transformer.
        facts: about it.
        plan: made for it.
        options: how.
        scheduler: of the pipeline, where there is one.

    Raises:
        ValueError: a plan that does not fit the transformer, or a transformer that permattn cannot
            run or runs already.
    """

    def __init__(
        self,
        model: nn.Module,
        facts: ModelFacts,
        plan: ParoPlan,
        options: ApplyOptions,
        scheduler: Any,
    ) -> None:
        self.plan, self.options = plan, options
        self.sparse = 0
        self.dense: Counter[str] = Counter()
        self.on_attention: Callable[[Observation], None] | None = None
        self._lock = threading.Lock()
        self._said: set[str] = set()
        self._facts = facts
        self._store = PlanStore(plan, options.quant)
        self._call_fault: str | None = None
        self._fault = why_not_model(plan, facts)
        if self._fault is not None:
            self._mismatch(self._fault)
        _warn_of_other_weights(plan, facts)
        self._patch = Patch(
            model,
            self._attend,
            scheduler=scheduler,
            on_call=self._enter,
            takes_prologue=self._takes_prologue,
        )
        self._patch.on_stray = self._stray

    def remove(self) -> None:
        """See `Patch.remove`."""
        self._patch.remove()

    def _takes_prologue(self, layer: int) -> bool:
        """Whether the call that runs now is sparse, and nobody looks at its q and k."""
        call = self._patch.call
        sparse = call is not None and self._why_dense(call, layer) is None
        return sparse and self.on_attention is None

    def key_of(self, call: TransformerCall, layer: int) -> PlanKey:
        """The plan of a layer in a call, for all heads."""
        bin = self.plan.bin_of(call.sigma)
        return PlanKey(layer, bin, call.num_text_tokens, (0, self.plan.num_heads))

    def _enter(self, call: TransformerCall) -> None:
        if self._patch.is_bypassed:
            self._count(OTHER_BACKEND, self._patch.num_layers)
        self._call_fault = self._fault or why_not_call(self.plan, call, self.options.match_steps)
        if self._call_fault is not None:
            self._mismatch(self._call_fault)

    def _stray(self) -> None:
        self._warn(f"permattn: attention runs dense: {NO_CALL}. Apply first, then compile")
        self._count(NO_CALL)

    def _why_dense(self, call: TransformerCall, layer: int) -> str | None:
        """Why a layer is dense in a call by decision or fault; None = it runs its plan."""
        if self._call_fault is not None:
            return self._call_fault
        if layer in self.options.dense_layers:
            return DENSE_LAYER
        return FIRST_STEPS if call.step < self.options.dense_first_steps else None

    def _attend(self, call: TransformerCall, layer: Layer, attention: AttentionCall) -> Tensor:
        reason = self._why_dense(call, layer.number)
        if reason is None:
            reason = self._why_not_attention(call, layer, attention)
            if reason is not None:
                self._mismatch(reason)
        is_fault = reason not in (None, FIRST_STEPS, DENSE_LAYER)
        if self.on_attention is not None and attention.parallel is None and not is_fault:
            attention = attention.after_prologue()
            self.on_attention(observation_of(self._patch.family, call, layer, attention))
        if reason is not None:
            self._count(reason)
            return attention.dense()
        with self._lock:
            self.sparse += 1
        if context_of(attention.parallel) is None:
            key = self.key_of(call, layer.number)
            mask = text_visible_of(attention.mask, call, self._patch.family)
            return self._sparse(key, attention.q, attention.k, attention.v, mask, attention)
        return self._in_parallel(call, layer, attention)

    def _why_not_attention(
        self, call: TransformerCall, layer: Layer, attention: AttentionCall
    ) -> str | None:
        """Why this attention call cannot run the plan."""
        context = context_of(attention.parallel)
        tokens, heads = attention.q.shape[1:3]
        ranks = 1
        if context is not None:
            reason = why_not_ulysses(context, heads)
            if reason is not None:
                return reason
            if torch.is_grad_enabled() and attention.q.requires_grad:
                return "context parallelism without torch.no_grad()"
            ranks = context.ulysses_degree
        if not attention.plain:
            return "attention with dropout, causality or grouped heads"
        if tokens * ranks != call.num_tokens or attention.k.shape[1] != tokens:
            return (
                f"layer {layer.number} has {tokens * ranks} queries and "
                f"{attention.k.shape[1] * ranks} keys; a grid of {call.size} and "
                f"{call.num_text_tokens} text tokens make {call.num_tokens}"
            )
        if heads != self.plan.num_heads:
            return f"layer {layer.number} runs {heads} heads, the plan has {self.plan.num_heads}"
        if attention.mask is not None and ranks == 1:
            try:
                text_visible_of(attention.mask, call, self._patch.family)
            except NotPadding as e:
                return str(e)
        return None

    def _in_parallel(self, call: TransformerCall, layer: Layer, attention: AttentionCall) -> Tensor:
        context = context_of(attention.parallel)
        whole = self.key_of(call, layer.number)
        key = PlanKey(
            *(whole.layer, whole.bin, whole.num_text),
            heads_of_rank(context, self.plan.num_heads),
            context.ulysses_degree,
        )

        # A mask of this rank's tokens has been gathered, in the order of the rows.
        gathered = attention.mask is not None and attention.mask.shape[-1] == attention.k.shape[1]

        def local(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
            if mask is not None and gathered:
                rows = interleaved(self.plan, key.num_text, key.num_ranks).to(mask.device)
                mask = mask.flatten(1)[:, rows]
            visible = text_visible_of(mask, call, self._patch.family)
            return self._sparse(key, q, k, v, visible, attention)

        return run_ulysses(attention, local)

    def _sparse(
        self,
        key: PlanKey,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        visible: Tensor | None,
        attention: AttentionCall,
    ) -> Tensor:
        if visible is None:
            plan = self._store.get(key, q.device)
        else:
            plan = self._store.masked(key, q.device, visible)
        out = sparse_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            plan,
            scale=attention.scale,
            backend=self.options.backend,
            prologue=attention.prologue,
        )
        return out.transpose(1, 2)

    def _mismatch(self, fault: str) -> None:
        """A fault that the caller can mend: an error, or one warning and exact dense."""
        if self.options.on_mismatch == "raise":
            raise ValueError(f"apply_paro: {fault}")
        self._warn(f"permattn: attention runs dense: {fault}")

    def _warn(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            warnings.warn(message, stacklevel=3)

    def _count(self, reason: str, calls: int = 1) -> None:
        with self._lock:
            self.dense[reason] += calls


def why_not_model(plan: ParoPlan, facts: ModelFacts) -> str | None:
    """What keeps a plan from a transformer, whatever it is called with."""
    origin = plan.origin
    for what, want, got in (
        ("transformer", origin.model_class or facts.model_class, facts.model_class),
        ("number of layers", plan.num_layers, facts.num_layers),
        ("number of heads", plan.num_heads, facts.num_heads),
        ("head_dim", origin.head_dim or facts.head_dim, facts.head_dim),
        ("place of the text", plan.text, facts.text),
    ):
        if want != got:
            return f"{what}: the plan was made for {want}, got {got}"
    return None


def why_not_call(plan: ParoPlan, call: TransformerCall, match_steps: bool) -> str | None:
    """What keeps a plan from one call of its transformer."""
    if call.size is None:
        return f"tokens: {call.fault}"
    if call.size != tuple(plan.grid):
        return (
            f"grid: the plan was made for {tuple(plan.grid)} tokens (frames, height, width), got "
            f"{call.size}; calibrate for this resolution and length"
        )
    want = plan.origin.num_steps
    if match_steps and want and call.num_steps is not None and call.num_steps != want:
        return (
            f"num_inference_steps: the plan was made for {want}, got {call.num_steps}; pass "
            "match_steps=False to choose masks by noise level alone"
        )
    if call.num_text_tokens == 0 and bool(plan.empty_heads.any()):
        return "text: heads of the plan see text alone, got 0 text tokens"
    return None


def _warn_of_other_weights(plan: ParoPlan, facts: ModelFacts) -> None:
    want = plan.origin.fingerprint
    if want and facts.fingerprint and want != facts.fingerprint:
        warnings.warn(
            f"permattn: the plan was calibrated on other weights ({want}) than these "
            f"({facts.fingerprint}): a fine-tuned model, a LoRA or another dtype. Calibrate again "
            "if results suffer",
            stacklevel=4,
        )
