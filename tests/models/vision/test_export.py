"""torch.compile, torch.export, tracing and ONNX of modules and networks."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing
from permattn.models.vision import set_backend

from .test_attention_modes import CASES, attention, maps
from .test_networks import images, small

ONE_EACH = {"depths": (1, 1, 1, 1)}


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# Sizes B, H, W that differ from one another: equal ones would be taken for one symbol.
@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("hard", [(2, 6, 8), (3, 8, 10), (5, 20, 12)]),
        ("legacy", [(2, 7, 5), (3, 8, 10), (5, 20, 13)]),
        ("mask", [(2, 7, 5), (3, 8, 10), (5, 20, 13)]),
    ],
)
def test_one_graph_for_every_batch_and_map(name: str, sizes: list[tuple[int, int, int]]):
    module = attention(**CASES[name][0])
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch, height, width in sizes:
            x = maps(height, width)[:1].repeat(batch, 1, 1, 1)
            torch.testing.assert_close(compiled(x), module(x), rtol=1e-10, atol=1e-10)


def test_compiled_module_has_the_gradients_of_any_batch():
    module = attention(**CASES["hard"][0])
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (2, 3):
        x = maps(6, 8)[:1].repeat(batch, 1, 1, 1).requires_grad_()
        (ours,) = torch.autograd.grad(compiled(x).sin().sum(), x)
        (theirs,) = torch.autograd.grad(module(x).sin().sum(), x)
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_network_compiles_whole_and_trains():
    net, x = small(**ONE_EACH).train(), images()
    want = small(**ONE_EACH).train()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    compiled(x).square().sum().backward()
    want(x).square().sum().backward()
    # Biases before a batch norm have no gradient but roundings of the others' size.
    size = max(float(p.grad.abs().max()) for p in want.parameters())
    for a, b in zip(net.parameters(), want.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5 * size)


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_export_of_a_network_takes_any_batch(backend: str):
    net = set_backend(small(**ONE_EACH).eval(), backend)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(net, (images(),), dynamic_shapes=({0: batch},))
    x = images(batch=5)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), net(x), rtol=1e-5, atol=1e-5)
    ours = [str(n.target) for n in program.graph.nodes if "permattn" in str(n.target)]
    # Three routed stages, each a routing and an attention.
    assert len(ours) == (6 if backend == "auto" else 0)


def test_tracing_of_a_network_of_plain_operators():
    net = set_backend(small("stl-nchw", **ONE_EACH).eval(), "torch")
    with warnings.catch_warnings(), torch.no_grad():
        # Sizes become constants, which tracing warns of.
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        traced = torch.jit.trace(net, (images(72),), check_trace=False)
        x = images(72, batch=3)
        torch.testing.assert_close(traced(x), net(x), rtol=1e-5, atol=1e-5)


def test_onnx_by_plain_operators(tmp_path: Path):
    """The padded network: soft spots of exporters are padding, sorting and gathering."""
    for name in ("onnx", "onnxscript"):
        pytest.importorskip(name, reason=f"{name} is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    net = set_backend(small("padded", **ONE_EACH).eval(), "torch")
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.onnx.export(
        net, (images(72),), dynamo=True, dynamic_shapes=({0: batch},), verbose=False
    )
    assert program is not None
    program.save(tmp_path / "net.onnx")
    session = runtime.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
    x = images(72, batch=3)
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        want = small("padded", **ONE_EACH).eval()(x)
    torch.testing.assert_close(torch.from_numpy(got), want, rtol=1e-4, atol=1e-4)


def test_set_backend_reaches_every_module_and_names_what_has_none():
    net = set_backend(small(), "reference")
    named = [m.backend for m in net.modules() if hasattr(m, "backend")]
    assert named == ["reference"] * 4
    with pytest.raises(ValueError, match="module: Linear holds no bi-level routing attention"):
        set_backend(torch.nn.Linear(2, 2), "auto")
