"""The interpreter itself: its arithmetic is a GPU's, and planted faults are caught."""

import pytest
import torch
import triton
import triton.language as tl
from interpreter import KernelMemoryError
from interpreter.memory_checker import untouched_memory
from triton.runtime.errors import InterpreterError

SIZE = 64


@triton.jit
def arithmetic(p_x, p_y, p_out, N: tl.constexpr):
    o = tl.arange(0, N)
    x, y = tl.load(p_x + o), tl.load(p_y + o)
    tl.store(p_out + o, x + y)
    tl.store(p_out + N + o, x * y)
    tl.store(p_out + 2 * N + o, -x)
    tl.store(p_out + 3 * N + o, tl.where(x < y, x, y))
    tl.store(p_out + 4 * N + o, tl.fma(x, y, x))


@triton.jit
def cast(p_x, p_out, N: tl.constexpr):
    o = tl.arange(0, N)
    tl.store(p_out + o, tl.load(p_x + o).to(p_out.dtype.element_ty))


@triton.jit
def total(p_x, p_out, N: tl.constexpr):
    x = tl.load(p_x + tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :])
    tl.store(p_out + tl.arange(0, N), tl.max(x, 1))
    tl.store(p_out + N + tl.arange(0, N), tl.sum(x, 0))


@triton.jit
def product(p_x, p_y, p_out, N: tl.constexpr, TYPE: tl.constexpr):
    o = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(p_out + o, tl.dot(tl.load(p_x + o), tl.load(p_y + o), out_dtype=TYPE))


def random(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    return (torch.randn(*shape, generator=g) * 3).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_arithmetic_rounds_once_to_nearest_even(dtype):
    x, y = random(SIZE, dtype=dtype), random(2 * SIZE, dtype=dtype)[SIZE:]
    out = torch.empty(5, SIZE, dtype=dtype)
    arithmetic[(1,)](x, y, out, N=SIZE)
    fused = (x.double() * y.double() + x.double()).to(dtype)
    assert torch.equal(out, torch.stack([x + y, x * y, -x, torch.minimum(x, y), fused]))


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float16),
        (torch.bfloat16, torch.float16),
        (torch.float32, torch.float8_e4m3fn),
        (torch.float32, torch.float8_e5m2),
    ],
    ids=lambda x: str(x).removeprefix("torch."),
)
def test_casts_round_to_nearest_even(source, target):
    x = random(1024, dtype=source)
    # Exactly half way between two bfloat16 values: both neighbours, one of them even.
    x[:2] = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8]).to(source)
    out = torch.empty(1024, dtype=target)
    cast[(1,)](x, out, N=1024)
    assert torch.equal(out.float(), x.to(target).float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_reductions_see_values_and_not_bits(dtype):
    x = random(SIZE, SIZE, dtype=dtype)
    out = torch.empty(2, SIZE, dtype=dtype)
    total[(1,)](x, out, N=SIZE)
    assert torch.equal(out[0], x.amax(1))
    torch.testing.assert_close(out[1], x.double().sum(0).to(dtype))


def test_int8_products_are_exact():
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randint(-128, 128, (SIZE, SIZE), generator=g, dtype=torch.int8) for _ in range(2))
    x[0], y[:, 0] = -128, -128
    out = torch.empty(SIZE, SIZE, dtype=torch.int32)
    product[(1,)](x, y, out, N=SIZE, TYPE=tl.int32)
    assert torch.equal(out, x.int() @ y.int())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_products_add_up_in_float32(dtype):
    x, y = random(SIZE, SIZE, dtype=dtype), random(SIZE, SIZE, dtype=dtype)
    out = torch.empty(SIZE, SIZE)
    product[(1,)](x, y, out, N=SIZE, TYPE=tl.float32)
    torch.testing.assert_close(out, x.float() @ y.float(), rtol=1e-5, atol=1e-4)


@triton.jit
def copy_past_the_end(p_x, p_y, n, N: tl.constexpr):
    o = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(p_y + o, tl.load(p_x + o), mask=o < n)


@triton.jit
def store_before_the_start(p_x, p_y, n, N: tl.constexpr):
    o = tl.arange(0, N)
    tl.store(p_y + o - 1, tl.load(p_x + o, mask=o < n))


@triton.jit
def two_programs_one_element(p_x, p_y, n, N: tl.constexpr):
    o = tl.arange(0, N)
    tl.store(p_y + o, tl.load(p_x + o))


@triton.jit
def reads_what_another_wrote(p_x, p_y, n, N: tl.constexpr):
    o = tl.program_id(0) * N + tl.arange(0, N)
    b = tl.load(p_y + o, mask=o < n)
    tl.store(p_y + N + o, b, mask=o + N < n)


@triton.jit
def one_store_twice(p_x, p_y, n, N: tl.constexpr):
    o = tl.arange(0, N)
    if tl.program_id(0) == 0:
        tl.store(p_y + o // 2, tl.load(p_x + o))


@triton.jit
def offset_in_32_bits(p_x, p_y, n, N: tl.constexpr):
    o = tl.arange(0, N)
    if tl.program_id(0) == 0:
        tl.store(p_y + o, tl.load(p_x + 40000 * n + o))


@triton.jit
def offset_in_64_bits(p_x, p_y, n, N: tl.constexpr):
    o = tl.arange(0, N)
    if tl.program_id(0) == 0:
        tl.store(p_y + o, tl.load(p_x + 40000 * n.to(tl.int64) + o))


@triton.jit
def correct(p_x, p_y, n, N: tl.constexpr):
    o = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(p_y + o, tl.load(p_x + o, mask=o < n), mask=o < n)


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        (copy_past_the_end, "load out of bounds in program .1, 0, 0.: 28/64 lanes.*'p_x'"),
        (store_before_the_start, "store out of bounds"),
        (two_programs_one_element, "race: program .1, 0, 0. does a store of element 0 of 'p_y'"),
        (reads_what_another_wrote, "race: program .1, 0, 0. does a load of element 64 of 'p_y'"),
        (one_store_twice, "stores an element of 'p_y' twice"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_planted_faults_are_caught(kernel, message):
    with pytest.raises((KernelMemoryError, InterpreterError), match=message):
        kernel[(2,)](torch.zeros(100), torch.zeros(100), 100, N=64)


def test_int32_offsets_that_overflow_are_caught():
    # 6 GiB of addresses without memory behind them.
    with untouched_memory():
        far, y = torch.empty(3 * 2**30, dtype=torch.bfloat16), torch.zeros(16)
    with pytest.raises((KernelMemoryError, InterpreterError), match=r"out of bounds|overflow"):
        offset_in_32_bits[(1,)](far, y, 2**16, N=16)
    far[40000 * 2**16 + 3] = 7.0
    offset_in_64_bits[(1,)](far, y, 2**16, N=16)
    assert y[3] == 7.0


def test_correct_kernels_pass():
    x, y = torch.randn(100), torch.zeros(100)
    correct[(2,)](x, y, 100, N=64)
    assert torch.equal(x, y)


def test_overlapping_arguments_are_one_region():
    packed = torch.arange(256.0)
    correct[(1,)](packed[:128], packed[100:228], 64, N=64)
    assert torch.equal(packed[100:164], torch.arange(64.0))
