"""Small kernels around a few lines of PTX, for tests of single instructions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import ptxsim

HEAD = ".version 8.6\n.target sm_90a\n.address_size 64\n"
REGISTERS = """
    .reg .pred %p<64>;
    .reg .b16 %h<256>;
    .reg .b32 %r<512>;
    .reg .f32 %f<512>;
    .reg .b64 %d<128>;
"""


def kernel(body: str, parameters: Sequence[str] = (), shared: int = 0, head: str = "") -> str:
    """A module of one entry; `shared` bytes are named `buffer` and aligned to 1024."""
    declared = ",\n".join(f".param {p}" for p in parameters)
    memory = f".shared .align 1024 .b8 buffer[{shared}];" if shared else ""
    return f"{HEAD}{head}.visible .entry k({declared})\n{{{REGISTERS}{memory}\n{body}\nret;\n}}\n"


def _letter(dtype: np.dtype) -> str:
    return {2: "h", 4: "r", 8: "d"}[dtype.itemsize]


def evaluate(
    lines: str,
    inputs: Sequence[np.ndarray],
    output: Any,
    *,
    threads: int = 0,
    shared: int = 0,
    **options: Any,
) -> np.ndarray:
    """Runs lines once per thread: `$0`, `$1`, ... are the inputs' elements, `$o` the result.

    Registers are untyped, so that any instruction takes them; `$t` is the thread's number.
    """
    inputs = [np.ascontiguousarray(x) for x in inputs]
    count = threads or len(inputs[0])
    dtype = np.dtype(output)
    result = np.zeros(count, dtype)
    names = {"$t": "%r500", "$o": f"%{_letter(dtype)}101"}
    body = ["mov.u32 %r500, %tid.x;", "cvt.u64.u32 %d100, %r500;"]
    for i, x in enumerate(inputs):
        names[f"${i}"] = f"%{_letter(x.dtype)}{110 + i}"
        body += [
            f"ld.param.u64 %d101, [p{i}];",
            f"mad.lo.s64 %d102, %d100, {x.itemsize}, %d101;",
            f"ld.global.b{8 * x.itemsize} {names[f'${i}']}, [%d102];",
        ]
    for name, register in names.items():
        lines = lines.replace(name, register)
    body += [
        lines,
        "ld.param.u64 %d103, [out];",
        f"mad.lo.s64 %d104, %d100, {dtype.itemsize}, %d103;",
        f"st.global.b{8 * dtype.itemsize} [%d104], {names['$o']};",
    ]
    parameters = [f".u64 p{i}" for i in range(len(inputs))] + [".u64 out"]
    memory = [ptxsim.Region.of(x, f"input {i}", read_only=True) for i, x in enumerate(inputs)]
    ptx = kernel("\n".join(body), parameters, shared)
    ptxsim.launch(ptx, "k", 1, count, 0, [*inputs, result], memory, **options)
    return result


def numbers(dtype: Any, count: int = 96, seed: int = 0) -> np.ndarray:
    """Random numbers of a type, with its extremes and small ones among them."""
    rng, dtype = np.random.default_rng(seed), np.dtype(dtype)
    if dtype.kind == "f":
        edges = [0.0, -0.0, 1.0, -1.5, np.inf, -np.inf, np.nan, 65504.0, 1e-3]
        values = np.concatenate([edges, rng.normal(size=count - len(edges)) * 50])
        return rng.permutation(values).astype(dtype)
    info = np.iinfo(dtype)
    edges = [0, 1, info.max, info.min, info.max - 1, 7, 3]
    values = rng.integers(info.min, info.max, count - len(edges), dtype, endpoint=True)
    return rng.permutation(np.concatenate([np.array(edges, dtype), values]))
