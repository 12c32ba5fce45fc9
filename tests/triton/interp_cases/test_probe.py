"""The probe's kernels against float64, with memory and races checked."""

import pytest
import torch
from interpreter.memory_checker import untouched_memory
from permattn.probe import probe_mass
from probe_cases import CASES, LONG, NAMES, Case, check_case


@pytest.mark.parametrize("case", [*CASES, *LONG[:2]], ids=str)
def test_masses_are_within_the_bound(case):
    check_case(case, "triton")


def test_two_runs_are_bit_identical():
    found = Case("twice", 1100, 70, skip=True, dtype=torch.bfloat16).inputs()
    first, second = probe_mass(**found, backend="triton"), probe_mass(**found, backend="triton")
    assert all(torch.equal(getattr(first, x), getattr(second, x)) for x in NAMES)


def test_all_heads_share_four_launches(checker):
    found = Case("launches", 100, 64, heads=4, batch=2).inputs()
    before = checker.launches
    probe_mass(**found, backend="triton")
    assert checker.launches - before == 4


def test_no_keys_give_no_mass():
    found = Case("none", 20, 5, axis="subset").inputs()
    empty = found["order"][:, :0].contiguous()
    mass = probe_mass(**{**found, "order": empty}, backend="triton")
    assert mass.column.shape == (1, 2, 0) and bool((mass.lse == float("-inf")).all())


def test_offsets_past_32_bits_are_computed_in_64():
    keys, stride = 24, 2**27
    with untouched_memory():
        virtual = torch.empty_strided((1, 1, keys, 16), (0, 0, stride, 1), dtype=torch.bfloat16)
    found = Case("far", keys, 8, dim=16, dtype=torch.bfloat16).inputs()
    virtual.copy_(found["k"])
    near, far = (probe_mass(**{**found, "k": k}, backend="triton") for k in (found["k"], virtual))
    assert all(torch.equal(getattr(near, x), getattr(far, x)) for x in NAMES)
