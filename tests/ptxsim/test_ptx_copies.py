"""cp.async, bulk copies and mbarriers: bytes in place, and not before they were waited for."""

from __future__ import annotations

import numpy as np
import ptxsim
import pytest
from snippets import kernel

INIT = """
    mov.u32 %r1, %tid.x; mov.u32 %r2, buffer; add.u32 %r3, %r2, 32768;
    setp.eq.u32 %p1, %r1, 0;
    @%p1 mbarrier.init.shared::cta.b64 [%r3], 1;
    @%p1 fence.mbarrier_init.release.cluster;
    bar.sync 0;
"""
WAIT = """
    AGAIN: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r3], 0; @!%p2 bra AGAIN;
"""


def copy_out(count: int) -> str:
    """Stores `count` bytes of the buffer to `out`, 4 per thread and turn, by 128 threads."""
    return f"""
        ld.param.u64 %d50, [out]; mov.b32 %r50, %r1;
        MORE: setp.ge.u32 %p9, %r50, {count // 4}; @%p9 bra ENOUGH;
        mad.lo.u32 %r51, %r50, 4, %r2; ld.shared.b32 %r52, [%r51];
        mad.wide.u32 %d51, %r50, 4, %d50; st.global.b32 [%d51], %r52;
        add.u32 %r50, %r50, 128; bra MORE;
        ENOUGH:
    """


@pytest.mark.parametrize("size", [4, 8, 16])
@pytest.mark.parametrize("eager", [False, True])
def test_cp_async_with_zero_fill(size: int, eager: bool):
    rng = np.random.default_rng(0)
    source = rng.integers(0, 256, 128 * size).astype(np.uint8)
    lengths = rng.integers(0, size + 1, 128).astype(np.uint32)
    cache = "cg" if size == 16 else "ca"
    body = f"""
        mov.u32 %r1, %tid.x; mov.u32 %r2, buffer;
        ld.param.u64 %d1, [source]; mad.wide.u32 %d1, %r1, {size}, %d1;
        ld.param.u64 %d2, [lengths]; mad.wide.u32 %d2, %r1, 4, %d2; ld.global.b32 %r4, [%d2];
        mad.lo.u32 %r5, %r1, {size}, %r2;
        cp.async.{cache}.shared.global [%r5], [%d1], {size}, %r4;
        cp.async.commit_group;
        cp.async.wait_group 0;
        bar.sync 0;
        {copy_out(128 * size)}
    """
    ptx = kernel(body, [".u64 source", ".u64 lengths", ".u64 out"], 4096)
    out = np.zeros_like(source)
    ptxsim.launch(ptx, "k", 1, 128, 0, [source, lengths, out], eager=eager)
    keep = np.arange(size)[None, :] < lengths[:, None]
    np.testing.assert_array_equal(out, np.where(keep, source.reshape(-1, size), 0).ravel())
    with pytest.raises(ptxsim.SimulationError, match="asynchronous copy is still writing"):
        missing = ptx.replace("cp.async.wait_group 0;", "")
        ptxsim.launch(missing, "k", 1, 128, 0, [source, lengths, out], eager=eager)
    with pytest.raises(ptxsim.SimulationError, match="asynchronous copy is still writing"):
        loose = ptx.replace("wait_group 0", "wait_group 1")
        ptxsim.launch(loose, "k", 1, 128, 0, [source, lengths, out], eager=eager)


@pytest.mark.parametrize("no_increment", [False, True])
def test_cp_async_that_arrives_at_an_mbarrier(no_increment: bool):
    """Without `.noinc` the barrier counts one arrival more for it, so that others must arrive."""
    source = np.random.default_rng(0).integers(0, 1 << 32, 128).astype(np.uint32)
    count = 128 if no_increment else 1
    arrive = ".noinc" if no_increment else ""
    body = f"""
        {INIT.replace("[%r3], 1;", f"[%r3], {count};")}
        ld.param.u64 %d1, [source]; mad.wide.u32 %d1, %r1, 4, %d1; mad.lo.u32 %r5, %r1, 4, %r2;
        cp.async.ca.shared.global [%r5], [%d1], 4;
        cp.async.mbarrier.arrive{arrive}.shared::cta.b64 [%r3];
        bar.sync 0;
        {"" if no_increment else "@%p1 mbarrier.arrive.shared::cta.b64 _, [%r3];"}
        {WAIT}
        {copy_out(512)}
    """
    ptx = kernel(body, [".u64 source", ".u64 out"], 32784)
    out = np.zeros_like(source)
    ptxsim.launch(ptx, "k", 1, 128, 0, [source, out])
    np.testing.assert_array_equal(out, source)


def swizzled(box: np.ndarray, swizzle: int) -> np.ndarray:
    """The bytes of a box in shared memory: rows of `swizzle` bytes, 16-byte chunks exchanged."""
    rows = box.reshape(-1, box.shape[-1]).view(np.uint8)
    if swizzle == 0:
        return rows.ravel()
    out = np.empty_like(rows)
    chunks = swizzle // 16
    for r in range(len(rows)):
        # The pattern repeats every 1024, 512 and 256 bytes.
        key = r * swizzle // 128 % chunks
        for c in range(chunks):
            out[r, 16 * (c ^ key) : 16 * (c ^ key) + 16] = rows[r, 16 * c : 16 * c + 16]
    return out.ravel()


