"""Attention over plans by the CUDA C++ kernels: what they take, and the blocks of one call."""

from __future__ import annotations

import torch
from torch import Tensor

from permattn.backends.cuda import device
from permattn.backends.cuda.launch import (
    SM80,
    SM90,
    Config,
    Launch,
    Operand,
    Results,
    Run,
    config_of,
    launch_attend,
    launch_finish,
    runs_of,
    shape_of,
)
from permattn.backends.cuda.rows import (
    MAX_ROWS_PER_SCALE,
    Layout,
    Made,
    aligned,
    column_statistics,
    make_rows,
)
from permattn.core.permutation import Permutation
from permattn.core.plan import AttnPart
from permattn.core.prepare import (
    PrepareArgs,
    Prepared,
    Smoothing,
    smoothing_from_columns,
)
from permattn.core.problem import BwdArgs, FwdArgs, Problem, empty_out, why_not_quantised
from permattn.core.prologue import Prologue, RowTransform
from permattn.core.quant import say_once

FAMILIES = {SM80: "mma.sync", SM90: "wgmma"}
NO_BACKWARD = "has no backward: the triton backend has one"


def why_not(problem: Problem) -> str | None:
    if not device.takes(problem.device_type):
        return f"needs a CUDA device, got {problem.device_type}"
    if problem.dtype not in device.DTYPES:
        return f"computes in bfloat16 or float16, got {problem.dtype}"
    if problem.needs_grad:
        return NO_BACKWARD
    why = why_not_quantised(problem) or device.why_not_here(problem.device_type)
    if why is not None:
        return why
    quant = problem.quant
    if quant.is_quantised:
        for name in ("q_rows_per_scale", "kv_rows_per_scale"):
            rows = getattr(quant, name)
            if rows > MAX_ROWS_PER_SCALE:
                return f"takes {name} up to {MAX_ROWS_PER_SCALE}, got {rows}"
    why = device.why_no_kernel(*_shape_of(problem))
    if why is None:
        return None
    facts = f"D = {problem.head_dim}, Dv = {problem.head_dim_v}"
    if quant.is_quantised:
        facts += f", qk = {quant.qk!r}, pv = {quant.pv!r}"
        facts += f", kv_rows_per_scale = {quant.kv_rows_per_scale}"
    return f"{why}; got {facts}"


def _shape_of(problem: Problem) -> tuple[int, ...]:
    dims = problem.head_dim, problem.head_dim_v
    return shape_of(problem.blocks, problem.dtype, problem.quant, *dims)


def kernel_name(problem: Problem) -> str:
    """The kernel that a problem gets here, for people."""
    capability = device.capability()
    c = config_of(capability, _shape_of(problem))
    dtype = str(problem.dtype).removeprefix("torch.")
    formats = [dtype if fmt == "none" else fmt for fmt in (c.qk, c.pv)]
    return (
        f"CUDA C++, sm_{capability}, {FAMILIES[c.family]}, Q K^T in {formats[0]}, P V in "
        f"{formats[1]}, tile {c.block_m} x {c.block_n}, head dim {c.dim}, {c.warps} warps"
    )


def backward(args: BwdArgs) -> tuple[Tensor, Tensor, Tensor]:
    raise NotImplementedError(f"backend 'cuda' {NO_BACKWARD}")


def prepare(args: PrepareArgs) -> Prepared:
    """See `Backend.prepare`. One reading and one writing of memory."""
    device.need_kernels()
    made = make_rows(args)
    scale = args.x.new_empty(0, dtype=torch.float32) if made.scale is None else made.scale
    return made.rows, scale


