"""The kernels against float64, case by case, with memory and races checked."""

import pytest
from kernel_cases import CASES, check_case


@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_and_gradients_are_within_the_bound(case):
    check_case(case)
