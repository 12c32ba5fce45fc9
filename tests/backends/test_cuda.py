"""What the CUDA backend takes, why it refuses, and what stands around its launches: no device, no
kernel."""

import json
import subprocess
import sys

import pytest
import torch
from permattn.backends import AUTO_ORDER, BACKENDS, cuda, resolve
from permattn.backends.cuda import device, launch
from permattn.backends.cuda.rows import aligned
from permattn.core import AttnPart, AttnPlan, Permutation, Problem, QuantSpec, TokenBand, native
from permattn.testing import random_index

pytestmark = pytest.mark.skipif(native.load() is not None, reason=str(native.load()))

HELD = device.Holds((80, 86, 89, 90, 120), 89, 13000)
INT8 = QuantSpec("int8", "int8")


def problem(**facts) -> Problem:
    known = {"device_type": "cuda", "dtype": torch.bfloat16, "num_q_heads": 4, "num_kv_heads": 2}
    sizes = {"head_dim": 64, "head_dim_v": 64, "blocks": ((128, 64),)}
    return Problem(**{**known, **sizes, **facts})


@pytest.fixture
def gpu(monkeypatch):
    """Makes this process believe that it has a device and a library with kernels."""

    def play(capability=80, held=HELD, driver=None, torch_cuda="13.0", library=None):
        monkeypatch.setattr(device, "SHIM", None)
        monkeypatch.setattr(device, "load_kernels", lambda: library)
        monkeypatch.setattr(device, "holds", lambda: held)
        monkeypatch.setattr(device, "driver_problem", lambda: driver)
        monkeypatch.setattr(device, "capability", lambda: capability)
        monkeypatch.setattr(torch.version, "cuda", torch_cuda)

    return play


