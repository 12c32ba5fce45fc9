"""Shuffles, votes, reductions, divergence, barriers, atomics: what threads do together."""

from __future__ import annotations

import numpy as np
import ptxsim
import pytest
from snippets import evaluate, kernel, numbers

LANE = np.arange(32)


@pytest.mark.parametrize("mode", ["bfly", "up", "down", "idx"])
@pytest.mark.parametrize("width", [32, 16, 8])
def test_shuffles(mode: str, width: int):
    x = numbers(np.uint32, 64)
    by = np.resize(np.arange(width, dtype=np.uint32), 64) if mode == "idx" else np.full(64, 3, "u4")
    clamp = (32 - width) << 8 | (0 if mode == "up" else 31)
    lines = f"shfl.sync.{mode}.b32 %r1|%p1, $0, $1, {clamp}, -1;"
    lines += "selp.b32 $o, %r1, 4242, %p1;"
    found = evaluate(lines, [x, by], np.uint32).reshape(-1, 32)
    for warp in range(2):
        value = x[32 * warp : 32 * warp + 32]
        for lane in range(32):
            first, step = lane // width * width, int(by[32 * warp + lane])
            source = {
                "bfly": lane ^ step,
                "up": lane - step,
                "down": lane + step,
                "idx": first + step,
            }[mode]
            inside = first <= source < first + width
            assert found[warp, lane] == (value[source] if inside else 4242)


def test_votes_and_masks():
    x = np.random.default_rng(0).integers(0, 2, 64).astype(np.uint32)
    x[32:] = 1
    lines = "setp.ne.u32 %p1, $0, 0; vote.sync.ballot.b32 $o, %p1, -1;"
    found = evaluate(lines, [x], np.uint32)
    ballots = [(x[w : w + 32].astype(np.uint64) << LANE.astype(np.uint64)).sum() for w in (0, 32)]
    np.testing.assert_array_equal(found, np.repeat(ballots, 32))
    for mode, wanted in (("all", [0, 1]), ("any", [1, 1]), ("uni", [0, 1])):
        lines = (
            f"setp.ne.u32 %p1, $0, 0; vote.sync.{mode}.pred %p2, %p1, -1; selp.b32 $o, 1, 0, %p2;"
        )
        np.testing.assert_array_equal(evaluate(lines, [x], np.uint32), np.repeat(wanted, 32), mode)


def test_match():
    x = np.random.default_rng(0).integers(0, 4, 32).astype(np.uint32)
    found = evaluate("match.any.sync.b32 $o, $0, -1;", [x], np.uint32)
    same = (x[:, None] == x[None, :]).astype(np.uint64) << LANE.astype(np.uint64)
    np.testing.assert_array_equal(found, same.sum(1))


@pytest.mark.parametrize("name", ["add.s32", "max.s32", "min.u32", "or.b32", "and.b32", "xor.b32"])
def test_redux(name: str):
    dtype = np.int32 if "s32" in name else np.uint32
    x = numbers(dtype, 64)
    function = {"add": np.add, "max": np.maximum, "min": np.minimum, "or": np.bitwise_or}
    function |= {"and": np.bitwise_and, "xor": np.bitwise_xor}
    found = evaluate(f"redux.sync.{name} $o, $0, -1;", [x], dtype)
    wanted = function[name.split(".")[0]].reduce(x.reshape(2, 32), axis=1, dtype=dtype)
    np.testing.assert_array_equal(found, np.repeat(wanted, 32))


def test_elect_and_activemask_inside_a_branch():
    x = np.arange(64, dtype=np.uint32)
    lines = """
        and.b32 %r1, $0, 31; mov.b32 $o, 0;
        setp.lt.u32 %p1, %r1, 5; @%p1 bra SKIP;
        activemask.b32 %r2;
        elect.sync %r3|%p2, %r2;
        selp.b32 $o, %r2, %r3, %p2;
        SKIP:
    """
    found = evaluate(lines, [x], np.uint32).reshape(2, 32)
    assert (found[:, :5] == 0).all()
    assert (found[:, 5] == 0xFFFFFFE0).all()
    assert (found[:, 6:] == 5).all()


def test_a_loop_of_different_lengths_joins_again():
    x = np.random.default_rng(0).integers(0, 20, 96).astype(np.uint32)
    lines = """
        mov.b32 %r1, 0; mov.b32 %r2, 0;
        AGAIN: setp.ge.u32 %p1, %r1, $0; @%p1 bra OUT;
        add.u32 %r1, %r1, 1; add.u32 %r2, %r2, %r1; bra AGAIN;
        OUT: shfl.sync.idx.b32 %r3, %r2, 0, 31, -1;
        add.u32 $o, %r2, %r3;
    """
    found = evaluate(lines, [x], np.uint32)
    sums = x * (x + 1) // 2
    np.testing.assert_array_equal(found, sums + np.repeat(sums[::32], 32))


def test_predicated_exit_leaves_the_others():
    x = np.arange(64, dtype=np.uint32)
    found = evaluate("setp.lt.u32 %p1, $0, 40; @%p1 ret; mov.b32 $o, 7;", [x], np.uint32)
    np.testing.assert_array_equal(found, np.where(x < 40, 0, 7))


