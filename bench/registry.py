"""The cases, as data: shapes, plans, contenders, and the ratios that are wanted of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from permattn import HeadPattern
from permattn.core.quant import PRECISIONS

from bench.planners import (
    AUTO,
    GRID,
    GRID_5,
    GRID_TABLE_4,
    LINES_8,
    FlexPrefill,
    Planner,
    Prefill,
    Static,
    XAttention,
)
from bench.plans import Dense, Paro, PlanBuilder, RandomBlocks, TwoParts

Dtype = Literal["bf16", "fp32", "fp16"]


@dataclass(frozen=True)
class Shape:
    """[B, Hq | Hkv, S, D] of one case."""

    dtype: Dtype
    head_dim: int
    num_tokens: int = 8192
    batch: int = 1
    num_q_heads: int = 8
    num_kv_heads: int = 8

    def __str__(self) -> str:
        heads = f"{self.num_q_heads}"
        if self.num_kv_heads != self.num_q_heads:
            heads += f"/{self.num_kv_heads}"
        return f"B={self.batch} H={heads} N={self.num_tokens} D={self.head_dim} {self.dtype}"


@dataclass(frozen=True)
class Run:
    """One contender of a case.

    Args:
        name: as it appears in goals and results.
        kind: "sdpa" and "flex" are baselines; "ours" is `sparse_attention` with a plan; "kernel"
            is the backend's forward alone; "probe" is one probe of the last 64 queries; "prepare"
            permutes and quantises q, k and v and does not attend; "plan" builds a planner's plan,
            "attend" attends with one built before, "planned" does both.
        plan: what ours and flex compute.
        planner: of plan, attend and planned.
        causal: of sdpa.
        threads: None = those of the whole run.
    """

    name: str
    kind: Literal["sdpa", "flex", "ours", "kernel", "probe", "prepare", "plan", "attend", "planned"]
    plan: PlanBuilder | None = None
    planner: Planner | None = None
    causal: bool = False
    threads: int | None = None


@dataclass(frozen=True)
class Goal:
    """A ratio of two contenders' times, slow / fast, and what is wanted of it.

    Args:
        name: the row of the printed table.
        slow, fast: names of runs.
        target: None = shown without a verdict.
        at_most: the ratio should stay below the target, not reach it.
        per_pair: divide both times by the (query, key) pairs that they compute.
        own, own_target: the run that lists every block with our own kernel, and what is wanted of
            its time over `fast`'s: the part of a gain that is sparsity, not a better dense kernel.
    """

    name: str
    slow: str
    fast: str
    target: float | None = None
    at_most: bool = False
    per_pair: bool = False
    own: str | None = None
    own_target: float | None = None

    def is_met(self, value: float) -> bool | None:
        if self.target is None:
            return None
        return value <= self.target if self.at_most else value >= self.target


@dataclass(frozen=True)
class Case:
    """One set of inputs, the contenders that see it, and the goals read off their times.

    Args:
        inputs: "video" adds to q and k what a grid plan is there to find: tokens at one place of
            the frame attend to that place in earlier frames, and all to one place. "heads" are
            those of `bench.heads`, each of another kind; what a plan keeps of their attention is
            measured as well. "local" are those of `bench.local_heads`, for bidirectional plans.
        quick: part of the smoke run.
        rounds: samples of every contender at most, where one of them takes long; None = as asked.
    """

    name: str
    group: Literal[
        "speed",
        "structure",
        "planning",
        "prefill",
        "length",
        "planners",
        "paro",
        "threads",
        "size",
    ]
    title: str
    shape: Shape
    runs: tuple[Run, ...]
    goals: tuple[Goal, ...]
    probe: Literal["time", "memory"] = "time"
    inputs: Literal["normal", "video", "heads", "local"] = "normal"
    quick: bool = False
    rounds: int | None = None

    def small(self) -> Case:
        """The same case at a size that any backend runs quickly, without compiled baselines."""
        shape = replace(self.shape, num_tokens=min(self.shape.num_tokens, 512))
        # Targets are stated for full sizes, so a small run shows its ratios without a verdict.
        goals = tuple(replace(g, target=None, own_target=None) for g in self.goals)
        return replace(self, shape=shape, goals=goals).without_flex()

    def without_flex(self) -> Case:
        runs = tuple(r for r in self.runs if r.kind != "flex")
        names = {r.name for r in runs}
        goals = tuple(g for g in self.goals if {g.slow, g.fast} <= names)
        return replace(self, runs=runs, goals=goals)


# Wanted of the native kernels against SDPA in the same dtype: 100, 50, 25, 10 %, causal 25 %.
TARGETS: dict[tuple[Dtype, int], tuple[float, float, float, float, float]] = {
    ("bf16", 64): (1.9, 3.7, 7.0, 15.0, 7.0),
    ("bf16", 128): (1.55, 3.0, 5.5, 11.0, 5.0),
    ("fp32", 64): (0.9, 1.8, 3.3, 7.5, 3.4),
    ("fp32", 128): (0.85, 1.6, 3.0, 6.5, 3.0),
}
DENSITIES = (1.0, 0.5, 0.25, 0.1)
# Where FlexAttention is compiled too (about ten seconds a shape).
WITH_FLEX = {("bf16", 64), ("bf16", 128)}


def percent(density: float) -> str:
    return f"{density:.0%}"


def speed_case(dtype: Dtype, head_dim: int) -> Case:
    """One dtype and head dimension at all densities, beside SDPA and beside our own dense list."""
    dense, half, quarter, tenth, causal_quarter = TARGETS[dtype, head_dim]
    runs = [Run("sdpa", "sdpa"), Run("sdpa-causal", "sdpa", causal=True)]
    runs += [Run(percent(d), "ours", Dense() if d == 1.0 else RandomBlocks(d)) for d in DENSITIES]
    runs += [
        Run("causal-dense", "ours", Dense(causal=True)),
        Run("causal-25%", "ours", RandomBlocks(0.25, causal=True)),
    ]
    goals = [
        Goal("100 % vs SDPA", "sdpa", "100%", dense),
        Goal("50 % vs SDPA", "sdpa", "50%", half, own="100%"),
        Goal("25 % vs SDPA", "sdpa", "25%", quarter, own="100%", own_target=3.3),
        Goal("10 % vs SDPA", "sdpa", "10%", tenth, own="100%", own_target=6.5),
        Goal("causal dense vs causal SDPA", "sdpa-causal", "causal-dense"),
        Goal(
            "causal 25 % vs causal SDPA",
            "sdpa-causal",
            "causal-25%",
            causal_quarter,
            own="causal-dense",
        ),
        Goal("half the blocks, 100 to 50 %", "100%", "50%", 1.7),
        Goal("half the blocks, 50 to 25 %", "50%", "25%", 1.7),
    ]
    if (dtype, head_dim) in WITH_FLEX:
        runs.append(Run("flex-25%", "flex", RandomBlocks(0.25)))
        goals += [
            Goal("FlexAttention 25 % vs SDPA", "sdpa", "flex-25%"),
            Goal("25 % vs FlexAttention, same blocks", "flex-25%", "25%"),
        ]
    return Case(
        name=f"{dtype}-d{head_dim}",
        group="speed",
        title=f"{dtype}, D = {head_dim}, blocks of 128",
        shape=Shape(dtype, head_dim),
        quick=(dtype, head_dim) == ("bf16", 64),
        runs=tuple(runs),
        goals=tuple(goals),
    )


def structure_case(head_dim: int) -> Case:
    """What a plan's structure costs at one density: smaller blocks, permutation, parts, a band."""
    quarter = RandomBlocks(0.25, causal=True)
    return Case(
        name=f"structure-d{head_dim}",
        group="structure",
        title=f"bf16, D = {head_dim}, causal, 25 % of the blocks in other shapes",
        shape=Shape("bf16", head_dim),
        quick=head_dim == 64,
        runs=(
            Run("sdpa-causal", "sdpa", causal=True),
            Run("one-part", "ours", quarter),
            Run("two-parts", "ours", TwoParts(0.25)),
            Run("block-64", "ours", RandomBlocks(0.25, causal=True, block_q=64, block_kv=64)),
            Run("kv-16", "ours", RandomBlocks(0.25, causal=True, block_kv=16)),
        ),
        goals=(
            Goal(
                "two permuted parts with a band, per pair",
                "one-part",
                "two-parts",
                0.85,
                per_pair=True,
            ),
            Goal("blocks of 64, per pair", "one-part", "block-64", 0.85, per_pair=True),
            Goal("key granules of 16, per pair", "one-part", "kv-16", per_pair=True),
            Goal("two permuted parts vs causal SDPA", "sdpa-causal", "two-parts"),
            Goal("blocks of 64 vs causal SDPA", "sdpa-causal", "block-64"),
            Goal("key granules of 16 vs causal SDPA", "sdpa-causal", "kv-16"),
        ),
    )


