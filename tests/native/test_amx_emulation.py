"""The AMX kernel's own source, run with tile intrinsics written in plain C++."""

import ctypes
import importlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from permattn import TokenBand, testing
from permattn.backends import cpu
from permattn.core import AttnPlan, QuantSpec
from permattn.core.packing import pack_plan
from permattn.core.problem import FwdArgs
from permattn.patterns.dense import plan_dense
from permattn.probe import ProbeMass

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "triton"))
cases = importlib.import_module("probe_cases")
COMPILER = next((c for c in ("g++", "clang++") if shutil.which(c)), None)

pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler"),
    pytest.mark.skipif(
        "avx512_bf16" not in cpu.available_isas(), reason="the softmax needs AVX-512 bf16"
    ),
]


@pytest.fixture(scope="module")
def amx(tmp_path_factory):
    library = tmp_path_factory.mktemp("amx") / "amx.so"
    flags = (ROOT / "csrc" / "compile_flags.txt").read_text().replace("-O3", "-O2").split()
    sources = [
        ROOT / "tests/native/amx_harness.cpp",
        *(ROOT / "csrc/cpu" / f"{x}.cpp" for x in ("forward", "prepare", "probe", "quantised")),
    ]
    flags.append("-fvisibility=default")
    command = [COMPILER, *flags, "-shared", *map(str, sources), "-o", str(library)]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(library))


def run(function, q, k, v, plan, scale):
    out = q.new_full((*q.shape[:3], v.shape[3]), float("nan"))
    lse = torch.full(q.shape[:3], float("nan"))
    tensors, ints = pack_plan(plan)
    tensors = [x.contiguous() for x in tensors]
    pointers = (ctypes.c_void_p * len(tensors))(*(x.data_ptr() for x in tensors))
    shapes = torch.tensor([list(x.shape) for x in tensors])
    numbers = torch.tensor(ints)
    sizes = torch.tensor([*q.shape[:2], k.shape[1], q.shape[2], *k.shape[2:], v.shape[3]])
    at = [ctypes.c_void_p(x.data_ptr()) for x in (q, k, v, out, lse, sizes)]
    products = function(
        *(*at, ctypes.c_float(scale), ctypes.c_int64(len(plan.parts)), pointers),
        *(ctypes.c_void_p(x.data_ptr()) for x in (shapes, numbers)),
    )
    assert products > 0, "a tile was used without its configuration, or none was used"
    return out, lse


PLANS = {
    "causal": lambda: plan_dense(200, 200, causal=True),
    "three-parts": lambda: testing.split_plan(150, 170, heads=4),
    "permuted-odd-blocks": lambda: testing.random_plan(
        90, 140, heads=4, permuted=True, holes=5, block_q=7, block_kv=3, band=TokenBand(-9, 80)
    ),
}


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(("dim", "dim_v"), [(64, 64), (40, 24), (1, 1), (128, 256), (33, 80)])
def test_emulated_tiles_match_float64(amx, plan, dim, dim_v):
    plan = PLANS[plan]()
    g = torch.Generator().manual_seed(0)
    sq, skv, scale = plan.num_q_tokens, plan.num_kv_tokens, dim**-0.5
    q, k, v = (
        torch.randn(1, h, s, w, generator=g).bfloat16()
        for h, s, w in ((4, sq, dim), (2, skv, dim), (2, skv, dim_v))
    )
    visible = testing.visible_pairs(plan, 1, 4) > 0
    ours = run(amx.amx_forward, q, k, v, plan, scale)
    exact = testing.masked_attention(q.double(), k.double(), v.double(), visible, scale)
    plain = testing.masked_attention(q, k, v, visible, scale)
    for name, a, p, e in zip(("out", "lse"), ours, plain, exact, strict=True):
        testing.assert_within(a, p, e, name)


def one_part():
    return testing.random_plan(
        90, 150, heads=4, permuted=True, holes=5, block_q=48, block_kv=80, band=TokenBand(-9, 90)
    )


def three_parts():
    return testing.split_plan(90, 150, heads=4)


@pytest.mark.parametrize(
    ("plan", "kv_rows"), [(one_part, 16), (one_part, 20), (one_part, 80), (three_parts, 16)]
)
@pytest.mark.parametrize(("dim", "dim_v"), [(64, 64), (128, 33)])
@pytest.mark.parametrize("formats", ["int8-int8", "int4-int4", "int8-none", "int8-fp8"])
def test_emulated_tiles_give_the_bits_of_vectors(amx, formats, dim, dim_v, plan, kv_rows):
    """Sums of integers have one value, and the float arithmetic around them is shared."""
    qk, pv = formats.split("-")
    plan = AttnPlan(plan().parts, QuantSpec(qk, pv, 16, kv_rows))
    g = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, h, s, w, generator=g).bfloat16()
        for h, s, w in ((4, 90, dim), (2, 150, dim), (2, 150, dim_v))
    )
    ours = run(amx.amx_forward, q, k, v, plan, dim**-0.5)
    vectors = cpu.forward(FwdArgs(q, k, v, plan, dim**-0.5), isa="avx512_bf16")
    for a, b in zip(ours, vectors, strict=True):
        if pv in ("none", "fp8"):  # tiles sum floats in another order
            torch.testing.assert_close(a, b, atol=1e-3, rtol=2e-2)
        else:
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("rows", "dim"), [(64, 64), (17, 40), (1, 16), (100, 128)], ids=lambda x: str(x)
)
def test_emulated_tiles_probe_like_float64(amx, rows, dim):
    case = cases.Case("amx", 210, rows, heads=4, kv_heads=2, dim=dim, dtype=torch.bfloat16)
    found = case.inputs()
    results = [torch.full((1, 4, rows), float("nan"))]
    results += [torch.full((1, 4, 210), float("nan")) for _ in range(2)]
    results.append(torch.zeros(1, 4, 210))
    sizes = torch.tensor([1, 4, 2, rows, 210, dim])
    names = ("q", "k", "first_position", "key_range")
    tensors = [*(found[x] for x in names), *results, sizes]
    assert amx.amx_probe(*(ctypes.c_void_p(x.data_ptr()) for x in tensors)) > 0
    cases.assert_probe(ProbeMass(*results), found, "amx")