def test_a_shuffle_with_a_part_of_the_warp_is_refused():
    x = np.arange(32, dtype=np.uint32)
    lines = "setp.lt.u32 %p1, $0, 9; @%p1 shfl.sync.idx.b32 $o, $0, 0, 31, -1;"
    with pytest.raises(ptxsim.SimulationError, match="member mask"):
        evaluate(lines, [x], np.uint32)


def test_shared_memory_exchanges_over_a_barrier():
    x = numbers(np.uint32, 128)
    lines = """
        mov.u32 %r1, buffer; shl.b32 %r2, $t, 2; add.u32 %r3, %r1, %r2;
        st.shared.b32 [%r3], $0;
        bar.sync 0;
        xor.b32 %r4, $t, 127; shl.b32 %r4, %r4, 2; add.u32 %r4, %r4, %r1;
        ld.shared.b32 $o, [%r4];
    """
    np.testing.assert_array_equal(evaluate(lines, [x], np.uint32, shared=512), x[::-1])
    with pytest.raises(ptxsim.SimulationError, match="shared race"):
        evaluate(lines.replace("bar.sync 0;", ""), [x], np.uint32, shared=512)


def test_named_barriers_of_two_halves():
    """The halves hand a value over: one arrives, the other waits, by a number in a register."""
    x = numbers(np.uint32, 128)
    lines = """
        mov.u32 %r1, buffer; setp.lt.u32 %p1, $t, 64; mov.b32 %r9, 3; mov.b32 $o, 0;
        shl.b32 %r2, $t, 2; add.u32 %r3, %r1, %r2;
        @!%p1 bra LATER;
        st.shared.b32 [%r3], $0;
        bar.arrive %r9, 128;
        bra DONE;
        LATER: bar.sync %r9, 128;
        ld.shared.b32 $o, [%r3+-256];
        DONE:
    """
    found = evaluate(lines, [x], np.uint32, shared=256)
    np.testing.assert_array_equal(found, np.concatenate([np.zeros(64, "u4"), x[:64]]))
    with pytest.raises(ptxsim.SimulationError, match=r"deadlock[\s\S]*64 of 128"):
        evaluate(lines.replace("bar.arrive %r9, 128;", ""), [x], np.uint32, shared=256)
    with pytest.raises(ptxsim.SimulationError, match="different thread counts"):
        evaluate(
            lines.replace("bar.arrive %r9, 128;", "bar.arrive %r9, 96;"), [x], "u4", shared=256
        )


def test_barriers_that_reduce():
    x = np.zeros(64, np.uint32)
    x[[3, 40]] = 1
    cases = {"popc.u32 $o": 2, "or.pred %p2": 1, "and.pred %p2": 0}
    for name, wanted in cases.items():
        operation, target = name.split(" ")
        lines = f"setp.ne.u32 %p1, $0, 0; bar.red.{operation} {target}, 0, %p1;"
        if "pred" in name:
            lines += "selp.b32 $o, 1, 0, %p2;"
        np.testing.assert_array_equal(evaluate(lines, [x], np.uint32), np.full(64, wanted))


@pytest.mark.parametrize("space", ["shared", "global", "generic"])
def test_atomics(space: str):
    x = np.random.default_rng(0).integers(0, 50, 96).astype(np.uint32)
    total = np.zeros(4, np.uint32)
    address = "mov.u32 %r1, buffer;" if space == "shared" else "ld.param.u64 %d1, [total];"
    if space == "generic":
        address = "mov.u32 %r1, buffer; cvt.u64.u32 %d1, %r1; cvta.shared.u64 %d1, %d1;"
    base = "%r1" if space == "shared" else "%d1"
    suffix = "" if space == "generic" else f".{space}"
    body = f"""
        mov.u32 %r2, %tid.x; {address}
        setp.ne.u32 %p1, %r2, 0;
        mov.u32 %r7, buffer;
        @!%p1 st.shared.v2.b32 [%r7], {{0, 0}};
        bar.sync 0;
        ld.param.u64 %d2, [x]; mad.wide.u32 %d3, %r2, 4, %d2; ld.global.b32 %r3, [%d3];
        atom{suffix}.add.u32 %r4, [{base}], %r3;
        atom{suffix}.max.u32 %r5, [{base}+4], %r3;
        bar.sync 0;
        ld{suffix}.b32 %r6, [{base}]; ld{suffix}.b32 %r8, [{base}+4];
        ld.param.u64 %d4, [out]; mad.wide.u32 %d4, %r2, 8, %d4;
        st.global.v2.b32 [%d4], {{%r6, %r8}};
    """
    out = np.zeros((96, 2), np.uint32)
    ptx = kernel(body, [".u64 x", ".u64 total", ".u64 out"], 64)
    ptxsim.launch(ptx, "k", 1, 96, 0, [x, total, out])
    assert (out == [x.sum(), x.max()]).all()


