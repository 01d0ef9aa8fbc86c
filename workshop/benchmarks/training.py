"""How fast a training is: ours against a loop as the original report describes it.

Both train the same UNet, the original's with half the channels (on a GPU its baseline at full
size), in batches of 64. The reference reads 320×240 PNGs with PIL, in a DataLoader of two workers,
and computes step by step, channels first: in float32 on a processor, under float16 autocast on a
GPU. Ours are the defaults of `lab7.training` for the device. Each has a process of its own, whose
peak memory is told, and they work in turn.
"""

import dataclasses
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import tyro
from diffusers import DDPMScheduler
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from lab7.dataset import ICLEVRDataset, to_float
from lab7.devices import choose_device
from lab7.experiments import TrainConfig, get_experiment
from lab7.model import ConditionalUNet
from lab7.records import describe_machine
from lab7.training import Run, diffusion_loss
from workshop.benchmarks.png_files import PNGFolder, write_pngs
from workshop.study.reproduction import ORIGINALS

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
        steps: Optimizer steps between two looks at the clock.
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
    with tempfile.TemporaryDirectory() as folder:
        dataset = ICLEVRDataset(data)
        files = write_pngs(dataset, Path(folder), min(pictures, len(dataset)))
        loops = {
            "reference": Worker(reference_loop, config, data, device, files),
            "lab7": Worker(start_ours, config, data, device),
        }
        seconds = {name: [] for name in loops}
        for _ in range(rounds):
            for name, worker in loops.items():
                seconds[name].append(worker.advance(steps))
        peaks = {name: worker.stop() for name, worker in loops.items()}
    speeds = {n: batch_size * steps / sorted(s)[len(s) // 2] for n, s in seconds.items()}
    for name, speed in speeds.items():
        print(f"{name:12s} {speed:9.2f} pictures/s  {peaks[name]:7,.0f} MB at most")
    print_profile(Run(config, dataset, device, Path()))
    if table_batch:
        print_table(dataset, device, table_batch)
    print(f"{'ratio':12s} {speeds['lab7'] / speeds['reference']:9.2f}")


class Worker:
    """A training loop in a process of its own.

    Args:
        loop: Makes an iterator that trains a step at a time, out of the other arguments.
    """

    def __init__(self, loop, config: TrainConfig, data: str | None, device: torch.device, *rest):
        spawn = multiprocessing.get_context("spawn")
        self.pipe, other = spawn.Pipe()
        arguments = (other, loop, config, data, device, *rest)
        self.process = spawn.Process(target=work, args=arguments)
        self.process.start()
        other.close()  # so that `recv` ends with an error if the process does
        self.advance(2)  # compilation, the first look at memory

    def advance(self, steps: int) -> float:
        """Return the seconds that some steps take."""
        self.pipe.send(steps)
        return self.pipe.recv()

    def stop(self) -> float:
        """End the process and return the most memory that it used, in MB."""
        peak = self.advance(0)
        self.process.join()
        return peak


def work(pipe: Connection, loop, config, data: str | None, device: torch.device, *rest) -> None:
    """Do what a `Worker` asks for."""
    steps = loop(config, ICLEVRDataset(data), device, *rest)
    while count := pipe.recv():
        pipe.send(advance(steps, count, device))
    pipe.send(peak_memory(device))


def advance(steps: Iterator[None], count: int, device: torch.device) -> float:
    """Return the seconds that some steps take."""
    started = time.perf_counter()
    for _ in range(count):
        next(steps)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


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
    pngs = PNGFolder(files, dataset.conditions)
    loader = torch.utils.data.DataLoader(
        *(pngs, config.batch_size),
        **{"shuffle": True, "num_workers": WORKERS, "drop_last": True, "persistent_workers": True},
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
            loss.item()
            yield


def start_ours(config: TrainConfig, dataset: ICLEVRDataset, device: torch.device) -> Iterator[None]:
    """Train as `lab7.training.train` does."""
    return our_loop(Run(config, dataset, device, Path()))


def our_loop(run: Run) -> Iterator[None]:
    """Take one optimizer step after the other."""
    while True:
        run.update()
        yield


def print_profile(run: Run) -> None:
    """Print which part of a step reads its pictures, and the operations that take most of it."""
    device, activities = run.images.device, [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    time_of = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    steps = our_loop(run)
    advance(steps, 1, device)
    step = advance(steps, 1, device)
    with torch.profiler.profile(activities=activities) as profile:
        advance(steps, 1, device)
    print(f"{'reading the pictures':32s} {seconds_of_reading(run) / step:7.3%} of a step")
    rows = sorted(profile.key_averages(), key=lambda row: -getattr(row, time_of))
    total = sum(getattr(row, time_of) for row in rows)
    for row in rows[:SHOWN]:
        share = getattr(row, time_of) / total
        print(f"{row.key[:32]:32s} {share:7.1%} in {row.count} calls")


def seconds_of_reading(run: Run, repetitions: int = 20) -> float:
    """Return the seconds in which a batch is looked up and made float."""
    started = time.perf_counter()
    for step in range(repetitions):
        rows = run.order(step)
        to_float(run.images[rows]), run.conditions[rows]
    return (time.perf_counter() - started) / repetitions


def print_table(dataset: ICLEVRDataset, device: torch.device, batch_size: int) -> None:
    """Print size, work and speed of the originals' and our training, without torch.compile."""
    print(f"{'batches of ' + str(batch_size):24s} M parameters  GFLOP a picture  pictures/s")
    for name in (*ORIGINALS, "ours"):
        config = dataclasses.replace(
            get_experiment(name).config, batch_size=batch_size, compile=False
        )
        run = Run(config, dataset, device, Path())
        advance(steps := our_loop(run), 2, device)
        speed = 3 * batch_size / advance(steps, 3, device)
        size = sum(p.numel() for p in run.network.parameters()) / 1e6
        print(f"{name:24s} {size:12.1f} {gflop(run):16.1f} {speed:11.1f}")


def gflop(run: Run) -> float:
    """Return the 10⁹ floating-point operations of a picture's forward and backward pass."""
    x0, cond, t, noise = (part[:1] for part in run.batch())
    with FlopCounterMode(display=False) as counter:
        diffusion_loss(run.network, run.scheduler, x0, cond, t, noise).backward()
    return counter.get_total_flops() / 1e9


if __name__ == "__main__":
    tyro.cli(main)
