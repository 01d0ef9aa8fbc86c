"""Where and how to compute: the device, bfloat16, torch.compile."""

import os
import shutil
import time
from collections.abc import Callable
from typing import Any

import torch


def default_device() -> torch.device:
    """Choose CUDA, then Apple's MPS, then the processor."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def bfloat16_is_faster(device: torch.device, work: Callable[[], Any]) -> bool:
    """Tell whether some work should run under bfloat16 autocast.

    A GPU that has bfloat16 is faster with it. A processor may have instructions for it or may
    emulate it at a fraction of the speed, so there the work is timed both ways.

    Args:
        device: Where the work runs.
        work: A small sample of it; autocast is set around it.
    """
    if device.type != "cpu":
        return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    seconds = {False: [], True: []}
    for _ in range(3):
        for bfloat16, times in seconds.items():
            started = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                work()
            times.append(time.perf_counter() - started)
    return min(seconds[True]) < min(seconds[False])


def has_compiler() -> bool:
    """Tell whether a C++ compiler is there, which `torch.compile` needs on a processor."""
    names = (os.environ.get("CXX"), "c++", "g++", "clang++", "cl")
    return any(shutil.which(name) for name in names if name)
