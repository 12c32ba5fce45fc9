"""Operators under torch's modes: autocast does not reach inside, FLOP counters know the cost."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Mapping

import torch

Formulas = Mapping[torch._ops.OpOverloadPacket, Callable[..., int]]
_offered: set[torch._ops.OpOverloadPacket] = set()


def without_autocast(x: torch.Tensor) -> contextlib.AbstractContextManager:
    """For the body of an operator, which computes in the dtypes that it was given."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return contextlib.nullcontext()


def offer_flop_formulas(formulas: Formulas) -> None:
    """Tells torch's FLOP counter what operators cost, once somebody has imported it.

    Not at import: the counter imports triton, which `import permattn` must not. A counter copies
    the formulas when it is made, so those that count already are told, too.
    """
    if "torch.utils.flop_counter" not in sys.modules or _offered.issuperset(formulas):
        return
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    for op, formula in formulas.items():
        if op not in _offered:
            _offered.add(op)
            register_flop_formula(op, get_raw=True)(formula)
    for mode in _get_current_dispatch_mode_stack():
        registry = getattr(getattr(mode, "counter", None), "flop_registry", None)
        if registry is not None:
            registry.update({op: flop_registry[op] for op in formulas})
