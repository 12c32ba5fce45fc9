"""The static estimate of the kernels for sm_90a: against what was compiled, and by hand."""

from __future__ import annotations

import re

import machine_code_table
import main_loop
import pytest
import sm90_estimate
from marked_pages import replaced

ROWS = [row for row in machine_code_table.read_table()[1].values() if row["loop"]]
HALVES = 2
NAME = re.compile(r"<(\w+), (\w+), (\w+), (\d+), (\d+)>")
SHAPE = re.compile(r"\w+\.(\d+)x(\d+)x(\d+)")


def cycles_of(shim, row, tiles=1):
    _, qk, pv, dim, keys = NAME.search(row["kernel"]).groups()
    formats = getattr(shim.Format, qk), getattr(shim.Format, pv)
    return shim.sm90_step_cycles(*formats, int(dim), int(keys), tiles, row["loop"])


@pytest.mark.parametrize("row", ROWS, ids=lambda row: NAME.search(row["kernel"])[0].strip("<>"))
def test_products_are_those_of_the_compiled_instructions(shim, row):
    """The code has every product twice: in the loop, and before or behind it."""
    total = 0
    for name, count in row["matrix"].items():
        m, n, k = map(int, SHAPE.match(name).groups())
        rate = 2048 if name.startswith("HGMMA") else 4096
        assert count * m * n * k % (2 * rate) == 0
        total += count * m * n * k // (2 * rate)
    assert cycles_of(shim, row)["products"] == HALVES * total


@pytest.mark.parametrize("row", ROWS, ids=lambda row: NAME.search(row["kernel"])[0].strip("<>"))
def test_the_way_round_the_loop_has_an_exponential_a_score(row):
    """And per row one or two more: what the sums shrink by, and the weight of a quantised P."""
    _, _, pv, _, keys = NAME.search(row["kernel"]).groups()
    special = sum(span[main_loop.PIPES.index("special")] for span in row["loop"])
    assert special == int(keys) // 2 + (2 if pv == "none" else 4)


def test_one_step_by_hand(shim):
    """bfloat16, 128 columns, tiles of 128 keys, both halves the same."""
    loop = [[84, 4, 4, 0], [17, 0, 5, 0], [399, 168, 148, 66]]
    none = shim.Format.none
    found = shim.sm90_step_cycles(none, none, 128, 128, 1, loop)
    tile = 128 * 128 * 2
    product = 64 * 128 * 128 // 2048
    assert found["products"] == 2 * 2 * product == 2048
    # Q is read again for every tile.
    assert found["shared"] == (2 * (2 * tile + 64 * 128 * 2) + 2 * tile) // 128
    assert found["l2"] == 2 * tile // 29
    # Two warps a quarter; 66 exponentials at 8 cycles are more than 500 issues.
    assert found["instructions"] == 2 * 66 * 8
    assert found["alone"] == product + product + 66 * 8
    assert found["bound"] == found["l2"]
    apart = shim.sm90_step_cycles(none, none, 128, 128, 2, loop)
    assert apart["l2"] == 4 * tile // 29
    assert apart["shared"] - found["shared"] == 2 * tile // 128


def test_instructions_between_the_waits_cost_nothing_beside_a_longer_product(shim):
    none = shim.Format.none
    after = [[0, 0, 0, 0], [0, 0, 0, 0], [100, 0, 0, 64]]
    beside = [[0, 0, 0, 0], [100, 0, 0, 64], [0, 0, 0, 0]]
    late, early = (shim.sm90_step_cycles(none, none, 128, 128, 1, x) for x in (after, beside))
    assert late["alone"] - early["alone"] == 64 * 8
    assert late["instructions"] == early["instructions"] == 2 * 64 * 8


def test_a_shape_without_a_kernel_is_refused(shim):
    fp8 = shim.Format.fp8
    with pytest.raises(ValueError, match="no kernel"):
        shim.sm90_step_cycles(shim.Format.int8, fp8, 256, 64, 1, [[0] * 4] * 3)


def test_the_page_has_the_tables_numbers(shim):
    page = (machine_code_table.ROOT / sm90_estimate.PAGE).read_text(encoding="utf-8")
    assert page == replaced(page, sm90_estimate.MARK, sm90_estimate.block(shim, ROWS))


# The loop in a disassembly

LISTING = """
.L_x_1:
        /*0000*/                   FMUL R1, R1, R2 ;
.L_x_2:
        /*0010*/                   HGMMA.64x64x16.F32 R24, gdesc[UR8], R24 ;
        /*0020*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
        /*0030*/              @!P0 BRA `(.L_x_3) ;
        /*0040*/                   ISETP.GE.AND P1, PT, R1, R2, PT ;
        /*0050*/                   FSEL R3, R3, -INF , P1 ;
.L_x_3:
        /*0060*/                   MUFU.EX2 R3, R3 ;
        /*0070*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0080*/                   FFMA R3, R3, R4, R5 ;
        /*0090*/               @P0 BRA `(.L_x_2) ;
        /*00a0*/               @P1 BRA `(.L_x_1) ;
        /*00b0*/                   EXIT ;
"""


def test_the_shortest_way_round_the_innermost_loop():
    spans = main_loop.spans_of_listing(LISTING.splitlines())
    # Without the two instructions that a branch goes over, nor those of the outer loop.
    assert spans == [[2, 0, 0, 0], [3, 0, 0, 1], [2, 1, 0, 0]]


def test_a_branch_that_is_always_taken_is_the_only_way():
    listing = LISTING.replace("@!P0 BRA `(.L_x_3)", "BRA `(.L_x_3)")
    assert main_loop.spans_of_listing(listing.splitlines())[1] == [3, 0, 0, 1]
    # Where nothing branches over them they are on the way.
    listing = LISTING.replace("@!P0 BRA `(.L_x_3)", "NOP")
    assert main_loop.spans_of_listing(listing.splitlines())[1] == [5, 0, 2, 1]


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ("FFMA", "NEWOP", "whose pipe is known, got NEWOP"),
        ("0x1 ;", "0x2 ;", "wants one wait that leaves a product under way, got 0"),
        ("gsb0, 0x0", "gsb0, 0x3", "wants two waits for products, got 1"),
        ("@P0 BRA `(.L_x_2)", "NOP", "wants two waits|none is round"),
    ],
    ids=["opcode", "no-first-wait", "no-last-wait", "no-inner-loop"],
)
def test_what_is_not_understood_is_an_error(old, new, why):
    listing = LISTING.replace(old, new)
    if "none is round" in why:
        listing = listing.replace("@P1 BRA `(.L_x_1)", "NOP")
    with pytest.raises(ValueError, match=why):
        main_loop.spans_of_listing(listing.splitlines())
