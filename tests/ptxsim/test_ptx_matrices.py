"""mma.sync, ldmatrix, stmatrix: fragments laid out by the manual's formulas, one by one."""

from __future__ import annotations

import numpy as np
import ptxsim
import pytest
import torch
from snippets import kernel

# Elements per 32-bit register.
PER_REGISTER = {"bf16": 2, "f16": 2, "tf32": 1, "s8": 4, "u8": 4, "s4": 8, "u4": 8, "e4m3": 4}
RANGES = {"s8": (-128, 128), "u8": (0, 256), "s4": (-8, 8), "u4": (0, 16)}
SMALL = {"bf16": torch.bfloat16, "f16": torch.float16, "e4m3": torch.float8_e4m3fn}


def random_matrix(kind: str, rows: int, columns: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(values in float64, bit patterns)."""
    rng = np.random.default_rng(seed)
    if kind in RANGES:
        values = rng.integers(*RANGES[kind], (rows, columns))
        return values.astype(np.float64), values & 0xFF if kind[1] == "8" else values & 0xF
    x = torch.from_numpy(rng.normal(size=(rows, columns)).astype(np.float32))
    if kind == "tf32":
        bits = x.view(torch.int32).numpy().view(np.uint32) & np.uint32(0xFFFFE000)
        return bits.view(np.float32).astype(np.float64), bits
    x = x.to(SMALL[kind])
    bits = x.view(torch.uint8 if kind == "e4m3" else torch.uint16).numpy()
    return x.double().numpy(), bits


def registers_of(bits: np.ndarray, places, count: int, per: int) -> np.ndarray:
    """[32, count] registers; places(lane, register, element) is where an element comes from."""
    width, words = 32 // per, np.zeros((32, count), np.uint64)
    for lane in range(32):
        for r in range(count):
            for e in range(per):
                words[lane, r] |= np.uint64(int(bits[places(lane, r, e)]) << width * e)
    return words.astype(np.uint32)


def a_places(per: int):
    def places(lane: int, r: int, e: int) -> tuple[int, int]:
        return lane // 4 + 8 * (r % 2), (lane % 4) * per + e + 4 * per * (r // 2)

    return places


def b_places(per: int):
    def places(lane: int, r: int, e: int) -> tuple[int, int]:
        return (lane % 4) * per + e + 4 * per * r, lane // 4

    return places


MMA = {
    "m16n8k16 f32.bf16.bf16.f32": 16, "m16n8k8 f32.bf16.bf16.f32": 8,
    "m16n8k16 f32.f16.f16.f32": 16, "m16n8k8 f32.tf32.tf32.f32": 8, "m16n8k4 f32.tf32.tf32.f32": 4,
    "m16n8k32 s32.s8.s8.s32": 32, "m16n8k32 s32.u8.s8.s32": 32, "m16n8k16 s32.s8.s8.s32": 16,
    "m16n8k64 s32.s4.s4.s32": 64, "m16n8k64 s32.u4.s4.s32": 64, "m16n8k32 f32.e4m3.e4m3.f32": 32,
}  # fmt: skip


@pytest.mark.parametrize("name", MMA)
def test_mma(name: str):
    shape, types = name.split(" ")
    depth, (out, kind_a, kind_b, _) = MMA[name], types.split(".")
    a, bits_a = random_matrix(kind_a, 16, depth, 1)
    b, bits_b = random_matrix(kind_b, depth, 8, 2)
    rng = np.random.default_rng(3)
    dtype = np.float32 if out == "f32" else np.int32
    c = (rng.normal(size=(16, 8)) * 10).astype(dtype)
    per_a, per_b = PER_REGISTER[kind_a], PER_REGISTER[kind_b]
    count_a, count_b = 16 * depth // per_a // 32, 8 * depth // per_b // 32
    words_a = registers_of(bits_a, a_places(per_a), count_a, per_a)
    words_b = registers_of(bits_b, b_places(per_b), count_b, per_b)
    lane, r = np.arange(32)[:, None], np.arange(4)[None, :]
    row, column = lane // 4 + 8 * (r // 2), (lane % 4) * 2 + r % 2
    words_c = c[row, column].view(np.uint32)
    given = np.concatenate([words_a, words_b, words_c], 1)
    loads, count = [], given.shape[1]
    for i in range(count):
        loads.append(f"ld.global.b32 %r{10 + i}, [%d2+{4 * i}];")
    names = [f"%r{10 + i}" for i in range(count)]
    operands = [names[:count_a], names[count_a : count_a + count_b], names[count_a + count_b :]]
    a_text, b_text, c_text = ("{" + ", ".join(x) + "}" for x in operands)
    body = f"""
        mov.u32 %r1, %tid.x; ld.param.u64 %d1, [given];
        mul.lo.u32 %r2, %r1, {4 * count}; cvt.u64.u32 %d2, %r2; add.s64 %d2, %d1, %d2;
        {" ".join(loads)}
        mma.sync.aligned.{shape}.row.col.{types}
            {{%r60, %r61, %r62, %r63}}, {a_text}, {b_text}, {c_text};
        ld.param.u64 %d3, [out]; mad.wide.u32 %d3, %r1, 16, %d3;
        st.global.v4.b32 [%d3], {{%r60, %r61, %r62, %r63}};
    """
    result = np.zeros((32, 4), dtype)
    ptxsim.launch(kernel(body, [".u64 given", ".u64 out"]), "k", 1, 32, 0, [given, result])
    wanted = (a @ b + c)[row, column]
    np.testing.assert_allclose(result, wanted, 1e-6, 1e-5 if out == "f32" else 0)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix_and_stmatrix(count: int, transposed: bool):
    rng = np.random.default_rng(0)
    matrices = rng.integers(0, 1 << 16, (count, 8, 8)).astype(np.uint16)
    suffix = ".trans" if transposed else ""
    registers = ", ".join(f"%r{20 + i}" for i in range(count))
    vector = "{" + registers + "}"
    # Rows of 16 bytes, one per thread; the second half of `buffer` takes what stmatrix writes.
    body = f"""
        mov.u32 %r1, %tid.x; mov.u32 %r2, buffer; mad.lo.u32 %r3, %r1, 16, %r2;
        ld.param.u64 %d1, [given]; mad.wide.u32 %d2, %r1, 16, %d1;
        setp.lt.u32 %p1, %r1, {8 * count};
        @%p1 ld.global.v4.b32 {{%r4, %r5, %r6, %r7}}, [%d2];
        @%p1 st.shared.v4.b32 [%r3], {{%r4, %r5, %r6, %r7}};
        bar.sync 0;
        ldmatrix.sync.aligned.m8n8.x{count}{suffix}.shared.b16 {vector}, [%r3];
        stmatrix.sync.aligned.m8n8.x{count}{suffix}.shared.b16 [%r3+512], {vector};
        bar.sync 0;
        ld.param.u64 %d3, [out]; mad.wide.u32 %d4, %r1, 16, %d3;
        {" ".join(f"st.global.b32 [%d4+{4 * i}], %r{20 + i};" for i in range(count))}
        ld.param.u64 %d5, [back]; mad.wide.u32 %d6, %r1, 16, %d5;
        @%p1 ld.shared.v4.b32 {{%r4, %r5, %r6, %r7}}, [%r3+512];
        @%p1 st.global.v4.b32 [%d6], {{%r4, %r5, %r6, %r7}};
    """
    out, back = np.zeros((32, 4), np.uint32), np.zeros_like(matrices)
    ptx = kernel(body, [".u64 given", ".u64 out", ".u64 back"], 1024)
    report = ptxsim.launch(ptx, "k", 1, 32, 0, [matrices, out, back])
    for k in range(count):
        m = matrices[k].T if transposed else matrices[k]
        for lane in range(32):
            low, high = m[lane // 4, 2 * (lane % 4)], m[lane // 4, 2 * (lane % 4) + 1]
            assert out[lane, k] == int(low) | int(high) << 16
    np.testing.assert_array_equal(back, matrices)
    assert report.statistics["ldmatrix bank conflicts"] == 0


@pytest.mark.parametrize("pitch, conflicts", [(16, 0), (128, 7), (144, 0), (64, 6), (32, 4)])
def test_bank_conflicts_of_ldmatrix(pitch: int, conflicts: int):
    body = f"""
        mov.u32 %r1, %tid.x; mov.u32 %r2, buffer;
        mov.b32 %r9, 0;
        FILL: mad.lo.u32 %r3, %r1, 4, %r2; mad.lo.u32 %r3, %r9, 128, %r3;
        st.shared.b32 [%r3], 0; add.u32 %r9, %r9, 1; setp.lt.u32 %p1, %r9, 10; @%p1 bra FILL;
        bar.sync 0;
        and.b32 %r4, %r1, 7; mad.lo.u32 %r4, %r4, {pitch}, %r2;
        ldmatrix.sync.aligned.m8n8.x1.shared.b16 {{%r5}}, [%r4];
    """
    report = ptxsim.launch(kernel(body, [], 1280), "k", 1, 32, 0, [])
    assert report.statistics["ldmatrix bank conflicts"] == conflicts
