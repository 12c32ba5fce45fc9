"""`python bench/gpu_child.py WORK`: a few launches, for a sanitizer or a profiler around them.

WORK is "small" (every kernel of a backend once, checked), or the operands of a hot kernel: "bf16"
or "int8+fp8".
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if TYPE_CHECKING:
    import torch

HOT = ("bf16", "int8+fp8")
# Tokens, heads, head dim and share of listed blocks of the hot kernels.
HOT_SIZE = (16384, 16, 128, 0.25)
TINY_SIZE = (256, 2, 64, 0.5)


def main(argv: list[str]) -> int:
    from bench.gpu import use_tree

    made = argparse.ArgumentParser(prog="gpu_child", description=(__doc__ or "").split("\n\n")[0])
    made.add_argument("work", choices=("small", *HOT))
    made.add_argument("--backend", default="cuda")
    made.add_argument("--folder", type=Path, help="of the native library")
    made.add_argument("--device", default="cuda")
    options = made.parse_args(argv)
    use_tree()
    import torch

    from bench.gpu_machine import use_library

    use_library(options.folder)
    device = torch.device(options.device)
    if options.work == "small":
        small(options.backend, device)
    else:
        hot(options.backend, device, options.work)
    if device.type == "cuda":
        torch.cuda.synchronize()
    print(f"gpu_child: {options.work} done")
    return 0


def small(backend: str, device: torch.device) -> None:
    """One launch of every kind, on inputs of some hundred tokens; results are finite."""

    from bench.gpu_cases import playing

    for capability in families(backend, device):
        with playing(capability):
            _launches(backend, device)


def families(backend: str, device: torch.device) -> list[int | None]:
    """The capabilities to play: on 9.0, where kernels of two families run, both."""
    import torch
    from permattn.backends.cuda import device as library

    if backend != "cuda" or device.type != "cuda" or library.load_kernels() is not None:
        return [None]
    both = torch.cuda.get_device_capability() == (9, 0)
    return [None, 80] if both and library.why_no_code(80, library.holds()) is None else [None]


def _launches(backend: str, device: torch.device) -> None:
    import torch
    from permattn import sparse_attention, testing
    from permattn.core import AttnPlan, QuantSpec

    g = torch.Generator().manual_seed(0)
    for dim in (64, 128):
        shape = (1, 4, 200, dim)
        q, k, v = (torch.randn(shape, generator=g).bfloat16().to(device) for _ in range(3))
        for permuted in (False, True):
            plain = testing.random_plan(200, 200, heads=4, permuted=permuted)
            for pv in (None, "none", "int8"):
                quant = QuantSpec() if pv is None else QuantSpec("int8", pv, smooth_k=True)
                plan = AttnPlan(plain.parts, quant).to(device)
                out = sparse_attention(q, k, v, plan, backend=backend)
                if not bool(torch.isfinite(out).all()):
                    raise AssertionError(f"D = {dim}, permuted = {permuted}, {quant}: not finite")
        plan = testing.split_plan(200, 200, heads=4).to(device)
        sparse_attention(q, k, v, plan, backend=backend)


def hot(backend: str, device: torch.device, operands: str) -> None:
    """Two calls of a hot kernel; the second one is worth a look."""
    import torch
    from permattn import sparse_attention
    from permattn.core import AttnPlan, QuantSpec

    from bench.plans import RandomBlocks

    tokens, heads, dim, density = HOT_SIZE if device.type == "cuda" else TINY_SIZE
    parts = RandomBlocks(density)(tokens, heads).parts
    quant = QuantSpec() if operands == "bf16" else QuantSpec("int8", "fp8", smooth_k=True)
    if device.type != "cuda" and operands != "bf16":
        quant = QuantSpec("int8", "int8", smooth_k=True)
    plan = AttnPlan(parts, quant, validate=False).to(device)
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = (
        torch.randn(1, heads, tokens, dim, generator=generator, device=device).bfloat16()
        for _ in range(3)
    )
    for _ in range(2):
        sparse_attention(q, k, v, plan, backend=backend)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
