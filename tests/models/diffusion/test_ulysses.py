"""Context parallelism of diffusers: two processes compute what one does, to the last bit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from permattn.models.diffusion.parallel import heads_of_rank, why_not_ulysses
from permattn.models.diffusion.store import interleaved

from .tiny import build, plan_for

WORKER = Path(__file__).with_name("ulysses_worker.py")


def test_two_ranks_equal_one():
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("needs torch.distributed with gloo")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run([*command, str(WORKER)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("result ")]
    results = [json.loads(line.removeprefix("result ")) for line in lines]
    assert sorted(r["rank"] for r in results) == [0, 1]
    for result in results:
        for name in ("wan", "flux", "qwen_image"):
            found = result[name]
            assert found["equal"], name
            assert found["differs"] > 1e-3
            assert found["restored"] <= 1e-5
            assert found["stats"] == {"sparse": 2, "dense": {}}
        assert "ring attention gives a rank a part of the keys" in result["ring"]["error"]
        assert result["ring"]["said"] == 1
        assert result["ring"]["sparse"] == 0
        assert result["ring"]["distance"] <= 1e-5


@pytest.mark.parametrize("name", ["flux", "hunyuan_video"], ids=["prefix", "suffix"])
def test_where_tokens_stand_after_the_all_to_all(name: str):
    case = build(name)
    plan = plan_for(case)
    plain = [f"t{i}" for i in range(8)], [f"v{i}" for i in range(96)]
    text, vision = plain
    order = text + vision if name == "flux" else vision + text
    shares = []
    for rank in range(4):
        t, v = text[2 * rank : 2 * rank + 2], vision[24 * rank : 24 * rank + 24]
        shares += t + v if name == "flux" else v + t
    rows = interleaved(plan, 8, 4)
    assert [shares[row] for row in rows] == order


def test_what_cannot_run_says_why():
    def config(**fields):
        return SimpleNamespace(
            **({"ring_degree": 1, "ulysses_degree": 2, "ulysses_anything": False} | fields)
        )

    assert why_not_ulysses(config(), 4) is None
    assert "ring attention" in why_not_ulysses(config(ring_degree=2), 4)
    assert "unevenly" in why_not_ulysses(config(ulysses_anything=True), 4)
    assert "3 heads do not divide" in why_not_ulysses(config(), 3)
    mesh = SimpleNamespace(get_local_rank=lambda: 1)
    assert heads_of_rank(config(_ulysses_mesh=mesh), 4) == (2, 4)
