"""Block sums of a model, added up sample by sample: in memory, or in a folder that can be resumed.

What is kept has one number per block: nothing grows with the square of the tokens themselves.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from permattn.calibrate.state import StateError

_KEY = "permattn_block_sums"


@dataclass
class _Cell:
    """Sums of one (bin, layer) and what went into them; `sums` is dropped where a file has them."""

    sums: Tensor | None
    count: int
    samples: list[str]


class BlockSums:
    """Sums of attention over blocks, per bin and layer.

    Args:
        folder: where to keep them, a file per bin and layer that appears whole or not at all; None
            = in memory.
        shape: bins, layers, heads, query blocks, key blocks.

    Raises:
        StateError: the folder has damaged files or files of another shape.
    """

    def __init__(self, folder: Path | None, shape: tuple[int, int, int, int, int]) -> None:
        self._folder, self.shape = folder, shape
        self._cells: dict[tuple[int, int], _Cell] = {}

    def has(self, bin: int, layer: int, sample: str) -> bool:
        """Whether this sample went in already."""
        return sample in self._cell(bin, layer).samples

    def add(self, bin: int, layer: int, sample: str, sums: Tensor) -> None:
        """Adds the sums of one call.

        Args:
            sample: its name.
            sums: float32 [B, H, nq, nk]; every batch row counts as one.

        Raises:
            ValueError: sums that are not finite.
            StateError: the folder cannot be written.
        """
        if not bool(sums.isfinite().all()):
            raise ValueError(f"layer {layer}: attention is not finite at {sample}")
        cell = self._cell(bin, layer)
        before = self._read(bin, layer)[0] if cell.sums is None and cell.count else cell.sums
        total = sums.float().sum(0).cpu()
        total = total if before is None else before + total
        count, samples = cell.count + sums.shape[0], [*cell.samples, sample]
        if self._folder is not None:
            self._write(bin, layer, total, count, samples)
        self._cells[bin, layer] = _Cell(None if self._folder is not None else total, count, samples)

    def mean(self, bin: int, layer: int) -> Tensor:
        """float32 [H, nq, nk]: the mean over all samples.

        Raises:
            ValueError: no sample reached this bin and layer.
        """
        cell = self._cell(bin, layer)
        if not cell.count:
            raise ValueError(f"layer {layer} was never seen at the steps of bin {bin}")
        sums = self._read(bin, layer)[0] if cell.sums is None else cell.sums
        return sums / cell.count

    def _cell(self, bin: int, layer: int) -> _Cell:
        if (bin, layer) not in self._cells:
            cell = _Cell(None, 0, [])
            if self._folder is not None and self._path(bin, layer).exists():
                _, cell.count, cell.samples = self._read(bin, layer)
            self._cells[bin, layer] = cell
        return self._cells[bin, layer]

    def _path(self, bin: int, layer: int) -> Path:
        assert self._folder is not None
        return self._folder / f"sums.{bin}.{layer}.safetensors"

    def _read(self, bin: int, layer: int) -> tuple[Tensor, int, list[str]]:
        from safetensors import SafetensorError, safe_open

        path = self._path(bin, layer)
        try:
            with safe_open(path, framework="pt") as f:
                facts = json.loads(f.metadata()[_KEY])
                sums = f.get_tensor("sums")
            count, samples = int(facts["count"]), list(map(str, facts["samples"]))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as e:
            raise StateError(f"state {path}: damaged ({type(e).__name__}); remove it") from e
        if sums.shape != self.shape[2:]:
            raise StateError(
                f"state {path}: wants sums {list(self.shape[2:])}, got {list(sums.shape)}; remove "
                "it"
            )
        return sums, count, samples

    def _write(self, bin: int, layer: int, sums: Tensor, count: int, samples: list[str]) -> None:
        from safetensors.torch import save_file

        path = self._path(bin, layer)
        part = path.with_suffix(".part")
        facts = json.dumps({"count": count, "samples": samples})
        try:
            save_file({"sums": sums.contiguous()}, part, {_KEY: facts})
            os.replace(part, path)
        except OSError as e:
            raise StateError(f"state {self._folder}: cannot be written ({e.strerror})") from e
        finally:
            part.unlink(missing_ok=True)
