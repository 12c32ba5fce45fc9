"""Block masses against a dense softmax in float64, and what the operator promises beside."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from permattn import testing
from permattn.backends import AUTO_ORDER, reasons
from permattn.block_mass import block_mass, block_mass_op
from permattn.core.axis_order import cells_in_order
from permattn.core.block_mass import BlockMassProblem
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

PROBLEM = BlockMassProblem("cpu", torch.float32, 64, 64, 64)
BACKENDS = [name for name in AUTO_ORDER if reasons(PROBLEM)[name] is None]
EPS = 1e-3


@dataclass(frozen=True)
class Case:
    """A grid behind a few text tokens, every head in an order of its own."""

    name: str
    grid: tuple[int, int, int] = (5, 9, 10)
    text: int = 0
    orders: tuple[int, ...] = (0, 1, 2, 3, 4, 5)
    kv_heads: int = 6
    batch: int = 1
    dim: int = 32
    block: tuple[int, int] = (64, 64)
    stride: int = 1
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        return self.name

    def inputs(self) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(3)
        n = self.text + self.grid[0] * self.grid[1] * self.grid[2]
        heads = len(self.orders)
        q = torch.randn(self.batch, heads, n, self.dim, generator=generator)
        k = torch.randn(self.batch, self.kv_heads, n, self.dim, generator=generator)
        q, k = (2 * q).to(self.dtype), k.to(self.dtype)
        every = k.double().repeat_interleave(heads // self.kv_heads, 1)
        lse = (q.double() @ every.mT * self.dim**-0.5).logsumexp(-1).float()
        token = cells_in_order(self.grid, torch.tensor(self.orders))[None] + self.text
        blocks = -(-token.shape[-1] // self.block[0])
        return {
            "q": q,
            "k": k,
            "token_of_q_slot": token,
            "token_of_kv_slot": token,
            "q_blocks": torch.arange(0, blocks, self.stride, dtype=torch.int32),
            "block": self.block,
            "lse": lse,
            "eps": EPS,
        }


CASES = (
    Case("six-orders"),
    Case("image", grid=(1, 16, 12), orders=(0, 1), kv_heads=2),
    Case("one-token", grid=(1, 1, 1), orders=(0,), kv_heads=1),
    Case("text-is-not-listed", text=30),
    Case("sampled-blocks", stride=3),
    Case("unequal-blocks", block=(32, 128)),
    Case("grouped-heads", kv_heads=2, batch=2),
    Case("one-order-for-all-heads", orders=(4,), kv_heads=1, batch=3),
    Case("bf16", dtype=torch.bfloat16),
    Case("fp16", dtype=torch.float16, dim=80),
    Case("long-rows", grid=(7, 15, 20), orders=(3, 5), kv_heads=1),
)


def dense(found: dict[str, Any], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """sums, maxima and the entries themselves [B, H, n, bq, nk, bk], -1 where a slot is a hole."""
    q, k = found["q"].to(dtype), found["k"].to(dtype)
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    p = ((q @ k.mT) * q.shape[3] ** -0.5 - found["lse"][..., None].to(dtype)).exp()
    for dim, token in ((2, found["token_of_q_slot"]), (3, found["token_of_kv_slot"])):
        size = found["block"][dim - 2]
        token = torch.nn.functional.pad(token, (0, -token.shape[-1] % size), value=-1).long()
        token = token.expand(*q.shape[:2], -1)
        shape = [*q.shape[:2], 1, 1]
        shape[dim] = -1
        index = token.view(shape)
        wide = list(p.shape)
        wide[dim] = token.shape[-1]
        p = p.gather(dim, index.clamp_min(0).expand(wide)).masked_fill(index < 0, -1.0)
    p = p.unflatten(3, (-1, found["block"][1])).unflatten(2, (-1, found["block"][0]))
    p = p[:, :, found["q_blocks"].long()]
    real = p.clamp_min(0.0)
    return real.sum((3, 5)), real.amax((3, 5)), p


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_masses_are_within_the_bound(case: Case, backend: str):
    found = case.inputs()
    ours = block_mass(**found, backend=backend)
    exact, plain = dense(found, torch.float64), dense(found, case.dtype)
    testing.assert_within(ours.sums, plain[0].float(), exact[0], "sums")
    testing.assert_within(ours.maxima, plain[1].float(), exact[1], "maxima")
    # A rounding moves an entry over eps: counts lie between those of the neighbours of eps.
    p = exact[2]
    slack = 1e-4 if case.dtype == torch.float32 else 0.05
    low, high = (((p < EPS * (1 + sign * slack)) & (p >= 0.0)).sum((3, 5)) for sign in (-1, 1))
    assert bool(((ours.small >= low) & (ours.small <= high)).all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_vision_row_sums_to_one_less_what_text_gets(backend: str):
    found = replace(CASES[0], text=30).inputs()
    sums = block_mass(**found, backend=backend).sums.sum((-2, -1))
    assert bool((sums < 450).all()) and bool((sums > 300).all())
    found = CASES[0].inputs()
    sums = block_mass(**found, backend=backend).sums.sum((-2, -1))
    torch.testing.assert_close(sums, torch.full((1, 6), 450.0), rtol=1e-5, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_holes_and_rows_that_see_nothing_count_nowhere(backend: str):
    found = CASES[4].inputs()
    token = found["token_of_q_slot"].clone()
    token[:, 2, 5:40] = -1
    found |= {"token_of_q_slot": token, "token_of_kv_slot": token}
    exact = dense(found, torch.float64)
    for x in ("q", "k"):
        found[x][0, 2, CASES[4].inputs()["token_of_q_slot"][0, 2, 5:40].long()] = float("nan")
    ours = block_mass(**found, backend=backend)
    torch.testing.assert_close(ours.sums.double(), exact[0], rtol=1e-4, atol=1e-5)
    first = ours.small[0, 2, 0, 0]
    assert float(first) <= 29 * 29
    found["lse"][0, 1] = float("-inf")
    nothing = block_mass(**found, backend=backend)
    assert float(nothing.sums[0, 1].abs().max()) == 0.0
    assert torch.equal(nothing.sums[0, 3:], ours.sums[0, 3:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_sums_alone_are_the_same_and_two_runs_are_equal(backend: str):
    found = CASES[3].inputs()
    whole = block_mass(**found, backend=backend)
    alone = block_mass(**{**found, "eps": None}, backend=backend)
    assert torch.equal(whole.sums, alone.sums)
    assert alone.maxima is None and alone.small is None
    again = block_mass(**found, backend=backend)
    assert torch.equal(again.maxima, whole.maxima) and torch.equal(again.small, whole.small)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_views_and_a_scale(backend: str):
    found = CASES[6].inputs()
    whole = block_mass(**found, backend=backend)
    for x in ("q", "k"):
        found[x] = found[x].transpose(1, 2).contiguous().transpose(1, 2)
    found["q"] = found["q"] * 0.5
    strided = block_mass(**found, scale=2 * 32**-0.5, backend=backend)
    torch.testing.assert_close(strided.sums, whole.sums, rtol=1e-4, atol=1e-5)


def test_reference_is_the_same_in_chunks(monkeypatch):
    found = CASES[0].inputs()
    whole = block_mass(**found, backend="reference")
    home = importlib.import_module("permattn.backends.reference.block_mass")
    monkeypatch.setattr(home, "_CHUNK", {"cpu": 1})
    again = block_mass(**found, backend="reference")
    torch.testing.assert_close(again.sums, whole.sums, rtol=1e-5, atol=1e-6)


def test_no_blocks_and_no_slots():
    found = CASES[0].inputs()
    none = block_mass(**{**found, "q_blocks": found["q_blocks"][:0]})
    assert none.sums.shape == (1, 6, 0, 8)
    empty = block_mass(**{**found, "token_of_kv_slot": found["token_of_kv_slot"][..., :0]})
    assert empty.sums.shape == (1, 6, 8, 0)


def test_opcheck_and_fake():
    found = CASES[1].inputs()
    args = (
        *(found["q"], found["k"], found["token_of_q_slot"], found["token_of_kv_slot"]),
        *(found["q_blocks"], *found["block"], found["lse"], 0.2),
    )
    for eps in (EPS, None):
        torch.library.opcheck(block_mass_op, (*args, eps, "reference"))
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(x) if isinstance(x, Tensor) else x for x in args]
        assert block_mass_op(*fake, EPS, "reference")[1].shape == (1, 2, 3, 3)


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "q-axes": ({"q": torch.zeros(2, 3)}, ValueError, "q: wants 4 axes"),
    "k-dtype": ({"k": torch.zeros(1, 6, 450, 32).bfloat16()}, TypeError, "k: wants q's dtype"),
    "k-dim": ({"k": torch.zeros(1, 6, 450, 16)}, ValueError, "k: wants q's batch size"),
    "heads": ({"k": torch.zeros(1, 4, 450, 32)}, ValueError, "Hq % Hkv"),
    "lse-shape": ({"lse": torch.zeros(1, 6, 449)}, ValueError, "lse: wants shape"),
    "lse-dtype": ({"lse": torch.zeros(1, 6, 450).double()}, TypeError, "lse: wants"),
    "slot-dtype": ({"token_of_q_slot": torch.zeros(1, 1, 9).long()}, TypeError, "token_of_q_slot"),
    "slot-heads": (
        {"token_of_kv_slot": torch.zeros(1, 5, 9, dtype=torch.int32)},
        ValueError,
        "token_of_kv_slot: wants",
    ),
    "slot-values": (
        {"token_of_kv_slot": torch.full((1, 1, 9), 450, dtype=torch.int32)},
        ValueError,
        "from -1 to 449",
    ),
    "blocks-values": ({"q_blocks": torch.tensor([8], dtype=torch.int32)}, ValueError, "0 to 7"),
    "blocks-dtype": ({"q_blocks": torch.tensor([0])}, TypeError, "q_blocks"),
    "block": ({"block": (64, 0)}, ValueError, "block: wants two sizes"),
    "eps": ({"eps": 0.0}, ValueError, "eps: wants"),
    "backend": ({"backend": "fast"}, ValueError, "backend: wants"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name: str):
    change, kind, text = BAD[name]
    with pytest.raises(kind, match=text):
        block_mass(**{**CASES[0].inputs(), **change})


def test_a_backend_without_a_kernel_says_so():
    missing = [name for name in AUTO_ORDER if name not in BACKENDS]
    for name in missing:
        with pytest.raises(NotImplementedError, match=name):
            block_mass(**CASES[0].inputs(), backend=name)


@pytest.mark.parametrize(("sq", "skv"), [(0, 8), (8, 0), (0, 0)], ids=str)
def test_without_rows_or_keys_every_slot_is_a_hole(sq, skv):
    """Slots there are, tokens there are none."""
    q, k = torch.randn(1, 2, sq, 16), torch.randn(1, 2, skv, 16)

    def slots(tokens: int) -> torch.Tensor:
        kept = torch.arange(32, dtype=torch.int32)
        return torch.where(kept < tokens, kept, -1)[None, None]

    found = block_mass(
        *(q, k),
        token_of_q_slot=slots(sq),
        token_of_kv_slot=slots(skv),
        q_blocks=torch.tensor([0, 1], dtype=torch.int32),
        block=(16, 16),
        lse=torch.zeros(1, 2, sq),
        eps=0.1,
        backend="reference",
    )
    assert found.maxima is not None and found.small is not None
    for x in (found.sums, found.maxima, found.small):
        assert x.shape == (1, 2, 2, 2) and (x == 0).all()
