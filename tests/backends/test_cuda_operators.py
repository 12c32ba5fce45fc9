"""The CUDA operators refuse what would lead a kernel out of its memory, and write only results."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import permattn as pa
import pytest
import torch
from cuda_on_cpu import on_cpu, shim_path  # noqa: F401
from permattn.backends import cuda, reference
from permattn.backends.cuda import launch
from permattn.backends.cuda.rows import make_rows
from permattn.core import AttnPlan, BlockIndex, Problem, QuantSpec, TokenBand
from permattn.core.packing import pack_plan
from permattn.core.prepare import PrepareArgs
from permattn.core.problem import FwdArgs
from permattn.core.prologue import Prologue, RowTransform
from permattn.core.quant import FORMATS, quantise
from permattn.testing import crossed_plan, random_plan, split_plan
from torch import Tensor

S, D, HQ, HKV, BLOCK = 128, 64, 4, 2, 64
HEADER = ("qk", "pv", "q_rows", "kv_rows", "sq", "skv", "unit", "capability", "head_dim", "sorts")
PART = ("block_q", "block_kv", "has_min", "min_lag", "has_max", "max_lag")
FLAGS = ("kv_identity", "k_in_slots", "v_in_slots")


@dataclass
class Call:
    """Arguments of cuda_attend that are right, to be broken one by one."""

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor
    q_scale: Tensor | None = None
    q_token: Tensor | None = None
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None
    kv_token: Tensor | None = None
    acc: Tensor | None = None
    high: Tensor | None = None
    total: Tensor | None = None
    order: Tensor | None = None
    kv_indices: Tensor = field(default_factory=lambda: ints(0, 0, 1))
    row_offsets: Tensor = field(default_factory=lambda: ints(0, 1, 3))
    num_full: Tensor = field(default_factory=lambda: ints(1, 2))
    numbers: dict[str, int] = field(default_factory=dict)
    num_parts: int = 1

    def run(self) -> None:
        known = {"sq": S, "skv": S, "unit": BLOCK, "capability": 80, "head_dim": D}
        known |= {"q_rows": BLOCK, "kv_rows": BLOCK, "block_q": BLOCK, "block_kv": BLOCK}
        known |= {"kv_identity": int(self.kv_token is None)}
        known |= self.numbers
        part = [known.get(name, 0) for name in (*PART, *FLAGS)]
        numbers = [known.get(name, 0) for name in HEADER] + part * self.num_parts
        absent = self.q.new_empty(0)
        optional = (self.k_scale, self.v_scale, self.kv_token)
        tensors = [self.k, self.v, *(absent if x is None else x for x in optional)]
        tensors += [self.kv_indices, self.row_offsets, self.num_full]
        torch.ops.permattn_native.cuda_attend(
            *(self.q, self.q_scale, self.q_token, tensors * self.num_parts, self.out, self.lse),
            *(self.acc, self.high, self.total, self.order, numbers, 0.125),
        )


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)[None, None]


def floats(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, dtype=dtype)


def plain() -> Call:
    q, k, v = floats(1, HQ, S, D), floats(1, HKV, S, D), floats(1, HKV, S, D)
    return Call(q, k, v, torch.empty_like(q), torch.empty(1, HQ, S))


def small() -> Call:
    """INT8, P V too."""
    call = plain()
    for name, heads in (("q", HQ), ("k", HKV)):
        rows, scale = quantise(getattr(call, name), FORMATS["int8"], BLOCK)
        setattr(call, name, rows)
        setattr(call, f"{name}_scale", scale)
        assert scale.shape == (1, heads, S // BLOCK)
    call.v = torch.zeros(1, HKV, S // BLOCK, D, BLOCK, dtype=torch.int8)
    call.v_scale = torch.ones(1, HKV, S // BLOCK, D)
    call.numbers = {"qk": 1, "pv": 1, "k_in_slots": 1}
    return call


def misaligned(x: Tensor) -> Tensor:
    flat = x.new_zeros(x.numel() + 1)[1:]
    return flat.view(x.shape).copy_(x)


def oddly_strided(x: Tensor) -> Tensor:
    return torch.nn.functional.pad(x, (0, 1))[..., : x.shape[-1]]


def number(**values: int):
    return lambda call: replace(call, numbers={**call.numbers, **values})


def tensor(name: str, change):
    return lambda call: replace(call, **{name: change(getattr(call, name))})


def given(name: str, make):
    return lambda call: replace(call, **{name: make()})


BAD = {
    "no-part": (lambda c: replace(c, num_parts=0), "1 to 4 parts"),
    "five-parts": (lambda c: replace(c, num_parts=5), "1 to 4 parts"),
    "q-axes": (tensor("q", lambda x: x[0]), "want 4 axes"),
    "q-float": (tensor("q", torch.Tensor.float), "wants q's dtype"),
    "out-float": (tensor("out", torch.Tensor.float), "out: wants bfloat16 or float16"),
    "out-shape": (tensor("out", lambda x: x[:, :, 1:]), "out: wants shape"),
    "lse-shape": (tensor("lse", lambda x: x[..., 1:].contiguous()), "lse: wants 512"),
    "lse-dtype": (tensor("lse", torch.Tensor.double), "lse: wants 512"),
    "lse-strided": (tensor("lse", lambda x: x.transpose(1, 2)), "lse: wants 512 contiguous"),
    "k-batch": (tensor("k", lambda x: x.repeat(2, 1, 1, 1)), "k: wants shape"),
    "k-heads": (tensor("k", lambda x: x.repeat(1, 2, 1, 1)[:, :3]), "heads that divide q's"),
    "k-rows": (tensor("k", lambda x: x[:, :, :64]), "k: wants shape"),
    "k-dtype": (tensor("k", torch.Tensor.half), "k: wrong dtype"),
    "k-width": (tensor("k", lambda x: x[..., :32]), "k: wants shape"),
    "v-dtype": (tensor("v", torch.Tensor.half), "v: wants out's dtype"),
    "v-width": (tensor("v", lambda x: x[..., :32]), "v: wants shape"),
    "v-rows": (tensor("v", lambda x: x[:, :, :64]), "v: wants shape"),
    "q-misaligned": (tensor("q", misaligned), "q: wants memory at a multiple of 16"),
    "k-misaligned": (tensor("k", misaligned), "k: wants memory at a multiple of 16"),
    "v-misaligned": (tensor("v", misaligned), "v: wants memory at a multiple of 16"),
    "out-misaligned": (tensor("out", misaligned), "out: wants memory at a multiple of 16"),
    "q-strides": (tensor("q", oddly_strided), "q: strides must be multiples of 16"),
    "k-strides": (tensor("k", oddly_strided), "k: strides must be multiples of 16"),
    "last-stride": (tensor("k", lambda x: x.mT.contiguous().mT), "the last stride must be 1"),
    "head-dim": (number(head_dim=60), "multiples of 8"),
    "old-device": (number(capability=75), "compute capability 8.0"),
    "no-format": (number(qk=7), "no format of number 7"),
    "sq": (number(sq=S + 1), "q: wants shape"),
    "skv": (number(skv=S + 1), "k: wants shape"),
    "unit": (number(unit=48), "unit: must divide blocks of 64"),
    "no-unit": (number(unit=0), "unit: wants 1"),
    "huge-unit": (number(unit=2**40), "unit: wants 1"),
    "block-q": (number(block_q=0), "must be >= 1"),
    "few-rows": (number(block_q=32, unit=32), "num_full: wants a column for each of 4 blocks"),
    "offsets": (tensor("row_offsets", lambda x: x[..., :2]), "one column more than num_full"),
    "list-dtype": (tensor("kv_indices", torch.Tensor.long), r"kv_indices: wants int32 \[Bx, Hx, n"),
    "list-heads": (
        tensor("kv_indices", lambda x: x.expand(1, 3, -1)),
        "kv_indices: leading axes must be 1 or",
    ),
    "no-kv-token": (number(kv_identity=0), "kv_token: wanted"),
    "q-token-dtype": (given("q_token", lambda: ints(0, 1).long()), "q_token: wants int32"),
    "half-a-state": (given("acc", lambda: torch.zeros(1, HQ, S, D)), "all three or none"),
    "order-size": (given("order", lambda: ints(0)), "order: wants 8"),
    "slots-rows": (
        lambda c: replace(c, kv_token=ints(*range(100)), numbers={"k_in_slots": 1}),
        "k: wants shape",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_argument_is_named(on_cpu, case):  # noqa: F811
    change, message = BAD[case]
    call = plain()
    call.run()
    with pytest.raises(RuntimeError, match=message):
        change(call).run()


BAD_SMALL = {
    "q-dtype": (tensor("q", torch.Tensor.bfloat16), "q: wants int8"),
    "no-q-scale": (given("q_scale", lambda: None), "q_scale: wanted"),
    "q-scale-size": (tensor("q_scale", lambda x: x[..., :1].contiguous()), "q_scale: wants 8"),
    "k-dtype": (tensor("k", torch.Tensor.bfloat16), "k: wrong dtype"),
    "no-k-scale": (given("k_scale", lambda: None), "k_scale: wanted"),
    "k-scale-size": (tensor("k_scale", lambda x: x[..., :1].contiguous()), "k_scale: wants 4"),
    "tokens": (number(k_in_slots=0), "quantised rows are slots"),
    "v-dtype": (tensor("v", torch.Tensor.bfloat16), "v: wants"),
    "v-size": (tensor("v", lambda x: x[:, :, :1].contiguous()), "v: wants 16384"),
    "v-misaligned": (tensor("v", misaligned), "v: wants memory at"),
    "no-v-scale": (given("v_scale", lambda: None), "v_scale: wanted"),
    "v-scale-size": (tensor("v_scale", lambda x: x[..., :8].contiguous()), "v_scale: wants 256"),
    "no-q-rows": (number(q_rows=0), "q_rows, kv_rows: must be >= 1"),
    "kv-rows": (number(kv_rows=32), "kv_rows_per_scale of 64"),
    "block-kv": (number(block_kv=96), "kv_rows: must divide blocks of 96"),
    "pv-alone": (number(qk=0), "together with Q and K"),
    "fp8": (number(pv=3), "FP8"),
}


@pytest.mark.parametrize("case", BAD_SMALL)
def test_a_bad_argument_of_small_numbers_is_named(on_cpu, case):  # noqa: F811
    change, message = BAD_SMALL[case]
    call = small()
    call.run()
    with pytest.raises(RuntimeError, match=message):
        change(call).run()


def test_lists_that_make_no_sense_stay_inside_their_memory(on_cpu):  # noqa: F811
    """Values lie on the device, where nobody can check them: kernels pass over nonsense."""
    call = plain()
    call.kv_indices = ints(-5, 2**31 - 1, 1, 0)
    for offsets in ((-7, 2**31 - 1, 3), (5, 1, -(2**31)), (0, 4, 4)):
        call.row_offsets = ints(*offsets)
        call.num_full = ints(-1, 2**31 - 1)
        call.q_token = ints(*range(S // 2), *([-1] * 32), *([2**31 - 1] * 32))
        call.kv_token = ints(*range(S // 2), *([-9] * 32), *([2**31 - 1] * 32))
        call.out.zero_()
        call.run()
        assert torch.isfinite(call.out).all()


def test_finish_checks_its_arguments(on_cpu):  # noqa: F811
    acc, high, total = torch.randn(1, 2, 8, 16), torch.zeros(1, 2, 8), torch.ones(1, 2, 8)
    out, lse = torch.empty(1, 2, 8, 16, dtype=torch.float16), torch.empty(1, 2, 8)
    finish = torch.ops.permattn_native.cuda_finish
    total[0, 0, 3], high[0, 0, 3], acc[0, 0, 3] = 0.0, -torch.inf, 0.0
    finish(acc, high, total, out, lse)
    assert (out[0, 0, 3] == 0).all() and lse[0, 0, 3] == -torch.inf
    torch.testing.assert_close(out[0, 1], acc[0, 1].half())
    for bad, message in (
        ((acc[..., :8].contiguous(), high, total, out, lse), "acc: wants 256"),
        ((acc, high[..., 1:].contiguous(), total, out, lse), "high: wants 16"),
        ((acc, high, total.double(), out, lse), "total: wants 16"),
        ((acc, high, total, out.float(), lse), "out: wants bfloat16 or float16"),
        ((acc, high, total, out, lse.mT), "lse: wants 16 contiguous"),
        ((acc, high, total, misaligned(out), lse), "out: wants memory at"),
    ):
        with pytest.raises(RuntimeError, match=message):
            finish(*bad)


def prepared(**changes):
    """cuda_prepare of four heads of 100 tokens of 64 columns, in groups of 64."""
    x = floats(1, 4, 100, 64)
    known = {
        "x": x,
        "token_of_slot": None,
        "tensors": [],
        "ints": [],
        "floats": [],
        "mean": None,
        "factor": None,
        "against": None,
        "dots": None,
        "format": 1,
        "rows_per_scale": 64,
        "per_column": False,
        "layout": 0,
        "rows": torch.empty(1, 4, 100, 64, dtype=torch.int8),
        "scales": torch.empty(1, 4, 2),
    }
    torch.ops.permattn_native.cuda_prepare(*{**known, **changes}.values())


BAD_PREPARE = {
    "x-axes": ({"x": floats(4, 100, 64)}, "x: wants 4 axes"),
    "x-dtype": ({"x": torch.zeros(1, 4, 100, 64, dtype=torch.int8)}, "float32, bfloat16"),
    "x-width": ({"x": floats(1, 4, 100, 264)}, "1 to 256 columns"),
    "format": ({"format": 4}, "no format of number 4"),
    "group": ({"rows_per_scale": 0}, "rows_per_scale: wants 1 to 128"),
    "long-group": ({"rows_per_scale": 129}, "rows_per_scale: wants 1 to 128"),
    "layout": ({"layout": 9}, "no layout of number 9"),
    "cpu-layout": ({"layout": 3}, "layout: wants rows"),
    "nibbles-of-int8": ({"layout": 5}, "rows of nibbles are of INT4"),
    "rows-dtype": ({"rows": floats(1, 4, 100, 64)}, "rows: wrong dtype"),
    "rows-size": ({"rows": torch.empty(1, 4, 99, 64, dtype=torch.int8)}, "rows: want"),
    "rows-heads": ({"rows": torch.empty(1, 6, 100, 64, dtype=torch.int8)}, "multiple of H"),
    "rows-misaligned": (
        {"rows": misaligned(torch.zeros(1, 4, 100, 64, dtype=torch.int8))},
        "rows: wants memory at",
    ),
    "fragments": (
        {"layout": 6, "rows": torch.empty(1, 4, 2, 64, 32, dtype=torch.int8), "per_column": True},
        "rows: want",
    ),
    "no-scales": ({"scales": None}, "scales: wanted"),
    "scales-size": ({"scales": torch.empty(1, 4, 1)}, "scales: wants 8"),
    "column-scales": ({"per_column": True}, "scales: wants 512"),
    "mean-size": ({"mean": torch.zeros(1, 4, 63)}, "mean: wants 256"),
    "factor-dtype": ({"factor": torch.zeros(1, 4, 64).half()}, "factor: wants 256"),
    "no-dots": ({"against": torch.zeros(1, 2, 64)}, "want both or none"),
    "dots-size": ({"against": torch.zeros(1, 2, 64), "dots": torch.zeros(1, 4, 99)}, "dots: wants"),
    "against-heads": (
        {"against": torch.zeros(1, 3, 64), "dots": torch.zeros(1, 4, 100)},
        "heads that divide",
    ),
    "token-dtype": (
        {"token_of_slot": torch.zeros(1, 1, 100)},
        "token_of_slot: wants int32",
    ),
    "token-heads": (
        {"token_of_slot": torch.zeros(1, 3, 100, dtype=torch.int32)},
        "leading axes must be 1 or",
    ),
    "prologue": ({"ints": [1, 1, 0, 0, 0, 0, 0, 0], "floats": [1e-6]}, "prologue: too few"),
}


@pytest.mark.parametrize("case", BAD_PREPARE)
def test_a_bad_argument_of_prepare_is_named(on_cpu, case):  # noqa: F811
    prepared()
    changes, message = BAD_PREPARE[case]
    with pytest.raises(RuntimeError, match=message):
        prepared(**changes)


PLANS = {
    "three-parts": lambda: split_plan(150, 170, heads=HQ),
    "two-query-orders": lambda: crossed_plan(140, 150),
    "permuted": lambda: random_plan(
        130, 190, heads=HQ, block_q=32, block_kv=16, permuted=True, holes=5
    ),
}


def arguments(plan: AttnPlan, spec: QuantSpec = QuantSpec(), head_dim: int = 64) -> FwdArgs:
    generator = torch.Generator().manual_seed(3)

    def draw(heads: int, tokens: int) -> Tensor:
        return torch.randn(1, heads, tokens, head_dim, generator=generator).bfloat16()

    q = draw(HQ, plan.num_q_tokens)
    k, v = draw(HKV, plan.num_kv_tokens), draw(HKV, plan.num_kv_tokens)
    return FwdArgs(q, k, v, AttnPlan(plan.parts, spec, validate=False), 0.125)


def quantisable() -> AttnPlan:
    """Orders of every head, blocks of 64, a band."""
    return random_plan(192, 200, heads=HQ, band=TokenBand(-150), permuted=True, holes=8)


def closeness(args: FwdArgs, made: tuple[Tensor, Tensor]) -> float:
    """Largest error of out against float32, or the reference's own numbers where quantised."""
    q, k, v = (x if args.plan.quant.is_quantised else x.float() for x in (args.q, args.k, args.v))
    out, lse = reference.forward(replace(args, q=q, k=k, v=v))
    assert torch.equal(torch.isinf(lse), torch.isinf(made[1]))
    return float((out.float() - made[0].float()).abs().max())


