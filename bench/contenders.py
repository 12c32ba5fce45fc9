"""From a case to callables: inputs, plans, and what each contender computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import permattn
import torch
from permattn.backends import BACKENDS, resolve
from permattn.core import AttnPlan, FwdArgs, Problem, Segment, TokenGrid, TokenRun
from permattn.core.prepare import PrepareArgs
from permattn.probe import probe_mass
from torch import Tensor

from bench import baselines, heads, local_heads
from bench.planners import Planner
from bench.plans import Dense, PlanBuilder, head_orders, num_pairs
from bench.registry import Case, Run, Shape

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True, eq=False)
class Contender:
    """What one run computes: a call, the plan behind it (None = dense torch), and its work.

    Args:
        recall: whether the share of true attention that the plan keeps is to be measured.
    """

    call: Callable[[], object]
    plan: AttnPlan | None
    pairs: float
    flops: float
    judged: bool
    recall: bool


@dataclass
class Bench:
    """The inputs of one case and the contenders made from them; plans are built once and shared."""

    case: Case
    backend: str
    threads: int
    q: Tensor = field(init=False)
    k: Tensor = field(init=False)
    v: Tensor = field(init=False)
    segments: tuple[Segment, ...] = field(init=False)
    plans: dict[PlanBuilder | Planner, AttnPlan] = field(default_factory=dict)

    def __post_init__(self) -> None:
        case, shape = self.case, self.case.shape
        if case.inputs == "heads":
            self.q, self.k, self.v, self.segments = head_inputs(shape)
        elif case.inputs == "local":
            self.q, self.k, self.v = local_inputs(shape)
            self.segments = (TokenGrid(0, *local_heads.grid_of(shape.num_tokens)),)
        else:
            self.q, self.k, self.v = make_inputs(shape, video=case.inputs == "video")
            self.segments = video_segments(shape.num_tokens)

    def plan_of(self, builder: PlanBuilder) -> AttnPlan:
        if builder not in self.plans:
            shape = self.case.shape
            self.plans[builder] = builder(shape.num_tokens, shape.num_q_heads)
        return self.plans[builder]

    def planned_by(self, planner: Planner) -> AttnPlan:
        if planner not in self.plans:
            self.plans[planner] = planner(self.q, self.k, self.segments)
        return self.plans[planner]

    @property
    def backend_name(self) -> str:
        """The backend that "auto" comes to for this case."""
        plan = Dense()(self.case.shape.num_tokens, self.case.shape.num_q_heads)
        problem = Problem.of(self.q, self.k, self.v, plan, needs_grad=False)
        return resolve(problem, self.backend)

    def contender(self, run: Run) -> Contender:
        if run.kind == "sdpa":
            call: Callable[[], object] = baselines.sdpa(self.q, self.k, self.v, causal=run.causal)
            return self._finished(run, call, None)
        if run.kind == "probe":
            return self._finished(run, self._probe(), None)
        if run.planner is not None:
            return self._planner(run, run.planner)
        assert run.plan is not None
        plan = self.plan_of(run.plan)
        if run.kind == "flex":
            return self._finished(run, baselines.flex(self.q, self.k, self.v, plan), plan)
        if run.kind == "kernel":
            return self._finished(run, self._kernel(plan), plan)
        if run.kind == "prepare":
            return self._finished(run, self._prepare(plan), plan)
        return self._finished(run, self._attend(plan), plan)

    def _attend(self, plan: AttnPlan) -> Callable[[], Tensor]:
        return lambda: permattn.sparse_attention(self.q, self.k, self.v, plan, backend=self.backend)

    def _kernel(self, plan: AttnPlan) -> Callable[[], Tensor]:
        """The backend alone: no validation, no operator."""
        problem = Problem.of(self.q, self.k, self.v, plan, needs_grad=False)
        backend = BACKENDS[resolve(problem, self.backend)]
        args = FwdArgs(self.q, self.k, self.v, plan, self.q.shape[3] ** -0.5)
        return lambda: backend.forward(args)[0]

    def _prepare(self, plan: AttnPlan) -> Callable[[], object]:
        """q, k and v of a plan of one part, permuted and quantised."""
        problem = Problem.of(self.q, self.k, self.v, plan, needs_grad=False)
        backend, quant, part = BACKENDS[resolve(problem, self.backend)], plan.quant, plan.parts[0]
        q_order, kv_order = part.q_perm.token_of_slot, part.kv_perm.token_of_slot
        q_rows, kv_rows = quant.q_rows_per_scale, quant.kv_rows_per_scale
        jobs = (
            PrepareArgs(self.q, q_order, fmt=quant.qk, rows_per_scale=q_rows),
            PrepareArgs(self.k, kv_order, fmt=quant.qk, rows_per_scale=kv_rows),
            PrepareArgs(self.v, kv_order, fmt=quant.pv, rows_per_scale=kv_rows, per_column=True),
        )
        return lambda: [backend.prepare(job) for job in jobs]

    def _probe(self) -> Callable[[], object]:
        """One probe of the last 64 queries, all heads."""
        rows = self.q[:, :, -64:] * self.q.shape[3] ** -0.5
        batch, _, num_rows, _ = rows.shape
        position = torch.full((batch,), self.k.shape[2] - num_rows, dtype=torch.int32)
        keys = torch.tensor([[0, self.k.shape[2]]] * batch, dtype=torch.int32)
        return lambda: probe_mass(rows, self.k, first_position=position, key_range=keys)

    def _planner(self, run: Run, planner: Planner) -> Contender:
        plan = self.planned_by(planner)

        def make() -> AttnPlan:
            return planner(self.q, self.k, self.segments)

        def make_and_attend() -> Tensor:
            return permattn.sparse_attention(self.q, self.k, self.v, make(), backend=self.backend)

        calls = {"plan": make, "attend": self._attend(plan), "planned": make_and_attend}
        return self._finished(run, calls[run.kind], plan)

    def _finished(self, run: Run, call: Callable[[], object], plan: AttnPlan | None) -> Contender:
        if run.threads is not None:
            call = _with_threads(call, run.threads)
        shape = self.case.shape
        heads = shape.batch * shape.num_q_heads
        n = shape.num_tokens
        pairs = heads * (n * (n + 1) / 2 if run.causal else float(n * n))
        if plan is not None:
            pairs = num_pairs(plan, shape.batch, shape.num_q_heads)
        flops = 0.0 if run.kind in ("plan", "probe", "prepare") else 4.0 * pairs * shape.head_dim
        return Contender(
            call,
            plan,
            pairs,
            flops,
            judged=run.kind not in ("sdpa", "plan", "probe", "prepare"),
            recall=run.kind == "planned" and self.case.inputs == "heads",
        )


def make_inputs(
    shape: Shape, *, video: bool = False, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Seeded normal q, k, v: never zeros, which run faster than data does."""
    generator = torch.Generator().manual_seed(seed)
    q_marks, k_marks = video_marks(shape, generator) if video else (None, None)

    def draw(heads: int, marks: Tensor | None = None) -> Tensor:
        x = torch.randn(shape.batch, heads, shape.num_tokens, shape.head_dim, generator=generator)
        if marks is not None:
            x += marks
        return x.to(DTYPES[shape.dtype])

    kv_heads = shape.num_kv_heads
    return draw(shape.num_q_heads, q_marks), draw(kv_heads, k_marks), draw(kv_heads)


