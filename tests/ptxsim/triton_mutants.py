"""The bf16 forward of the Triton backend with one instruction missing; prints what survives.

python tests/ptxsim/triton_mutants.py --arch 90
"""

from __future__ import annotations

import argparse
import json
import sys

import deletions
import torch
from permattn.backends.triton import forward_kernels
from permattn.core import TokenBand
from permattn.core.problem import FwdArgs
from permattn.testing import float64_bound, masked_attention, random_plan, visible_pairs
from triton_launches import Executed, simulated

TOKENS, DIM, SCALE = 260, 64, 0.125


def main() -> int:
    """Prints {target: [made, caught, survivors]}, and the whole story on stderr."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, default=90)
    args = parser.parse_args()
    torch.set_num_threads(1)
    g = torch.Generator().manual_seed(0)
    # Causal in token order: full and partial blocks, several of each.
    plan = random_plan(TOKENS, TOKENS, density=1.0, band=TokenBand(0))
    q, k, v = (torch.randn(1, 1, TOKENS, DIM, generator=g).bfloat16() for _ in "qkv")
    seen = visible_pairs(plan, 1, 1) > 0
    exact, _ = masked_attention(q.double(), k.double(), v.double(), seen, SCALE)
    plain, _ = masked_attention(q, k, v, seen, SCALE)

    def forward(edit) -> tuple[torch.Tensor, Executed]:
        out, lse = torch.full_like(q, float("nan")), torch.full(q.shape[:3], float("nan"))
        options = {"most_steps": 200_000}
        with simulated(args.arch, edit=edit, options=options) as simulator:
            forward_kernels(FwdArgs(q, k, v, plan, SCALE), out, lse)
        return out, simulator.executed[0]

    def is_right(text: str) -> bool:
        return float64_bound(forward(lambda name, ptx: text)[0], plain, exact).ok

    out, whole = forward(lambda name, ptx: ptx)
    assert float64_bound(out, plain, exact).ok
    outcomes = deletions.try_all(whole.ptx, whole.report.lines, is_right)
    print(deletions.told(outcomes), file=sys.stderr)
    rows = {t: [o.made, o.made - len(o.survivors), o.survivors] for t, o in outcomes.items()}
    print(json.dumps(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
