import json

import pytest
import torch
from permattn import load_plan, save_plan
from permattn.testing import split_plan, visible_pairs
from safetensors.torch import save_file


@pytest.fixture
def path(tmp_path):
    p = tmp_path / "plan.safetensors"
    save_plan(split_plan(60, 70, heads=2), p)
    return p


def test_round_trip(path):
    plan, back = split_plan(60, 70, heads=2), load_plan(path)
    assert back.q_groups() == plan.q_groups() and back.quant == plan.quant
    assert [p.band for p in back.parts] == [p.band for p in plan.parts]
    for a, b in zip(plan.parts, back.parts, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a.tensors(), b.tensors(), strict=True))
        assert a.kv_perm.is_identity == b.kv_perm.is_identity
    assert torch.equal(visible_pairs(plan, 1, 2), visible_pairs(back, 1, 2))
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no plan file"):
        load_plan(tmp_path / "none")


@pytest.mark.parametrize("damage", ["empty", "text", "cut", "flipped"])
def test_damaged_files_raise(path, damage):
    data = bytearray(path.read_bytes())
    if damage == "flipped":
        # The first list entry of the file's tensor area becomes a huge block number.
        data[-4:] = b"\xff\xff\xff\x7f"
    else:
        data = {"empty": b"", "text": b"not a plan" * 9, "cut": data[: len(data) // 2]}[damage]
    path.write_bytes(bytes(data))
    with pytest.raises(ValueError, match=r"plan\.safetensors"):
        load_plan(path)


@pytest.mark.parametrize(
    ("header", "match"),
    [
        (None, "not one with a permattn plan"),
        ({"format": 2}, "format 2, this version reads 1"),
        ({"format": 1}, "damaged plan header"),
        ([], "damaged plan header"),
    ],
    ids=["foreign", "version", "incomplete", "list"],
)
def test_foreign_files_raise(tmp_path, header, match):
    path = tmp_path / "x.safetensors"
    metadata = {} if header is None else {"permattn_plan": json.dumps(header)}
    save_file({"x": torch.zeros(3)}, path, metadata=metadata)
    with pytest.raises(ValueError, match=match):
        load_plan(path)
