"""How fast an epoch of batches is read: our loader against a DataLoader that opens PNGs.

Reference: what most versions of this lab do. PIL opens a 320×240 PNG, torchvision resizes and
normalises it, a DataLoader makes batches of it, with and without worker processes. Its PNGs are the
embedded pictures enlarged: they have no grain, so they decode faster than the course's. Both end on
the device where a training would be.
"""

import dataclasses
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import torch
import tyro
from torch import Tensor

from lab7.batches import Batches
from lab7.dataset import DATA_DIR, ICLEVRDataset, to_float
from lab7.devices import choose_device
from lab7.experiments import TrainConfig
from lab7.records import describe_machine
from workshop.benchmarks.png_files import PNGFolder, write_pngs

WORKERS = (0, 2)
STATUS = Path("/proc/self/status")  # Linux's; its VmHWM is the highest memory in use so far, in KiB
PEAK = """
import re, sys, torch
peak = lambda: int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1])
data, batch_size, before = sys.argv[1] or None, int(sys.argv[2]), peak()
from workshop.benchmarks.loading import ICLEVRDataset, our_epoch, read
cpu = torch.device("cpu")
read(our_epoch(ICLEVRDataset(data), batch_size, cpu), cpu)
print(peak() - before)
"""


def main(
    pictures: int = 3200,
    batch_size: int = 64,
    rounds: int = 3,
    data: str | None = None,
    device: str | None = None,
) -> None:
    """Time both and print pictures a second, peak memory and the ratio.

    Args:
        pictures: PNGs that the reference reads; ours reads the whole set.
        batch_size: Pictures a batch.
        rounds: How often each is timed, in turn; the fastest counts.
        data: Data folder; by default $LAB7_DATA, else the embedded set.
        device: cuda, mps or cpu; by default the best there is.
    """
    dataset, device = ICLEVRDataset(data), choose_device(device)
    with tempfile.TemporaryDirectory() as folder:
        files = write_pngs(dataset, Path(folder), min(pictures, len(dataset)))
        slow = PNGFolder(files, dataset.conditions)
        speeds = {"lab7": [], **{f"PNGs, {n} workers": [] for n in WORKERS}}
        for _ in range(rounds):
            speeds["lab7"].append(read(our_epoch(dataset, batch_size, device), device))
            for n in WORKERS:
                loader = torch.utils.data.DataLoader(slow, batch_size, shuffle=True, num_workers=n)
                speeds[f"PNGs, {n} workers"].append(read(loader, device))
    print(f"{describe_machine()}, on {device}; batches of {batch_size}, the fastest of {rounds}")
    best = {name: max(found) for name, found in speeds.items()}
    for name, speed in best.items():
        print(f"{name:16s} {speed:11,.0f} pictures/s")
    if STATUS.exists():
        print(f"{'memory':16s} {measure_peak(data, batch_size):11,.0f} MB, above PyTorch alone")
    print(f"{'ratio':16s} {best.pop('lab7') / max(best.values()):11.0f}")


def our_epoch(
    dataset: ICLEVRDataset, batch_size: int, device: torch.device
) -> Iterable[tuple[Tensor, Tensor]]:
    """Yield an epoch of batches as the training makes them, on the device."""
    config = dataclasses.replace(TrainConfig(), batch_size=batch_size)
    batches = Batches(config, dataset, device)
    for step in range(len(dataset) // batch_size):
        rows = batches.rows(step)
        yield to_float(batches.images[rows]), batches.conditions[rows]


def read(batches: Iterable[tuple[Tensor, Tensor]], device: torch.device) -> float:
    """Go through all batches, move them to the device and return pictures a second."""
    start = time.perf_counter()
    count = sum(len(images.to(device)) for images, _ in batches)
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return count / (time.perf_counter() - start)


def measure_peak(data: str | None, batch_size: int) -> float:
    """Return the most memory, in MB, that opening the set and an epoch of ours take.

    What Python with PyTorch takes is left out, what the other imports take is not.
    """
    folder = str(Path(data).resolve()) if data else ""
    command = [sys.executable, "-c", PEAK, folder, str(batch_size)]
    root = DATA_DIR.parent  # where workshop is found
    output = subprocess.run(command, check=True, capture_output=True, text=True, cwd=root).stdout
    return 1.024e-3 * int(output)


if __name__ == "__main__":
    tyro.cli(main)
