"""The stand-in for CUDA on the CPU: instructions against numpy, and faults that it must see."""

from __future__ import annotations

import numpy as np
import pytest
import torch

FAULTS = {
    "no-wait": 1,
    "no-first-sync": 2,
    "no-second-sync": 3,
    "misaligned": 4,
    "outside": 5,
    "in-flight": 6,
    "two-collectives": 7,
    "missed-barrier": 8,
}
SEEDS = range(6)
# name -> (bits of a number, a is signed); b is signed
INTEGERS = {"s8": (8, True), "u8s8": (8, False), "s4": (4, True), "u4s4": (4, False)}
FLOATS = {"bf16": torch.bfloat16, "f16": torch.float16, "e4m3": torch.float8_e4m3fn}


def as_words(matrix: np.ndarray, bits: int) -> np.ndarray:
    """Neighbours of the last axis in 32-bit words, the first one in the low bits."""
    numbers = matrix.astype(np.int64) & ((1 << bits) - 1)
    numbers = numbers.reshape(*matrix.shape[:-1], -1, 32 // bits)
    return (numbers << (bits * np.arange(32 // bits))).sum(-1).astype(np.uint32)


def fragments(a: np.ndarray, b: np.ndarray, bits: int) -> tuple[list, list]:
    """Words of every lane of a [16, k] and b [k, 8], as the tables of the PTX manual have them."""
    a_words, b_words = as_words(a, bits), as_words(b.T.copy(), bits)
    lanes_a, lanes_b = [], []
    for lane in range(32):
        row, word = divmod(lane, 4)
        where = ((row, word), (row + 8, word), (row, word + 4), (row + 8, word + 4))
        lanes_a.append([int(a_words[i]) for i in where])
        lanes_b.append([int(b_words[row, word]), int(b_words[row, word + 4])])
    return lanes_a, lanes_b


def as_matrix(words: list, dtype: type) -> np.ndarray:
    c = np.zeros((16, 8), dtype)
    for lane, four in enumerate(np.array(words, np.uint32).view(dtype)):
        row, pair = divmod(lane, 4)
        c[row, 2 * pair : 2 * pair + 2] = four[:2]
        c[row + 8, 2 * pair : 2 * pair + 2] = four[2:]
    return c


@pytest.mark.parametrize("name", INTEGERS)
def test_products_of_integers_are_exact(shim, name):
    bits, signed = INTEGERS[name]
    rng, half, k = np.random.default_rng(0), 1 << (bits - 1), 256 // bits
    low, high = (-half, half) if signed else (0, 2 * half)
    a, b = rng.integers(low, high, (16, k)), rng.integers(-half, half, (k, 8))
    assert np.array_equal(as_matrix(shim.product(name, *fragments(a, b, bits)), np.int32), a @ b)


@pytest.mark.parametrize("name", FLOATS)
def test_products_of_floats(shim, name):
    dtype, g = FLOATS[name], torch.Generator().manual_seed(0)
    bits = 8 * dtype.itemsize
    k = 256 // bits
    a, b = (torch.randn(shape, generator=g).to(dtype) for shape in ((16, k), (k, 8)))
    raw = {8: torch.uint8, 16: torch.int16}[bits]
    words = fragments(a.view(raw).numpy(), b.view(raw).numpy(), bits)
    want = (a.double() @ b.double()).numpy()
    np.testing.assert_allclose(as_matrix(shim.product(name, *words), np.float32), want, atol=1e-5)


@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "transposed"])
def test_matrices_are_loaded_as_fragments(shim, transposed):
    shared = (np.arange(512) % 256).astype(np.uint8).view(np.uint16).reshape(4, 8, 8)
    words = np.array(shim.load_matrices(transposed), np.uint32).view(np.uint16).reshape(32, 4, 2)
    for lane in range(32):
        row, pair = divmod(lane, 4)
        for m in range(4):
            matrix = shared[m].T if transposed else shared[m]
            assert np.array_equal(words[lane, m], matrix[row, 2 * pair : 2 * pair + 2])


def test_float8_rounds_as_torch(shim):
    x = torch.cat((torch.linspace(-500, 500, 3001), torch.linspace(-0.02, 0.02, 801)))
    want = x.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    assert [shim.e4m3_bits(float(y)) for y in x] == want.tolist()


@pytest.mark.parametrize("row_bytes", [32, 64, 96, 128, 192, 256])
def test_panels_are_a_bijection_without_bank_conflicts(shim, row_bytes):
    chunks = {(r, c): shim.panel_offset(row_bytes, r, c) for r in range(64) for c in
              range(0, row_bytes, 16)}  # fmt: skip
    assert sorted(chunks.values()) == list(range(0, 64 * row_bytes, 16))
    for first in range(0, 64, 8):
        for column in range(0, row_bytes, 16):
            banks = {chunks[first + i, column] // 16 % 8 for i in range(8)}
            assert len(banks) == 8


def outcomes(shim, fault: int, eager: bool) -> list:
    found = []
    for seed in SEEDS:
        shim.set_options(seed, eager)
        try:
            found.append(shim.rotate(fault))
        except RuntimeError as error:
            found.append(str(error))
    return found


def test_a_right_kernel_is_right_under_every_schedule(shim):
    (first, *others) = outcomes(shim, 0, False) + outcomes(shim, 0, True)
    assert all(isinstance(x, list) and x == first for x in others)


# Two faults are seen in one mode only: what is never waited for lands in time when it lands at
# once, and what is overwritten too early is not when it lands late.
@pytest.mark.parametrize(
    ("fault", "eager"),
    [
        ("no-wait", False),
        ("no-first-sync", False),
        ("no-first-sync", True),
        ("no-second-sync", True),
    ],
)
def test_missing_waits_make_numbers_wrong(shim, fault, eager):
    shim.set_options(1, False)
    right = shim.rotate(0)
    found = outcomes(shim, FAULTS[fault], eager)
    assert sum(x != right for x in found) >= len(SEEDS) - 1, found


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("misaligned", "misaligned"),
        ("outside", "outside shared memory"),
        ("in-flight", "under way"),
        ("two-collectives", "different collectives"),
        ("missed-barrier", "deadlock"),
    ],
)
def test_misuse_is_an_error_with_a_name(shim, fault, words):
    for error in outcomes(shim, FAULTS[fault], False):
        assert isinstance(error, str) and words in error, error
