"""How fast pictures are drawn: the shipped generators against the original report's way.

Reference: the original's UNet (its baseline), DDPM, 1000 steps, as diffusers runs it. A few of its
steps are timed, alternating with ours, and scaled to 1000; untrained weights take the same time.
"""

import statistics
from pathlib import Path
from time import perf_counter

import tyro
from diffusers import DDPMScheduler

from lab7.devices import choose_device
from lab7.experiments import get_experiment
from lab7.labels import LABELS, encode
from lab7.model import ConditionalUNet
from lab7.pipeline import FAST_DIR, ConditionalDDPMPipeline, load_pipeline
from lab7.records import describe_machine
from workshop.options import RESULTS
from workshop.records import write_record

TIMED_STEPS = 4


def main(
    pictures: int = 16,
    rounds: int = 3,
    device: str | None = None,
    record: str | None = None,
    results: Path = RESULTS,
) -> None:
    """Time both and print pictures a second and their ratio.

    Args:
        pictures: Pictures drawn at once.
        rounds: How often each is timed; the median counts.
        device: cuda, mps or cpu; by default the best there is.
        record: Name of a record to write; the report reads "sampling".
        results: Folder of the records.
    """
    device = choose_device(device)
    config = get_experiment("original-baseline").config
    unet = ConditionalUNet(**config.unet).to(device).eval()
    original = ConditionalDDPMPipeline(unet, DDPMScheduler(**config.noise))
    shipped = {"ours": load_pipeline(device=device)}
    if FAST_DIR.is_dir():
        shipped["fast"] = load_pipeline(FAST_DIR, device)
    cond = encode([LABELS[i % 24 : i % 24 + 2] for i in range(pictures)])
    seconds = {name: [] for name in ("original", *shipped)}
    for _ in range(rounds):
        steps = draw(original, cond, TIMED_STEPS)
        seconds["original"].append(steps * config.num_inference_steps / TIMED_STEPS)
        for name, pipeline in shipped.items():
            seconds[name].append(draw(pipeline, cond))
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    settings = {name: pipeline.settings() for name, pipeline in shipped.items()}
    print(f"{describe_machine()}, on {device}; {pictures} pictures at once, median of {rounds}")
    print(f"original: {config.num_inference_steps} DDPM steps, scaled from {TIMED_STEPS}")
    for name, time in medians.items():
        ratio = medians["original"] / time
        print(f"{name:9} {pictures / time:9.3f} pictures/s, {ratio:7.1f} times the original's")
    if record is not None:
        config = {"pictures": pictures, "rounds": rounds, "timed_steps": TIMED_STEPS}
        each = {name: {"seconds_a_picture": time / pictures} for name, time in medians.items()}
        write_record(record, config, each | {"device": str(device), "settings": settings}, results)


def draw(pipeline: ConditionalDDPMPipeline, cond, num_inference_steps: int | None = None) -> float:
    """Return the seconds until the pictures are on the CPU, so that a GPU has finished."""
    start = perf_counter()
    pipeline(
        cond,
        num_inference_steps=num_inference_steps,
        output_type="pt",
        batch_size=len(cond),
        progress=False,
    )
    return perf_counter() - start


if __name__ == "__main__":
    tyro.cli(main)
