"""Instructions: the stand-in for CUDA and the simulator answer as a device did, and as each other.

A device's answers are written by `make gpu` beside its record. A probe whose inputs change would
make them answers to another question: add a probe, and leave the old one.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
import conformance_engines as engines
from conformance_probes import Probe, probes

ROOT = Path(__file__).resolve().parents[3]
FIXTURES = sorted((ROOT / "bench" / "results" / "gpu").glob("*.npz"))
MOST_BYTES = 1 << 20
WHY_NOT = None if engines.nvcc() else "nvcc is not installed"

pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))
IN_WARPS = [p for p in probes() if p.shim]


@pytest.mark.parametrize("probe", IN_WARPS, ids=str)
def test_stand_in_and_simulator_agree(probe: Probe):
    found, other = engines.on_cpu(probe), engines.simulated(probe)
    assert found.any()
    assert probe.distance(found, other, probe.simulators) <= 1


@pytest.mark.parametrize("probe", [p for p in probes() if p.exact is not None], ids=str)
def test_the_simulator_computes(probe: Probe):
    found = engines.simulated(probe)
    if probe.simulators is None:
        assert np.array_equal(found.view(np.int32).astype(np.float64), probe.exact)
    else:
        exact = probe.exact.astype(np.float32).view(np.uint32)
        assert probe.distance(found, exact, probe.simulators) <= 1


@pytest.mark.parametrize("probe", [p for p in probes() if p.name.startswith("tma")], ids=str)
def test_boxes_have_zeros_outside(probe: Probe):
    """Words inside, whatever their order; five boxes of which two are inside or all outside."""
    box = probe.inputs[0]
    boxes = engines.simulated(probe).view(np.uint16).reshape(5, 16, -1)
    width, tensor = box.row_bytes // 2, box.tensor
    assert np.array_equal(np.sort(boxes[0], None), np.sort(tensor[0, :16, :width], None))
    corner = np.zeros((16, width), np.uint16)
    corner[:10] = tensor[1, 10:20, 8 : 8 + width]
    assert np.array_equal(np.sort(boxes[1], None), np.sort(corner, None))
    assert not boxes[4].any()


def unlike(path: Path) -> list[str]:
    """What answers otherwise than the device whose answers a file holds."""
    found = []
    by_name = {p.name: p for p in probes()}
    with np.load(path) as fixture:
        known = [name for name in fixture if not name.endswith(".inputs")]
        assert known and set(known) <= set(by_name), "a probe that a device answered is gone"
        for name in known:
            probe = by_name[name]
            inputs = str(fixture[f"{name}.inputs"])
            assert inputs == probe.sha256(), f"{name}: add a probe, keep this one"
            answers = {"simulator": engines.simulated(probe)}
            if probe.shim:
                answers["stand-in"] = engines.on_cpu(probe)
            for who, answer in answers.items():
                distance = probe.distance(answer, fixture[name], probe.device)
                if not distance <= 1:
                    found.append(f"{name}: the {who} is {distance:.3g} bounds from the device")
    return found


@pytest.mark.parametrize("path", FIXTURES, ids=lambda p: p.stem)
def test_everything_answers_as_the_device(path: Path):
    assert path.stat().st_size <= MOST_BYTES
    assert not unlike(path)


def test_a_device_that_answers_otherwise_is_seen(tmp_path):
    """The simulator's answers as a device's, and two of them changed."""
    some = [p for p in probes() if p.name in ("mma_s8", "mma_bf16", "pack_f16", "wgmma_e4m3_rs")]
    kept = {p.name: engines.simulated(p) for p in some}
    kept |= {f"{p.name}.inputs": np.array(p.sha256()) for p in some}
    np.savez(tmp_path / "same.npz", **kept)
    assert not unlike(tmp_path / "same.npz")
    kept["mma_s8"][5] ^= 1
    kept["wgmma_e4m3_rs"].view(np.float32)[9] += 64.0
    np.savez(tmp_path / "other.npz", **kept)
    wrong = unlike(tmp_path / "other.npz")
    assert [line.split(" is ")[0] for line in wrong] == [
        "mma_s8: the simulator",
        "mma_s8: the stand-in",
        "wgmma_e4m3_rs: the simulator",
    ]
    np.savez(tmp_path / "asked.npz", **{**kept, "pack_f16.inputs": np.array("other")})
    with pytest.raises(AssertionError, match="pack_f16: add a probe, keep this one"):
        unlike(tmp_path / "asked.npz")


def test_probes_fit_a_fixture():
    assert sum(4 * p.words for p in probes()) < MOST_BYTES
    assert len({p.name for p in probes()}) == len(probes())


@pytest.mark.parametrize("name", ["mma_bf16", "mma_s8", "ldmatrix", "exp2_approx"])
def test_a_wrong_answer_is_seen(name: str):
    """One bit of an integer, a thousandth of a float."""
    probe = next(p for p in probes() if p.name == name)
    right = engines.on_cpu(probe)
    wrong = right.copy()
    if probe.simulators is None:
        wrong[7] ^= 1
    else:
        wrong.view(np.float32)[7] *= 1.001
    assert probe.distance(right, wrong, probe.simulators) > 1
    assert probe.distance(right, wrong, probe.device) > 1
