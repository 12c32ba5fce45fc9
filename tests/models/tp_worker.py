"""Run by torchrun on two ranks: a tensor-parallel decoder, patched, against the whole one.

Prints one line per rank that `test_tensor_parallel` reads.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from permattn.models import patch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

# torchrun starts this file as a script, so its package has to be put in reach by hand.
sys.path.insert(0, str(Path(__file__).parents[1]))
from models.exact import plan_everything
from models.tiny import BATCH
from models.tiny_models import build


def main() -> None:
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    case = build("qwen2_5_vl", BATCH)
    with torch.no_grad():
        want = case.model(**case.inputs).logits
    mesh = init_device_mesh("cpu", (2,))
    for layer in case.model.get_decoder().layers:
        columns = {name: ColwiseParallel() for name in ("q_proj", "k_proj", "v_proj")}
        parallelize_module(layer.self_attn, mesh, {**columns, "o_proj": RowwiseParallel()})
    sinks = []

    def planner(q, k, rows, heads, **pads):
        sinks.append([head.sink for head in heads])
        return plan_everything(q, k, rows, heads, **pads)

    heads = [{"pattern": "a_shape", "sink": 10 + n} for n in range(4)]
    config = {"min_q_len": 2, "layers": {"0": {"heads": heads}}}
    with torch.no_grad(), patch(case.model, config, planner=planner) as handle:
        got = case.model(**case.inputs).logits
        sparse = handle.stats["sparse"]
    error = (got - want)[case.real].abs().max().item()
    line = {"rank": dist.get_rank(), "sinks": sinks[0], "error": error, "sparse": sparse}
    print("\nresult " + json.dumps(line), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
