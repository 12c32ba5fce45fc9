"""Run by torchrun on two ranks: a tensor-parallel decoder, patched, against the whole one.

Prints one line per rank that `test_tensor_parallel` reads.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from permattn.models import patch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

# torchrun starts this file as a script, so its package has to be put in reach by hand.
sys.path.insert(0, str(Path(__file__).parents[1]))
from models.exact import plan_everything
from models.tiny import BATCH, Case
from models.tiny_models import build

# Four heads, all different, patterns of boundaries among them.
HEADS = [
    {"pattern": "a_shape", "local": 9, "sink": 3},
    {"pattern": "vertical_slash", "local": 5, "vertical": 20, "slash": 2},
    {
        "pattern": "grid",
        "local": 7,
        "boundary": "q",
        "when": {"text": {"pattern": "a_shape", "local": 30}},
    },
    {
        "pattern": "auto",
        "local": 8,
        "boundary": "2d",
        "when": {"text,vision": {"pattern": "a_shape", "local": 4}},
    },
]
CONFIG = {
    "min_q_len": 2,
    "layers": {"0": {"heads": HEADS}, "1": {"heads": HEADS[::-1]}},
}


def shard(case: Case, mesh: DeviceMesh) -> None:
    """Splits the heads; a single key head stays whole on every rank."""
    for layer in case.model.get_decoder().layers:
        split = ["q_proj", "k_proj", "v_proj"]
        if case.model.config.get_text_config().num_key_value_heads == 1:
            split = ["q_proj"]
        columns = {name: ColwiseParallel() for name in split}
        parallelize_module(layer.self_attn, mesh, {**columns, "o_proj": RowwiseParallel()})


def logits(case: Case) -> torch.Tensor:
    with torch.no_grad():
        return case.model(**case.inputs).logits


def error(case: Case, got: torch.Tensor, want: torch.Tensor) -> float:
    return (got - want)[case.real].abs().max().item()


def against_dense(mesh: DeviceMesh) -> dict[str, Any]:
    case = build("qwen2_5_vl", BATCH)
    want = logits(case)
    shard(case, mesh)
    sinks = []

    def planner(q, k, rows, heads, **pads):
        sinks.append([head.sink for head in heads])
        return plan_everything(q, k, rows, heads, **pads)

    heads = [{"pattern": "a_shape", "sink": 10 + n} for n in range(4)]
    config = {"min_q_len": 2, "layers": {"0": {"heads": heads}}}
    with patch(case.model, config, planner=planner) as handle:
        got = logits(case)
        sparse = handle.stats["sparse"]
    return {"sinks": sinks[0], "error": error(case, got, want), "sparse": sparse}


def against_one_process(mesh: DeviceMesh, num_kv_heads: int, **config: int) -> float:
    """Heads of different patterns: two ranks against the same patterns on the whole model."""
    case = build("qwen2_5_vl", BATCH, num_key_value_heads=num_kv_heads)
    dense = logits(case)
    with patch(case.model, CONFIG, backend="reference"):
        want = logits(case)
    assert error(case, want, dense) > 1e-3, "the patterns leave something out"
    shard(case, mesh)
    with patch(case.model, {**CONFIG, **config}, backend="reference") as handle:
        got = logits(case)
        assert handle.stats["sparse"] == 2
    return error(case, got, want)


def main() -> None:
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    line = {
        "rank": dist.get_rank(),
        **against_dense(mesh),
        "split": against_one_process(mesh, 2),
        "replicated": against_one_process(mesh, 1),
        "passes": against_one_process(mesh, 2, heads_per_pass=2),
    }
    print("\nresult " + json.dumps(line), flush=True)
    # A rank that leaves early takes the other's connection with it.
    dist.barrier()
    # gloo's teardown now and then destroys a thread that still runs, which aborts the process. All
    # is said by now, so nothing is torn down.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
