"""How fast a training is: ours against a loop as the original report describes it.

Both train the same UNet, the original's with half the channels (on a GPU its baseline at full
size), in batches of 64. The reference reads 320×240 PNGs with PIL, in a DataLoader of two workers,
and computes step by step, channels first: in float32 on a processor, under float16 autocast on a
GPU. Ours is `lab7.training.train` with its defaults for the device, timed by its own log. They run
in turn, each time in a process of its own, whose peak memory is told.
"""

import dataclasses
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import tyro
from diffusers import DDPMScheduler
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile, schedule
from torch.utils.flop_counter import FlopCounterMode

from lab7.batches import Batches
from lab7.dataset import ICLEVRDataset, to_float
from lab7.devices import choose_device, should_compile
from lab7.diffusion import diffusion_loss
from lab7.experiments import ORIGINALS, TrainConfig, get_experiment
from lab7.model import ConditionalUNet
from lab7.records import describe_machine
from lab7.training import train
from workshop.benchmarks.png_files import PNGFolder, write_pngs

WORKERS = 2
SHOWN = 8  # operations of the profile


def main(
    steps: int = 2,
    rounds: int = 3,
    batch_size: int = 64,
    pictures: int = 1024,
    experiment: str | None = None,
    table_batch: int = 8,
    data: str | None = None,
    device: str | None = None,
) -> None:
    """Print pictures a second, peak memory, the ratio, where time goes, and all networks' speeds.

    Args:
        steps: Optimizer steps that are timed, after as many that are not.
        rounds: How often each is timed, in turn; the median counts.
        batch_size: Pictures a step.
        pictures: PNGs that the reference reads.
        experiment: Whose network; by default original-half-channels, on a GPU original-baseline.
        table_batch: Pictures a step in the table of all experiments; 0: no table.
        data: Data folder; by default $LAB7_DATA, else the embedded set.
        device: cuda, mps or cpu; by default the best there is.
    """
    device = choose_device(device)
    default = "original-half-channels" if device.type == "cpu" else "original-baseline"
    config = get_experiment(name := experiment or default).config
    config = dataclasses.replace(config, batch_size=batch_size)
    print(f"{describe_machine()}, on {device}; {name}, batches of {batch_size}")
    dataset = ICLEVRDataset(data)
    found = {"reference": [], "lab7": []}
    with tempfile.TemporaryDirectory() as folder:
        files = write_pngs(dataset, Path(folder), min(pictures, len(dataset)))
        for _ in range(rounds):
            found["reference"].append(apart(time_reference, config, data, device, steps, files))
            found["lab7"].append(apart(time_ours, config, data, device, steps))
    medians = {name: sorted(pairs)[rounds // 2] for name, pairs in found.items()}
    for name, (speed, peak) in medians.items():
        print(f"{name:12s} {speed:9.2f} pictures/s  {peak:7,.0f} MB at most")
    print_profile(config, dataset, device)
    if table_batch:
        print_table(dataset, device, table_batch)
    print(f"{'ratio':12s} {medians['lab7'][0] / medians['reference'][0]:9.2f}")


def apart(function: Callable, *arguments: Any) -> tuple[float, float]:
    """Call a function in a process of its own, which shares no memory with others."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def time_reference(
    config: TrainConfig, data: str | None, device: torch.device, steps: int, files: list[Path]
) -> tuple[float, float]:
    """Return pictures a second and the most memory, in MB, of the reference."""
    loop = reference_loop(config, ICLEVRDataset(data), device, files)
    for _ in range(steps):
        next(loop)
    started = time.perf_counter()
    for _ in range(steps):
        next(loop)
    return steps * config.batch_size / (time.perf_counter() - started), peak_memory(device)


def time_ours(
    config: TrainConfig, data: str | None, device: torch.device, steps: int
) -> tuple[float, float]:
    """Return pictures a second and the most memory, in MB, of our training."""
    speed = train_briefly(config, ICLEVRDataset(data), device, steps, 2)[-1]["images_per_second"]
    return speed, peak_memory(device)


def train_briefly(
    config: TrainConfig,
    dataset: ICLEVRDataset,
    device: torch.device,
    steps: int,
    rows: int,
    callback: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
    """Train as `config` says, but stop early, and return the rows of the log.

    Args:
        config: Its network and batch; nothing is saved or drawn between the rows.
        dataset: The pictures.
        device: Where to train.
        steps: Optimizer steps of a row.
        rows: How many there are; the first holds compilation and the first look at memory.
        callback: Called after each row.
    """
    config = dataclasses.replace(
        config,
        compile=should_compile(config, device),
        num_steps=steps * rows,
        log_every=steps,
        save_every=steps * rows,
        sample_every=None,
    )
    log = []
    with tempfile.TemporaryDirectory() as folder:
        train(
            config,
            dataset,
            folder,
            callback=lambda row: log.append(row) or callback(),
            progress=False,
            device=device,
        )
    return log


def peak_memory(device: torch.device) -> float:
    """Return the most memory, in MB, that this process used: of the GPU if it worked on one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e6 if sys.platform == "darwin" else 1e6 / 1024)


def reference_loop(
    config: TrainConfig, dataset: ICLEVRDataset, device: torch.device, files: list[Path]
) -> Iterator[None]:
    """Train as the original report describes it."""
    unet = ConditionalUNet(**config.unet).to(device)
    scheduler = DDPMScheduler(**config.noise)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=config.learning_rate)
    half = device.type == "cuda"
    scaler = torch.amp.GradScaler(device.type, enabled=half)
    loader = torch.utils.data.DataLoader(
        PNGFolder(files, dataset.conditions),
        config.batch_size,
        shuffle=True,
        num_workers=WORKERS,
        drop_last=True,
        persistent_workers=True,
    )
    while True:
        for images, cond in loader:
            x0, cond = images.to(device), cond.to(device)
            noise = torch.randn_like(x0)
            t = torch.randint(scheduler.config.num_train_timesteps, (len(x0),), device=device)
            with torch.autocast(device.type, torch.float16, enabled=half):
                answer = unet(scheduler.add_noise(x0, noise, t), t, cond).sample
                loss = F.mse_loss(answer.float(), noise)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(unet.parameters(), config.max_grad_norm)
            scaler.step(optimizer)
            scaler.update()
            loss.item()  # waits for a GPU
            yield


