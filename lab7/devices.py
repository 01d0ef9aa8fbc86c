"""Where and how to compute: the device, bfloat16, torch.compile."""

import ctypes
import os
import platform
import shutil
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list, is_tensorboard_available
from torch import Tensor

from lab7.errors import UserError
from lab7.experiments import CHOICES, TrainConfig
from lab7.model import ConditionalUNet

_FEW_PICTURES = 8  # on which speed is measured
PRECISIONS_BY_DEVICE = {"cpu": ("auto", "float32", "bfloat16"), "mps": ("auto", "float32")}


def choose_device(device: str | torch.device | None = None) -> torch.device:
    """Return the device that is named, or without a name the best there is: a GPU if there is one.

    Args:
        device: For instance "cuda", "cuda:1", "mps" or "cpu".

    Raises:
        UserError: This machine has no such device; the message names those it has.
    """
    gpu = torch.accelerator.current_accelerator(check_available=True)
    available = [gpu.type, "cpu"] if gpu else ["cpu"]
    name = str(device or available[0])
    kind, _, number = name.partition(":")
    count = 1 if kind == "cpu" else torch.accelerator.device_count()
    if kind not in available or (number and not (number.isdigit() and int(number) < count)):
        raise UserError(f"no device {name!r} here: choose one of {', '.join(available)}")
    return torch.device(name)


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


def keep_freed_memory() -> bool:
    """Let this process keep the memory of freed tensors for its next ones; glibc only.

    glibc gives large blocks back to the system at once, which then has to clear every page anew: a
    third of a training step of a large network on a processor. See mallopt(3).

    Returns:
        Whether it could be done.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    trim_threshold, mmap_max, most = -1, -4, 2**31 - 1
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(mmap_max, 0) and mallopt(trim_threshold, most))


def choose_precision(unet: ConditionalUNet) -> str:
    """Choose "bfloat16" autocast or "float32" for training a network where it is."""
    faster = bfloat16_is_faster(unet.device, lambda: _train_a_little(unet))
    return "bfloat16" if faster else "float32"


def estimate_seconds(config: TrainConfig, device: torch.device) -> float:
    """Estimate how long a training takes on a device that does nothing else, from a few pictures.

    Muon, the average and the samples come on top: about a tenth.
    """
    unet = ConditionalUNet(**config.unet).to(device)
    precision = choose_precision(unet) if config.precision == "auto" else config.precision
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=precision != "float32"):
            _train_a_little(unet).item()  # a GPU is waited for
        seconds.append(time.perf_counter() - started)
    return min(seconds) / _FEW_PICTURES * config.batch_size * config.num_steps


def _train_a_little(unet: ConditionalUNet) -> Tensor:
    """Do a forward and a backward pass of a few black pictures, and return the loss."""
    config = unet.config
    shape = (_FEW_PICTURES, config.in_channels, config.sample_size, config.sample_size)
    cond = torch.zeros(_FEW_PICTURES, config.num_labels, device=unet.device)
    loss = unet(torch.zeros(shape, device=unet.device), 0, cond).sample.mean()
    loss.backward()
    unet.zero_grad()
    return loss.detach()


def should_compile(config: TrainConfig, device: torch.device) -> bool:
    """Tell whether a run wants `torch.compile`, see `TrainConfig.compile`."""
    if config.compile is not None:
        return config.compile
    return device.type == "cuda" and config.num_steps >= 2000


def build_accelerator(
    config: TrainConfig, unet: ConditionalUNet, folder: Path, precision: str | None
) -> Accelerator:
    """Make what computes a training: precision, torch.compile, processes, TensorBoard.

    Args:
        config: The run.
        unet: Its network, where it shall be trained.
        folder: Of the run.
        precision: What "auto" means in a run that was started before; None: choose now.

    Raises:
        UserError: The device does not have that precision.
    """
    allowed = PRECISIONS_BY_DEVICE.get(unet.device.type, CHOICES["precision"])
    if config.precision not in allowed:
        raise UserError(
            f"precision {config.precision!r} is not for {unet.device.type}: choose one of "
            f"{', '.join(allowed)}"
        )
    if config.precision != "auto":
        precision = config.precision
    precision = precision or choose_precision(unet)
    precision = broadcast_object_list([precision])[0]  # the timings of processes may differ
    compiled = should_compile(config, unet.device) and has_compiler()
    if config.compile and not compiled:
        warnings.warn("no C++ compiler found: training without torch.compile", stacklevel=4)
    # Accelerate keeps the precision of the first Accelerator for the life of the process.
    AcceleratorState._reset_state(reset_partial_state=PartialState().num_processes == 1)
    return Accelerator(
        mixed_precision={"float32": "no", "bfloat16": "bf16", "float16": "fp16"}[precision],
        dynamo_backend="inductor" if compiled else "no",
        cpu=unet.device.type == "cpu",
        log_with="tensorboard" if config.tensorboard and is_tensorboard_available() else None,
        project_dir=folder,
    )
