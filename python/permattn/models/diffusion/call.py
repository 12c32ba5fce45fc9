"""What the transformer call that is running now is: grid, text, noise level, step."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.hooks import BaseState, CacheContext, StateManager
from torch import Tensor, nn

from permattn.core import TokenGrid
from permattn.models.diffusion.family import (
    DiffusionFamily,
    Inputs,
    NotOneGrid,
    Size,
    named_inputs,
)

_HOOK = "permattn"
# A step of bfloat16 below 1.
_BF16 = 2.0**-8


@dataclass(frozen=True)
class TransformerCall:
    """One call of a transformer.

    Args:
        size: of its vision grid in tokens; None = it has none, see `fault`.
        fault: why it has no grid.
        num_text_tokens: text tokens in self-attention.
        sigma: noise level, 1 = pure noise.
        step: its number in the run, from 0.
        num_steps: steps of the run, where known.
        context: the name that the pipeline gives it ("cond", "uncond"), where it does.
    """

    size: Size | None
    fault: str
    num_text_tokens: int
    sigma: float
    step: int
    num_steps: int | None
    context: str | None

    @property
    def num_vision_tokens(self) -> int:
        frames, height, width = self.size or (0, 0, 0)
        return frames * height * width

    @property
    def num_tokens(self) -> int:
        return self.num_vision_tokens + self.num_text_tokens

    def grid(self, family: DiffusionFamily) -> TokenGrid:
        """The grid at its place among all tokens."""
        assert self.size is not None
        return TokenGrid(self.num_text_tokens if family.text == "prefix" else 0, *self.size)


class _NoState(BaseState):
    def reset(self, *args: Any, **kwargs: Any) -> None:
        """Nothing is kept."""


class _StepHook(ModelHook):
    """Counts steps; pipelines reset it when a run ends, and name the step that they are in."""

    _is_stateful = True

    def __init__(self) -> None:
        super().__init__()
        self.manager = StateManager(_NoState)  # type: ignore[arg-type]
        self.step, self.sigma = 0, -1.0

    def reset_state(self, module: nn.Module) -> nn.Module:
        self.step, self.sigma = 0, -1.0
        self.manager.reset()
        return module

    @property
    def context(self) -> CacheContext | None:
        return self.manager._context

    def count(self, sigma: float) -> int:
        """The step of a call: noise that goes up starts a run, noise that goes down a step."""
        if sigma > self.sigma:
            self.step = 0
        elif sigma < self.sigma:
            self.step += 1
        self.sigma = sigma
        return self.step


class _Times:
    """The steps of a scheduler: exact where a model is given its timestep in 16 bits.

    Two steps near the start of a run can be one number in bfloat16.
    """

    def __init__(self) -> None:
        self._kept: weakref.ref[Tensor] | None = None
        self._times: list[float] = []

    def find(self, scheduler: Any, sigma: float) -> tuple[int, float] | None:
        """(step of the run, sigma) of a scheduler; None where it does not stand at `sigma`."""
        times = getattr(scheduler, "timesteps", None)
        if not torch.is_tensor(times) or not hasattr(scheduler, "step_index"):
            return None
        if self._kept is None or self._kept() is not times:
            self._kept, self._times = weakref.ref(times), [float(t) for t in times.tolist()]
        # Image to image begins in the middle of the schedule.
        begin = getattr(scheduler, "begin_index", None) or 0
        step = begin if scheduler.step_index is None else scheduler.step_index
        if step >= len(self._times) or abs(self._times[step] / 1000 - sigma) > _BF16:
            return None
        return step - begin, self._times[step] / 1000


class CallTracker:
    """Watches the calls of one transformer by a hook in front of all others.

    A step cache skips blocks and context parallelism splits tensors: both happen behind the hook,
    which sees every call whole. Attention reads `call` while the call runs.

    Args:
        model: the transformer.
        family: its family.
        scheduler: the pipeline's, where there is one.
        on_call: is told every call before it runs.
    """

    def __init__(
        self,
        model: nn.Module,
        family: DiffusionFamily,
        scheduler: Any,
        on_call: Callable[[TransformerCall], None],
    ) -> None:
        self._model, self._family, self._scheduler = model, family, scheduler
        self._on_call = on_call
        self._hook = _StepHook()
        self._times = _Times()
        self._had_registry = hasattr(model, "_diffusers_hook")
        self._had_forward = "forward" in model.__dict__
        registry = HookRegistry.check_if_exists_or_initialize(model)
        registry.register_hook(self._hook, _HOOK)
        registry.invalidate_child_registries_cache()
        # At the head of a compiled model too: a graph break there, and values of this call inside.
        self._pre = model.register_forward_pre_hook(
            torch.compiler.disable(self._enter), with_kwargs=True, prepend=True
        )

    def remove(self) -> None:
        """Leaves the model as it was."""
        self._pre.remove()
        model: Any = self._model
        registry = HookRegistry.check_if_exists_or_initialize(model)
        registry.remove_hook(_HOOK, recurse=False)
        registry.invalidate_child_registries_cache()
        if registry.hooks:
            return
        if not self._had_forward:
            model.__dict__.pop("forward", None)
        if not self._had_registry:
            del model._diffusers_hook

    def _enter(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = named_inputs(model, args, kwargs)
        size, fault = None, ""
        try:
            size = self._family.grid(model, inputs)
        except NotOneGrid as e:
            fault = str(e)
        context = self._hook.context
        sigma = self._sigma(inputs, context)
        num_steps = getattr(self._scheduler, "num_inference_steps", None)
        scheduled = self._times.find(self._scheduler, sigma)
        if context is not None and context.step_index is not None:
            step, num_steps = context.step_index, context.num_inference_steps or num_steps
        elif scheduled is not None:
            step, sigma = scheduled
        else:
            step = self._hook.count(sigma)
        self._on_call(
            TransformerCall(
                size=size,
                fault=fault,
                num_text_tokens=self._family.num_text_tokens(inputs),
                sigma=sigma,
                step=step,
                num_steps=num_steps,
                context=None if context is None else context.name,
            )
        )

    def _sigma(self, inputs: Inputs, context: CacheContext | None) -> float:
        timestep = inputs["timestep"]
        if not torch.is_tensor(timestep):
            return float(timestep) / self._family.timesteps_per_sigma
        named = None if context is None else context.sigma
        if timestep.device.type != "cpu" and named is not None and 0.0 <= named <= 1.0:
            # Flow matching: the same number, and nobody waits for the device.
            return float(named)
        # Tokens may have timesteps of their own (a given first frame is without noise): the most.
        return float(timestep.max()) / self._family.timesteps_per_sigma
