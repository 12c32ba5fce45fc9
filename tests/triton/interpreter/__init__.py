"""Triton's CPU interpreter, repaired and made strict. Import it before any kernel is launched.

`repairs` makes bfloat16, float8 and int8 arithmetic right; `memory_checker` makes every launch
report addresses outside its tensors and races between its programs. Works with Triton 3.6 and 3.9.
"""

import os

if os.environ.get("TRITON_INTERPRET") != "1":
    raise RuntimeError("set TRITON_INTERPRET=1 before triton is imported for the first time")

from interpreter import memory_checker, repairs

repairs.install()
CHECKER = memory_checker.install()
KernelMemoryError = memory_checker.KernelMemoryError

__all__ = ["CHECKER", "KernelMemoryError"]
