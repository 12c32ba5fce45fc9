"""Other packages on a GPU, each imported if it is there: dense attention, and the same blocks.

What a package does to its inputs at every call (quantising, smoothing) is in its time; what it
plans once for a mask is not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from permattn.core import AttnPlan
from torch import Tensor

from bench import baselines

Call = Callable[[], object]


@dataclass(frozen=True, eq=False)
class Inputs:
    """q, k, v [1, H, S, D], and, of sparse attention, its blocks.

    Args:
        mask: bool [H, nq, nk], the listed blocks of `block` queries and keys.
        plan: the same, as ours.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None = None
    block: int = 0
    plan: AttnPlan | None = None

    @property
    def by_token(self) -> tuple[Tensor, Tensor, Tensor]:
        """[1, S, H, D] each."""
        return self.q.transpose(1, 2), self.k.transpose(1, 2), self.v.transpose(1, 2)


def _sdpa(kind: str) -> Callable[[Inputs], Call]:
    def make(x: Inputs) -> Call:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        dense = baselines.sdpa(x.q, x.k, x.v, causal=False)

        def attend() -> object:
            with sdpa_kernel(SDPBackend.__members__[kind]):
                return dense()

        return attend

    return make


def _flash_attn_2(x: Inputs) -> Call:
    from flash_attn import flash_attn_func

    q, k, v = x.by_token
    return lambda: flash_attn_func(q, k, v, causal=False)


def _flash_attn_3(x: Inputs) -> Call:
    from flash_attn_interface import flash_attn_func

    q, k, v = x.by_token
    return lambda: flash_attn_func(q, k, v, causal=False)


def _flash_attn_4(x: Inputs) -> Call:
    from flash_attn.cute import flash_attn_func

    q, k, v = x.by_token
    return lambda: flash_attn_func(q, k, v, causal=False)


def _flashinfer_dense(x: Inputs) -> Call:
    import flashinfer

    q, k, v = (y[0].contiguous() for y in x.by_token)
    return lambda: flashinfer.single_prefill_with_kv_cache(q, k, v, causal=False)


def _sage(x: Inputs) -> Call:
    from sageattention import sageattn

    return lambda: sageattn(x.q, x.k, x.v, tensor_layout="HND", is_causal=False)


def _flex(x: Inputs) -> Call:
    assert x.plan is not None
    return baselines.flex(x.q, x.k, x.v, x.plan)


def _flashinfer_blocks(x: Inputs) -> Call:
    from flashinfer.sparse import VariableBlockSparseAttentionWrapper

    assert x.mask is not None
    heads, rows, columns = x.mask.shape
    workspace = torch.empty(128 << 20, dtype=torch.uint8, device=x.q.device)
    wrapper = VariableBlockSparseAttentionWrapper(workspace)
    sizes = (
        torch.full((heads, n), x.block, dtype=torch.int32, device=x.q.device)
        for n in (rows, columns)
    )
    facts = {"num_qo_heads": heads, "num_kv_heads": heads, "head_dim": x.q.shape[3]}
    wrapper.plan(x.mask, *sizes, **facts, q_data_type=x.q.dtype)
    q, k, v = (y[0] for y in (x.q, x.k, x.v))
    return lambda: wrapper.run(q, k, v)


def _block_sparse_attn(x: Inputs) -> Call:
    from block_sparse_attn import block_sparse_attn_func

    assert x.mask is not None
    if x.block != 128:
        raise NotImplementedError(f"has blocks of 128, not of {x.block}")
    heads, tokens = x.q.shape[1:3]
    q, k, v = (y[0].contiguous() for y in x.by_token)
    ends = torch.tensor([0, tokens], dtype=torch.int32, device=x.q.device)
    kinds = torch.ones(heads, dtype=torch.int32, device=x.q.device)
    mask = x.mask[None]
    facts: dict[str, Any] = {"deterministic": True, "is_causal": False}
    return lambda: block_sparse_attn_func(
        *(q, k, v, ends, ends, kinds, None, mask, tokens, tokens, 0.0), **facts
    )


def _sparge(x: Inputs) -> Call:
    """Its own blocks are 128 queries by 64 keys: every listed block of ours, cut or joined."""
    from spas_sage_attn import block_sparse_sage2_attn_cuda

    assert x.mask is not None
    columns = x.mask.repeat_interleave(x.block // 64, 2)
    rows = columns if x.block == 128 else columns[:, ::2]
    blocks = rows[None].to(torch.int8).contiguous()
    facts = {"mask_id": blocks, "tensor_layout": "HND"}
    return lambda: block_sparse_sage2_attn_cuda(x.q, x.k, x.v, **facts)


# name -> (makes a call, formats of its operands)
DENSE: dict[str, tuple[Callable[[Inputs], Call], str]] = {
    "sdpa-flash": (_sdpa("FLASH_ATTENTION"), "bf16"),
    "sdpa-cudnn": (_sdpa("CUDNN_ATTENTION"), "bf16"),
    "sdpa-efficient": (_sdpa("EFFICIENT_ATTENTION"), "bf16"),
    "flash-attn-2": (_flash_attn_2, "bf16"),
    "flash-attn-3": (_flash_attn_3, "bf16"),
    "flash-attn-4": (_flash_attn_4, "bf16"),
    "flashinfer": (_flashinfer_dense, "bf16"),
    "sageattention": (_sage, "its own"),
}
SAME_BLOCKS: dict[str, tuple[Callable[[Inputs], Call], str]] = {
    "flex": (_flex, "bf16"),
    "flashinfer-blocks": (_flashinfer_blocks, "bf16"),
    "block-sparse-attn": (_block_sparse_attn, "bf16"),
    "spargeattn": (_sparge, "its own"),
}


def why_not(error: Exception) -> str:
    """What keeps another package from running, in one line."""
    first = str(error).splitlines()[0][:200] if str(error) else ""
    if isinstance(error, ImportError):
        return f"not importable: {first}"
    return f"{type(error).__name__}: {first}"
