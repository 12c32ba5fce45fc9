"""Plans made with the CUDA kernels of lists are those that torch makes."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import permattn
import pytest
import torch
from permattn.backends.cuda import device, lists
from permattn.core import BlockIndex, list_kernels
from permattn.core.selection import pooled_blocks, strongest_blocks
from permattn.patterns.flexprefill import plan_flexprefill

sys.path.insert(0, str(Path(__file__).parents[1] / "backends"))
from cuda_on_cpu import on_cpu, one_thread, shim_path  # noqa: F401

pytestmark = pytest.mark.usefixtures("on_cpu", "one_thread")
KINDS = ("compact", "transpose", "pool", "scores", "strongest")


@pytest.fixture
def calls(monkeypatch) -> Counter:
    """How often each kind of kernel was asked."""
    counted = Counter()

    def count(kind):
        plain = getattr(lists.CudaLists, kind)

        def counting(self, *args):
            counted[kind] += 1
            return plain(self, *args)

        monkeypatch.setattr(lists.CudaLists, kind, counting)

    for kind in KINDS:
        count(kind)
    return counted


def in_torch(make):
    """What torch makes of it alone."""
    kept = list_kernels._registered[:]
    list_kernels._registered.clear()
    try:
        return make()
    finally:
        list_kernels._registered.extend(kept)


def assert_same_index(found: BlockIndex, want: BlockIndex) -> None:
    for name in ("kv_indices", "row_offsets", "kv_num_full"):
        assert torch.equal(getattr(found, name), getattr(want, name)), name
    assert (found.block_q, found.block_kv) == (want.block_q, want.block_kv)


def assert_same_plan(found, want) -> None:
    assert len(found.parts) == len(want.parts)
    for a, b in zip(found.parts, want.parts, strict=True):
        assert_same_index(a.index, b.index)


def drawn(*shape: int, seed: int = 0, dtype=torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("capacity", [None, 40, 10**6], ids=["whole", "cut", "more-than-whole"])
@pytest.mark.parametrize("axes", [2, 4])
def test_masks(calls, axes, capacity):
    mask = torch.rand(2, 3, 9, 40, generator=torch.Generator().manual_seed(1)) < 0.3
    mask = mask.transpose(0, 1) if axes == 4 else mask[0, 0]
    made = [
        make(lambda: BlockIndex.from_block_mask(mask, 64, 32, full=True, capacity=capacity))
        for make in (lambda f: f(), in_torch)
    ]
    assert calls == {"compact": 1}
    assert_same_index(*made)


def test_lists_are_turned_where_bits_of_all_pairs_cost_no_more_than_entries(calls):
    for density, is_asked in ((0.3, True), (0.0001, False)):
        mask = torch.rand(1, 2, 300, 400, generator=torch.Generator().manual_seed(1)) < density
        most = max(1, int(mask.sum((2, 3)).max()))
        index = in_torch(
            lambda mask=mask, most=most: BlockIndex.from_block_mask(mask, 8, 8, capacity=most)
        )
        calls.clear()
        found = index.transpose(400)
        assert calls["transpose"] == 1
        assert (
            lists.CudaLists().transpose(index.kv_indices, index.row_offsets, index.kv_num_full, 400)
            is not None
        ) == is_asked
        assert_same_index(found, in_torch(lambda index=index: index.transpose(400)))


def test_pooled_blocks_choose_the_same_keys(calls):
    q, k = drawn(2, 4, 300, 40), drawn(2, 2, 700, 40, seed=1)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(2)).int()[None, None]

    def chosen(budget):
        return strongest_blocks(
            pooled_blocks(q, 32, order),
            pooled_blocks(k, 32),
            allowed_stop=torch.arange(10) + 12,
            budget=budget,
            coverage=None,
            max_blocks=7,
            scale=0.2,
            allowed_start=torch.tensor([0, 3]),
        )

    for budget in (5, 9, -1, torch.tensor([7, 0, 3, 9])):
        calls.clear()
        assert torch.equal(chosen(budget), in_torch(lambda budget=budget: chosen(budget)))
        assert calls == {"pool": 2, "scores": 1, "strongest": 1}


def test_flexprefill_plans_the_same(calls):
    q, k = drawn(1, 2, 400, 32), drawn(1, 1, 400, 32, seed=1)
    found = plan_flexprefill(q, k)
    assert calls["compact"] == 1
    assert_same_plan(found, in_torch(lambda: plan_flexprefill(q, k)))


def test_gradients_use_turned_lists(calls):
    """A backward in a backend that asks for them, on tensors that the kernels take."""
    plan = permattn.plan_dense(200, 200, causal=True)
    q, k, v = (drawn(1, 2, 200, 32, seed=i, dtype=torch.float32).requires_grad_() for i in range(3))

    def gradients():
        out = permattn.sparse_attention(q, k, v, plan, backend="cpu")
        return torch.autograd.grad(out.sum(), (q, k, v))

    for a, b in zip(gradients(), in_torch(gradients), strict=True):
        assert torch.equal(a, b)
    assert calls["transpose"] >= 1


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(1, 1, 4, 4, dtype=torch.float64),
        torch.zeros(1, 1, 4, 300),
        torch.zeros(1, 1, 4, 4, device="meta"),
    ],
    ids=["float64", "wide", "meta"],
)
def test_what_the_kernels_do_not_pool_torch_does(x):
    assert pooled_blocks(x, 2).shape == (1, 1, 2, x.shape[3])


def test_traced_tensors_stay_with_torch(calls):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        assert list_kernels.kernels_for(torch.zeros(1, 1, 4, 4)) is None

    @torch.compile(fullgraph=True, backend="eager")
    def pooled(x):
        return pooled_blocks(x, 2)

    x = drawn(1, 1, 6, 8, dtype=torch.float32)
    torch.testing.assert_close(pooled(x), pooled_blocks(x, 2))
    assert calls == {"pool": 1}


def test_no_library_no_kernels(monkeypatch):
    monkeypatch.setattr(device, "load_kernels", lambda: "the native library was not built")
    assert list_kernels.kernels_for(torch.zeros(1, 1, 4, 4)) is None