def print_profile(config: TrainConfig, dataset: ICLEVRDataset, device: torch.device) -> None:
    """Print which part of a step reads its pictures, and the operations that take most of it."""
    activities = [ProfilerActivity.CPU]
    time_of = "self_cpu_time_total"
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
        time_of = "self_device_time_total"
    # The fourth step is recorded.
    with profile(activities=activities, schedule=schedule(wait=2, warmup=1, active=1)) as profiler:
        log = train_briefly(config, dataset, device, 1, 4, profiler.step)
    step = config.batch_size / log[1]["images_per_second"]
    share = seconds_of_reading(config, dataset, device) / step
    print(f"{'reading the pictures':32s} {share:7.3%} of a step")
    rows = [row for row in profiler.key_averages() if not row.key.startswith("ProfilerStep")]
    rows.sort(key=lambda row: -getattr(row, time_of))
    total = sum(getattr(row, time_of) for row in rows)
    for row in rows[:SHOWN]:
        share = getattr(row, time_of) / total
        print(f"{row.key[:32]:32s} {share:7.1%} in {row.count} calls")


def seconds_of_reading(
    config: TrainConfig, dataset: ICLEVRDataset, device: torch.device, repetitions: int = 20
) -> float:
    """Return the seconds in which a batch is looked up and made float."""
    batches = Batches(config, dataset, device)
    started = time.perf_counter()
    for step in range(repetitions):
        rows = batches.rows(step)
        to_float(batches.images[rows]), batches.conditions[rows]
    return (time.perf_counter() - started) / repetitions


def print_table(dataset: ICLEVRDataset, device: torch.device, batch_size: int) -> None:
    """Print size, work and speed of the originals' and our training, without torch.compile."""
    print(f"{'batches of ' + str(batch_size):24s} M parameters  GFLOP a picture  pictures/s")
    for name in (*ORIGINALS, "ours"):
        config = get_experiment(name).config
        config = dataclasses.replace(config, batch_size=batch_size, compile=False)
        speed = train_briefly(config, dataset, device, 3, 2)[-1]["images_per_second"]
        size = sum(p.numel() for p in ConditionalUNet(**config.unet).parameters()) / 1e6
        print(f"{name:24s} {size:12.1f} {gflop(config):16.1f} {speed:11.1f}")


def gflop(config: TrainConfig) -> float:
    """Return the 10⁹ floating-point operations of a picture's forward and backward pass."""
    unet, scheduler = ConditionalUNet(**config.unet), DDPMScheduler(**config.noise)
    x0, cond, t = torch.zeros(1, 3, 64, 64), torch.zeros(1, 24), torch.zeros(1, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        diffusion_loss(unet, scheduler, x0, cond, t, x0).backward()
    return counter.get_total_flops() / 1e9


if __name__ == "__main__":
    tyro.cli(main)