@pytest.mark.parametrize("plan", PLANS)
def test_a_plan_goes_through_the_backend_and_nothing_else_is_written(on_cpu, plan):  # noqa: F811
    args = arguments(PLANS[plan]())
    tensors = [args.q, args.k, args.v, *pack_plan(args.plan)[0]]
    before = [x.clone() for x in tensors]
    made = cuda.forward(args)
    assert all(map(torch.equal, tensors, before))
    assert closeness(args, made) < 0.02
    again = cuda.forward(args)
    assert all(map(torch.equal, made, again))


@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("change", [misaligned, oddly_strided], ids=["misaligned", "odd-strides"])
def test_odd_memory_is_copied_not_refused(on_cpu, name, change):  # noqa: F811
    args = arguments(PLANS["permuted"]())
    want = cuda.forward(args)
    odd = change(getattr(args, name))
    assert all(map(torch.equal, want, cuda.forward(replace(args, **{name: odd}))))


def test_heads_innermost_come_back_so(on_cpu):  # noqa: F811
    args = arguments(PLANS["three-parts"]())
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (args.q, args.k, args.v))
    out, lse = cuda.forward(replace(args, q=q, k=k, v=v))
    assert out.transpose(1, 2).is_contiguous()
    want = cuda.forward(args)
    assert torch.equal(out, want[0]) and torch.equal(lse, want[1])


