"""Whole prefills on a GPU, 32k to 1M tokens: itemised, beside what others compute densely.

One layer of 28 query and 4 key heads of 128 (Qwen2.5-VL 7B), bf16, K and V in place. What another
package cannot do here (not installed, no such backend, out of memory) is recorded, not fatal; a
wrong or failing result of our own is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import permattn
import torch
from permattn import testing
from permattn.core import AttnPlan, Segment
from permattn.probe import probe_mass
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench import baselines
from bench.contenders import video_marks, video_segments
from bench.gate import sample_rows, visible_rows
from bench.gpu_clock import Clock
from bench.heads import recall
from bench.planners import GRID_5, LAYER, LINES_8, FlexPrefill, Planner, XAttention
from bench.plans import Dense
from bench.registry import Shape

DEVICE = torch.device("cuda")
LENGTHS = {"32k": 1 << 15, "128k": 1 << 17, "512k": 1 << 19, "1m": 1 << 20}
# Lists of blocks that only the data bounds, or padded for FlexAttention: (N / 128)^2 a head.
LISTS_UP_TO = 1 << 17
PLANNERS: dict[str, Planner] = {
    "grid": GRID_5,
    "lines": LINES_8,
    "layer": LAYER,
    "flexprefill": FlexPrefill(),
    "xattention": XAttention(),
}
UNBOUNDED = ("flexprefill", "xattention")
# Milliseconds that the samples of one contender may take in all.
BUDGET_MS = 4000.0


@dataclass(frozen=True, eq=False)
class Layer:
    """The inputs of one prefill."""

    q: Tensor
    k: Tensor
    v: Tensor
    segments: tuple[Segment, ...]
    backend: str

    @property
    def num_tokens(self) -> int:
        return self.q.shape[2]

    @property
    def dense_flops(self) -> float:
        n = self.num_tokens
        return 4.0 * self.q.shape[1] * self.q.shape[3] * n * (n + 1) / 2


def prefill(
    backend: str,
    num_tokens: int,
    *,
    heads: tuple[int, int] = (28, 4),
    head_dim: int = 128,
    with_flex: bool = True,
) -> dict[str, Any]:
    """Every planner and every dense kernel at one length.

    Returns: `ours` and `others`, a list of runs each, and `ratios` of what was aimed at.

    Raises:
        AssertionError: a result of ours outside the float64 bound.
    """
    layer = draw(backend, num_tokens, heads, head_dim)
    ours = [{"run": "probe", "ms": milliseconds(_probe(layer))}]
    for name, planner in PLANNERS.items():
        if num_tokens <= LISTS_UP_TO or name not in UNBOUNDED:
            ours.append(planned(layer, name, planner))
            _free()
    others = []
    for name, make in dense_kernels(with_flex and num_tokens <= LISTS_UP_TO).items():
        others.append(_recorded(name, make, layer))
        _free()
    return {
        "tokens": num_tokens,
        "shape": f"{heads[0]}/{heads[1]} heads, D = {head_dim}, bf16",
        "ours": ours,
        "others": others,
        "ratios": ratios(num_tokens, ours, others),
    }


def draw(backend: str, num_tokens: int, heads: tuple[int, int], head_dim: int) -> Layer:
    """Seeded inputs of a video (see `video_marks`), made where they are used."""
    shape = Shape("bf16", head_dim, num_tokens, num_q_heads=heads[0], num_kv_heads=heads[1])
    q_marks, k_marks = video_marks(shape, torch.Generator().manual_seed(0))
    generator = torch.Generator(DEVICE).manual_seed(1)

    def tensor(count: int, marks: Tensor | None) -> Tensor:
        x = torch.empty(1, count, num_tokens, head_dim, dtype=torch.bfloat16, device=DEVICE)
        for h in range(count):
            noise = torch.randn(num_tokens, head_dim, generator=generator, device=DEVICE)
            x[0, h] = noise if marks is None else noise + marks
        return x

    q = tensor(heads[0], q_marks.to(DEVICE))
    k, v = tensor(heads[1], k_marks.to(DEVICE)), tensor(heads[1], None)
    return Layer(q, k, v, video_segments(num_tokens), backend)


def planned(layer: Layer, name: str, planner: Planner) -> dict[str, Any]:
    """One planner: checked first; then planning, attention and both, timed apart."""
    q, k, v = layer.q, layer.k, layer.v

    def attend(plan: AttnPlan) -> Tensor:
        return permattn.sparse_attention(q, k, v, plan, backend=layer.backend)

    plan = planner(q, k, layer.segments)
    error = spot_check(attend(plan), layer, plan)
    if not error.ok:
        raise AssertionError(f"{name}: error {error.ours:.2e}, allowed {error.bound:.2e}")
    _reset_peak()
    found: dict[str, Any] = {
        "run": name,
        "plan_ms": milliseconds(lambda: planner(q, k, layer.segments)),
        "attend_ms": milliseconds(lambda: attend(plan)),
        "ms": milliseconds(lambda: attend(planner(q, k, layer.segments))),
        "peak_gb": _peak_gb(),
        "density": plan.density(),
        "error": error.ours,
        "bound": error.bound,
    }
    pairs = float(plan.num_block_pairs().double().mean()) * q.shape[1]
    found["tflops"] = 4 * pairs * q.shape[3] / found["attend_ms"] / 1e9
    every = max(1, layer.num_tokens // 64)
    kept = recall(plan, q, k, v, backend=layer.backend, every=every)
    return found | {"recall": float(kept.mean()), "least_recall": float(kept.min())}


def spot_check(out: Tensor, layer: Layer, plan: AttnPlan, heads: int = 4) -> testing.Error:
    """A few queries of a few heads against float64; the worst of them."""
    q, k, v = layer.q, layer.k, layer.v
    rows = sample_rows(layer.num_tokens, 8)
    seen = visible_rows(plan.to("cpu"), rows, 1, q.shape[1])
    scale, group = q.shape[3] ** -0.5, q.shape[1] // k.shape[1]
    worst = testing.Error(0.0, 0.0, 0.0)
    for h in range(0, q.shape[1], max(1, q.shape[1] // heads)):
        a, b, c = q[:, h : h + 1, rows], k[:, h // group, None], v[:, h // group, None]
        shown = seen[:, h : h + 1].to(DEVICE)
        plain = testing.masked_attention(a, b, c, shown, scale)[0]
        exact = testing.masked_attention(a.double(), b.double(), c.double(), shown, scale)[0]
        error = testing.float64_bound(out[:, h : h + 1, rows], plain, exact)
        if error.ours - error.bound >= worst.ours - worst.bound:
            worst = error
    return worst


Attend = Callable[[], object]


def dense_kernels(with_flex: bool) -> dict[str, Callable[[Layer], Attend]]:
    """What others compute densely and causally (and FlexAttention on our blocks): by name."""
    kernels: dict[str, Callable[[Layer], Attend]] = {
        "sdpa-flash": lambda x: _sdpa(x, SDPBackend.FLASH_ATTENTION),
        "sdpa-cudnn": lambda x: _sdpa(x, SDPBackend.CUDNN_ATTENTION),
        "flash-attn-2": _flash_attn_2,
        "flash-attn-3": _flash_attn_3,
    }
    if with_flex:
        kernels["flex-causal"] = _flex_causal
        kernels["flex-xattention-blocks"] = _flex_same_blocks
    return kernels


def _sdpa(layer: Layer, kind: SDPBackend) -> Attend:
    def attend(k: Tensor, v: Tensor, grouped: bool) -> Tensor:
        with sdpa_kernel(kind):
            return torch.nn.functional.scaled_dot_product_attention(
                layer.q, k, v, is_causal=True, enable_gqa=grouped
            )

    try:
        attend(layer.k, layer.v, True)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        # This backend wants a key head for every query head.
        group = layer.q.shape[1] // layer.k.shape[1]
        k, v = (x.repeat_interleave(group, 1) for x in (layer.k, layer.v))
        return lambda: attend(k, v, False)
    return lambda: attend(layer.k, layer.v, True)


def _flash_attn_2(layer: Layer) -> Attend:
    from flash_attn import flash_attn_func

    q, k, v = (x.transpose(1, 2) for x in (layer.q, layer.k, layer.v))
    return lambda: flash_attn_func(q, k, v, causal=True)


def _flash_attn_3(layer: Layer) -> Attend:
    from flash_attn_interface import flash_attn_func

    q, k, v = (x.transpose(1, 2) for x in (layer.q, layer.k, layer.v))
    return lambda: flash_attn_func(q, k, v, causal=True)


def _flex_causal(layer: Layer) -> Attend:
    plan = Dense(causal=True)(layer.num_tokens, layer.q.shape[1]).to(DEVICE)
    return baselines.flex(layer.q, layer.k, layer.v, plan)


def _flex_same_blocks(layer: Layer) -> Attend:
    """XAttention's plan is one part in token order: FlexAttention can compute the same blocks."""
    plan = PLANNERS["xattention"](layer.q, layer.k, layer.segments)
    return baselines.flex(layer.q, layer.k, layer.v, plan)


