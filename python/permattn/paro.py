"""PAROAttention from end to end: calibrate once, save, load, apply.

    plan = permattn.paro.calibrate(pipe, ["a dog in the snow"], density=0.3)
    permattn.paro.save(plan, "wan_480p.paro")
    with permattn.paro.apply(pipe, "wan_480p.paro"):
        video = pipe(...)

Source: PAROAttention (arXiv 2506.16054). `calibrate` and `apply` load on first use: they need
diffusers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from permattn.paro_file import load_paro as load
from permattn.paro_file import save_paro as save
from permattn.patterns.paro import ParoPlan, plan_paro

if TYPE_CHECKING:
    from permattn.calibrate.paro import calibrate
    from permattn.models.diffusion import apply_paro as apply

__all__ = ["ParoPlan", "apply", "calibrate", "load", "plan_paro", "save"]


def __getattr__(name: str) -> Any:
    if name == "apply":
        from permattn.models.diffusion import apply_paro

        return apply_paro
    if name == "calibrate":
        from permattn.calibrate import paro

        return paro.calibrate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
