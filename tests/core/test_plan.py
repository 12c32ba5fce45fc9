import dataclasses

import pytest
import torch
from permattn import AttnPart, AttnPlan, BlockIndex, Permutation, QuantSpec, TokenBand
from permattn.testing import random_plan, split_plan, visible_pairs
from torch.utils import _pytree


def test_is_a_pytree_and_shared_permutations_stay_shared():
    plan = split_plan(100, 120, heads=2)
    leaves, spec = _pytree.tree_flatten(plan)
    assert all(isinstance(x, torch.Tensor) for x in leaves)
    back = _pytree.tree_unflatten(leaves, spec)
    assert back.q_groups() == plan.q_groups() and set(plan.q_groups()) == {0, 1}
    shared = [id(p.kv_perm) for p in back.parts]
    assert len(set(shared)) == 2 and any(p.kv_perm.is_identity for p in back.parts)
    assert torch.equal(visible_pairs(back, 1, 2), visible_pairs(plan, 1, 2))
    assert isinstance(_pytree.tree_map(lambda x: 0, plan), AttnPlan)


def test_to_moves_every_tensor():
    moved = random_plan(40, 40, permuted=True).to("meta")
    assert moved.device.type == "meta"
    assert all(x.is_meta for x in moved.parts[0].tensors())


def test_density_counts_listed_blocks():
    plan = random_plan(128, 128, block_q=32, block_kv=32, density=1.0)
    assert plan.num_block_pairs().tolist() == [[128 * 128]]
    assert plan.density(causal=False) == 1.0


def test_parts_have_an_order_of_their_own():
    plan = split_plan(100, 120, heads=2)
    for parts in (plan.parts[::-1], plan.parts[1:] + plan.parts[:1]):
        assert all(a is b for a, b in zip(AttnPlan(parts).parts, plan.parts, strict=True))


def test_is_immutable():
    plan = random_plan(8, 8)
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.quant = QuantSpec()


def full_block_part(band: TokenBand, token_of_slot=None) -> AttnPart:
    q, kv = Permutation.identity(8), Permutation.identity(8)
    if token_of_slot is not None:
        kv = Permutation.from_token_of_slot(torch.tensor(token_of_slot), 8)
    kv_indices = torch.zeros(1, 1, 2, 1, dtype=torch.int64)
    one = torch.ones(1, 1, 2, dtype=torch.int64)
    return AttnPart(q, kv, BlockIndex.from_padded(kv_indices, one, one, 4, 4), band)


@pytest.mark.parametrize(
    ("band", "tokens"),
    [
        (TokenBand(min_lag=0), None),
        (TokenBand(max_lag=7), None),
        (TokenBand(), [0, -1, 2, 3]),
    ],
    ids=["causal", "window", "hole"],
)
def test_a_block_marked_full_must_be_full(band, tokens):
    with pytest.raises(ValueError, match=r"parts\[0\].*marked full"):
        AttnPlan((full_block_part(band, tokens),))
    AttnPlan((full_block_part(band, tokens),), validate=False)


def test_a_full_block_inside_its_band_passes():
    AttnPlan((full_block_part(TokenBand(min_lag=-4, max_lag=8)),))


def test_parts_must_fit():
    with pytest.raises(ValueError, match="at least one part"):
        AttnPlan(())
    with pytest.raises(ValueError, match=r"parts\[1\].*\(9, 8\).*\(8, 8\)"):
        AttnPlan((random_plan(8, 8).parts[0], random_plan(9, 8).parts[0]))
    with pytest.raises(ValueError, match="3 rows, got 2"):
        AttnPart(
            Permutation.identity(9),
            Permutation.identity(8),
            full_block_part(TokenBand()).index,
            TokenBand(),
        )


def test_quant_names_are_checked():
    with pytest.raises(ValueError, match=r"QuantSpec.qk.*'int3'"):
        QuantSpec(qk="int3")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"QuantSpec.pv.*'e4m3'"):
        QuantSpec(pv="e4m3")  # type: ignore[arg-type]
    assert QuantSpec(qk="int8").is_quantised and not QuantSpec().is_quantised
