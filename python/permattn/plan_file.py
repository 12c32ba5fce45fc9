"""Plans on disk: one safetensors file, its header a versioned JSON text."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from permattn.core.block_index import BlockIndex
from permattn.core.permutation import Permutation
from permattn.core.plan import AttnPart, AttnPlan, TokenBand
from permattn.core.quant import QuantSpec

FORMAT = 1
_KEY = "permattn_plan"


def save_plan(plan: AttnPlan, path: str | os.PathLike[str]) -> None:
    """Writes a plan; shared permutations are stored once. The file appears whole or not at all.

    Args:
        plan: any plan, on any device.
        path: the file to write, usually `*.safetensors`.

    Raises:
        RuntimeError: the safetensors package is missing.
    """
    perms, numbers = plan.distinct_permutations()
    tensors: dict[str, Tensor] = {}
    parts = []
    for i, (part, (q, kv)) in enumerate(zip(plan.parts, numbers, strict=True)):
        index = part.index
        parts.append(
            {
                "q_perm": q,
                "kv_perm": kv,
                "block_q": index.block_q,
                "block_kv": index.block_kv,
                "min_lag": part.band.min_lag,
                "max_lag": part.band.max_lag,
            }
        )
        tensors[f"parts.{i}.kv_indices"] = index.kv_indices
        tensors[f"parts.{i}.row_offsets"] = index.row_offsets
        tensors[f"parts.{i}.kv_num_full"] = index.kv_num_full
    for i, perm in enumerate(perms):
        tensors[f"perms.{i}.token_of_slot"] = perm.token_of_slot
    header = {
        "format": FORMAT,
        "num_tokens": [perm.num_tokens for perm in perms],
        "is_identity": [perm.is_identity for perm in perms],
        "parts": parts,
        "quant": asdict(plan.quant),
    }
    write_tensors(path, tensors, {_KEY: json.dumps(header)})


def load_plan(path: str | os.PathLike[str], device: torch.device | str | None = None) -> AttnPlan:
    """Reads a plan that `save_plan` wrote, and checks every value of it.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a damaged or foreign file, another format version, or values that fit no plan.
        RuntimeError: the safetensors package is missing.
    """
    tensors, metadata = read_tensors(path)
    if _KEY not in metadata:
        raise ValueError(f"{path}: a safetensors file, but not one with a permattn plan")
    try:
        plan = _build(json.loads(metadata[_KEY]), tensors)
    except (KeyError, TypeError, IndexError, AttributeError, json.JSONDecodeError) as e:
        raise ValueError(f"{path}: damaged plan header ({type(e).__name__}: {e})") from None
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from None
    return plan if device is None else plan.to(device)


def _build(header: dict, tensors: dict[str, Tensor]) -> AttnPlan:
    if header["format"] != FORMAT:
        raise ValueError(f"plan format {header['format']!r}, this version reads {FORMAT}")
    perms = []
    for i, (num_tokens, is_identity) in enumerate(
        zip(header["num_tokens"], header["is_identity"], strict=True)
    ):
        if isinstance(num_tokens, bool) or not isinstance(num_tokens, int) or num_tokens < 0:
            raise ValueError(f"num_tokens[{i}]: wants an integer >= 0, got {num_tokens!r}")
        perm = Permutation.from_token_of_slot(tensors[f"perms.{i}.token_of_slot"], num_tokens)
        perms.append(Permutation(perm.token_of_slot, perm.slot_of_token, bool(is_identity)))
    parts = []
    for i, part in enumerate(header["parts"]):
        index = BlockIndex(
            tensors[f"parts.{i}.kv_indices"],
            tensors[f"parts.{i}.row_offsets"],
            tensors[f"parts.{i}.kv_num_full"],
            part["block_q"],
            part["block_kv"],
        )
        band = TokenBand(part["min_lag"], part["max_lag"])
        parts.append(AttnPart(perms[part["q_perm"]], perms[part["kv_perm"]], index, band))
    return AttnPlan(tuple(parts), QuantSpec(**header["quant"]))


def write_tensors(
    path: str | os.PathLike[str], tensors: dict[str, Tensor], metadata: dict[str, str]
) -> None:
    """Writes a safetensors file that appears whole or not at all."""
    safetensors = _safetensors()
    stored = {name: x.detach().cpu().contiguous().clone() for name, x in tensors.items()}
    target = Path(path)
    partial = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        safetensors.torch.save_file(stored, partial, metadata=metadata)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it cannot be read.
        RuntimeError: the safetensors package is missing.
    """
    safetensors = _safetensors()
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no plan file at {path}")
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as f:
            tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
            return tensors, f.metadata() or {}
    except Exception as e:  # the package raises its own types for every kind of damage
        raise ValueError(f"{path}: not a readable safetensors file ({e})") from None


def _safetensors() -> ModuleType:
    try:
        import safetensors.torch
    except ImportError as e:
        raise RuntimeError(
            f"plan files need the safetensors package: pip install 'permattn[io]' ({e})"
        ) from None
    return safetensors
