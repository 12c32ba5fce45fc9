"""PAROAttention on a GPU: formats against the reference, and two video models' layers, itemised.

What another package cannot do here (not installed, no such kernel, out of memory) is recorded, not
fatal; a wrong or failing result of our own is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import permattn
import torch
from permattn.backends import BACKENDS
from permattn.core import AttnPlan, FwdArgs, Permutation, QuantSpec, TokenGrid
from permattn.core.prepare import PrepareArgs, smoothing_of
from permattn.core.quant import PRECISIONS
from torch import Tensor

from bench import baselines, local_heads
from bench.gpu_prefill import milliseconds
from bench.plans import head_orders

DEVICE = torch.device("cuda")
FORMATS = ("none", *PRECISIONS)
# Over FlashAttention-2, QKV projections left out: the paper's figures on an A100.
GOALS = {0.5: 1.73, 0.3: 2.71, 0.2: 3.81}


@dataclass(frozen=True)
class Layer:
    """The self-attention of one layer of a published model."""

    grid: tuple[int, int, int]
    heads: int
    head_dim: int
    text: int = 0

    @property
    def num_tokens(self) -> int:
        frames, height, width = self.grid
        return self.text + frames * height * width


LAYERS = {
    "wan": Layer((21, 45, 80), 40, 128),
    "cogvideox": Layer((13, 30, 45), 48, 64, text=226),
}


def correctness(backend: str) -> list[dict[str, Any]]:
    """Every format on ragged video with text before it, against the reference on the same numbers.

    Raises:
        AssertionError: a result further from the reference than a few steps of its rounding.
    """
    data, wrong = [], []
    for head_dim in (64, 128):
        layer = Layer((5, 9, 10), 6, head_dim, text=30)
        q, k, v = local_heads.inputs(
            *(layer.grid, head_orders(6), head_dim),
            text=layer.text,
            outliers=True,
            dtype=torch.bfloat16,
        )
        for name in FORMATS:
            plan = plan_of(layer, 0.4, QuantSpec.named(name))
            want = permattn.sparse_attention(q, k, v, plan, backend="reference").float()
            a, b, c = (x.to(DEVICE) for x in (q, k, v))
            got = attend(backend, a, b, c, plan.to(DEVICE))()
            error = float((got.cpu().float() - want).norm() / want.norm())
            data.append({"case": f"{name}-d{head_dim}", "error": error, "bound": 0.01})
            if not error <= 0.01:
                wrong.append(f"{name}-d{head_dim} ({error:.2e})")
    if wrong:
        raise AssertionError(f"{len(wrong)} of {len(data)} differ from the reference: {wrong}")
    return data


def plan_of(layer: Layer, density: float, quant: QuantSpec) -> AttnPlan:
    """The nearest blocks of every head, on the CPU."""
    orders = head_orders(layer.heads)
    masks = {o: local_heads.block_mask(layer.grid, o, density, (64, 64)) for o in set(orders)}
    return permattn.plan_paro(
        TokenGrid(layer.text, *layer.grid),
        torch.tensor(orders),
        torch.stack([masks[o] for o in orders]),
        num_tokens=layer.num_tokens,
        quant=quant,
    )


def draw(layer: Layer) -> tuple[Tensor, Tensor, Tensor]:
    shape = (1, layer.heads, layer.num_tokens, layer.head_dim)
    generator = torch.Generator(DEVICE).manual_seed(0)
    q, k, v = (
        torch.randn(shape, generator=generator, device=DEVICE, dtype=torch.bfloat16)
        for _ in range(3)
    )
    return q, k, v


def attend(backend: str, q: Tensor, k: Tensor, v: Tensor, plan: AttnPlan) -> Callable[[], Tensor]:
    return lambda: permattn.sparse_attention(q, k, v, plan, backend=backend)


def timing(backend: str, model: str, densities: tuple[float, ...] = tuple(GOALS)) -> dict[str, Any]:
    """One layer at several densities in every format, beside what others do.

    Returns: `ours`, `others` and `ratios` over SDPA's FlashAttention, with the paper's figure as
    the target of bf16.
    """
    layer = LAYERS[model]
    q, k, v = draw(layer)
    others = [_recorded(x, make, q, k, v) for x, make in dense_kernels().items()]
    ours = []
    for density in densities:
        host = plan_of(layer, density, QuantSpec()).to(DEVICE)
        for name in FORMATS:
            plan = AttnPlan(host.parts, QuantSpec.named(name), validate=False)
            found: dict[str, Any] = {
                "run": f"{density:.0%} {'bf16' if name == 'none' else name}",
                "density": density,
            }
            found["ms"] = milliseconds(attend(backend, q, k, v, plan))
            pairs = float(plan.num_block_pairs().double().mean()) * layer.heads
            found["tflops"] = 4 * pairs * layer.head_dim / found["ms"] / 1e9
            if plan.quant.is_quantised:
                found |= _itemised(backend, q, k, v, plan)
            ours.append(found)
    flash = next((x["ms"] for x in others if x["run"] == "sdpa-flash" and "ms" in x), None)
    ratios = {
        f"{x['run']} over SDPA flash": {
            "value": flash / x["ms"],
            "target": GOALS.get(x["density"]),
            "at_most": False,
        }
        for x in ours
        if flash is not None
    }
    shape = f"{layer.num_tokens} tokens, {layer.heads} heads, D = {layer.head_dim}, bf16"
    return {"shape": shape, "ours": ours, "others": others, "ratios": ratios}


def _itemised(backend: str, q: Tensor, k: Tensor, v: Tensor, plan: AttnPlan) -> dict[str, float]:
    """What stands before the kernel, timed alone: column statistics; permuting and quantising."""
    quant, module = plan.quant, BACKENDS[backend]
    args = FwdArgs(q, k, v, plan, q.shape[3] ** -0.5)
    smoothing = smoothing_of(args)
    jobs: list[PrepareArgs] = []

    def add(x: Tensor, perm: Permutation, fmt: str, rows: int, per_column: bool = False) -> None:
        jobs.append(
            PrepareArgs(x, perm.token_of_slot, fmt=fmt, rows_per_scale=rows, per_column=per_column)
        )

    add(q, plan.parts[0].q_perm, quant.qk, quant.q_rows_per_scale)
    for part in plan.parts:
        add(k, part.kv_perm, quant.qk, quant.kv_rows_per_scale)
        if quant.pv != "none":
            add(v, part.kv_perm, quant.pv, quant.kv_rows_per_scale, per_column=True)
    found = {"prepare_ms": milliseconds(lambda: [module.prepare(job) for job in jobs])}
    if smoothing.mean is not None:
        found["statistics_ms"] = milliseconds(lambda: smoothing_of(args))
    return found


Attend = Callable[[], object]


def dense_kernels() -> dict[str, Callable[[Tensor, Tensor, Tensor], Attend]]:
    """Dense attention of others, and SpargeAttn's own sparse kernel on random blocks of 30 %."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def sdpa(kind: SDPBackend) -> Callable[[Tensor, Tensor, Tensor], Attend]:
        def make(q: Tensor, k: Tensor, v: Tensor) -> Attend:
            dense = baselines.sdpa(q, k, v, causal=False)

            def attend() -> object:
                with sdpa_kernel(kind):
                    return dense()

            return attend

        return make

    return {
        "sdpa-flash": sdpa(SDPBackend.FLASH_ATTENTION),
        "sdpa-cudnn": sdpa(SDPBackend.CUDNN_ATTENTION),
        "sageattention": _sage,
        "spargeattn-30%": _sparge,
    }


def _sage(q: Tensor, k: Tensor, v: Tensor) -> Attend:
    from sageattention import sageattn

    return lambda: sageattn(q, k, v, tensor_layout="HND", is_causal=False)


def _sparge(q: Tensor, k: Tensor, v: Tensor) -> Attend:
    from spas_sage_attn import block_sparse_sage2_attn_cuda

    rows, columns = (-(-q.shape[2] // size) for size in (128, 64))
    generator = torch.Generator(q.device).manual_seed(0)
    shape = (1, q.shape[1], rows, columns)
    mask = torch.rand(shape, generator=generator, device=q.device) < 0.3
    blocks = mask.to(torch.int8)
    return lambda: block_sparse_sage2_attn_cuda(q, k, v, mask_id=blocks, tensor_layout="HND")


def _recorded(
    name: str, make: Callable[[Tensor, Tensor, Tensor], Attend], q: Tensor, k: Tensor, v: Tensor
) -> dict[str, Any]:
    try:
        ms = milliseconds(make(q, k, v))
    except Exception as error:  # somebody else's kernel: what it cannot do is data
        first = str(error).splitlines()[0] if str(error) else ""
        return {"run": name, "why_not": f"{type(error).__name__}: {first}"}
    return {"run": name, "ms": ms}
