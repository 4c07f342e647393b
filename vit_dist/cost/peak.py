"""What a device can do at best, measured on it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch


def settle() -> float:
    """The time in seconds, once the device has done all that it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def matmul_flops(device: torch.device, precision: str) -> float:
    """FLOP/s of square matrix products: the fastest of four times five, in half a second on a CPU core.

    `precision` is that of a run: fp32, bf16, fp16.
    """
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]
    side = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return 2 * side**3 / _fastest(lambda: a @ b)


def _fastest(act: Callable[[], Any]) -> float:
    best = math.inf
    for _ in range(4):
        begin = settle()
        for _ in range(5):
            act()
        best = min(best, (settle() - begin) / 5)
    return best
