import pytest
import torch
from permattn import plan_dense
from permattn.testing import visible_pairs


@pytest.mark.parametrize("block", [16, 64])
@pytest.mark.parametrize("lower_right", [False, True], ids=["upper-left", "lower-right"])
@pytest.mark.parametrize(("sq", "skv"), [(1, 1), (100, 100), (70, 130), (130, 70), (5, 200)])
def test_causal_is_exact(sq, skv, lower_right, block):
    plan = plan_dense(sq, skv, causal=True, lower_right=lower_right, block_q=block, block_kv=block)
    plan.check_values()
    shift = skv - sq if lower_right else 0
    want = torch.arange(skv)[None] <= torch.arange(sq)[:, None] + shift
    assert torch.equal(visible_pairs(plan, 1, 1)[0, 0] == 1, want)


def test_not_causal_lists_full_blocks_only():
    plan = plan_dense(100, 90, causal=False)
    plan.check_values()
    index = plan.parts[0].index
    assert torch.equal(index.kv_num_full[0, 0], index.row_offsets[0, 0].diff())
    assert (visible_pairs(plan, 1, 1) == 1).all()


def test_capacity_is_what_causality_needs():
    index = plan_dense(4096, 4096, causal=True, block_q=64, block_kv=64).parts[0].index
    assert index.capacity == 64 * 65 // 2


def test_negative_lengths_raise():
    with pytest.raises(ValueError, match="lengths must be >= 0"):
        plan_dense(-1, 4, causal=True)