GQA = Case(
    name="gqa",
    quick=True,
    group="structure",
    title="bf16, D = 128, 8 query heads on 2 key heads, a list for every query head",
    shape=Shape("bf16", 128, num_kv_heads=2),
    runs=(
        Run("sdpa-causal", "sdpa", causal=True),
        Run("causal-dense", "ours", Dense(causal=True)),
        Run("causal-25%", "ours", RandomBlocks(0.25, causal=True)),
    ),
    goals=(
        Goal("causal 25 % vs causal SDPA", "sdpa-causal", "causal-25%", 5.0, own="causal-dense"),
    ),
)

PLANNING = Case(
    name="planning-16k",
    group="planning",
    title="bf16, D = 64, a grid plan found online for a video of 16k tokens",
    shape=Shape("bf16", 64, num_tokens=16384),
    inputs="video",
    quick=True,
    runs=(
        Run("sdpa-causal", "sdpa", causal=True),
        Run("causal-dense", "ours", Dense(causal=True)),
        Run("plan", "plan", planner=GRID),
        Run("plan-and-attend", "planned", planner=GRID),
    ),
    goals=(
        Goal("planning as a share of causal SDPA", "plan", "sdpa-causal", 0.05, at_most=True),
        Goal("planning as a share of our causal dense list", "plan", "causal-dense", at_most=True),
        Goal(
            "planning and attention vs causal SDPA",
            "sdpa-causal",
            "plan-and-attend",
            5.0,
            own="causal-dense",
        ),
    ),
)