def boxed(tensor: np.ndarray, corner: list[int], box: tuple[int, ...]) -> np.ndarray:
    """A box, zero outside of the tensor; corner and box in the tensor's order of axes."""
    out = np.zeros(box, tensor.dtype)
    for index in np.ndindex(*box):
        at = tuple(c + i for c, i in zip(corner, index, strict=True))
        if all(0 <= x < n for x, n in zip(at, tensor.shape, strict=True)):
            out[index] = tensor[at]
    return out


BOXES = {
    # tensor, box, corner (in the order of the axes), swizzle
    "1d": ((100,), (64,), [30], 0),
    "1d-outside": ((100,), (64,), [-20], 0),
    "2d-none": ((20, 40), (8, 16), [3, 5], 0),
    "2d-32": ((40, 32), (16, 16), [7, 10], 32),
    "2d-64": ((40, 64), (16, 32), [30, 40], 64),
    "2d-128": ((40, 72), (16, 64), [-3, 16], 128),
    "3d-128": ((3, 20, 64), (2, 9, 64), [2, -4, 0], 128),
    "4d-64": ((2, 3, 10, 40), (1, 2, 5, 32), [1, 2, 7, 20], 64),
    "5d-32": ((2, 2, 3, 4, 24), (2, 1, 2, 3, 16), [0, 1, 2, -1, 16], 32),
}