REFUSED = {
    "device": ({}, {"device_type": "cpu"}, "needs a CUDA device, got cpu"),
    "dtype": ({}, {"dtype": torch.float32}, "bfloat16 or float16, got torch.float32"),
    "gradients": ({}, {"needs_grad": True}, "no backward: the triton backend has one"),
    "no-library": ({"library": "was not built: no compiler"}, {}, "no compiler"),
    "torch-without-cuda": ({"torch_cuda": None}, {}, "torch .* was built without CUDA"),
    "driver": (
        {"driver": "the driver supports CUDA 12.4, the library was built with 13.0"},
        {},
        r"no usable CUDA device: the driver supports CUDA 12\.4",
    ),
    "old-device": ({"capability": 75}, {}, r"8\.0 or newer, got 7\.5"),
    "no-code": (
        {"capability": 90, "held": device.Holds((80, 86), 86, 13000)},
        {},
        r"no code for compute capability 9\.0, only for 8\.0, 8\.6",
    ),
    "odd-head-dim": ({}, {"head_dim": 60, "head_dim_v": 60}, "multiples of 8 .*D = 60, Dv = 60"),
    "wide-head-dim": ({}, {"head_dim": 264}, "multiples of 8 .*D = 264"),
    "pv-alone": ({}, {"quant": QuantSpec("none", "int8")}, "together with Q and K"),
    "pv-groups": (
        {},
        {"quant": QuantSpec("int8", "int8", 32, 32)},
        "kv_rows_per_scale of 64; got .*kv_rows_per_scale = 32",
    ),
    "long-groups": (
        {},
        {"quant": QuantSpec("int8", "none", 64, 256), "blocks": ((256, 256),)},
        "kv_rows_per_scale up to 128, got 256",
    ),
    "fp8-before-8.9": ({"capability": 86}, {"quant": QuantSpec("int8", "fp8")}, "FP8 .*8\\.9"),
    "int4-values-on-9.0": (
        {"capability": 90},
        {"quant": QuantSpec("int4", "int4")},
        "INT4 .*9\\.0",
    ),
    "quantised-gradients": ({}, {"quant": INT8, "needs_grad": True}, "no backward"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_every_limit_has_one_clear_line(gpu, case):
    machine, facts, wanted = REFUSED[case]
    gpu(**machine)
    why = cuda.why_not(problem(**facts))
    assert why is not None and "\n" not in why
    with pytest.raises(NotImplementedError, match=wanted):
        resolve(problem(**facts), "cuda")


TAKEN = {
    "bf16": (80, {}),
    "fp16": (86, {"dtype": torch.float16}),
    "two-widths": (80, {"head_dim": 72, "head_dim_v": 40}),
    "int8": (80, {"quant": QuantSpec("int8", smooth_k=True)}),
    "int8-small-groups": (80, {"quant": QuantSpec("int8", "none", 1, 16)}),
    "int8-values": (86, {"quant": INT8}),
    "fp8-values": (89, {"quant": QuantSpec("int8", "fp8")}),
    "int4": (89, {"quant": QuantSpec("int4", "int4")}),
    "int4-as-int8": (90, {"quant": QuantSpec("int4")}),
    "hopper": (90, {}),
    "newer-than-all": (121, {}),
}


@pytest.mark.parametrize("case", TAKEN)
def test_what_has_a_kernel_is_taken_and_named(gpu, case):
    capability, facts = TAKEN[case]
    gpu(capability)
    assert cuda.why_not(problem(**facts)) is None
    assert resolve(problem(**facts), "auto") == "cuda"
    assert f"sm_{capability}" in cuda.kernel_name(problem(**facts))


@pytest.mark.parametrize(
    ("capability", "archs", "ptx", "runs"),
    [
        (80, (80,), 0, True),
        (87, (80,), 0, True),
        (87, (89,), 0, False),
        (86, (80, 89), 0, True),
        (80, (86,), 0, False),
        (90, (90,), 0, True),
        (90, (80,), 80, False),
        (100, (90,), 0, False),
        (100, (80, 89), 89, True),
        (89, (80,), 80, True),
        (120, (120,), 0, True),
        (121, (120,), 0, False),
        (121, (89, 120), 89, True),
        (75, (80,), 80, False),
    ],
)
def test_machine_code_runs_where_the_hardware_says(capability, archs, ptx, runs):
    why = device.why_no_code(capability, device.Holds(archs, ptx, 13000))
    assert (why is None) == runs


def test_auto_asks_cuda_first_and_goes_on(gpu, monkeypatch):
    assert AUTO_ORDER == ("cuda", "triton", "cpu", "reference")
    monkeypatch.setattr(BACKENDS["triton"], "why_not", lambda problem: None)
    gpu()
    assert resolve(problem(), "auto") == "cuda"
    assert resolve(problem(needs_grad=True), "auto") == "triton"
    gpu(library="the native library has no CUDA kernels: nvcc was not found")
    assert resolve(problem(), "auto") == "triton"
    with pytest.raises(NotImplementedError, match=r"'cuda' cannot run .*nvcc was not found"):
        resolve(problem(), "cuda")


def test_what_it_does_not_offer_names_who_does():
    with pytest.raises(NotImplementedError, match="'cuda' has no backward: the triton backend"):
        cuda.backward(None)


def test_a_library_without_kernels_repeats_why(monkeypatch, tmp_path):
    monkeypatch.setattr(device, "SHIM", None)
    monkeypatch.setattr(device, "holds", lambda: device.Holds((), 0, 0))
    monkeypatch.setattr(native, "PACKAGE", tmp_path)
    assert "install permattn again" in device.load_kernels.__wrapped__()
    report = {"built": True, "cuda": {"built": False, "reason": "nvcc was not found"}}
    (tmp_path / "_native_build.json").write_text(json.dumps(report))
    why = device.load_kernels.__wrapped__()
    assert why == "the native library has no CUDA kernels: nvcc was not found"


def test_a_library_that_holds_kernels_says_for_which_devices(monkeypatch):
    monkeypatch.setattr(device, "SHIM", None)
    monkeypatch.setattr(device, "load_kernels", device.load_kernels.__wrapped__)
    held = device.Holds(
        tuple(torch.ops.permattn_native.cuda_archs()),
        torch.ops.permattn_native.cuda_ptx_arch(),
        torch.ops.permattn_native.cuda_version(),
    )
    cuda_report = native.build_report().get("cuda", {"built": False})
    assert (held.version > 0) == cuda_report["built"] == bool(held.archs)
    facts = cuda.describe()
    assert facts["archs"] == [f"{a // 10}.{a % 10}" for a in held.archs]
    if not torch.cuda.is_available():
        assert facts["why_not"]


IMPORTS = """
import torch, permattn, permattn.backends.cuda
assert not torch.cuda.is_initialized()
assert not torch.ops.loaded_libraries
permattn.plan_dense(8, 8, causal=True)
assert not torch.cuda.is_initialized()
"""


def test_importing_loads_no_library_and_initialises_nothing():
    subprocess.run([sys.executable, "-c", IMPORTS], check=True, timeout=120)


def test_the_environment_names_the_kernels_for_cpu_tensors(monkeypatch, tmp_path):
    assert not device.takes("cpu") or device.SHIM is not None
    (tmp_path / "shim.so").write_bytes(b"not a library")
    monkeypatch.setattr(device, "SHIM", str(tmp_path / "shim.so"))
    assert device.takes("cpu") and device.takes("cuda") and not device.takes("mps")
    assert "PERMATTN_CUDA_SHIM does not load" in device.load_kernels.__wrapped__()


def five_parts(block_q: tuple[int, ...], tokens: int = 256) -> AttnPlan:
    perm = Permutation.identity(tokens)
    parts = []
    for size in block_q:
        index = random_index(perm, perm, TokenBand(), block_q=size, block_kv=64, density=1.0)
        parts.append(AttnPart(perm, perm, index, TokenBand()))
    return AttnPlan(tuple(parts), validate=False)


@pytest.mark.parametrize(
    ("block_q", "runs"),
    [
        ((64,) * 5, [(4, 64), (1, 64)]),
        ((128, 192, 64), [(3, 64)]),
        ((16, 16), [(2, 16)]),
        # A unit of 16 would leave three quarters of every tile idle.
        ((80, 64), [(1, 64), (1, 80)]),
    ],
)
def test_parts_share_a_launch_where_their_blocks_fill_tiles(block_q, runs):
    made = launch.runs_of(five_parts(block_q))
    assert sorted((len(run.parts), run.unit) for run in made) == sorted(runs)


def test_a_block_longer_than_the_sequence_is_cut_to_whole_tiles():
    plan = five_parts((4096,), tokens=100)
    (run,) = launch.runs_of(plan)
    assert run.blocks == ((128, 64),)
    by_96 = AttnPlan(five_parts((960,), 100).parts, QuantSpec("int8", "none", 96, 64))
    assert launch.runs_of(by_96)[0].blocks[0][0] == 384


def test_rows_are_copied_only_where_they_do_not_start_at_sixteen_bytes():
    x = torch.randn(2, 3, 8, 64, dtype=torch.bfloat16)
    assert aligned(x) is x
    turned = x.transpose(1, 2)
    assert aligned(turned) is turned
    expanded = x[:1].expand(4, -1, -1, -1)
    assert aligned(expanded) is expanded
    flat = torch.randn(8 * 64 + 1, dtype=torch.bfloat16)
    wide = torch.randn(1, 1, 8, 65, dtype=torch.bfloat16)
    for odd in (flat[1:].view(1, 1, 8, 64), wide[..., :64], x[..., ::2]):
        made = aligned(odd)
        assert made is not odd and torch.equal(made, odd)
        assert made.data_ptr() % 16 == 0 and made.stride(-1) == 1
