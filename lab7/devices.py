"""Device, precision and torch.compile of a training, and an estimate of its time."""

import ctypes
import functools
import logging
import os
import platform
import re
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

from lab7.dataset import IMAGE_SIZE
from lab7.errors import UserError, unknown
from lab7.experiments import CHOICES, TrainConfig
from lab7.labels import NUM_LABELS
from lab7.model import ConditionalUNet

_FEW_PICTURES = 8  # on which speed is measured
PRECISIONS_BY_DEVICE = {"cpu": ("auto", "float32", "bfloat16"), "mps": ("auto", "float32")}


def choose_device(device: str | torch.device | None = None) -> torch.device:
    """Return the named device; without a name the best there is, a GPU before the CPU.

    Instead of a GPU that the installed PyTorch has no code for it returns the CPU, and logs that
    once, in one line.

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
    usable = kind != "cuda" or _has_code(int(number or 0))
    return torch.device(name if usable else "cpu")


@functools.cache
def _has_code(gpu: int) -> bool:
    """Tell whether the installed PyTorch has code for a GPU; if not, log it.

    Binary code, sm_XY, runs on compute capabilities X.Y and above with the same X; PTX code,
    compute_XY, is compiled for any from X.Y up (CUDA C++ Programming Guide).
    """
    built = torch.cuda.get_arch_list()
    with warnings.catch_warnings(action="ignore"):  # PyTorch's own fill a screen
        major, minor = torch.cuda.get_device_capability(gpu)
    codes = re.findall(r"(sm|compute)_(\d+)(\d)", " ".join(built))
    for kind, x, y in codes:
        if (int(x), int(y)) <= (major, minor) and (kind == "compute" or int(x) == major):
            return True
    if codes:  # AMD's GPUs have none
        logging.getLogger(__name__).warning(
            f"this PyTorch has no code for {torch.cuda.get_device_name(gpu)} (compute capability "
            f"{major}.{minor}; it has {', '.join(built)}): using the CPU"
        )
    return not codes


def prepare_device(device: torch.device) -> torch.device:
    """Prepare a device for training; with several processes on GPUs each gets its own."""
    if device.type == "cpu":
        keep_freed_memory()
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    return PartialState(cpu=device.type == "cpu").device if several else device


def bfloat16_is_faster(device: torch.device, work: Callable[[], Any]) -> bool:
    """Tell whether some work is faster under bfloat16 autocast.

    A GPU with bfloat16 is. A CPU may have instructions for it, or emulate it at a fraction of the
    speed, so there the work is timed both ways.

    Args:
        device: Where the work runs.
        work: A small sample of it; autocast is set around it.
    """
    if device.type != "cpu":
        return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return _seconds(device, work, bfloat16=True) < _seconds(device, work, bfloat16=False)


def _seconds(device: torch.device, work: Callable[[], Any], bfloat16: bool) -> float:
    """Time some work with or without autocast: the fastest of three runs, or of fewer long ones."""
    times = []
    while len(times) < 3 and sum(times) < 3:
        started = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            work()
        times.append(time.perf_counter() - started)
    return min(times)


def estimate_seconds(config: TrainConfig, device: torch.device) -> float:
    """Estimate from a few pictures how long a training takes on an otherwise idle device.

    The optimizer, the average and the samples are not included: about a tenth more.
    """
    unet = ConditionalUNet(**config.unet).to(device)
    bfloat16 = choose_precision(config, unet) != "float32"
    # A few pictures tell the time of a batch on a processor; a GPU takes them all at once.
    count = config.batch_size if device.type == "cuda" else _FEW_PICTURES
    seconds = _seconds(device, lambda: _train_a_little(unet, count), bfloat16)
    return seconds / count * config.batch_size * config.num_steps


def _train_a_little(unet: ConditionalUNet, count: int = _FEW_PICTURES) -> None:
    """Run a forward and a backward pass of some pictures, and wait for the device."""
    xt = torch.zeros(count, 3, IMAGE_SIZE, IMAGE_SIZE, device=unet.device)
    cond = torch.zeros(count, NUM_LABELS, device=unet.device)
    loss = unet(xt, 0, cond).sample.mean()
    loss.backward()
    unet.zero_grad()
    loss.item()


def choose_precision(config: TrainConfig, unet: ConditionalUNet, before: str | None = None) -> str:
    """Return the precision to train a network in: "float32", "bfloat16" or "float16".

    Args:
        config: The run.
        unet: Its network, on the device of the training.
        before: What "auto" meant when the run was started; None: it starts now.

    Raises:
        UserError: The device does not have the precision that the configuration asks for.
    """
    allowed = PRECISIONS_BY_DEVICE.get(unet.device.type, CHOICES["precision"])
    if config.precision not in allowed:
        raise unknown(f"precision on {unet.device.type}", config.precision, allowed)
    if config.precision != "auto":
        return config.precision
    if before is None:
        faster = bfloat16_is_faster(unet.device, lambda: _train_a_little(unet))
        before = "bfloat16" if faster else "float32"
    return broadcast_object_list([before])[0]  # the timings of processes may differ


def should_compile(config: TrainConfig, device: torch.device) -> bool:
    """Tell whether a run wants `torch.compile`, see `TrainConfig.compile`."""
    pays_off = device.type == "cuda" and config.num_steps >= 2000
    return pays_off if config.compile is None else config.compile


def has_compiler() -> bool:
    """Tell whether a C++ compiler is there, which `torch.compile` needs."""
    names = (os.environ.get("CXX"), "c++", "g++", "clang++", "cl")
    return any(shutil.which(name) for name in names if name)


def build_accelerator(
    config: TrainConfig, device: torch.device, folder: Path, precision: str
) -> Accelerator:
    """Make the Accelerator of a training: precision, torch.compile, processes, TensorBoard.

    Args:
        config: The run.
        device: Of the training.
        folder: Of the run.
        precision: See `choose_precision`.
    """
    compiled = should_compile(config, device) and has_compiler()
    if config.compile and not compiled:
        warnings.warn("no C++ compiler found: training without torch.compile", stacklevel=4)
    # Accelerate keeps the precision of the first Accelerator for the life of the process.
    AcceleratorState._reset_state(reset_partial_state=PartialState().num_processes == 1)
    return Accelerator(
        mixed_precision={"float32": "no", "bfloat16": "bf16", "float16": "fp16"}[precision],
        dynamo_backend="inductor" if compiled else "no",
        cpu=device.type == "cpu",
        device_placement=False,  # it would move a network on cuda:1 to cuda:0
        log_with="tensorboard" if config.tensorboard and is_tensorboard_available() else None,
        project_dir=folder,
    )


def keep_freed_memory() -> bool:
    """Let this process reuse the memory of freed tensors; glibc only.

    glibc returns large blocks to the system at once, which then has to clear every page again: a
    third of a training step of a large network on a CPU. See mallopt(3).

    Returns:
        Whether it could be done.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    trim_threshold, mmap_max, most = -1, -4, 2**31 - 1
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(mmap_max, 0) and mallopt(trim_threshold, most))