def prefill_case(name: str, title: str, planner: Planner, head_dim: int, target: float) -> Case:
    """A planner at 32k tokens beside SDPA, plan building included, itemised.

    SDPA takes up to a minute a call here, so three rounds have to do.
    """
    return Case(
        name=f"{name}-32k-d{head_dim}",
        group="prefill",
        title=f"bf16, D = {head_dim}, {title}",
        shape=Shape("bf16", head_dim, num_tokens=32768),
        inputs="video",
        rounds=3,
        runs=(
            Run("sdpa-causal", "sdpa", causal=True),
            Run("causal-dense", "ours", Dense(causal=True)),
            Run("probe", "probe"),
            Run("plan", "plan", planner=planner),
            Run("attend", "attend", planner=planner),
            Run("plan-and-attend", "planned", planner=planner),
        ),
        goals=(
            Goal(
                "planning and attention vs causal SDPA",
                "sdpa-causal",
                "plan-and-attend",
                target,
                own="causal-dense",
            ),
            Goal("planning as a share of its sparse attention", "plan", "attend", at_most=True),
            Goal("the probe as a share of planning", "probe", "plan", at_most=True),
        ),
    )


LONG = Case(
    name="grid-128k",
    group="prefill",
    title="bf16, D = 128, a grid of the paper's sizes found online, a video of 128k tokens",
    shape=Shape("bf16", 128, num_tokens=131072),
    inputs="video",
    rounds=5,
    runs=(
        Run("probe", "probe"),
        Run("plan", "plan", planner=GRID_TABLE_4),
        Run("attend", "attend", planner=GRID_TABLE_4),
        Run("plan-and-attend", "planned", planner=GRID_TABLE_4),
        Run("plan, our defaults", "plan", planner=GRID),
        Run("attend, our defaults", "attend", planner=GRID),
    ),
    goals=(
        Goal("planning as a share of its sparse attention", "plan", "attend", 0.05, at_most=True),
        Goal("the probe as a share of planning", "probe", "plan", at_most=True),
        Goal(
            "the same with our defaults (half the window)",
            "plan, our defaults",
            "attend, our defaults",
            at_most=True,
        ),
    ),
)


def length_case(num_tokens: int) -> Case:
    """Where sparse begins to pay: a grid plan found online, every default, beside SDPA."""
    lost = num_tokens >= 4096
    return Case(
        name=f"length-{num_tokens // 1024}k",
        group="length",
        title=f"bf16, D = 128, a grid plan found online for {num_tokens // 1024}k tokens",
        shape=Shape("bf16", 128, num_tokens=num_tokens),
        inputs="video",
        runs=(
            Run("sdpa-causal", "sdpa", causal=True),
            Run("causal-dense", "ours", Dense(causal=True)),
            Run("plan-and-attend", "planned", planner=GRID),
        ),
        goals=(
            Goal(
                "planning and attention vs causal SDPA",
                "sdpa-causal",
                "plan-and-attend",
                1.0 if lost else None,
                own="causal-dense",
            ),
        ),
    )


PLANNERS: dict[str, Planner] = {
    "mminference": AUTO,
    "flexprefill": FlexPrefill(),
    "xattention": XAttention(),
    "vertical-slash": Prefill((HeadPattern("vertical_slash", local=256),)),
    "tri-shape": Static(last=128),
    "a-shape": Static(),
}

COMPARED = Case(
    name="planners-32k",
    group="planners",
    title="bf16, D = 128, heads of eight kinds, every planner on the same kernel",
    shape=Shape("bf16", 128, num_tokens=32768),
    inputs="heads",
    quick=True,
    rounds=3,
    runs=(
        Run("causal-dense", "ours", Dense(causal=True)),
        *(Run(f"{name}-plan", "plan", planner=planner) for name, planner in PLANNERS.items()),
        *(Run(name, "planned", planner=planner) for name, planner in PLANNERS.items()),
    ),
    goals=tuple(Goal(f"{n} vs our causal dense list", "causal-dense", n) for n in PLANNERS),
)


