"""Run by torchrun on two ranks: sparse attention under diffusers' context parallelism.

Prints one line per rank that `test_ulysses` reads.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig
from permattn.models.diffusion import apply_paro

# torchrun starts this file as a script, so its package has to be put in reach by hand.
sys.path.insert(0, str(Path(__file__).parents[2]))
from models.diffusion.tiny import build, plan_for


def compare(name: str, parallel_first: bool) -> dict[str, object]:
    """One process with everything against this rank's share."""
    case = build(name)
    plan = plan_for(case)
    with apply_paro(case.model, plan) as handle:
        # Observed, so that norm and rotation are the model's own, as they are in parallel.
        handle.on_attention = lambda _: None
        want = case.run()
    dense = case.run()
    case = build(name)
    config = ContextParallelConfig(ulysses_degree=2)
    if parallel_first:
        case.model.enable_parallelism(config=config)
    with apply_paro(case.model, plan) as handle:
        if not parallel_first:
            case.model.enable_parallelism(config=config)
        got = case.run()
    after = case.run()
    return {
        "equal": torch.equal(got, want),
        "differs": float((want - dense).abs().max()),
        "restored": float((after - dense).abs().max()),
        "stats": handle.stats,
    }


def ring() -> dict[str, object]:
    """A plan cannot run: an error, or dense and a warning."""
    case = build("wan")
    plan = plan_for(case)
    dense = case.run()
    case.model.enable_parallelism(config=ContextParallelConfig(ring_degree=2))
    try:
        with apply_paro(case.model, plan):
            case.run()
        error = ""
    except ValueError as e:
        error = str(e)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with apply_paro(case.model, plan, on_mismatch="dense") as handle:
            try:
                distance = float((case.run() - dense).abs().max())
            except (RuntimeError, ValueError, NotImplementedError):
                # diffusers has no ring attention for CPU tensors: its own error, not ours.
                distance = 0.0
    said = [str(w.message) for w in caught if "runs dense" in str(w.message)]
    return {
        "error": error,
        "said": len(said),
        "distance": distance,
        "sparse": handle.stats["sparse"],
    }


def main() -> None:
    torch.set_num_threads(1)
    # diffusers divides by it; a machine without accelerators has none.
    torch.accelerator.device_count = lambda: 1
    dist.init_process_group("gloo")
    found: dict[str, object] = {"rank": dist.get_rank()}
    for name in ("wan", "flux", "qwen_image"):
        found[name] = compare(name, parallel_first=name == "flux")
    found["ring"] = ring()
    # One rank after the other: they share a pipe.
    for rank in range(dist.get_world_size()):
        if rank == dist.get_rank():
            print("result " + json.dumps(found), flush=True)
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
