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


@dataclass(frozen=True)
class Mutant:
    """`old` becomes `new` in a kernel file (first occurrence); `fast`: part of CI."""

    name: str
    file: str
    old: str
    new: str
    fast: bool = False

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
)


def run_cases(kernels: Path) -> None:
    """In a process of its own: the cases over the kernels of a folder; pytest's exit status."""
    spec = importlib.util.spec_from_file_location(
        NAME, kernels / "__init__.py", submodule_search_locations=[str(kernels)]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[NAME] = module
    spec.loader.exec_module(module)
    suites = ("kernels", "promises", "probe")
    cases, promises, probe = (str(HERE / "interp_cases" / f"test_{x}.py") for x in suites)
    first = [f"{cases}::test_forward_and_gradients_are_within_the_bound[{x}]" for x in FIRST]
    options = ["-x", "-q", "--tb=no", "--no-header", "-p", "no:cacheprovider", "-p", "no:warnings"]
    with open(kernels / "log.txt", "w") as log:
        os.dup2(log.fileno(), 1)
        status = pytest.main([*options, *first]) or pytest.main([*options, probe, promises, cases])
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
        process = multiprocessing.get_context("fork").Process(target=run_cases, args=(kernels,))
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