# Two warps. Each branch is a step of its own.
SPLIT = "setp.lt.u32 %p1, $t, 32; @%p1 bra FIRST; {second} bra DONE; FIRST: {first} DONE:"
READ, CHANGE = "ld.shared.b32 $o, [%r1];", "atom.shared.add.u32 $o, [%r1], 1;"


def beside(first: str, second: str, before: str = "") -> np.ndarray:
    lines = f"""
        mov.u32 %r1, buffer; setp.eq.u32 %p2, $t, 0; @%p2 st.shared.b32 [%r1], 5; bar.sync 0;
        {before} {SPLIT.format(first=first, second=second)}
    """
    return evaluate(lines, [], np.uint32, threads=64, shared=16)


def test_what_atomics_left_is_read_by_all():
    found = beside(READ, READ, before=f"{CHANGE} bar.sync 0;")
    np.testing.assert_array_equal(found, np.full(64, 69))


def test_atomics_do_not_race_with_each_other():
    assert sorted(beside(CHANGE, CHANGE)) == list(range(5, 69))


@pytest.mark.parametrize("before", ["", f"{CHANGE} bar.sync 0;"], ids=["first", "again"])
@pytest.mark.parametrize("pair", [(READ, CHANGE), (CHANGE, READ)], ids=["reads", "changes"])
def test_atomics_race_with_plain_accesses(pair, before):
    with pytest.raises(ptxsim.SimulationError, match="shared race"):
        beside(*pair, before=before)


def test_several_blocks_run_apart():
    out = np.zeros((6, 64), np.uint32)
    body = """
        mov.u32 %r1, %tid.x; mov.u32 %r2, %ctaid.x; mov.u32 %r3, %ctaid.y; mov.u32 %r4, %nctaid.x;
        mad.lo.u32 %r5, %r3, %r4, %r2;
        mov.u32 %r6, buffer; mad.lo.u32 %r7, %r1, 4, %r6;
        st.shared.b32 [%r7], %r5; bar.sync 0;
        xor.b32 %r8, %r1, 33; mad.lo.u32 %r8, %r8, 4, %r6; ld.shared.b32 %r9, [%r8];
        mad.lo.u32 %r10, %r5, 64, %r1;
        ld.param.u64 %d1, [out]; mad.wide.u32 %d1, %r10, 4, %d1; st.global.b32 [%d1], %r9;
    """
    for at_once in (1, 4, 0):
        out[:] = 99
        ptx = kernel(body, [".u64 out"], 256)
        report = ptxsim.launch(ptx, "k", (3, 2), 64, 0, [out], blocks_at_once=at_once)
        assert report.blocks == 6
        np.testing.assert_array_equal(out, np.arange(6)[:, None].repeat(64, 1))


def test_local_memory_constants_and_structs():
    head = ".const .align 4 .b8 table[8] = {1, 0, 0, 0, 5, 0, 0, 0};\n"
    body = """
        .local .align 8 .b8 depot[16];
        mov.u64 %d1, depot; cvta.local.u64 %d2, %d1;
        mov.u32 %r1, %tid.x; and.b32 %r2, %r1, 3; cvt.u64.u32 %d3, %r2; shl.b64 %d3, %d3, 2;
        st.local.v2.b32 [%d1], {10, 20}; st.local.v2.b32 [%d1+8], {30, 40};
        add.s64 %d4, %d2, %d3; ld.b32 %r3, [%d4];
        mov.u64 %d5, table; ld.const.b32 %r4, [%d5+4];
        mov.b64 %d6, facts; and.b32 %r5, %r1, 1; mul.wide.u32 %d7, %r5, 4; add.s64 %d7, %d6, %d7;
        ld.param.b32 %r6, [%d7+8];
        mad.lo.u32 %r7, %r3, %r4, %r6;
        ld.param.u64 %d8, [facts]; mad.wide.u32 %d9, %r1, 4, %d8; st.global.b32 [%d9], %r7;
    """
    out = np.zeros(32, np.uint32)
    params = int(out.ctypes.data).to_bytes(8, "little") + np.array([100, 200], "u4").tobytes()
    ptx = kernel(body, [".align 8 .b8 facts[16]"], head=head)
    ptxsim.launch(ptx, "k", 1, 32, 0, params, [ptxsim.Region.of(out)])
    lane = np.arange(32)
    np.testing.assert_array_equal(
        out, np.array([10, 20, 30, 40])[lane % 4] * 5 + (lane % 2 + 1) * 100
    )


def test_bytes_are_extended_by_their_type():
    x = numbers(np.int8, 64)
    for kind, dtype in (("s8", np.int8), ("u8", np.uint8)):
        body = f"""
            mov.u32 %r1, %tid.x; ld.param.u64 %d1, [x]; cvt.u64.u32 %d2, %r1; add.s64 %d3, %d1, %d2;
            ld.global.{kind} %r2, [%d3];
            ld.param.u64 %d4, [out]; mad.wide.u32 %d4, %r1, 4, %d4; st.global.b32 [%d4], %r2;
        """
        out = np.zeros(64, np.int32)
        ptxsim.launch(kernel(body, [".u64 x", ".u64 out"]), "k", 1, 64, 0, [x, out])
        np.testing.assert_array_equal(out, x.view(dtype).astype(np.int32))
