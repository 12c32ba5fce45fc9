"""Which kernels a device runs, and the cases that it runs them on."""

from __future__ import annotations

import pytest
import torch
from permattn.backends.cuda import attention, device

from bench import gpu_cases
from bench.gpu_suite import Journal, Skip, Suite


@pytest.fixture
def on(monkeypatch, tmp_path):
    """A suite on a device of that capability, with a library for some."""

    def make(capability: tuple[int, int], archs: tuple[int, ...] = (80, 90)) -> Suite:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *x: capability)
        monkeypatch.setattr(device, "holds", lambda: device.Holds(archs, 0, 13000))
        return Suite(torch.device("cuda"), Journal(tmp_path / "journal"))

    return make


def test_hopper_runs_both_families(on):
    assert gpu_cases.played(on((9, 0)), "sm90") is None
    assert gpu_cases.played(on((9, 0)), "sm80") == 80
    with pytest.raises(Skip, match=r"no code for compute capability 8\.0"):
        gpu_cases.played(on((9, 0), archs=(90,)), "sm80")


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (12, 0)], ids=str)
def test_others_run_one_as_themselves(on, capability):
    assert gpu_cases.played(on(capability), "sm80") is None
    with pytest.raises(Skip, match=r"needs compute capability 9\.0"):
        gpu_cases.played(on(capability), "sm90")


def test_playing_is_over_when_it_ends(monkeypatch):
    monkeypatch.setattr(device, "capability", lambda: 90)
    with gpu_cases.playing(80):
        assert device.capability() == 80 == attention._capability_of(torch.zeros(1))
    assert device.capability() == 90
    with gpu_cases.playing(None):
        assert device.capability() == 90


@pytest.mark.parametrize("family", ["sm80", "sm90"])
def test_every_kernel_of_a_family_has_a_case(family):
    attended = gpu_cases.attention_cases("cuda", family)
    quantised = gpu_cases.quantised_cases("cuda", family, 90)
    assert {c.dtype for c in attended} == {torch.bfloat16, torch.float16}
    assert {c.dim_v for c in attended} >= {248, 120, 88, 56}
    formats = {(c.spec.qk, c.spec.pv) for c in quantised}
    assert formats >= {("int8", "none"), ("int8", "int8"), ("int8", "fp8")}
    assert not any("int4" in pair for pair in formats)
    if family == "sm80":
        older = gpu_cases.quantised_cases("cuda", family, 80)
        assert ("int4", "int4") in {(c.spec.qk, c.spec.pv) for c in older}


def test_a_tree_without_tests_says_so():
    with pytest.raises(Skip, match="not here: No module named 'no_such_cases'"):
        gpu_cases.tests_module("no_such_cases")
