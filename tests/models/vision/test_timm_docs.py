"""Every Python block of docs/vision.md runs, each as a program of its own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from .torchvision_stand_in import import_timm

PAGE = Path(__file__).resolve().parents[3] / "docs" / "vision.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.M | re.S)

import_timm()


def test_the_page_has_blocks():
    text = "\n".join(BLOCKS)
    assert len(BLOCKS) >= 7
    for name in ("timm.create_model", "UperNetForSemanticSegmentation", "load_biformer"):
        assert name in text


@pytest.mark.parametrize("block", BLOCKS, ids=[f"block-{i}" for i in range(len(BLOCKS))])
def test_block_runs(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    exec(compile(block, str(PAGE), "exec"), {"__name__": "__main__"})
