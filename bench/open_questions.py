"""`python -m bench.open_questions`: what the papers leave open about MMInference, tried out.

Constructed heads only: they show what a choice costs where the structure is known, not how often
real heads have it. Writes bench/results/open_questions.json, which docs/patterns/mminference.md
quotes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from permattn import HeadPattern, TokenGrid, TokenRun, plan_dense, plan_prefill
from permattn import sparse_attention_with_lse as attend
from permattn.core import Segment
from permattn.patterns.mminference.config import Boundary
from permattn.probe import probe_mass
from torch import Tensor

from bench.docs import RESULTS

# Strides that videos have: rows, frames, frames with a separator, pairs of frames.
STRIDES = (7, 14, 16, 28, 32, 64, 91, 128, 182, 256, 257, 364, 514)
PLANTED = (14, 16, 64, 182, 257)
VIDEO = TokenGrid(40, 40, 8, 12)
LENGTH = VIDEO.stop + 120
HEAD = HeadPattern("grid", sink=8, local=128, strides=("frame",))


def main() -> int:
    torch.manual_seed(0)
    with torch.no_grad():
        found = {
            "stride_rule": stride_rules(),
            "phase": phases(),
            "strides": more_strides(),
            "rows": rows_over_text(),
            "pairs": pairs(),
        }
    (RESULTS / "open_questions.json").write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))
    return 0


def stride_rules(cases: int = 400, tokens: int = 12_000) -> dict[str, int]:
    """How often each normaliser finds a planted (stride, phase): 4 logits over unit noise."""
    right = dict.fromkeys(("excess", "ratio", "sum"), 0)
    g = torch.Generator().manual_seed(0)
    for _ in range(cases):
        stride = PLANTED[int(torch.randint(len(PLANTED), (1,), generator=g))]
        phase = int(torch.randint(stride, (1,), generator=g))
        # With D = 1 and k the logits of all rows, noise and signal are those of the score itself.
        score = torch.randn(1, 1, tokens, 1, generator=g)
        score[:, :, phase::stride] += 4.0
        mass = probe_mass(
            torch.ones(1, 1, 64, 1),
            score,
            first_position=torch.tensor([tokens - 64], dtype=torch.int32),
            key_range=torch.tensor([[0, tokens]], dtype=torch.int32),
        ).column[0, 0]
        line = {
            s: torch.nn.functional.pad(mass, (0, -tokens % s)).view(-1, s).sum(0) for s in STRIDES
        }
        rules = {
            "excess": lambda s: float(line[s].max() - line[s].sum() / s),  # noqa: B023
            "ratio": lambda s: float(line[s].max() * s / line[s].sum()),  # noqa: B023
            "sum": lambda s: float(line[s].max()),  # noqa: B023
        }
        for name, rule in rules.items():
            best = max(STRIDES, key=rule)
            right[name] += (best, int(line[best].argmax())) == (stride, phase)
    return {"cases": cases, **right}


def phases() -> dict[str, float]:
    """A head whose dense rows lie on the keys' phase, and one whose rows lie on another."""
    found = {}
    for name, shift in (("same", 0), ("other", 31)):
        q, k = grid_head(stride=96, phase=17)
        q[:, :, VIDEO.token_of_rank()[17 + shift :: 96], 0] = 0.0
        found[name] = measure(q, k, HEAD)["recall"]
    return found


def more_strides() -> dict[str, Any]:
    """Lines at strides beyond frame and row, with and without candidates of that size."""
    found: dict[str, Any] = {}
    for name, stride in (("half", 48), ("frame", 96), ("two", 192)):
        q, k = grid_head(stride, phase=17)
        few = measure(q, k, HEAD)
        more = measure(q, k, replace(HEAD, strides=("row", "frame", 48, 192)))
        found[name] = {"frame": few, "more": more}
    return found


def rows_over_text() -> dict[str, float]:
    """Rows on the line look at everything before them: do they need the text, too?"""
    q, k = grid_head(stride=96, phase=17)
    q[:, :, VIDEO.token_of_rank()[17::96], 0] = 0.0
    text = HeadPattern("a_shape", sink=0, local=1)
    only_vision = replace(HEAD, boundary="2d", sink=0, when={"vision,text": text})
    everything = replace(HEAD, sink=0)
    rows = VIDEO.token_of_rank()[17::96]
    return {
        "everything": measure(q, k, everything, rows)["recall"],
        "vision": measure(q, k, only_vision, rows)["recall"],
    }


def pairs() -> dict[str, Any]:
    """Text looks at columns that vision does not look at: one probe, or one per modality."""
    torch.manual_seed(1)
    segments: list[Segment] = [TokenRun(0, 400), replace(VIDEO, start=400), TokenRun(4240, 760)]
    q, k = torch.randn(1, 1, 5000, 16) * 0.3, torch.randn(1, 1, 5000, 16) * 0.3
    label = torch.zeros(5000, dtype=torch.bool)
    label[400:4240] = True
    q[0, 0, label, 0], q[0, 0, ~label, 1] = 8.0, 8.0
    k[0, 0, 400 + 17 : 4240 : 96, 0] += 7.0
    k[0, 0, torch.randperm(4240)[:60], 1] += 7.0
    head = HeadPattern(sink=8, local=64, vertical=128, slash=0)
    # The text after the video is dense whatever the boundary.
    text = torch.arange(64, 400)
    boundaries: tuple[Boundary, ...] = ("none", "q", "2d")
    found: dict[str, Any] = {}
    for boundary in boundaries:
        one = replace(head, boundary=boundary)
        whole = measure(q, k, one, segments=segments)
        found[boundary] = whole | {"text": measure(q, k, one, text, segments)["recall"]}
    return found


def grid_head(stride: int, phase: int) -> tuple[Tensor, Tensor]:
    """q, k of a head that looks at one key per stride of the video: 4 logits over noise."""
    q, k = torch.randn(1, 1, LENGTH, 16) * 0.3, torch.randn(1, 1, LENGTH, 16) * 0.3
    q[..., 0] = 8.0
    k[:, :, VIDEO.token_of_rank()[phase::stride], 0] += 4.0
    return q, k


def measure(
    q: Tensor,
    k: Tensor,
    head: HeadPattern,
    rows: Tensor | None = None,
    segments: Sequence[Segment] = (VIDEO,),
) -> dict[str, float]:
    """Share of the true attention mass that a plan holds (mean over rows), and its density."""
    plan = plan_prefill(q, k, [segments], [head])
    n = q.shape[2]
    _, sparse = attend(q, k, k, plan)
    _, dense = attend(q, k, k, plan_dense(n, n, causal=True))
    recall = (sparse - dense).exp()[0, 0]
    chosen = recall if rows is None else recall[rows]
    return {"recall": float(chosen.mean()), "density": plan.density()}


if __name__ == "__main__":
    raise SystemExit(main())