def forward(args: FwdArgs) -> tuple[Tensor, Tensor]:
    """See `Backend.forward`. Two runs are bit-identical. No wait for the device."""
    device.need_kernels()
    out = empty_out(args.q, args.v)
    lse = args.q.new_empty(args.q.shape[:3], dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    runs = runs_of(args.plan)
    state = None
    if len(runs) > 1:
        acc = torch.zeros(out.shape, dtype=torch.float32, device=out.device)
        state = (acc, torch.full_like(lse, float("-inf")), torch.zeros_like(lse))
    elif not args.plan.parts[0].q_perm.is_identity:
        # Tokens in no slot are written by nobody.
        out.zero_()
        lse.fill_(float("-inf"))
    results, blocks = Results(out, lse, state), _Blocks(args)
    for run in runs:
        _forward_run(blocks, run, results)
    if state is not None:
        launch_finish(results)
    if blocks.dots is not None:
        # Smoothing moved every score of a query by one number, which the softmax did not see.
        lse.add_(blocks.dots, alpha=args.scale)
    return out, lse


def _forward_run(blocks: _Blocks, run: Run, results: Results) -> None:
    args, capability = blocks.args, _capability_of(blocks.args.q)
    quant = args.plan.quant
    dims = args.q.shape[3], args.v.shape[3]
    shape = shape_of(run.blocks, args.q.dtype, quant, *dims)
    config = config_of(capability, shape)
    if quant.qk == "int4" and config.qk == "int8":
        say_once("cuda: INT4 values are multiplied as INT8 from compute capability 9.0 on")
    q, q_scale = blocks.queries(run.parts[0], config)
    operands = [blocks.operand(part, config) for part in run.parts]
    call = Launch(run, q, q_scale, operands, dims[0], quant, args.scale, capability)
    launch_attend(call, results, config)


def _capability_of(x: Tensor) -> int:
    if not x.is_cuda:
        return device.capability()
    major, minor = torch.cuda.get_device_capability(x.device)
    return 10 * major + minor


class _Blocks:
    """Queries, keys and values of one call as launches read them; each is made once.

    Attributes:
        dots: float32 [B, Hq, Sq], what smoothing takes from every score of a query, divided by the
            scale; None = nothing.
    """

    def __init__(self, args: FwdArgs) -> None:
        self.args = args
        self.prologue = args.prologue or Prologue()
        self.made: dict[tuple, Made] = {}
        self.smoothing = _smoothing_of(args)
        self.dots: Tensor | None = None
        if self.smoothing.mean is not None:
            self.dots = args.q.new_zeros(args.q.shape[:3], dtype=torch.float32)

    def queries(self, part: AttnPart, config: Config) -> Made:
        """Tokens as they are, or what is quantised of a query order."""
        args, quant, transform = self.args, self.args.plan.quant, self.prologue.q
        if quant.qk == "none":
            return self._tokens("q", args.q, transform)
        facts = (None, self.smoothing.q_factor, quant.qk, quant.q_rows_per_scale)
        layout: Layout = "nibbles" if config.qk == "int4" else "rows"
        against = {"against": self.smoothing.mean, "dots": self.dots}
        return self._slots("q", args.q, part.q_perm, layout, transform, *facts, **against)

    def operand(self, part: AttnPart, config: Config) -> Operand:
        """Keys and values of a part."""
        args, quant, perm = self.args, self.args.plan.quant, part.kv_perm
        # Bulk copies take rows that lie side by side.
        moves = config.family == SM90 and not perm.is_identity
        if quant.qk != "none":
            smoothing = self.smoothing
            facts = (smoothing.mean, smoothing.k_factor, quant.qk, quant.kv_rows_per_scale)
            layout: Layout = "nibbles" if config.qk == "int4" else "rows"
            k = self._slots("k", args.k, perm, layout, self.prologue.k, *facts)
        elif moves:
            k = self._slots("k", args.k, perm, "rows", self.prologue.k)
        else:
            k = self._tokens("k", args.k, self.prologue.k)
        if quant.pv != "none":
            v_facts = (None, None, None, quant.pv, quant.kv_rows_per_scale, True)
            v = self._slots("v", args.v, perm, "fragments", *v_facts)
        elif moves:
            v = self._slots("v", args.v, perm, "rows", None)
        else:
            v = self._tokens("v", args.v, None)
        return Operand(k.rows, v.rows, k.scale, v.scale, quant.qk != "none" or moves, moves)

    def _tokens(self, name: str, x: Tensor, transform: RowTransform | None) -> Made:
        key = (name, None)
        if key not in self.made:
            if transform is None:
                self.made[key] = Made(aligned(x), None)
            else:
                self.made[key] = make_rows(PrepareArgs(x, transform=transform))
        return self.made[key]

    def _slots(
        self, name: str, x: Tensor, perm: Permutation, layout: Layout, *facts, **more
    ) -> Made:
        """Parts of one order share what is made."""
        token = perm.token_of_slot
        key = (name, layout, token.data_ptr(), token.shape, token.stride())
        if key not in self.made:
            order = None if perm.is_identity else token
            self.made[key] = make_rows(PrepareArgs(x, order, *facts), layout, **more)
        return self.made[key]


def _smoothing_of(args: FwdArgs) -> Smoothing:
    """`core.prepare.smoothing_of` in one reading of k, and one of q where columns are balanced."""
    return smoothing_from_columns(args, column_statistics)
