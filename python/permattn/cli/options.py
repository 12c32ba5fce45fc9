"""Options that several commands share, checked."""

from __future__ import annotations

import torch

from permattn.backends import BACKENDS, resolve
from permattn.cli.errors import UserError
from permattn.core import Problem

DTYPES = {
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp16": torch.float16,
    "float16": torch.float16,
    "fp32": torch.float32,
    "float32": torch.float32,
}


def parse_dtype(text: str) -> torch.dtype:
    if text not in DTYPES:
        raise UserError(f"--dtype: wants bf16, fp16 or fp32, got {text!r}")
    return DTYPES[text]


def parse_device(text: str, *, must_exist: bool) -> torch.device:
    """Raises UserError for a device that torch does not know, or does not have here."""
    try:
        device = torch.device(text)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device: wants cpu, cuda or cuda:N, got {text!r}")
    if must_exist and device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise UserError(f"--device {text}: this machine has {count} CUDA devices; use cpu")
    return device


def check_backend(problem: Problem, backend: str) -> str:
    """The backend that will run. Raises UserError where none, or the named one, cannot."""
    if backend != "auto" and backend not in BACKENDS:
        raise UserError(f"--backend: wants auto, {', '.join(BACKENDS)}, got {backend!r}")
    try:
        return resolve(problem, backend)
    except NotImplementedError as e:
        raise UserError(f"--backend {backend}: {e}") from e