@pytest.mark.parametrize("capability", [80, 89])
@pytest.mark.parametrize(
    "spec",
    [
        QuantSpec("int8", "none", 32, 16, smooth_k=True, balance=True),
        QuantSpec("int8", "int8", smooth_k=True),
        QuantSpec("int4", "int4", smooth_k=True),
    ],
    ids=lambda s: f"{s.qk}-{s.pv}",
)
def test_small_numbers_are_the_references(on_cpu, spec, capability):  # noqa: F811
    on_cpu(capability)
    args = arguments(quantisable(), spec)
    norm = RowTransform("rms", torch.rand(64) + 0.5)
    args = replace(args, prologue=Prologue(norm, norm))
    assert cuda.why_not(Problem.of(args.q, args.k, args.v, args.plan, needs_grad=False)) is None
    assert closeness(args, cuda.forward(args)) < 0.02


def test_sorted_rows_make_the_same_numbers(on_cpu, monkeypatch):  # noqa: F811
    args = arguments(random_plan(300, 200, heads=HQ, block_q=16, block_kv=16))
    monkeypatch.setattr(launch, "SORTED_TILES", (10**9, 0))
    want = cuda.forward(args)
    monkeypatch.setattr(launch, "SORTED_TILES", (0, 10**9))
    assert all(map(torch.equal, want, cuda.forward(args)))


