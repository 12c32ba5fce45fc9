"""Do the interpreter's tests have teeth? Textual mutants of the kernels, which must be caught.

Every mutant is one edit of one kernel file in a copy of the package's kernels, over which the cases
run until one fails. `python tests/triton/mutants.py` runs all mutants and names the survivors.
"""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

os.environ.update(TRITON_INTERPRET="1", OPENBLAS_NUM_THREADS="1")

import pytest

HERE = Path(__file__).parent
NAME = "permattn.triton_kernels"
# Cheap cases that reach most of the code come first, so that most mutants fall at once.
FIRST = ("gqa-different-orders", "gqa-different-lists", "two-parts-one-launch", "three-parts")


PLAIN = ("probe", "promises", "kernels")
SUITES = {
    "prepare.py": ("prepare", "quantised"),
    "rounding.py": ("prepare", "quantised"),
    "quantised.py": ("quantised",),
    "block_mass.py": ("block_mass",),
    **dict.fromkeys(("regions_map.py", "regions_fwd.py", "regions_bwd.py"), ("regions",)),
    **dict.fromkeys(("regions_reverse.py", "route.py"), ("routing",)),
}
SMALL = ("quantised",)


@dataclass(frozen=True)
class Mutant:
    """`old` becomes `new` in a kernel file (first occurrence); `fast`: part of CI.

    suites: of interp_cases, in the order in which they are tried; () = those of `SUITES`.
    """

    name: str
    file: str
    old: str
    new: str
    fast: bool = False
    suites: tuple[str, ...] = ()

    def tried(self) -> tuple[str, ...]:
        return self.suites or SUITES.get(self.file, PLAIN)

    def __str__(self) -> str:
        return self.name


