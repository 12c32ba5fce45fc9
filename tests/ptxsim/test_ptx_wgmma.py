"""wgmma: every layout of its operands against numpy, and what it must not be done to in flight."""

from __future__ import annotations

import numpy as np
import ptxsim
import pytest
from snippets import kernel
from test_ptx_matrices import a_places, random_matrix, registers_of

BYTES = {"bf16": 2, "f16": 2, "s8": 1, "u8": 1, "e4m3": 1}
CODES = {0: 0, 128: 1, 64: 2, 32: 3}
HALF = 32768  # of the buffer: A below, B above


def exchange(address: int, swizzle: int) -> int:
    """The manual's swizzle: 16-byte chunks are exchanged by the bits above 128 bytes."""
    return address ^ (address >> 7 & swizzle // 16 - 1) << 4 if swizzle else address


def k_major(bits: np.ndarray, size: int, swizzle: int) -> tuple[np.ndarray, int, int]:
    """Memory of a matrix [rows, K = 32 bytes] with K along memory; (bytes, leading, stride)."""
    rows, depth = bits.shape
    image = np.zeros(HALF, np.uint8)
    # Without a swizzle, 8 rows of 16 bytes are 128 bytes in a piece; distances are the author's.
    leading, stride = (4096, 256) if swizzle == 0 else (16, 8 * swizzle)
    for r in range(rows):
        for k in range(depth):
            byte = k * size
            if swizzle == 0:
                at = byte // 16 * leading + r // 8 * stride + r % 8 * 16 + byte % 16
            else:
                at = exchange(r * swizzle + byte, swizzle)
            image[at : at + size] = np.frombuffer(int(bits[r, k]).to_bytes(size, "little"), "u1")
    return image, leading, stride


def mn_major(bits: np.ndarray, swizzle: int) -> tuple[np.ndarray, int, int]:
    """Memory of a matrix [rows, K = 16] of 16-bit numbers with the rows along memory.

    Panels as wide as the swizzle: [panel][k][numbers of a panel].
    """
    rows, depth = bits.shape
    image = np.zeros(HALF, np.uint8)
    leading, stride = (4096, 128) if swizzle == 0 else (depth * swizzle, 8 * swizzle)
    for r in range(rows):
        for k in range(depth):
            byte = 2 * r
            if swizzle == 0:
                # Pieces of 8 by 8: `stride` along the rows, `leading` along K.
                at = byte // 16 * stride + k // 8 * leading + k % 8 * 16 + byte % 16
            else:
                panel, inside = divmod(byte, swizzle)
                at = exchange(panel * leading + k * swizzle + inside, swizzle)
            image[at : at + 2] = np.frombuffer(int(bits[r, k]).to_bytes(2, "little"), "u1")
    return image, leading, stride


def image_of(bits, kind, swizzle, transposed) -> tuple[np.ndarray, int]:
    """(memory, descriptor without its start)."""
    if transposed:
        image, leading, stride = mn_major(bits, swizzle)
    else:
        image, leading, stride = k_major(bits, BYTES[kind], swizzle)
    return image, leading >> 4 << 16 | stride >> 4 << 32 | CODES[swizzle] << 62


LOAD = """
    mov.u32 %r1, %tid.x; mov.u32 %r2, buffer; mov.b32 %r10, %r1; ld.param.u64 %d1, [images];
    FILL: mad.wide.u32 %d2, %r10, 16, %d1; ld.global.v4.b32 {%r11, %r12, %r13, %r14}, [%d2];
    mad.lo.u32 %r15, %r10, 16, %r2; st.shared.v4.b32 [%r15], {%r11, %r12, %r13, %r14};
    add.u32 %r10, %r10, 128; setp.lt.u32 %p3, %r10, 4096; @%p3 bra FILL;
    fence.proxy.async.shared::cta;
    bar.sync 0;
    cvt.u64.u32 %d3, %r2; shr.u64 %d4, %d3, 4;
    ld.param.u64 %d5, [a_rest]; or.b64 %d6, %d4, %d5;
    ld.param.u64 %d7, [b_rest]; add.s64 %d8, %d4, 2048; or.b64 %d9, %d8, %d7;
"""
PARAMETERS = [".u64 images", ".u64 words", ".u64 a_rest", ".u64 b_rest", ".u64 sums"]


def product(opcode: str, tail: str, n: int, *, from_registers: bool = False, times: int = 1) -> str:
    sums = ", ".join(f"%r{100 + i}" for i in range(n // 2))
    words = ""
    if from_registers:
        words = """
            ld.param.u64 %d20, [words]; mad.wide.u32 %d21, %r1, 16, %d20;
            ld.global.v4.b32 {%r50, %r51, %r52, %r53}, [%d21];
        """
    left = "{%r50, %r51, %r52, %r53}" if from_registers else "%d6"
    one = f"wgmma.mma_async.sync.aligned.{opcode} {{{sums}}}, {left}, %d9, KEEP{tail};"
    stores = [f"st.global.b32 [%d31+{4 * i}], %r{100 + i};" for i in range(n // 2)]
    return f"""
        {LOAD} {words}
        wgmma.fence.sync.aligned;
        {one.replace("KEEP", "0")} {one.replace("KEEP", "1") * (times - 1)}
        wgmma.commit_group.sync.aligned;
        wgmma.wait_group.sync.aligned 0;
        ld.param.u64 %d30, [sums]; mul.lo.u32 %r90, %r1, {2 * n}; cvt.u64.u32 %d31, %r90;
        add.s64 %d31, %d30, %d31; {" ".join(stores)}
    """


def run(ptx: str, images, words, a_rest: int, b_rest: int, n: int, dtype) -> np.ndarray:
    """[64, n] sums, gathered by the manual's places of the result."""
    sums = np.zeros((128, n // 2), dtype)
    ptxsim.launch(ptx, "k", 1, 128, 0, [images, words, a_rest, b_rest, sums])
    out = np.zeros((64, n), dtype)
    for t in range(128):
        for i in range(n // 2):
            row = 16 * (t // 32) + t % 32 // 4 + 8 * (i // 2 % 2)
            out[row, 8 * (i // 4) + 2 * (t % 4) + i % 2] = sums[t, i]
    return out


CASES = [
    (kind, n, a_swizzle, b_swizzle, False, False)
    for kind, n in (("bf16", 64), ("s8", 24), ("e4m3", 40))
    for a_swizzle, b_swizzle in ((128, 128), (64, 32), (32, 0), (0, 64))
]
CASES += [
    ("bf16", 64, a, b, True, transposed_b)
    for a, b in ((128, 128), (64, 64), (32, 32), (0, 0))
    for transposed_b in (False, True)
]
CASES += [
    ("f16", 128, 128, 64, False, True),
    ("f16", 8, 64, 0, False, False),
    ("u8.s8", 80, 64, 128, False, False),
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(str(x) for x in c))
def test_operands_in_shared_memory(case):
    kinds, n, a_swizzle, b_swizzle, transposed_a, transposed_b = case
    kind_a, _, kind_b = kinds.partition(".")
    kind_b = kind_b or kind_a
    depth = 32 // BYTES[kind_a]
    a, bits_a = random_matrix(kind_a, 64, depth, 1)
    b, bits_b = random_matrix(kind_b, n, depth, 2)
    image_a, a_rest = image_of(bits_a, kind_a, a_swizzle, transposed_a)
    image_b, b_rest = image_of(bits_b, kind_b, b_swizzle, transposed_b)
    is_whole = kind_a in ("s8", "u8")
    out = "s32" if is_whole else "f32"
    tail = "" if is_whole else ", 1, 1"
    if BYTES[kind_a] == 2:
        tail += f", {int(transposed_a)}, {int(transposed_b)}"
    ptx = kernel(product(f"m64n{n}k{depth}.{out}.{kind_a}.{kind_b}", tail, n), PARAMETERS, 2 * HALF)
    images = np.concatenate([image_a, image_b])
    dtype = np.int32 if is_whole else np.float32
    found = run(ptx, images, np.zeros(512, "u4"), a_rest, b_rest, n, dtype)
    np.testing.assert_allclose(found, a @ b.T, 1e-5, 0 if is_whole else 1e-4)


@pytest.mark.parametrize("kind", ["bf16", "s8", "u8.s8", "e4m3"])
def test_a_in_registers_and_sums_that_go_on(kind: str):
    kind_a, _, kind_b = kind.partition(".")
    kind_b = kind_b or kind_a
    n, per = 32, 4 // BYTES[kind_a]
    depth = 32 // BYTES[kind_a]
    a, bits_a = random_matrix(kind_a, 64, depth, 1)
    b, bits_b = random_matrix(kind_b, n, depth, 2)
    words = [registers_of(bits_a[16 * w : 16 * w + 16], a_places(per), 4, per) for w in range(4)]
    image, b_rest = image_of(bits_b, kind_b, 128, False)
    is_whole = kind_a in ("s8", "u8")
    tail = "" if is_whole else ", 1, -1, 0" if kind_a == "bf16" else ", 1, -1"
    out = "s32" if is_whole else "f32"
    text = product(
        f"m64n{n}k{depth}.{out}.{kind_a}.{kind_b}", tail, n, from_registers=True, times=3
    )
    images = np.concatenate([np.zeros_like(image), image])
    dtype = np.int32 if is_whole else np.float32
    found = run(
        kernel(text, PARAMETERS, 2 * HALF), images, np.concatenate(words), 0, b_rest, n, dtype
    )
    wanted = 3 * (a @ b.T) * (1 if is_whole else -1)
    np.testing.assert_allclose(found, wanted, 1e-5, 0 if is_whole else 1e-3)


def zeros() -> list:
    """Arguments of a product of nothing."""
    return [np.zeros(2 * HALF, "u1"), np.zeros(512, "u4"), 1 << 62, 1 << 62, np.zeros(1024, "f4")]


SOURCE = product("m64n16k16.f32.bf16.bf16", ", 1, 1, 0, 0", 16)
WAIT, COMMIT = "wgmma.wait_group.sync.aligned 0;", "wgmma.commit_group.sync.aligned;"
FENCE = "wgmma.fence.sync.aligned;"
PLANTED = {
    "unfenced-memory": ("fence.proxy.async.shared::cta;", "", "without fence.proxy.async"),
    "no-fence": (FENCE, "", "without wgmma.fence"),
    "no-barrier": ("bar.sync 0;", "", "shared race"),
    "no-wait": (WAIT, "", "result of a wgmma in flight"),
    "no-commit": (COMMIT, "", "result of a wgmma in flight"),
    "wait-for-too-few": (WAIT, WAIT.replace("0;", "1;"), "result of a wgmma in flight"),
    "sum-read-early": (COMMIT, COMMIT + "mov.b32 %r99, %r103;", "result of a wgmma in flight"),
    "sum-written-early": (COMMIT, COMMIT + "mov.b32 %r103, 0;", "result of a wgmma in flight"),
    "operand-overwritten": (
        COMMIT,
        COMMIT + "st.shared.b32 [%r2], 0;",
        "wgmma or a bulk store in flight reads",
    ),
    "written-after-fence": (FENCE, FENCE + "add.u32 %r103, %r1, 0;", None),
    "half-a-warpgroup": (
        FENCE,
        "setp.ge.u32 %p7, %r1, 64; @%p7 ret;" + FENCE,
        "part of a warpgroup",
    ),
    "uneven-descriptor": (FENCE, "@%p1 add.s64 %d6, %d6, 2;" + FENCE, "descriptor differs"),
    "out-of-bounds": (FENCE, "add.s64 %d9, %d9, 2048;" + FENCE, "out of bounds"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_planted_faults(name: str):
    before, after, message = PLANTED[name]
    assert SOURCE.count(before) == 1
    body = SOURCE.replace(before, after).replace(
        "bar.sync 0;", "setp.eq.u32 %p1, %r1, 5; bar.sync 0;"
    )
    ptx = kernel(body, PARAMETERS, 2 * HALF)
    arguments = [
        np.zeros(2 * HALF, "u1"),
        np.zeros(512, "u4"),
        1 << 62,
        1 << 62,
        np.zeros(1024, "f4"),
    ]
    if message is None:
        # Sums that begin with a product are not read: no fence is wanted after the write.
        ptxsim.launch(ptx, "k", 1, 128, 0, arguments)
        body = body.replace("%d9, 0,", "%d9, 1,")
        message, ptx = "without wgmma.fence after", kernel(body, PARAMETERS, 2 * HALF)
    with pytest.raises(ptxsim.SimulationError, match=message):
        ptxsim.launch(ptx, "k", 1, 128, 0, arguments)


def test_a_of_registers_must_not_change_in_flight():
    text = product("m64n16k16.f32.bf16.bf16", ", 1, 1, 0", 16, from_registers=True)
    arguments = [
        np.zeros(2 * HALF, "u1"),
        np.zeros(512, "u4"),
        1 << 62,
        1 << 62,
        np.zeros(1024, "f4"),
    ]
    ptxsim.launch(kernel(text, PARAMETERS, 2 * HALF), "k", 1, 128, 0, arguments)
    changed = text.replace(COMMIT, COMMIT + "mov.b32 %r51, 0;")
    with pytest.raises(ptxsim.SimulationError, match="in flight reads as A"):
        ptxsim.launch(kernel(changed, PARAMETERS, 2 * HALF), "k", 1, 128, 0, arguments)
    read = text.replace(COMMIT, COMMIT + "mov.b32 %r99, %r51;")
    ptxsim.launch(kernel(read, PARAMETERS, 2 * HALF), "k", 1, 128, 0, arguments)