@pytest.mark.parametrize("fmt", ["none", "int8", "int4", "fp8"])
def test_prepared_rows_are_the_definition_to_the_last_bit(on_cpu, fmt):  # noqa: F811
    x = floats(1, 2, 100, 72)
    rows, scale = cuda.prepare(PrepareArgs(x, fmt=fmt))
    if fmt == "none":
        assert torch.equal(rows, x) and scale.numel() == 0
        return
    want, want_scale = quantise(x, FORMATS[fmt], 64)
    assert torch.equal(rows.float(), want.float()) and torch.equal(scale, want_scale)
    assert make_rows(PrepareArgs(x, fmt=fmt)).rows.dtype == FORMATS[fmt].dtype


@pytest.mark.parametrize("plan", PLANS)
def test_opcheck(on_cpu, plan):  # noqa: F811
    args = arguments(PLANS[plan]())
    tensors, numbers = pack_plan(args.plan)
    torch.library.opcheck(
        torch.ops.permattn.sparse_attention.default,
        (args.q, args.k, args.v, tensors, numbers, [], [], [], 0.125, "cuda"),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_fullgraph_with_a_dynamic_length(on_cpu):  # noqa: F811
    graphs = 0

    def count(gm, _):
        nonlocal graphs
        graphs += 1
        return gm.forward

    @torch.compile(fullgraph=True, dynamic=True, backend=count)
    def f(q, k, v, plan):
        return pa.sparse_attention(q * 2, k, v, plan, backend="cuda") + 1

    for tokens in (100, 130, 77):
        args = arguments(pa.plan_dense(tokens, tokens, causal=True))
        want = pa.sparse_attention(args.q * 2, args.k, args.v, args.plan, backend="cuda") + 1
        assert torch.equal(f(args.q, args.k, args.v, args.plan), want)
    assert graphs <= 2


@pytest.fixture
def refusing(shim_path):  # noqa: F811
    """Makes a device say why to every launch, or lets it run again."""
    import build

    module = build.module()
    yield module.refuse_launches
    module.refuse_launches("")


FORMATS_OF_PREPARE = r"\(format int8, head dim 64, 32 rows a scale\)"
REFUSED = {
    "sm80": (80, QuantSpec(), r"cuda_attend: .* \(sm80 kernel, head dim 64, tile 64 x 64, .*none"),
    "sm90": (90, QuantSpec(), r"cuda_attend: .* \(sm90 kernel, head dim 64, tile 64 x 64, .*none"),
    "rows": (80, QuantSpec("int8", "none", 32, 32), r"cuda_prepare: .* " + FORMATS_OF_PREPARE),
}


@pytest.mark.parametrize(("capability", "spec", "message"), REFUSED.values(), ids=list(REFUSED))
def test_a_failed_launch_names_the_kernel_and_is_not_remembered(
    on_cpu,  # noqa: F811
    refusing,
    capability,
    spec,
    message,
):
    on_cpu(capability)
    # Keys of an order of their own would be moved first on 9.0.
    plan = quantisable() if capability == 80 else random_plan(192, 200, heads=HQ)
    args = arguments(plan, spec)
    want = cuda.forward(args) if capability == 80 else None
    refusing("too many resources requested for launch")
    with pytest.raises(RuntimeError, match=message) as raised:
        cuda.forward(args)
    assert "too many resources requested for launch" in str(raised.value)
    refusing("")
    if want is None:
        # What runs on the device alone is asked for without an error.
        cuda.forward(args)
        return
    for a, b in zip(cuda.forward(args), want, strict=True):
        assert torch.equal(a, b)


def test_a_failed_launch_of_a_probe_or_of_lists_names_it(on_cpu, refusing):  # noqa: F811
    q = torch.zeros(1, 1, 4, 64).bfloat16()
    first, span = torch.tensor([0]).int(), torch.tensor([[0, 4]]).int()
    refusing("no kernel image is available")
    with pytest.raises(RuntimeError, match="cuda_probe: no kernel image is available"):
        pa.probe.probe_mass(q, q, first_position=first, key_range=span, backend="cuda")
    with pytest.raises(RuntimeError, match="cuda_compact: no kernel image is available"):
        BlockIndex.from_block_mask(torch.ones(2, 2, dtype=torch.bool), 64, 64)


def test_no_device_no_call(on_cpu, monkeypatch):  # noqa: F811
    monkeypatch.setattr(cuda.device, "load_kernels", lambda: "there is no library")
    with pytest.raises(RuntimeError, match="backend 'cuda': there is no library"):
        cuda.forward(arguments(PLANS["permuted"]()))