MUTANTS = (
    Mutant("rule-min-lag-off-by-one", "token_rule.py", "b_lag >= min_lag", "b_lag > min_lag", True),
    Mutant("rule-max-lag-off-by-one", "token_rule.py", "b_lag < max_lag", "b_lag <= max_lag", True),
    Mutant("rule-ignores-query-holes", "token_rule.py", "m_q & m_kv", "m_kv"),
    Mutant("rule-ignores-key-holes", "token_rule.py", "m_q & m_kv", "m_q"),
    Mutant(
        "seen-row-off-by-one",
        "token_rule.py",
        "q_high - b_kv_token >= min_lag",
        "q_high - b_kv_token > min_lag",
    ),
    Mutant(
        "seen-row-too-wide",
        "token_rule.py",
        "q_low - b_kv_token < max_lag",
        "q_low - b_kv_token <= max_lag",
    ),
    Mutant(
        "unseen-rows-are-read",
        "token_rule.py",
        "return tl.max(m_visible.to(tl.int32), 0) > 0",
        "return m_kv",
    ),
    Mutant("hole-is-token-0", "token_rule.py", "(b_token >= 0) & (b_token <", "(b_token <"),
    Mutant(
        "no-check-of-tokens",
        "token_rule.py",
        "(b_token >= 0) & (b_token < num_tokens)",
        "b_token >= 0",
    ),
    Mutant("full-count-unchecked", "token_rule.py", "tl.maximum(num_full, 0)", "num_full"),
    Mutant(
        "row-end-unchecked",
        "token_rule.py",
        "tl.maximum(i_end, i_begin), capacity)",
        "i_end, i_end)",
    ),
    Mutant(
        "row-end-off-by-one",
        "token_rule.py",
        "i_end - i_begin - num_full",
        "i_end - i_begin - num_full - 1",
        True,
    ),
    Mutant("row-of-next-head", "token_rule.py", "i_h * rows[1]", "(i_h + 1) * rows[1]"),
    Mutant("no-batch-rows", "token_rule.py", "i_b * rows[0] + i_h", "i_h", True),
    Mutant("block-number-unchecked", "token_rule.py", "(b_block >= 0) & (b_block", "(b_block"),
    Mutant("slot-tail-unchecked", "token_rule.py", "m_block & (o_slot < num_slots)", "m_block"),
    Mutant(
        "lane-tail-unchecked",
        "token_rule.py",
        "m_lane = o_lane < num_lanes",
        "m_lane = o_lane >= 0",
    ),
    Mutant(
        "rows-of-the-next-unit",
        "token_rule.py",
        "m_slot & (i_in_unit * TILE + tl.arange(0, TILE) < UNIT)",
        "m_slot",
    ),
    Mutant(
        "row-offset-in-32-bits",
        "token_rule.py",
        "b_token.to(tl.int64)[:, None]",
        "b_token[:, None]",
    ),
    Mutant("head-dim-unmasked", "token_rule.py", "m = m & (o_d < D)[None, :]", "m = m"),
    Mutant("pieces-dropped", "token_rule.py", "tl.sum(b_products, 0)", "tl.max(b_products, 0)"),
    Mutant("no-rescale-of-output", "fwd.py", "b_acc * b_shrink[:, None]", "b_acc", True),
    Mutant("no-rescale-of-total", "fwd.py", "b_total * b_shrink +", "b_total +"),
    Mutant("maximum-not-kept", "fwd.py", "        b_high = b_now\n", ""),
    Mutant("scores-unmasked", "fwd.py", 'tl.where(m_visible, b_score, float("-inf"))', "b_score"),
    Mutant("empty-row-is-nan", "fwd.py", 'tl.where(b_now == float("-inf"), 0.0, b_now)', "b_now"),
    Mutant("empty-row-divides-by-0", "fwd.py", "tl.where(m_empty, 1.0, b_total)", "b_total"),
    Mutant(
        "lse-in-base-2",
        "fwd.py",
        "tl.math.log2(b_divisor)) * LN2",
        "tl.math.log2(b_divisor))",
        True,
    ),
    Mutant("wrong-key-head", "fwd.py", "i_hkv = i_h // group", "i_hkv = i_h % group", True),
    Mutant(
        "full-list-read-twice",
        "fwd.py",
        "p_entry if is_full else p_entry + num_full",
        "p_entry",
    ),
    Mutant("first-part-only", "fwd.py", "tl.static_range(NUM_PARTS)", "tl.static_range(1)"),
    Mutant(
        "state-not-read",
        "fwd.py",
        "    if CARRY:\n        b_acc = load",
        "    if False:\n        b_acc = load",
    ),
    Mutant("no-delta", "bwd.py", "b_p * (b_dp - b_delta[:, None])", "b_p * b_dp", True),
    Mutant(
        "dlse-dropped", "bwd.py", "tl.sum(b_out * b_dout, 1) - b_dlse", "tl.sum(b_out * b_dout, 1)"
    ),
    Mutant("dq-not-scaled", "bwd.py", "b_dq = b_dq * scale", "b_dq = b_dq"),
    Mutant("dq-lse-in-base-e", "bwd.py", "b_lse * LOG2E", "b_lse"),
    Mutant("dq-not-added", "bwd.py", "b_dq += load_rows", "b_dq = load_rows"),
    Mutant(
        "dq-mask-dropped", "bwd.py", "tl.where(m_visible, b_p", "tl.where(m_visible | True, b_p"
    ),
    Mutant("dead-rows-not-masked", "bwd.py", 'm_token & (b_lse != float("-inf"))', "m_token"),
    Mutant("dk-not-scaled", "bwd_dkdv.py", "b_dk = b_dk * scale", "b_dk = b_dk"),
    Mutant("dk-no-delta", "bwd_dkdv.py", "b_p * (b_dp - b_delta[None, :])", "b_p * b_dp"),
    Mutant(
        "dkdv-first-head-only",
        "bwd_dkdv.py",
        "tl.range(i_head_begin, i_head_end)",
        "tl.range(i_head_begin, i_head_begin + 1)",
        True,
    ),
    Mutant(
        "dv-mask-dropped",
        "bwd_dkdv.py",
        "b_p = tl.where(m_visible, ",
        "b_p = tl.where(m_visible | True, ",
    ),
    Mutant("dkdv-not-added", "bwd_dkdv.py", "b_dv += load_rows", "b_dv = load_rows"),
    Mutant(
        "dkdv-wrong-lists", "bwd_dkdv.py", "i_first // BLOCK_KV, capacity", "0 * i_first, capacity"
    ),
    Mutant("probe-own-key-hidden", "probe.py", "b_key[None, :] <= b_pos", "b_key[None, :] < b_pos"),
    Mutant("probe-carry-dropped", "probe.py", "        b_carry = b_high\n", "", True),
    Mutant("probe-edge-dropped", "probe.py", "other=0.0) + b_edge", "other=0.0)"),
    Mutant("probe-edge-off-by-one", "probe.py", "SPLIT + o_n)", "SPLIT + o_n + 1)"),
    Mutant("probe-turned-too-far", "probe.py", "(BLOCK_N + 1 - BLOCK_M)", "(BLOCK_N - BLOCK_M)"),
    Mutant("probe-no-rescale", "probe.py", "b_sum * tl.math.exp2(b_top - b_safe) +", "b_sum +"),
    Mutant(
        "probe-splits-not-rescaled", "probe.py", "b_sums * tl.math.exp2(b_tops", "b_sums * (b_tops"
    ),
    Mutant("probe-lse-in-base-2", "probe.py", "b_sum))) * LN2", "b_sum)))"),
    Mutant(
        "probe-dead-row-is-nan", "probe.py", 'tl.where(b_lse == float("-inf"), float("inf"), ', "("
    ),
    Mutant("probe-one-order", "probe.py", "(i_b * order_rows)", "(i_b * 0)"),
    Mutant("probe-ignores-skip", "probe.py", "b_skip == 0", "b_skip >= 0"),
    Mutant("probe-divides-by-its-rows", "probe.py", "1.0 / num_all_rows", "1.0 / num_rows"),
    Mutant(
        "probe-key-tail-unmasked", "probe.py", "m_key = o_n < num_coordinates", "m_key = o_n >= 0"
    ),
    Mutant(
        "round-away-from-even", "rounding.py", "0x7FFFF + ((b_bits >> 20) & 1)", "0x80000", True
    ),
    Mutant("round-small-as-normal", "rounding.py", "tl.abs(b_x) < E4M3", "tl.abs(b_x) < 0 * E4M3"),
    Mutant("round-drops-the-sign", "rounding.py", "((b_bits >> 8) & 0x80)", "0"),
    Mutant("round-to-steps-of-2", "rounding.py", "(12582912.0)", "(25165824.0)"),
    Mutant(
        "decode-wrong-exponent", "rounding.py", "bitcast=True) * 256.0", "bitcast=True) * 128.0"
    ),
    Mutant(
        "prepare-no-mean",
        "prepare.py",
        "b_x = b_x - tl.load(p_mean +",
        "b_x = b_x - 0 * tl.load(p_mean +",
    ),
    Mutant(
        "prepare-mean-of-head-0",
        "prepare.py",
        "(i_b * num_x_heads + i_hx) * D",
        "(i_b * num_x_heads) * D",
    ),
    Mutant(
        "prepare-head-of-x",
        "prepare.py",
        "i_h // group, num_heads",
        "i_h % (num_heads // group), num_heads",
    ),
    Mutant(
        "prepare-one-order",
        "prepare.py",
        "p_token += head_row(i_b, i_h, token_rows)",
        "p_token += head_row(i_b, 0 * i_h, token_rows)",
    ),
    Mutant("prepare-holes-kept", "prepare.py", "    b_x = tl.where(m, b_x, 0.0)\n", ""),
    Mutant("prepare-nan-hidden", "prepare.py", "tl.where(m_bad > 0,", "tl.where(m_bad > 1,"),
    Mutant(
        "prepare-zero-group", "prepare.py", "m_zero = b_high < LEAST", "m_zero = b_high < 0 * LEAST"
    ),
    Mutant(
        "prepare-ieee-reciprocal",
        "prepare.py",
        "tl.math.div_rn(1.0, b_safe) * HIGH",
        "tl.math.div_rn(HIGH, b_safe)",
    ),
    Mutant(
        "prepare-truncates",
        "prepare.py",
        "b_value = round_to_integer(b_value)",
        "b_value = b_value",
    ),
    Mutant(
        "prepare-scale-of-group-0",
        "prepare.py",
        "p_scale + o_groups * D",
        "p_scale + (o_groups - o_group) * D",
    ),
    Mutant(
        "prepare-tile-of-rows",
        "prepare.py",
        "(o_groups * D + o_d) * ROWS + o_row",
        "(o_groups * ROWS + o_row) * D + o_d",
    ),
    Mutant(
        "prepare-no-offset",
        "prepare.py",
        "P_OFFSET = tl.constexpr(128)",
        "P_OFFSET = tl.constexpr(127)",
        True,
    ),
    Mutant("prepare-dots-dropped", "prepare.py", "b_x * b_against, 2", "b_x * 0, 2"),
    Mutant(
        "prepare-rope-start",
        "prepare.py",
        "o_angle = (b_token - rope_start)",
        "o_angle = (b_token)",
    ),
    Mutant("prepare-rope-past-end", "prepare.py", "m_rotated & (o_d < 2 * PAIRS)", "m_rotated"),
    Mutant(
        "prepare-rope-sign",
        "prepare.py",
        "tl.where(m_first, -b_z, b_z)",
        "tl.where(m_first, b_z, -b_z)",
    ),
    Mutant(
        "prepare-partner-unweighted",
        "prepare.py",
        "p_bias, o_partner, m_partner",
        "p_bias, o_d, m_partner",
    ),
    Mutant("prepare-layer-uncentred", "prepare.py", "tl.where(m_d, b_x - b_mean, 0.0)", "b_x"),
    Mutant("prepare-across-one-head", "prepare.py", "        p_x += x_strides[1]\n", ""),
    Mutant(
        "prepare-weight-of-head-0", "prepare.py", "p_weight += i_hx * D", "p_weight += 0 * i_hx"
    ),
    Mutant(
        "small-scale-of-next-group", "quantised.py", "o_slot // KV_ROWS", "(o_slot + 1) // KV_ROWS"
    ),
    Mutant(
        "small-q-unscaled",
        "quantised.py",
        "b_q_factor[:, None] *",
        "(0 * b_q_factor[:, None] + 0.01) *",
    ),
    Mutant("small-group-unclamped", "quantised.py", "m_block & (i_group < num_groups)", "m_block"),
    Mutant("small-group-0", "quantised.py", "+ i_lane % BLOCK // ROWS", ""),
    Mutant(
        "small-p-of-255-as-127",
        "quantised.py",
        "255.0 if PV",
        "127.0 if PV",
    ),
    Mutant(
        "small-p-of-15-as-7",
        "quantised.py",
        "15.0 if PV",
        "7.0 if PV",
    ),
    Mutant(
        "small-p-of-448-as-256",
        "quantised.py",
        "else 448.0",
        "else 256.0",
    ),
    Mutant("small-offset-unread", "quantised.py", "b_offset[None, :]", "0 * b_offset[None, :]"),
    Mutant(
        "small-sum-unrounded",
        "quantised.py",
        "tl.sum(b_p - SIGNED_STEPS, 1)",
        "tl.sum(tl.math.exp2(b_score - b_top[:, None]), 1) * P_HIGH",
    ),
    Mutant(
        "small-weight-of-1",
        "quantised.py",
        "tl.math.exp2(b_top - b_safe) *",
        "tl.math.exp2(b_top - b_top) *",
        True,
    ),
    Mutant(
        "small-v-unscaled",
        "quantised.py",
        "* b_v_scale[None, :]",
        "* (0 * b_v_scale[None, :] + 0.01)",
    ),
    Mutant("small-dv-unmasked", "quantised.py", "m_tile & (o_d < DV)", "m_tile & (o_d >= 0)"),
    Mutant(
        "small-kv-head",
        "fwd.py",
        "(num_q_heads // group) + i_h // group",
        "(num_q_heads // group) + i_h % group",
        suites=SMALL,
    ),
    Mutant(
        "small-q-group", "fwd.py", "o_q_slot // Q_ROWS", "o_q_slot // (2 * Q_ROWS)", suites=SMALL
    ),
    Mutant("small-q-by-token", "fwd.py", "b_q_row = o_q_slot", "b_q_row = b_q_token", suites=SMALL),
    Mutant(
        "small-k-by-token",
        "fwd.py",
        "load_rows(p_k, o_slot, m_kv",
        "load_rows(p_k, b_kv_token, m_kv",
        suites=SMALL,
    ),
    Mutant(
        "small-values-not-rescaled",
        "fwd.py",
        "b_shrink[:, None] + b_value",
        "1.0 + b_value",
        suites=SMALL,
    ),
    Mutant("mass-lse-in-base-e", "block_mass.py", "b_lse * LOG2E", "b_lse"),
    Mutant("mass-dead-rows", "block_mass.py", 'm_q & (b_lse != float("-inf"))', "m_q"),
    Mutant("mass-other-blocks-rows", "block_mass.py", "(o_inside < BLOCK) & ", ""),
    Mutant("mass-pairs-with-holes", "block_mass.py", "(m_pair & (b_p < eps))", "(b_p < eps)"),
    Mutant(
        "mass-splits-overlap",
        "block_mass.py",
        "num_q_blocks % num_splits",
        "num_q_blocks % 1",
        True,
    ),
    Mutant("mass-range-unchecked", "block_mass.py", "tl.where(m_block, i_block, -1)", "i_block"),
    Mutant("mass-kv-head", "block_mass.py", "i_h // group, k_strides", "i_h % 2, k_strides"),
    Mutant("region-of-next-column", "regions_map.py", "o_cell % BOX[2]", "o_cell % BOX[1]"),
    Mutant(
        "region-row-hangs-over", "regions_map.py", "(b_y < size[1]) & (b_x", "(b_y >= 0) & (b_x"
    ),
    Mutant("region-column-hangs-over", "regions_map.py", "(b_x < size[2])", "(b_x >= 0)"),
    Mutant("region-frame-hangs-over", "regions_map.py", "(b_t < size[0]) &", "(b_t >= 0) &"),
    Mutant("region-last-box-uncounted", "regions_map.py", "(size[2] + BOX[2] - 1)", "size[2]"),
    Mutant("region-cells-in-32-bits", "regions_map.py", "cell[2].to(tl.int64)", "cell[2]"),
    Mutant("region-channels-in-32-bits", "regions_map.py", "o_d.to(tl.int64)[None", "o_d[None"),
    Mutant(
        "region-number-unchecked", "regions_map.py", "(b_number < num_named)", "(b_number >= 0)"
    ),
    Mutant(
        *(
            "region-number-below-unchecked",
            "regions_map.py",
            "(b_number >= 0) &",
            "(b_number < 9) &",
        )
    ),
    Mutant("region-lane-tail", "regions_map.py", "o_lane < num_lanes", "o_lane >= 0"),
    Mutant(
        "region-place-tail", "regions_map.py", "m_lane = o_cell < CELLS", "m_lane = o_cell >= 0"
    ),
    Mutant("region-graph-of-next-head", "regions_map.py", "i_h * rows[1]", "(i_h + 1) * rows[1]"),
    Mutant(
        "region-keys-outside-are-read",
        "regions_fwd.py",
        "m_kv = m_named & m_held",
        "m_kv = m_named",
    ),
    Mutant(
        *("region-padding-never-counts", "regions_fwd.py"),
        *("m_named if COUNT_PADDING else m_kv", "m_kv if COUNT_PADDING else m_kv"),
    ),
    Mutant(
        *("region-no-rescale", "regions_fwd.py"),
        *("b_acc * b_shrink[:, None]", "b_acc", True),
    ),
    Mutant("region-cells-past-the-box", "regions_fwd.py", "& (o_cell < CELLS)", "& (o_cell >= 0)"),
    Mutant(
        *("region-score-unweighted", "regions_fwd.py"),
        *("b_score = b_score * b_weight[None, :]", "b_score = b_score"),
    ),
    Mutant(
        "region-value-unweighted", "regions_fwd.py", "b_p = b_p * b_weight[None, :]", "b_p = b_p"
    ),
    Mutant("region-head-order", "regions_fwd.py", "// NUM_TILES % num_heads", "% num_heads"),
    Mutant(
        "region-delta-without-dlse",
        "regions_bwd.py",
        "b_delta -= tl.load",
        "b_delta -= 0 * tl.load",
    ),
    Mutant("region-dq-unscaled", "regions_bwd.py", "b_dq * scale, D", "b_dq, D", True),
    Mutant("region-dk-unscaled", "regions_bwd.py", "b_dk * scale, D", "b_dk, D", True),
    Mutant(
        "region-dead-queries-are-read",
        "regions_bwd.py",
        '& (b_lse != float("-inf"))',
        "& (b_lse < 1e30)",
    ),
    Mutant(
        *("region-weight-sums-run-on", "regions_bwd.py"),
        *("tl.where(i_lane % SPAN == 0, 0.0, b_sum)", "b_sum"),
    ),
    Mutant(
        *("region-weight-sums-without-values", "regions_bwd.py"),
        *("b_ds * b_dot * scale + b_p * b_dp", "b_ds * b_dot * scale"),
    ),
    Mutant("region-of-entry", "regions_bwd.py", "b_entry // topk", "b_entry % num_q_regions"),
    Mutant("region-list-of-batch", "regions_bwd.py", "i_b * graph_rows[0] + i_h", "i_h"),
    Mutant("region-reverse-rank", "regions_reverse.py", "b_rank - 1", "b_rank - 2"),
    Mutant("region-reverse-range", "regions_reverse.py", "(b_region >= 0) &", "(b_region >= -1) &"),
    Mutant(
        "region-reverse-tail",
        "regions_reverse.py",
        "tl.where(m_place, b_region, num_regions + 1)",
        "b_region",
    ),
    Mutant("route-mean-of-the-box", "route.py", "tl.sum(b_held, 0).to(tl.float32)", "CELLS"),
    Mutant("route-ties-go-up", "route.py", "(0x7FFFFFFF - b_column)", "b_column", True),
    Mutant(
        "route-signs",
        "route.py",
        "b_bits ^ 0x7FFFFFFF, b_bits)\n    return (b_bits.to",
        "b_bits, b_bits)\n    return (b_bits.to",
    ),
    Mutant("route-negative-zero", "route.py", "b_x + 0.0", "b_x"),
    Mutant(
        "route-columns-that-are-not", "route.py", "tl.where(m_column[None, :], b_key, LOW)", "b_key"
    ),
)