def _recorded(name: str, make: Callable[[Layer], Attend], layer: Layer) -> dict[str, Any]:
    """Milliseconds of another kernel, or why there are none."""
    try:
        _reset_peak()
        ms = milliseconds(make(layer))
    except Exception as error:  # somebody else's kernel: what it cannot do is data
        first = str(error).splitlines()[0] if str(error) else ""
        return {"run": name, "why_not": f"{type(error).__name__}: {first}"}
    found: dict[str, Any] = {"run": name, "ms": ms, "peak_gb": _peak_gb()}
    if "blocks" not in name:
        found["tflops"] = layer.dense_flops / ms / 1e9
    return found


def ratios(
    num_tokens: int, ours: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """What was aimed at: name -> value, target (None where none is set for a length), at_most."""
    runs = {x["run"]: x for x in (*ours, *others) if "ms" in x}
    grid, layer, flash = runs["grid"], runs["layer"], runs.get("sdpa-flash")
    dense = [x["tflops"] for x in others if "tflops" in x]
    longest = num_tokens >= LENGTHS["1m"]
    found: dict[str, dict[str, Any]] = {}

    def add(name: str, value: float, target: float | None = None, at_most: bool = False) -> None:
        found[name] = {"value": value, "target": target, "at_most": at_most}

    if flash is not None:
        twelve, eight = (12.0, 8.3) if longest else (None, None)
        add("grid attention over SDPA flash", flash["ms"] / grid["attend_ms"], twelve)
        add("grid with planning over SDPA flash", flash["ms"] / grid["ms"])
        add("layer with planning over SDPA flash", flash["ms"] / layer["ms"], eight)
    if dense:
        add("rate of listed blocks over the best dense rate", grid["tflops"] / max(dense), 0.6)
    share = 0.05 if num_tokens >= LENGTHS["128k"] else None
    add("planning over attention, grid", grid["plan_ms"] / grid["attend_ms"], share, True)
    return found


def milliseconds(call: Callable[[], object]) -> float:
    """Median of samples; as many as fit the budget, 3 to 15."""
    return Clock(DEVICE, BUDGET_MS / 1e3, wanted=15)(call).ms


def _probe(layer: Layer) -> Attend:
    """One probe of the last 64 queries, all heads."""
    rows = layer.q[:, :, -64:] * layer.q.shape[3] ** -0.5
    n = layer.num_tokens
    position = torch.tensor([n - rows.shape[2]], dtype=torch.int32, device=DEVICE)
    keys = torch.tensor([[0, n]], dtype=torch.int32, device=DEVICE)
    return lambda: probe_mass(rows, layer.k, first_position=position, key_range=keys)


def _free() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()


def _reset_peak() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def _peak_gb() -> float:
    """Highest memory allocated since the last reset, inputs included, in GB (10^9 bytes)."""
    return torch.cuda.max_memory_allocated() / 1e9 if DEVICE.type == "cuda" else 0.0