def paro_case(head_dim: int, target: float) -> Case:
    """Reordered heads of a video at several densities and in several formats, beside dense SDPA."""
    quantised = [Run(f"30 % {name}", "ours", Paro(0.3, name)) for name in PRECISIONS]
    return Case(
        name=f"paro-16k-d{head_dim}",
        group="paro",
        title=f"bf16, D = {head_dim}, a video of 16 x 32 x 32 tokens, an order for every head",
        shape=Shape("bf16", head_dim, num_tokens=16384),
        inputs="local",
        quick=head_dim == 64,
        rounds=5,
        runs=(
            Run("sdpa", "sdpa"),
            Run("dense", "ours", Dense(block_q=64, block_kv=64)),
            *(Run(f"{d:.0%}", "ours", Paro(d)) for d in (0.5, 0.3, 0.2)),
            Run("prepare", "prepare", Paro(0.3, "int8+int8")),
            *quantised,
        ),
        goals=(
            Goal("50 % bf16 vs SDPA", "sdpa", "50%", own="dense"),
            Goal("30 % bf16 vs SDPA", "sdpa", "30%", target, own="dense"),
            Goal("20 % bf16 vs SDPA", "sdpa", "20%", own="dense"),
            Goal(
                "permute and quantise as a share of int8+int8 attention",
                "prepare",
                "30 % int8+int8",
                0.06,
                at_most=True,
            ),
            *(
                Goal(
                    f"{run.name} vs 30 % bf16",
                    "30%",
                    run.name,
                    0.85 if run.name.endswith(("int8", "int8+int8")) else None,
                )
                for run in quantised
            ),
        ),
    )


SCALING = Case(
    name="scaling-16k",
    group="size",
    title="bf16, D = 64, 16k tokens, the density halved again and again",
    shape=Shape("bf16", 64, num_tokens=16384),
    runs=tuple(
        Run(f"{d:.4g}", "ours", RandomBlocks(d)) for d in (0.5, 0.25, 0.125, 0.0625, 0.03125)
    ),
    goals=(
        Goal("50 to 25 %", "0.5", "0.25", 1.7),
        Goal("25 to 12.5 %", "0.25", "0.125", 1.7),
        Goal("12.5 to 6.25 %", "0.125", "0.0625", 1.7),
        Goal("6.25 to 3.1 %", "0.0625", "0.03125"),
    ),
)

THREADS = Case(
    name="threads",
    group="threads",
    title="bf16, 25 % of the blocks, one thread and two",
    shape=Shape("bf16", 64),
    runs=(
        Run("one-thread", "ours", RandomBlocks(0.25), threads=1),
        Run("two-threads", "ours", RandomBlocks(0.25), threads=2),
    ),
    goals=(Goal("two threads vs one", "one-thread", "two-threads", 1.8),),
)

TINY = Case(
    name="tiny",
    quick=True,
    group="size",
    title="a tiny call: 128 tokens, one head, everything listed",
    shape=Shape("bf16", 64, num_tokens=128, num_q_heads=1, num_kv_heads=1),
    runs=(
        Run("sdpa", "sdpa"),
        Run("kernel", "kernel", Dense()),
        Run("call", "ours", Dense()),
    ),
    goals=(
        Goal("the kernel's time over SDPA's", "kernel", "sdpa", 2.0, at_most=True),
        Goal("the whole call's time over SDPA's", "call", "sdpa", at_most=True),
    ),
)

# Measured in a process of its own; the "ratio" is peak resident memory of that whole process in GB.
MEMORY = Case(
    name="memory-128k",
    group="size",
    title="bf16, D = 64, 128k tokens, 4 heads, 2 % of the blocks",
    shape=Shape("bf16", 64, num_tokens=131072, num_q_heads=4, num_kv_heads=4),
    runs=(Run("2%", "ours", RandomBlocks(0.02)),),
    goals=(Goal("peak memory of the process, GB", "2%", "2%", 2.0, at_most=True),),
    probe="memory",
)

CASES: tuple[Case, ...] = (
    *(speed_case(dtype, head_dim) for dtype, head_dim in TARGETS),
    structure_case(64),
    structure_case(128),
    GQA,
    PLANNING,
    *(
        prefill_case("grid", "a grid plan found online, about 5 % of the pairs", GRID_5, d, 8.0)
        for d in (64, 128)
    ),
    *(
        prefill_case("lines", "1000 columns and 13 diagonals, about 8 % of them", LINES_8, d, 6.0)
        for d in (64, 128)
    ),
    LONG,
    *(length_case(1024 * n) for n in (1, 2, 4, 8)),
    COMPARED,
    paro_case(64, 5.0),
    paro_case(128, 4.0),
    SCALING,
    THREADS,
    TINY,
    MEMORY,
)