def run_cases(kernels: Path, names: tuple[str, ...]) -> None:
    """In a process of its own: suites over the kernels of a folder; pytest's exit status."""
    spec = importlib.util.spec_from_file_location(
        NAME, kernels / "__init__.py", submodule_search_locations=[str(kernels)]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[NAME] = module
    spec.loader.exec_module(module)
    suites = [str(HERE / "interp_cases" / f"test_{x}.py") for x in names]
    first = []
    if "kernels" in names:
        test = (
            f"{HERE}/interp_cases/test_kernels.py::test_forward_and_gradients_are_within_the_bound"
        )
        first = [f"{test}[{x}]" for x in FIRST]
    options = ["-x", "-q", "--tb=no", "--no-header", "-p", "no:cacheprovider", "--disable-warnings"]
    with open(kernels / "log.txt", "w") as log:
        os.dup2(log.fileno(), 1)
        status = (first and pytest.main([*options, *first])) or pytest.main([*options, *suites])
        sys.stdout.flush()
    os._exit(int(status))


def is_caught(mutant: Mutant | None) -> tuple[bool, str]:
    """Whether a case fails on a mutant (None: on the kernels as they are), and which one."""
    spec = importlib.util.find_spec(NAME)
    assert spec is not None and spec.origin is not None
    with tempfile.TemporaryDirectory() as folder:
        kernels = Path(folder) / "kernels"
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(Path(spec.origin).parent, kernels, ignore=ignored)
        if mutant is not None:
            path = kernels / mutant.file
            source = path.read_text(encoding="utf-8")
            if mutant.old not in source:
                raise ValueError(f"mutant {mutant}: its text is no longer in {mutant.file}")
            path.write_text(source.replace(mutant.old, mutant.new, 1), encoding="utf-8")
        # A fork has torch and triton loaded already, but no kernel yet.
        names = (*PLAIN, *dict.fromkeys(x for y in SUITES.values() for x in y))
        names = names if mutant is None else mutant.tried()
        fork = multiprocessing.get_context("fork")
        process = fork.Process(target=run_cases, args=(kernels, names))
        process.start()
        process.join()
        log = (kernels / "log.txt").read_text(encoding="utf-8")
    failed = re.findall(r"^(?:FAILED|ERROR) (.*)", log, re.M)
    return process.exitcode != 0, failed[0] if failed else log.strip()[-80:]


def main() -> int:
    """Prints every mutant and the case that caught it; fails if one survives."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--only", default="", help="regular expression on the names")
    parser.add_argument("--fast", action="store_true", help="only the mutants that CI runs")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    sys.path.insert(0, str(HERE))
    import interpreter  # noqa: F401
    import kernel_cases  # noqa: F401
    import probe_cases  # noqa: F401
    import quantised_cases  # noqa: F401
    import region_cases  # noqa: F401

    chosen: list[Mutant | None] = [m for m in MUTANTS if m.fast or not args.fast]
    if not args.fast:
        chosen.insert(0, None)
    chosen = [m for m in chosen if re.search(args.only, str(m))]
    wrong = 0
    with ThreadPoolExecutor(args.jobs) as pool:
        for mutant, (caught, words) in zip(chosen, pool.map(is_caught, chosen), strict=True):
            bad = caught == (mutant is None)
            wrong += bad
            print(f"{'WRONG ' if bad else ''}{mutant or 'no mutant'}: {words}", flush=True)
    print(f"{len(chosen)} runs, {wrong} wrong")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
