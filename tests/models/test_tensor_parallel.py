"""Head patterns are numbered globally; every rank takes its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from permattn.models.layer import local_heads
from permattn.patterns.mminference import HeadPattern
from torch import nn

from .checks import BOUND

WORKER = Path(__file__).with_name("tp_worker.py")


def test_two_ranks():
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("needs torch.distributed with gloo")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run([*command, str(WORKER)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("result ")]
    results = sorted(
        (json.loads(line.removeprefix("result ")) for line in lines), key=lambda r: r["rank"]
    )
    assert [r["sinks"] for r in results] == [[10, 11], [12, 13]]
    for result in results:
        assert result["sparse"] == 2
        assert result["error"] <= BOUND
        # Different patterns for every head: the same ones as in one process.
        for what in ("split", "replicated", "passes"):
            assert result[what] <= BOUND, what


def sharded(rank: int, ranks: int) -> nn.Module:
    module = nn.Module()
    mesh = SimpleNamespace(size=lambda: ranks, get_local_rank=lambda: rank)
    module.q_proj = SimpleNamespace(weight=SimpleNamespace(device_mesh=mesh))
    return module


HEADS = tuple(HeadPattern("a_shape", sink=n) for n in range(5))


@pytest.mark.parametrize(
    ("rank", "ranks", "num_local", "want"),
    [(0, 1, 5, [0, 1, 2, 3, 4]), (0, 2, 3, [0, 1, 2]), (1, 2, 2, [3, 4])],
    ids=["whole", "first", "last-uneven"],
)
def test_local_heads(rank, ranks, num_local, want):
    heads = local_heads(sharded(rank, ranks), HEADS, num_local)
    assert [head.sink for head in heads] == want


def test_local_heads_keep_their_boundaries():
    sub = {"text": HeadPattern("dense")}
    heads = tuple(HeadPattern("grid", sink=n, boundary="q", when=sub) for n in range(4))
    mine = local_heads(sharded(1, 2), heads, 2)
    assert mine == heads[2:]
    assert mine[0].between("text", "vision") == HeadPattern("dense")


def test_local_heads_that_do_not_add_up():
    with pytest.raises(RuntimeError, match="rank 1 of 2 wants 2 of 5 heads, got 3"):
        local_heads(sharded(1, 2), HEADS, 3)


def test_local_heads_of_an_unknown_split():
    assert local_heads(nn.Module(), HEADS[:1] * 4, 2) == HEADS[:1] * 2
    with pytest.raises(RuntimeError, match="5 head patterns, got 2 heads"):
        local_heads(nn.Module(), HEADS, 2)