@pytest.mark.parametrize("name", BOXES)
@pytest.mark.parametrize("way", ["load", "load-eager", "store"])
def test_boxes_of_tensors(name: str, way: str):
    shape, box, corner, swizzle = BOXES[name]
    rng = np.random.default_rng(0)
    tensor = rng.integers(1, 1 << 16, shape).astype(np.uint16)
    if shape[-1] * 2 % 16:
        tensor = tensor[..., : shape[-1] // 8 * 8]
    wanted = swizzled(boxed(tensor, corner, box), swizzle)
    rank, size = len(shape), wanted.nbytes
    coordinates = ", ".join(str(c) for c in reversed(corner))
    data = rng.integers(1, 255, size).astype(np.uint8) if way == "store" else np.zeros(size, "u1")
    head = INIT + "ld.param.u64 %d1, [map];"
    if way == "store":
        body = f"""
            {head} ld.param.u64 %d2, [out]; mov.b32 %r10, %r1;
            FILL: setp.ge.u32 %p3, %r10, {size // 4}; @%p3 bra FILLED;
            mad.wide.u32 %d3, %r10, 4, %d2; ld.global.b32 %r11, [%d3];
            mad.lo.u32 %r12, %r10, 4, %r2; st.shared.b32 [%r12], %r11;
            add.u32 %r10, %r10, 128; bra FILL;
            FILLED: fence.proxy.async.shared::cta;
            bar.sync 0;
            @!%p1 bra DONE;
            cp.async.bulk.tensor.{rank}d.global.shared::cta.tile.bulk_group
                [%d1, {{{coordinates}}}], [%r2];
            cp.async.bulk.commit_group; cp.async.bulk.wait_group.read 0;
            DONE:
        """
    else:
        body = f"""
            {head}
            @%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r3], {size};
            @%p1 cp.async.bulk.tensor.{rank}d.shared::cluster.global.mbarrier::complete_tx::bytes
                [%r2], [%d1, {{{coordinates}}}], [%r3];
            {WAIT} {copy_out(size)}
        """
    record = np.zeros(256, np.uint8)
    record = record[-record.ctypes.data % 64 :][:128]
    record[:] = np.frombuffer(ptxsim.TensorMap.of(tensor, box, swizzle).to_bytes(), np.uint8)
    memory = [ptxsim.Region.of(tensor, "tensor", read_only=way != "store")]
    ptx = kernel(body, [".u64 map", ".u64 out"], 32784)
    before = tensor.copy()
    eager = way == "load-eager"
    ptxsim.launch(ptx, "k", 1, 128, 0, [record, data], memory, eager=eager)
    if way != "store":
        np.testing.assert_array_equal(data, wanted)
        return
    # Every element of the tensor carries its number through the reference of loads: that tells
    # where each place of the shared memory belongs; places outside carry zero.
    number = np.arange(1, tensor.size + 1).astype(np.uint16).reshape(tensor.shape)
    owner = swizzled(boxed(number, corner, box), swizzle).view(np.uint16)
    expected = before.copy()
    expected.ravel()[owner[owner > 0] - 1] = data.view(np.uint16)[owner > 0]
    np.testing.assert_array_equal(tensor, expected)
    assert (tensor != before).any()


def test_rows_of_bytes_both_ways():
    source = np.random.default_rng(0).integers(0, 256, 2048).astype(np.uint8)
    body = f"""
        {INIT} ld.param.u64 %d1, [source]; ld.param.u64 %d2, [out];
        @%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r3], 1024;
        @%p1 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes
            [%r2], [%d1+512], 1024, [%r3];
        {WAIT}
        @!%p1 bra DONE;
        cp.async.bulk.global.shared::cta.bulk_group [%d2], [%r2], 1024;
        cp.async.bulk.commit_group; cp.async.bulk.wait_group 0;
        DONE:
    """
    out = np.zeros(1024, np.uint8)
    ptx = kernel(body, [".u64 source", ".u64 out"], 32784)
    ptxsim.launch(ptx, "k", 1, 128, 0, [source, out])
    np.testing.assert_array_equal(out, source[512:1536])
    with pytest.raises(ptxsim.SimulationError, match="ended with a bulk store"):
        missing = ptx.replace("cp.async.bulk.wait_group 0;", "")
        ptxsim.launch(missing, "k", 1, 128, 0, [source, out])


def test_test_wait_says_how_things_are():
    """Before the only arrival it says no and goes on; behind it, yes."""
    body = """
        mov.u32 %r2, buffer; mbarrier.init.shared::cta.b64 [%r2], 1; mov.u32 %r3, 0;
        mbarrier.test_wait.parity.shared::cta.b64 %p1, [%r2], %r3;
        mbarrier.arrive.shared::cta.b64 %d1, [%r2];
        mbarrier.test_wait.parity.shared::cta.b64 %p2, [%r2], %r3;
        selp.u32 %r4, 1, 0, %p1; selp.u32 %r5, 2, 0, %p2; add.u32 %r4, %r4, %r5;
        ld.param.u64 %d2, [out]; st.global.b32 [%d2], %r4;
    """
    out = np.zeros(1, np.uint32)
    ptxsim.launch(kernel(body, [".u64 out"], 256), "k", 1, 1, 0, [out])
    assert out[0] == 2


def test_phases_of_an_mbarrier():
    """Two warps pass a value back and forth four times over two mbarriers."""
    body = """
        mov.u32 %r1, %tid.x; mov.u32 %r2, buffer; setp.eq.u32 %p1, %r1, 0;
        @%p1 mbarrier.init.shared::cta.b64 [%r2], 32; @%p1 mbarrier.init.shared::cta.b64 [%r2+8], 1;
        bar.sync 0;
        and.b32 %r3, %r1, 31; mad.lo.u32 %r4, %r3, 4, %r2; mov.b32 %r5, 0; mov.b32 %r6, 0;
        setp.ge.u32 %p2, %r1, 32; @%p2 bra SECOND;
        FIRST: add.u32 %r7, %r5, %r1; st.shared.b32 [%r4+64], %r7;
        mbarrier.arrive.shared::cta.b64 %d1, [%r2];
        and.b32 %r8, %r5, 1;
        W1: mbarrier.try_wait.parity.shared::cta.b64 %p3, [%r2+8], %r8; @!%p3 bra W1;
        add.u32 %r5, %r5, 1; setp.lt.u32 %p4, %r5, 4; @%p4 bra FIRST;
        ret;
        SECOND: and.b32 %r8, %r5, 1;
        W2: mbarrier.try_wait.parity.shared::cta.b64 %p3, [%r2], %r8; @!%p3 bra W2;
        ld.shared.b32 %r9, [%r4+64]; mad.lo.u32 %r6, %r6, 10, %r9;
        bar.warp.sync -1;
        setp.eq.u32 %p5, %r3, 0; @%p5 mbarrier.arrive.shared::cta.b64 %d1, [%r2+8];
        add.u32 %r5, %r5, 1; setp.lt.u32 %p4, %r5, 4; @%p4 bra SECOND;
        ld.param.u64 %d2, [out]; mad.wide.u32 %d2, %r3, 4, %d2; st.global.b32 [%d2], %r6;
    """
    out = np.zeros(32, np.uint32)
    ptx = kernel(body, [".u64 out"], 256)
    ptxsim.launch(ptx, "k", 1, 64, 0, [out])
    lane = np.arange(32)
    np.testing.assert_array_equal(out, sum((lane + i) * 10 ** (3 - i) for i in range(4)))
    # Without the way back the first warp overwrites what the second one reads, phases ahead.
    ahead = ptx.replace("@!%p3 bra W1;", "").replace("[%r2+8], %r8;", "[%r2+8], 1;", 1)
    with pytest.raises(ptxsim.SimulationError, match=r"shared race|deadlock"):
        ptxsim.launch(ahead, "k", 1, 64, 0, [out])
    wrong = ptx.replace("[%r2+8], 1;", "[%r2+8], 2;", 1)
    with pytest.raises(ptxsim.SimulationError, match=r"deadlock[\s\S]*1 of 2 arrivals"):
        ptxsim.launch(wrong, "k", 1, 64, 0, [out])
    crowd = ptx.replace("[%r2], 32;", "[%r2], 16;", 1)
    with pytest.raises(ptxsim.SimulationError, match=r"race|more arrivals|deadlock"):
        ptxsim.launch(crowd, "k", 1, 64, 0, [out])
