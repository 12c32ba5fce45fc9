"""The measuring pass: runs a model twice, dense and exact, and keeps nothing but block sums."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from permattn._version import __version__
from permattn.api import sparse_attention_with_lse
from permattn.block_mass import block_mass
from permattn.calibrate.paro.bins import bin_of_steps, sampled_steps, sigma_edges, spread
from permattn.calibrate.paro.options import MeasureOptions, SelectOptions
from permattn.calibrate.paro.orders import choose_orders, measure_orders, orders_of
from permattn.calibrate.paro.select import BlockMeans, select_blocks
from permattn.calibrate.paro.sums import BlockSums
from permattn.calibrate.state import State
from permattn.core import AttnPlan, TokenGrid
from permattn.core.plan import ceil_div
from permattn.patterns.dense import plan_dense
from permattn.patterns.paro import ParoOrigin, ParoPlan, TextPlace, plan_paro, vision_tokens

STAGES = ("orders", "masks")

# Called with the stage, and how much of it is done in [0, 1].
OnProgress = Callable[[str, float], object]


class Subject(Protocol):
    """What is calibrated; `permattn.models.diffusion.ModelFacts` is one."""

    @property
    def model_class(self) -> str: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def text(self) -> TextPlace: ...
    @property
    def scheduler(self) -> str: ...
    @property
    def fingerprint(self) -> str: ...


class Seen(Protocol):
    """One self-attention call; `permattn.models.diffusion.Observation` is one.

    q, k [B, H, S, D] as attention sees them, after norms and rotary embedding; text_visible bool
    [B, text tokens] or None; sigma: noise level in [0, 1], any constant where there is no noise;
    num_steps: steps of the run where known.
    """

    @property
    def layer(self) -> int: ...
    @property
    def q(self) -> Tensor: ...
    @property
    def k(self) -> Tensor: ...
    @property
    def grid(self) -> TokenGrid: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def text_visible(self) -> Tensor | None: ...
    @property
    def sigma(self) -> float: ...
    @property
    def num_steps(self) -> int | None: ...


# Runs the model on the prompt of that number, dense, and reports every self-attention call.
Run = Callable[[int, Callable[[Seen], None]], object]


@dataclass(frozen=True, eq=False)
class Measurement:
    """Orders and block sums of a model: plans of any density come from one measurement.

    Args:
        subject: what was measured.
        options: how.
        grid: (frames, height, width) in tokens.
        axis_orders: uint8 [L, H].
        means: block sums per bin and layer, in the order of every head.
        sigma_edges: noise levels between bins.
        num_steps: steps of a run, as its scheduler counts them.
        text_tokens: joint text tokens.
    """

    subject: Subject
    options: MeasureOptions
    grid: tuple[int, int, int]
    axis_orders: Tensor
    means: BlockMeans
    sigma_edges: tuple[float, ...]
    num_steps: int
    text_tokens: int

    def plan(self, select: SelectOptions = SelectOptions()) -> ParoPlan:
        """The plan at one density.

        Raises:
            ValueError: see `select_blocks`.
        """
        frames, height, width = self.grid
        subject = self.subject
        found = select_blocks(
            self.means,
            select,
            num_tokens=frames * height * width,
            block=self.options.block,
            has_text=self.text_tokens > 0,
        )
        origin = ParoOrigin(
            model_class=subject.model_class,
            head_dim=subject.head_dim,
            num_steps=self.num_steps,
            scheduler=subject.scheduler,
            fingerprint=subject.fingerprint,
            metric=self.options.metric,
            scope=select.scope,
            density=select.density,
            text_tokens=self.text_tokens,
            version=__version__,
        )
        return ParoPlan(
            grid=self.grid,
            text=subject.text,
            axis_orders=self.axis_orders,
            packed_masks=found.packed_masks,
            sigma_edges=self.sigma_edges,
            empty_heads=found.empty_heads,
            origin=origin,
            block=self.options.block,
            native_cells=self.options.native_cells,
            recall=found.recall,
        )


def measure_runs(
    run: Run,
    num_runs: int,
    subject: Subject,
    options: MeasureOptions = MeasureOptions(),
    *,
    resume: Path | None = None,
    identity: Any = None,
    on_progress: OnProgress = lambda stage, done: None,
) -> Measurement:
    """Measures any model that can report its self-attention calls.

    Source: PAROAttention (arXiv 2506.16054), section 3; streaming: an entry of the attention map
    exists for one tile at a time. Every prompt runs twice: orders are compared on sampled steps and
    query blocks, then block sums are taken in the chosen order, on all query blocks.

    Args:
        run: called with a prompt's number and a callback; runs the model dense.
        num_runs: prompts.
        subject: the model.
        options: what to measure.
        resume: a folder for what has been measured; the same call goes on there.
        identity: JSON values that tell prompts and settings from others; compared on resume.
        on_progress: called with a stage of `STAGES` and its share in [0, 1].

    Returns: a `Measurement`; with `resume` its block sums are read from there when they are used.

    Raises:
        ValueError: no prompts, calls that do not fit `subject`, a grid or noise levels that change
            between prompts, attention that is not finite, or steps that a run does not have.
        StateError: a folder of another measurement, or one that cannot be used.
    """
    if num_runs < 1:
        raise ValueError("prompts: wants at least one, got none")
    return _Measuring(run, num_runs, subject, options, resume, identity, on_progress).run()


class _Watch:
    """Steps and sizes of one run, call by call."""

    def __init__(self, name: str, subject: Subject) -> None:
        self._name, self._subject = name, subject
        self.sigmas: list[float] = []
        self.grid: tuple[int, int, int] | None = None
        self.num_steps: int | None = None
        self.text_tokens = 0
        self._calls: dict[int, int] = {}

    def see(self, seen: Seen) -> tuple[int, int]:
        """The step of a call, and its number among this step's calls of the layer.

        A step is a noise level: calls at one level, such as cond and uncond, are one step.
        """
        self._check(seen)
        if not self.sigmas or seen.sigma != self.sigmas[-1]:
            self.sigmas.append(seen.sigma)
            self._calls = {}
        call = self._calls.get(seen.layer, 0)
        self._calls[seen.layer] = call + 1
        return len(self.sigmas) - 1, call

    def facts(self) -> dict[str, Any]:
        """What a resumed search needs to know of this run."""
        if self.grid is None:
            raise ValueError(f"{self._name}: ran without a single self-attention call")
        return {
            "sigmas": self.sigmas,
            "num_steps": self.num_steps or len(self.sigmas),
            "grid": list(self.grid),
            "text_tokens": self.text_tokens,
        }

    def _check(self, seen: Seen) -> None:
        subject = self._subject
        grid = (seen.grid.frames, seen.grid.height, seen.grid.width)
        if self.grid not in (None, grid):
            raise ValueError(f"{self._name}: the grid changes from {self.grid} to {grid}")
        self.grid, self.num_steps = grid, seen.num_steps
        self.text_tokens = max(self.text_tokens, seen.num_tokens - seen.grid.num_tokens)
        if not 0 <= seen.layer < subject.num_layers:
            raise ValueError(f"layer: wants 0 to {subject.num_layers - 1}, got {seen.layer}")
        if seen.q.shape[1] != subject.num_heads or seen.q.shape[2] != seen.num_tokens:
            raise ValueError(
                f"q: wants [B, {subject.num_heads}, {seen.num_tokens}, D], got {list(seen.q.shape)}"
            )


class _Measuring:
    """One measurement: two stages, each a run per prompt."""

    def __init__(
        self,
        run: Run,
        num_runs: int,
        subject: Subject,
        options: MeasureOptions,
        resume: Path | None,
        identity: Any,
        on_progress: OnProgress,
    ) -> None:
        self._run, self._num_runs, self._subject, self._options = run, num_runs, subject, options
        self._folder, self._on_progress = resume, on_progress
        self._state = State(resume, self._arguments(identity))

    def run(self) -> Measurement:
        options = self._options
        facts = self._orders_stage()
        grid: tuple[int, int, int] = tuple(facts["grid"])
        sigmas = facts["sigmas"]
        steps = sampled_steps(len(sigmas), options.sampled_steps, options.bins)
        bins = bin_of_steps(steps, len(sigmas), options.bins)
        edges = sigma_edges([sigmas[s] for s in steps], bins)
        axis_orders = self._axis_orders(TokenGrid(0, *grid))
        count = grid[0] * grid[1] * grid[2]
        num_blocks = [ceil_div(count, size) for size in options.block]
        layers, heads = self._subject.num_layers, self._subject.num_heads
        shape = (bins[-1] + 1, layers, heads, num_blocks[0], num_blocks[1])
        sums = BlockSums(self._folder, shape)
        self._masks_stage(sums, dict(zip(steps, bins, strict=True)), axis_orders, facts)
        return Measurement(
            *(self._subject, options, grid, axis_orders, sums, edges),
            *(facts["num_steps"], facts["text_tokens"]),
        )

    def _orders_stage(self) -> dict[str, Any]:
        """Terms of every order at every sampled step, into the state; facts of the runs."""
        first: dict[str, Any] | None = None
        for r in range(self._num_runs):
            facts = self._state.get(f"run.{r}")
            if facts is None:
                facts = self._compare_orders(r)
                self._state.put(f"run.{r}", facts)
            first = first or facts
            _check_alike(first, facts, r)
            self._on_progress("orders", (r + 1) / self._num_runs)
        assert first is not None
        return first

    def _compare_orders(self, r: int) -> dict[str, Any]:
        watch = _Watch(f"prompts[{r}]", self._subject)
        # Terms of the step that is running: by layer, one per call.
        terms: dict[int, list[Any]] = {}
        running = 0

        def keep(step: int) -> None:
            if terms:
                record = {str(n): found for n, found in terms.items()}
                self._state.put(f"orders.{r}.{step}", record)
                terms.clear()

        def on_seen(seen: Seen) -> None:
            nonlocal running
            step, _ = watch.see(seen)
            if step != running:
                keep(running)
                running = step
            self._report("orders", r, step, seen)
            many = len(orders_of(seen.grid, self._options)) > 1
            if many and self._is_compared(step, seen.num_steps) and not self._known(r, step):
                found = measure_orders(seen.q, seen.k, self._lse(seen), seen.grid, self._options)
                terms.setdefault(seen.layer, []).append(found.tolist())

        self._run(r, on_seen)
        keep(running)
        return watch.facts()

    def _is_compared(self, step: int, num_steps: int | None) -> bool:
        """Whether orders are compared at a step; at all of them where their number is unknown."""
        if num_steps is None:
            return True
        options = self._options
        steps = sampled_steps(num_steps, options.sampled_steps, options.bins)
        return step in spread(steps, options.order_steps)

    def _known(self, r: int, step: int) -> bool:
        return self._state.get(f"orders.{r}.{step}") is not None

    def _axis_orders(self, grid: TokenGrid) -> Tensor:
        """uint8 [L, H]."""
        orders = orders_of(grid, self._options)
        layers, heads = self._subject.num_layers, self._subject.num_heads
        if len(orders) == 1:
            return torch.full((layers, heads), orders[0], dtype=torch.uint8)
        total = torch.zeros(layers, len(orders), 2, heads, dtype=torch.double)
        count = [0] * layers
        for r in range(self._num_runs):
            for step in range(len(self._state.get(f"run.{r}")["sigmas"])):  # type: ignore[index]
                for name, found in (self._state.get(f"orders.{r}.{step}") or {}).items():
                    total[int(name)] += torch.tensor(found, dtype=torch.double).sum(0)
                    count[int(name)] += len(found)
        if 0 in count:
            raise ValueError(
                f"layer {count.index(0)}: no call at the steps where orders are compared; raise "
                "order_steps, or name sampled_steps that the run reaches"
            )
        means = total / torch.tensor(count)[:, None, None, None]
        return torch.stack([choose_orders(x, orders, self._options.alpha) for x in means])

    def _masks_stage(
        self, sums: BlockSums, bin_of_step: dict[int, int], orders: Tensor, facts: dict[str, Any]
    ) -> None:
        for r in range(self._num_runs):
            if self._state.get(f"masks.{r}") is None:
                watch = self._sum_blocks(r, sums, bin_of_step, orders)
                _check_alike(facts, watch.facts(), r)
                self._state.put(f"masks.{r}", True)
            self._on_progress("masks", (r + 1) / self._num_runs)

    def _sum_blocks(
        self, r: int, sums: BlockSums, bin_of_step: dict[int, int], orders: Tensor
    ) -> _Watch:
        watch = _Watch(f"prompts[{r}]", self._subject)
        options = self._options

        def on_seen(seen: Seen) -> None:
            step, call = watch.see(seen)
            self._report("masks", r, step, seen)
            bin, name = bin_of_step.get(step), f"{r}.{step}.{call}"
            if bin is None or sums.has(bin, seen.layer, name):
                return
            device = seen.q.device
            token = vision_tokens(seen.grid, orders[seen.layer].to(device), options.native_cells)[
                None
            ]
            mass = block_mass(
                *(seen.q, seen.k),
                token_of_q_slot=token,
                token_of_kv_slot=token,
                q_blocks=torch.arange(sums.shape[3], dtype=torch.int32, device=device),
                block=options.block,
                lse=self._lse(seen),
                backend=options.backend,
            )
            sums.add(bin, seen.layer, name, mass.sums)

        self._run(r, on_seen)
        return watch

    def _lse(self, seen: Seen) -> Tensor:
        """float32 [B, H, S] over every key that is seen, text included."""
        # The values do not matter.
        plan, backend = everything(seen, self._options.block), self._options.backend
        lse = sparse_attention_with_lse(seen.q, seen.k, seen.k, plan, backend=backend)[1].float()
        # A vision query sees itself at least, so -inf comes from NaN scores alone.
        if not bool(lse[:, :, seen.grid.start : seen.grid.stop].isfinite().all()):
            raise ValueError(f"layer {seen.layer}: attention is not finite at sigma {seen.sigma:g}")
        return lse

    def _report(self, stage: str, r: int, step: int, seen: Seen) -> None:
        if seen.num_steps:
            inside = min(1.0, (step + seen.layer / self._subject.num_layers) / seen.num_steps)
            self._on_progress(stage, (r + inside) / self._num_runs)

    def _arguments(self, identity: Any) -> dict[str, Any]:
        options, subject = self._options, self._subject
        cells = options.native_cells
        return {
            "permattn": __version__,
            "search": "paro",
            "model": {
                "class": subject.model_class,
                "layers": subject.num_layers,
                "heads": subject.num_heads,
                "head_dim": subject.head_dim,
                "fingerprint": subject.fingerprint,
            },
            "prompts": self._num_runs,
            "identity": identity,
            "density": options.density,
            "metric": options.metric,
            "alpha": options.alpha,
            "eps": options.eps,
            "sparse_share": options.sparse_share,
            "block": list(options.block),
            "sampled_steps": options.sampled_steps,
            "bins": options.bins,
            "order_steps": options.order_steps,
            "order_stride": options.order_stride,
            "orders": None if options.orders is None else list(options.orders),
            "native_cells": None if cells is None else cells.tolist(),
            "seed": options.seed,
            "backend": options.backend,
        }


def everything(seen: Seen, block: tuple[int, int]) -> AttnPlan:
    """The plan of exact attention for one call: every token sees all but padded text."""
    if seen.text_visible is None:
        return _dense(seen.num_tokens, seen.q.device)
    device = seen.q.device
    blocks = [ceil_div(seen.grid.num_tokens, size) for size in block]
    return plan_paro(
        seen.grid,
        torch.zeros(1, dtype=torch.int64, device=device),
        torch.ones(1, *blocks, dtype=torch.bool, device=device),
        num_tokens=seen.num_tokens,
        block=block,
        text_visible=seen.text_visible,
    )


@functools.lru_cache(maxsize=1)
def _dense(num_tokens: int, device: torch.device) -> AttnPlan:
    return plan_dense(num_tokens, num_tokens, causal=False, device=device)


def _check_alike(first: dict[str, Any], facts: dict[str, Any], r: int) -> None:
    """Raises ValueError when a run differs from the first in what a plan is made for."""
    if facts["grid"] != first["grid"]:
        raise ValueError(
            f"prompts[{r}]: runs on a grid of {tuple(facts['grid'])} tokens, prompts[0] on "
            f"{tuple(first['grid'])}; a plan serves one grid"
        )
    ours, theirs = facts["sigmas"], first["sigmas"]
    if len(ours) != len(theirs) or any(
        abs(a - b) > 1e-4 for a, b in zip(ours, theirs, strict=True)
    ):
        raise ValueError(
            f"prompts[{r}]: runs {len(ours)} steps at other noise levels than prompts[0] with "
            f"{len(theirs)}; use the same steps and scheduler"
        )
