"""Block masses of the kernel against the reference in float64."""

from dataclasses import dataclass

import pytest
import torch
from permattn.backends import reference, resolve, triton
from permattn.block_mass import block_mass
from permattn.core.block_mass import BlockMassArgs, BlockMassProblem
from permattn.testing import random_permutation


@dataclass(frozen=True)
class MassCase:
    """A measurement over random orders; `order_heads`: heads that have one of their own."""

    name: str
    sq: int = 70
    skv: int = 130
    batch: int = 1
    heads: int = 4
    kv_heads: int = 2
    order_heads: int = 4
    dim: int = 24
    block: tuple[int, int] = (32, 32)
    blocks: tuple[int, ...] = (2, 0)
    dtype: torch.dtype = torch.float32
    eps: float | None = 1e-3

    def __str__(self) -> str:
        return self.name

    def arguments(self) -> BlockMassArgs:
        g = torch.Generator().manual_seed(0)
        q = torch.randn(self.batch, self.sq, self.heads, self.dim, generator=g).transpose(1, 2)
        k = torch.randn(self.batch, self.kv_heads, self.skv, self.dim, generator=g)
        q, k = q.to(self.dtype), k.to(self.dtype)
        q_slot, kv_slot = (
            random_permutation(n, heads=self.order_heads, keep=0.9, holes=4, generator=g)
            for n in (self.sq, self.skv)
        )
        wide = k.repeat_interleave(self.heads // self.kv_heads, 1)
        lse = (q.float() @ wide.float().mT * 0.3).logsumexp(-1)
        lse[..., ::11] = float("-inf")
        blocks = torch.tensor(self.blocks, dtype=torch.int32)
        slots = q_slot.token_of_slot, kv_slot.token_of_slot
        return BlockMassArgs(q, k, *slots, blocks, *self.block, lse, 0.3, self.eps)


CASES = (
    MassCase("orders-of-heads"),
    MassCase("sums-alone", eps=None, order_heads=1, batch=2),
    MassCase("bfloat16", dtype=torch.bfloat16, dim=64, block=(64, 64), blocks=(1,)),
    MassCase("odd-blocks", block=(20, 5), blocks=(3, 3, 0), dim=40, dtype=torch.float16),
    MassCase("many-blocks", skv=170, block=(64, 8), kv_heads=4, blocks=(0,)),
    MassCase("no-blocks", blocks=()),
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_masses_are_the_references(case):
    args = case.arguments()
    ours = triton.block_mass(args)
    facts = {**vars(args), "q": args.q.double(), "k": args.k.double()}
    want = reference.block_mass(BlockMassArgs(**facts))
    assert all(
        x.dtype == torch.float32 and x.shape == y.shape for x, y in zip(ours, want, strict=True)
    )
    # exp(x) is as far off as x is, and scores of 16-bit inputs add up in float32.
    for x, y in zip(ours[:2], want[:2], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)
    # An entry next to eps may fall on either side.
    assert float((ours[2] - want[2]).abs().sum()) <= 2


def test_rows_and_keys_in_no_slot_are_not_read():
    args = MassCase("holes").arguments()
    want = triton.block_mass(args)
    q, k = args.q.clone(), args.k.clone()
    for x, slots, group in ((q, args.token_of_q_slot, 1), (k, args.token_of_kv_slot, 2)):
        for head in range(x.shape[1]):
            held = slots[0, head * group : (head + 1) * group].flatten().tolist()
            gone = sorted(set(range(x.shape[2])) - set(held))
            assert gone or group == 2
            x[:, head, gone] = float("nan")
    q[:, :, ::11] = float("nan")
    got = triton.block_mass(BlockMassArgs(**{**vars(args), "q": q, "k": k}))
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


def test_numbers_of_blocks_out_of_range_are_blocks_of_holes():
    args = MassCase("range", blocks=(-1, 2**31 - 1, 1, 2**27)).arguments()
    sums, maxima, small = triton.block_mass(args)
    for x in (sums, maxima, small):
        assert not bool(x[:, :, [0, 1, 3]].any()) and bool(x[:, :, 2].any())


def test_all_keys_add_up_to_one_and_runs_are_identical():
    case = MassCase("front", sq=64, skv=64, eps=None)
    args = case.arguments()
    order = random_permutation(64).token_of_slot
    wide = args.k.repeat_interleave(2, 1)
    facts = {
        "token_of_q_slot": order,
        "token_of_kv_slot": order,
        "q_blocks": torch.tensor([0, 1], dtype=torch.int32),
        "block": (32, 16),
        "lse": (args.q @ wide.mT * 0.3).logsumexp(-1),
        "scale": 0.3,
        "backend": "triton",
    }
    first, second = (block_mass(args.q, args.k, **facts) for _ in "ab")
    torch.testing.assert_close(first.sums.sum(-1), torch.full((1, 4, 2), 32.0))
    assert torch.equal(first.sums, second.sums) and first.maxima is None


def test_what_no_kernel_can_is_said():
    problem = BlockMassProblem("cpu", torch.float32, 64, 256, 64)
    with pytest.raises(NotImplementedError, match="takes blocks up to 128, got 256 x 64"):
        resolve(problem, "triton")
