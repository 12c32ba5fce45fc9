"""Heads that aggregate locally: what their order is worth, and what quantising them costs."""

from __future__ import annotations

import permattn as pa
import pytest
import torch
from permattn.core import AttnPlan, QuantSpec

from bench import local_heads
from bench.gate import judge
from bench.plans import Paro, head_orders

GRID = (8, 16, 16)
TOKENS = 2048
# Head dim -> how many heads.
HEADS = {64: 40, 128: 12}
ORDERS = head_orders(6)


def plan_of(orders: list[int], density: float = 0.3) -> AttnPlan:
    """Every head in the order given, with the blocks nearest in its own widths."""
    masks = {order: local_heads.block_mask(GRID, order, density, (64, 64)) for order in set(orders)}
    return pa.plan_paro(
        pa.TokenGrid(0, *GRID),
        torch.tensor(orders),
        torch.stack([masks[order] for order in orders]),
        num_tokens=TOKENS,
    )


@pytest.fixture(scope="module", params=list(HEADS), ids="d{}".format)
def heads(request) -> dict[bool, tuple[torch.Tensor, AttnPlan, torch.Tensor]]:
    """outliers -> (qkv, a plan of 30 %, its exact output)."""
    found = {}
    orders = head_orders(HEADS[request.param])
    plan = plan_of(orders)
    for outliers in (False, True):
        qkv = torch.stack(local_heads.inputs(GRID, orders, request.param, outliers=outliers))
        found[outliers] = qkv, plan, pa.sparse_attention(*qkv, plan)
    return found


# Format -> relative error of the output over all heads, and of the worst head.
LIMITS = {"int8": (0.005, 0.005), "int8+int8": (0.005, 0.005), "int4": (0.03, 0.035)}


@pytest.mark.parametrize("outliers", [False, True], ids=["plain", "outliers"])
@pytest.mark.parametrize("name", list(LIMITS))
def test_quantised_heads_stay_near(heads, name, outliers):
    qkv, base, exact = heads[outliers]
    plan = AttnPlan(base.parts, QuantSpec.named(name))
    difference = pa.sparse_attention(*qkv, plan) - exact
    of_all = difference.norm() / exact.norm()
    of_each = difference.norm(dim=(-1, -2)) / exact.norm(dim=(-1, -2))
    limit, worst = LIMITS[name]
    assert of_all <= limit
    assert of_each.max() <= worst


def test_blocks_of_the_wrong_order_lose_more():
    """The same share of blocks, nearest ones, all heads read FHW: what the order is there for."""
    q, k, v = local_heads.inputs(GRID, ORDERS, 64)
    right = plan_of(ORDERS)
    place = torch.stack([local_heads.block_mask(GRID, 0, 0.3, (64, 64))] * 6)
    wrong = pa.plan_paro(
        pa.TokenGrid(0, *GRID), torch.zeros(6, dtype=torch.int64), place, num_tokens=TOKENS
    )
    whole = (q @ k.mT * 64**-0.5).logsumexp(-1)
    lost = []
    for plan in (right, wrong):
        _, lse = pa.sparse_attention_with_lse(q, k, v, plan)
        lost.append(1 - (lse - whole).exp().mean(-1)[0])
    assert (lost[0] < 0.08).all()
    assert lost[1][1:].mean() > 1.5 * lost[0][1:].mean()


@pytest.mark.parametrize("density", [0.5, 0.2])
def test_a_mask_has_its_density_and_the_own_block(density):
    mask = local_heads.block_mask(GRID, 4, density, (64, 64))
    assert mask.sum(-1).tolist() == [round(density * 32)] * 32
    assert mask.diagonal().all()


@pytest.mark.parametrize("tokens", [64, 512, 2048, 16384])
def test_a_grid_holds_all_tokens(tokens):
    frames, height, width = local_heads.grid_of(tokens)
    assert frames * height * width == tokens


@pytest.mark.parametrize(("claimed", "ok"), [("int4", True), ("int8+int8", False)])
def test_the_gate_knows_a_format_from_a_coarser_one(claimed, ok):
    grid = local_heads.grid_of(512)
    q, k, v = local_heads.inputs(grid, [0, 3], 64)
    out = pa.sparse_attention(q, k, v, Paro(0.5, "int4")(512, 2))
    assert judge(out, q, k, v, Paro(0.5, claimed)(512, 2)).ok == ok
