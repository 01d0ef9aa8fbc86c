"""How fast a training is: ours against a loop as the original report describes it.

Both train the same UNet, the original's with half the channels (on a GPU its baseline at full
size), in batches of 64. The reference reads 320×240 PNGs with PIL, in a DataLoader of two workers,
and computes step by step, channels first: in float32 on a processor, under float16 autocast on a
GPU. Ours are the defaults of `lab7.training` for the device.
"""

import dataclasses
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import tyro
from diffusers import DDPMScheduler
from png_files import PNGFolder, write_pngs
from torch.nn import functional as F

from lab7.dataset import ICLEVRDataset
from lab7.devices import choose_device
from lab7.experiments import TrainConfig, get_experiment
from lab7.model import ConditionalUNet
from lab7.results import describe_machine
from lab7.training import Run

WORKERS = 2
STATUS = Path("/proc/self/status")  # Linux's; its VmHWM is the highest memory in use so far, in KiB


def main(
    steps: int = 2,
    rounds: int = 3,
    batch_size: int = 64,
    pictures: int = 1024,
    experiment: str | None = None,
    table: bool = True,
    profile: bool = True,
    data: str | None = None,
    device: str | None = None,
) -> None:
    """Time both in turn; print pictures a second, peak memory, the ratio and where time goes.

    Args:
        steps: Optimizer steps between two looks at the clock.
        rounds: How often each is timed; the median counts.
        batch_size: Pictures a step.
        pictures: PNGs that the reference reads.
        experiment: Whose network; by default original-half-channels, on a GPU original-baseline.
        table: Time the networks of all experiments, too.
        profile: Print which operations our steps spend their time in.
        data: Data folder; by default $LAB7_DATA, else the embedded set.
        device: cuda, mps or cpu; by default the best there is.
    """
    device = choose_device(device)
    default = "original-half-channels" if device.type == "cpu" else "original-baseline"
    config = get_experiment(experiment or default).config
    config = dataclasses.replace(config, batch_size=batch_size)
    dataset = ICLEVRDataset(data)
    with tempfile.TemporaryDirectory() as folder:
        files = write_pngs(dataset, Path(folder), min(pictures, len(dataset)))
        loops = {
            "reference": reference_loop(config, PNGFolder(files, dataset.conditions), device),
            "lab7": our_loop(Run(config, dataset, device, Path(folder))),
        }
        for loop in loops.values():  # compilation, the first look at memory
            advance(loop, 2, device)
        seconds = {name: [] for name in loops}
        for _ in range(rounds):
            for name, loop in loops.items():
                seconds[name].append(advance(loop, steps, device))
    print(f"{describe_machine()}, on {device}; {experiment or default}, batches of {batch_size}")
    speeds = {n: batch_size * steps / sorted(s)[len(s) // 2] for n, s in seconds.items()}
    for name, speed in speeds.items():
        print(f"{name:12s} {speed:9.2f} pictures/s")
    print(f"{'ratio':12s} {speeds['lab7'] / speeds['reference']:9.2f}")


def reference_loop(config: TrainConfig, pngs: PNGFolder, device: torch.device) -> Iterator[float]:
    """Train as the original report describes it; yields the loss of each step."""
    unet = ConditionalUNet(**config.unet).to(device)
    scheduler = DDPMScheduler(**config.noise)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=config.learning_rate)
    half = device.type == "cuda"
    scaler = torch.amp.GradScaler(device.type, enabled=half)
    loader = torch.utils.data.DataLoader(
        pngs, config.batch_size, shuffle=True, num_workers=WORKERS, drop_last=True
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
            yield loss.item()


def our_loop(run: Run) -> Iterator[None]:
    """Train as `lab7.training.train` does."""
    while True:
        run.update()
        yield


def advance(loop: Iterator, steps: int, device: torch.device) -> float:
    """Return the seconds that some steps take."""
    started = time.perf_counter()
    for _ in range(steps):
        next(loop)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


if __name__ == "__main__":
    tyro.cli(main)
