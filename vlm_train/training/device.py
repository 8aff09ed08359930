"""What a device can do and what it has held."""

from __future__ import annotations

import ctypes
import sys

import torch

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc's malloc.h

PEAKS = (
    ("GB200", 2500.0), ("B200", 2250.0), ("GH200", 989.0), ("H200", 989.0), ("H100 PCIe", 756.0), ("H100", 989.0),
    ("H800", 989.0), ("H20", 148.0), ("A100", 312.0), ("A800", 312.0), ("L40S", 362.0), ("L40", 181.0), ("L4", 121.0),
    ("A40", 150.0), ("A10", 125.0), ("RTX 4090", 165.0), ("RTX 3090", 71.0), ("MI300X", 1307.0), ("MI250X", 383.0),
)  # fmt: skip
"""Part of a device's name -> its dense bf16 TFLOP/s in the makers' data sheets; the first that fits counts."""


def peak_tflops(device: torch.device) -> float | None:
    """Dense bf16 TFLOP/s of a GPU, or None where they are not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAKS if part in name), None)


def peak_memory(device: torch.device) -> float:
    """Most bytes that this process held so far: of a GPU's allocator, else of its own memory."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return 0.0
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


def keep_freed_memory() -> None:
    """Let glibc keep what a step frees for the next one, in place of giving it back and having it cleared again: that
    is 3 % of a CPU step of 0.2 s. Elsewhere nothing happens."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(_MMAP_THRESHOLD, 32 * 2**20)  # the most it takes; larger ones are mapped, and given back, one by one
    mallopt(_TRIM_THRESHOLD, 2**31 - 1)
