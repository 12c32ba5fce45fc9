"""PARO plans on disk: one safetensors file; orders as bytes, masks as packed bits."""

from __future__ import annotations

import json
import os
from dataclasses import asdict

import torch

from permattn.patterns.paro import ParoOrigin, ParoPlan
from permattn.plan_file import read_tensors, write_tensors

FORMAT = 1
_KEY = "permattn_paro"


def save_paro(plan: ParoPlan, path: str | os.PathLike[str]) -> None:
    """Writes a plan; the file appears whole or not at all.

    Args:
        plan: any plan.
        path: the file to write, usually `*.paro`.

    Raises:
        RuntimeError: the safetensors package is missing.
    """
    tensors = {
        "axis_orders": plan.axis_orders,
        "packed_masks": plan.packed_masks,
        "empty_heads": plan.empty_heads,
    }
    if plan.native_cells is not None:
        tensors["native_cells"] = plan.native_cells.to(torch.int32)
    if plan.recall is not None:
        tensors["recall"] = plan.recall.float()
    header = {
        "format": FORMAT,
        "grid": list(plan.grid),
        "text": plan.text,
        "sigma_edges": list(plan.sigma_edges),
        "block": list(plan.block),
        "origin": asdict(plan.origin),
    }
    write_tensors(path, tensors, {_KEY: json.dumps(header)})


def load_paro(path: str | os.PathLike[str]) -> ParoPlan:
    """Reads a plan that `save_paro` wrote, and checks every value of it.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a damaged or foreign file, another format version, or values that fit no plan.
        RuntimeError: the safetensors package is missing.
    """
    tensors, metadata = read_tensors(path)
    if _KEY not in metadata:
        raise ValueError(f"{path}: a safetensors file, but not one with a PARO plan")
    try:
        header = json.loads(metadata[_KEY])
        if header["format"] != FORMAT:
            raise ValueError(f"PARO format {header['format']!r}, this version reads {FORMAT}")
        return ParoPlan(
            grid=_sizes(header["grid"]),
            text=header["text"],
            axis_orders=tensors["axis_orders"],
            packed_masks=tensors["packed_masks"],
            sigma_edges=tuple(map(float, header["sigma_edges"])),
            empty_heads=tensors["empty_heads"],
            origin=ParoOrigin(**header["origin"]),
            block=_sizes(header["block"]),
            native_cells=tensors.get("native_cells"),
            recall=tensors.get("recall"),
        )
    except (KeyError, TypeError, IndexError, AttributeError, json.JSONDecodeError) as e:
        raise ValueError(f"{path}: damaged PARO header ({type(e).__name__}: {e})") from None
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from None


def _sizes(values: list) -> tuple:
    if not all(isinstance(x, int) and not isinstance(x, bool) for x in values):
        raise ValueError(f"sizes must be integers, got {values}")
    return tuple(values)
