"""The project's own records: of a generator's scores, and of how its settings were chosen."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lab7.dataset import SCORED, ICLEVRDataset, data_hash, to_float
from lab7.diffusion import convert_scheduler, scheduler_name
from lab7.errors import UserError
from lab7.evaluator import Evaluator
from lab7.files import read_json, require_writable, write_atomically
from lab7.layouts import find_layout
from lab7.pipeline import ConditionalDDPMPipeline, save_pipeline
from lab7.plots import split_grid
from lab7.records import RESULTS_DIR, read_log
from lab7.sampling import DENOISING_CONDITION, denoising_frames, to_grid
from lab7.scoring import Conditions, draw_and_judge
from workshop.records import write_record

SAMPLE_ROWS = 6
# What a record keeps of how its run was started, as far as the run noted it.
_TRAINED = ("machine", "date", "git_commit", "packages", "precision", "data_sha256")


def record_generator(
    name: str,
    pipeline: ConditionalDDPMPipeline,
    evaluator: Evaluator,
    scored: dict[str, tuple[dict[str, Any], Tensor]],
    checkpoint: Path,
    root: Path = RESULTS_DIR,
    data: Path | None = None,
    extra: dict[str, Any] | None = None,
    num_seeds: int = 0,
    **settings: Any,
) -> Path:
    """Write down what a generator scored.

    Beside config.json and metrics.json the record gets the grids of `test` and `new_test` (the
    first repetition), the denoising row and some of the training's rows of samples. Its "course"
    says whether the pictures and the evaluator are the course's or this project's, "data_sha256"
    which pictures and labels the conditions go with.

    Args:
        name: Of the record.
        pipeline: The generator.
        evaluator: The judge.
        scored: By set of conditions, what `draw_and_judge` returned.
        checkpoint: Folder that the pipeline was loaded from; where it lies in the folder of a
            training run, the record gets the run's configuration and log.
        root: Folder of the records.
        data: Data folder that the conditions are of, see `find_layout`.
        extra: More metrics, by name.
        num_seeds: How many pictures of the course's denoising condition to draw, with the seeds
            0, 1, …, onto a sheet of their own, seeds.png; 0: no sheet.
        settings: Of sampling, see `draw_and_judge`.

    Returns:
        The record's folder.

    Raises:
        UserError: See `require_same_pictures`, or a folder cannot be read or written.
    """
    course_judge = evaluator.path is not None and evaluator.path.suffix == ".pth"
    metrics = {
        "course": {"pictures": find_layout(data).course, "evaluator": course_judge},
        "data_sha256": _data_hash(data),
        **(extra or {}),
    }
    run, config, grids = checkpoint.parent, {}, {}
    trained_here = (run / "log.jsonl").exists()
    if trained_here:
        require_same_pictures(checkpoint, data)
        config = read_json(run / "config.json")
        rows = choose_sample_rows(run / "samples")
        metrics["training"] = describe_training(run, pipeline)
        if rows:
            metrics["training"]["sample_steps"] = list(rows)
            pictures = list(rows.values())
            grids["samples"] = to_grid(torch.cat(pictures), columns=len(pictures[0]))
    for key, (found, images) in scored.items():
        metrics[key] = found
        if key in SCORED:
            grids[key] = to_grid(images[: len(images) // found["repetitions"]])
    frames = denoising_frames(pipeline, **settings)
    grids["denoising"] = to_grid(frames, columns=len(frames))
    if num_seeds:
        conditions = [DENOISING_CONDITION] * num_seeds
        grids["seeds"] = to_grid(pipeline(conditions, output_type="pt", **settings).images)
    folder = write_record(name, config, metrics, root, weights=checkpoint / "unet")
    for key, sheet in grids.items():
        write_atomically(folder / f"{key}.png", lambda file, s=sheet: s.save(file, "PNG"))
    if trained_here:
        write_atomically(folder / "log.jsonl", (run / "log.jsonl").read_bytes())
    return folder


def require_same_pictures(checkpoint: Path, data: Path | None) -> None:
    """Check that a training run in this project drew on the pictures that `data` holds.

    Raises:
        UserError: The generator was trained on the course's pictures and the conditions are not
            of the course, or the other way round.
    """
    where = checkpoint.parent / "environment.json"
    trained_on = read_json(where) if where.exists() else {}
    if trained_on and trained_on.get("course_pictures", False) != find_layout(data).course:
        raise UserError(
            f"{checkpoint.parent} was trained on other pictures than the conditions are for: give "
            "evaluate the same --data or LAB7_DATA as train"
        )


def describe_training(run: Path, pipeline: ConditionalDDPMPipeline) -> dict[str, Any]:
    """Return what a training took, and where and with what it was started.

    Its time is that of its pictures at the median speed of the log's rows: on a machine that does
    nothing else, and without pauses.

    Args:
        run: Folder of the training.
        pipeline: What was trained.
    """
    log, where = read_log(run / "log.jsonl"), read_json(run / "environment.json")
    last, speed = log[-1], float(np.median([row["images_per_second"] for row in log]))
    return {
        "steps": last["step"],
        "images": last["images"],
        "seconds": last["images"] / speed,
        "images_per_second": speed,
        "final_loss": last["loss"],
        "parameters": sum(p.numel() for p in pipeline.unet.parameters()),
        **{key: where[key] for key in _TRAINED if key in where},
    }


def choose_sample_rows(folder: Path, count: int = SAMPLE_ROWS) -> dict[int, Tensor]:
    """Read some of the rows of samples that a training drew.

    Args:
        folder: The training's folder samples/.
        count: The most to choose; the steps between them grow, as the pictures change ever slower.

    Returns:
        Pictures (B, 3, 64, 64) in [-1, 1] by training step, from the first to the last; empty if
        the training drew none.
    """
    files = {int(file.stem.removeprefix("step-")): file for file in folder.glob("step-*.png")}
    if not files:
        return {}
    wanted = np.geomspace(min(files), max(files), count)
    steps = sorted({min(files, key=lambda step: abs(step - near)) for near in wanted})
    return {step: to_float(torch.from_numpy(split_grid(Image.open(files[step])))) for step in steps}


def record_sweep(
    name: str,
    pipeline: ConditionalDDPMPipeline,
    evaluator: Evaluator,
    conditions: Conditions,
    guidance_scales: Sequence[float],
    step_counts: Sequence[int],
    schedulers: Sequence[str],
    repetitions: int,
    checkpoint: Path,
    root: Path = RESULTS_DIR,
    keep: bool = False,
    data: Path | None = None,
) -> dict[str, Any]:
    """Score guidance scales at the pipeline's own settings, then the others at the best of them.

    Args:
        name: Of the record.
        pipeline: The generator.
        evaluator: The judge.
        conditions: Those to choose settings on, so not the test's.
        guidance_scales: Weights of classifier-free guidance to try.
        step_counts: Numbers of sampling steps to try.
        schedulers: Names of samplers to try, see `convert_scheduler`.
        repetitions: Pictures of each condition and setting.
        checkpoint: Folder that the pipeline was loaded from.
        root: Folder of the records.
        keep: Whether to save the best guidance scale with the checkpoint.
        data: Data folder that the conditions are of, see `find_layout`.

    Returns:
        "guidance", "steps" and "schedulers": lists of rows with the settings, two scores and all
        verdicts; "best_guidance": the scale with the highest top-k accuracy, of equals the lowest.

    Raises:
        UserError: Nothing to try, a name that is no sampler's, or a folder cannot be written.
    """
    if not guidance_scales:
        raise UserError("no guidance scales to try: give at least one")
    for folder in (root / name, *([checkpoint] if keep else [])):
        require_writable(folder)
    data_sha256 = _data_hash(data)  # before anything is drawn: it needs the pictures
    samplers = [scheduler_name(convert_scheduler(pipeline.scheduler, x)) for x in schedulers]
    own, own_steps = scheduler_name(pipeline.scheduler), pipeline.config.num_inference_steps
    # Some settings are in more than one list.
    row = functools.cache(
        functools.partial(_score_setting, pipeline, evaluator, conditions, repetitions)
    )
    guidance = [row(own, own_steps, scale) for scale in sorted(guidance_scales)]
    best = max(guidance, key=lambda scored: scored["top_k"].value)["guidance_scale"]
    metrics = {
        "guidance": guidance,
        "steps": [row(own, count, best) for count in step_counts],
        "schedulers": [row(sampler, own_steps, best) for sampler in samplers],
        "best_guidance": best,
        "data_sha256": data_sha256,
    }
    if keep:
        pipeline.register_to_config(guidance_scale=best)
        save_pipeline(pipeline, checkpoint)
    write_record(name, {}, metrics, root, weights=checkpoint / "unet")
    return metrics


def _score_setting(
    pipeline: ConditionalDDPMPipeline,
    evaluator: Evaluator,
    conditions: Conditions,
    repetitions: int,
    sampler: str,
    num_inference_steps: int,
    guidance_scale: float,
) -> dict[str, Any]:
    """Draw and judge with one choice of settings, and return a row of the record."""
    scheduler = convert_scheduler(pipeline.scheduler, sampler)
    drawing = ConditionalDDPMPipeline(pipeline.unet, scheduler, **pipeline.settings())
    metrics, _ = draw_and_judge(
        drawing,
        conditions,
        evaluator,
        repetitions=repetitions,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
    )
    scores = metrics.pop("scores")
    return metrics | {"top_k": scores.top_k, "exact_set": scores.exact_set}


def _data_hash(data: Path | None) -> str:
    dataset = ICLEVRDataset(data)
    return data_hash(dataset.images, dataset.conditions)