def head_inputs(shape: Shape) -> tuple[Tensor, Tensor, Tensor, tuple[Segment, ...]]:
    """q, k, v of heads of known attention, each of another kind, and their prompt."""
    names = list(heads.HEADS)
    names = [names[h % len(names)] for h in range(shape.num_q_heads)]
    prompt = heads.Prompt(shape.num_tokens)
    return *heads.constructed(names, prompt, dtype=DTYPES[shape.dtype]), prompt.segments


def local_inputs(shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of heads that aggregate locally, outlier channels among them."""
    grid, orders = local_heads.grid_of(shape.num_tokens), head_orders(shape.num_q_heads)
    made = local_heads.inputs(
        grid, orders, shape.head_dim, outliers=True, dtype=DTYPES[shape.dtype]
    )
    return made[0], made[1], made[2]


def video_marks(shape: Shape, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """What queries and keys of a video have in common, [S, D] each: two lines for a grid to find.

    Every place of the frame has a direction of its own, worth 8 logits where query and key share it
    (slash lines); all queries see the keys of place 100 by as much (a vertical line).
    """
    video = video_segments(shape.num_tokens)[1]
    assert isinstance(video, TokenGrid)
    places = video.tokens_per_frame
    direction = torch.randn(places + 1, shape.head_dim, generator=generator)
    size = (8 * shape.head_dim**0.5) ** 0.5
    direction = size * torch.nn.functional.normalize(direction, dim=-1)
    q = direction[-1].repeat(shape.num_tokens, 1)
    k = torch.zeros(shape.num_tokens, shape.head_dim)
    k[video.start + 100 : video.stop : places] = q[0]
    for x in (q, k):
        x[video.start : video.stop] += direction[:-1].repeat(video.frames, 1)
    return q, k


def video_segments(num_tokens: int) -> tuple[Segment, ...]:
    """A prompt: 64 tokens of text, a video of 16 x 16 tokens a frame, and text to the end.

    Where not even one frame fits, all of it is text.
    """
    height = width = 16
    frames = (num_tokens - 128) // (height * width)
    if frames < 1:
        return (TokenRun(0, num_tokens),)
    video = TokenGrid(64, frames, height, width)
    return TokenRun(0, 64), video, TokenRun(video.stop, num_tokens - video.stop)


def _with_threads(call: Callable[[], object], threads: int) -> Callable[[], object]:
    def run() -> object:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            return call()
        finally:
            torch.set_num_threads(before)

    return run
