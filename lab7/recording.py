"""Records of what generators scored, and of the choice of their settings."""

import functools
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from lab7.dataset import SCORED, ICLEVRDataset, data_hash, is_course
from lab7.diffusion import convert_scheduler, scheduler_name
from lab7.evaluator import Evaluator
from lab7.files import require_writable, write_atomically
from lab7.labels import read_json
from lab7.pipeline import ConditionalDDPMPipeline, save_pipeline
from lab7.results import RESULTS_DIR, Record, read_log, write_record
from lab7.sampling import choose_sample_rows, denoising_frames, stack_grids, to_grid
from lab7.scoring import Conditions, Verdicts, draw_and_judge

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
        data: Data folder that the conditions are of, see `resolve_root`.
        settings: Of sampling, see `draw_and_judge`.

    Returns:
        The record's folder.

    Raises:
        ValueError: See `require_same_pictures`.
    """
    course_judge = evaluator.path is not None and evaluator.path.suffix == ".pth"
    metrics = {
        "course": {"pictures": is_course(data), "evaluator": course_judge},
        "data_sha256": _data_hash(data),
    }
    run, config, grids = checkpoint.parent, {}, {}
    trained_here = (run / "log.jsonl").exists()
    if trained_here:
        require_same_pictures(checkpoint, data)
        where = read_json(run / "environment.json")
        config = read_json(run / "config.json")
        metrics["training"] = training_summary(read_log(run / "log.jsonl"), pipeline)
        metrics["training"] |= {key: where[key] for key in _TRAINED if key in where}
        rows = choose_sample_rows(run / "samples")
        if rows:
            metrics["training"]["sample_steps"] = list(rows)
            grids["samples"] = stack_grids(list(rows.values()))
    for key, (found, images) in scored.items():
        metrics[key] = found
        if key in SCORED:
            grids[key] = to_grid(images[: len(images) // found["repetitions"]])
    frames = denoising_frames(pipeline, **settings)
    grids["denoising"] = to_grid(frames, columns=len(frames))
    folder = write_record(name, config, metrics, root, weights=checkpoint)
    for key, sheet in grids.items():
        write_atomically(folder / f"{key}.png", lambda file, s=sheet: s.save(file, "PNG"))
    if trained_here:
        shutil.copy(run / "log.jsonl", folder / "log.jsonl")
    return folder


def require_same_pictures(checkpoint: Path, data: Path | None) -> None:
    """Check that a training run in this project drew on the pictures that `data` holds.

    Raises:
        ValueError: The generator was trained on the course's pictures and the conditions are not
            of the course, or the other way round.
    """
    where = checkpoint.parent / "environment.json"
    trained_on = read_json(where) if where.exists() else {}
    if trained_on and trained_on.get("course_pictures", False) != is_course(data):
        raise ValueError(
            f"{checkpoint.parent} was trained on other pictures than the conditions are for: give "
            "evaluate the same --data or LAB7_DATA as train"
        )


def training_summary(log: list[dict], pipeline: ConditionalDDPMPipeline) -> dict[str, Any]:
    """Return what a training took, from the last row of its log."""
    last = log[-1]
    return {
        "steps": last["step"],
        "images": last["images"],
        "seconds": last["seconds"],
        "images_per_second": last["images"] / last["seconds"],
        "final_loss": last["loss"],
        "parameters": sum(p.numel() for p in pipeline.unet.parameters()),
    }


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
        data: Data folder that the conditions are of, see `resolve_root`.

    Returns:
        "guidance", "steps" and "schedulers": lists of rows with the settings, two scores and all
        verdicts; "best_guidance": the scale with the highest top-k accuracy, of equals the lowest.
    """
    if not guidance_scales:
        raise ValueError("no guidance scales to try: give at least one")
    require_writable(root / name)
    if keep:
        require_writable(checkpoint)

    own = pipeline.settings()
    others = [convert_scheduler(pipeline.scheduler, name) for name in schedulers]
    drawing = {scheduler_name(s): ConditionalDDPMPipeline(pipeline.unet, s, **own) for s in others}
    drawing[own_sampler := scheduler_name(pipeline.scheduler)] = pipeline

    @functools.cache  # some settings stand in more than one list
    def row(sampler: str, num_inference_steps: int, guidance_scale: float) -> dict[str, Any]:
        settings = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
        metrics, _ = draw_and_judge(
            drawing[sampler], conditions, evaluator, repetitions=repetitions, **settings
        )
        scores = metrics.pop("scores")
        return metrics | {"top_k": scores.top_k, "exact_set": scores.exact_set}

    own_steps = own["num_inference_steps"]
    guidance = [row(own_sampler, own_steps, w) for w in sorted(guidance_scales)]
    best = max(guidance, key=lambda scored: scored["top_k"].value)["guidance_scale"]
    steps = [row(own_sampler, n, best) for n in step_counts]
    samplers = [row(scheduler_name(s), own_steps, best) for s in others]
    if keep:
        pipeline.register_to_config(guidance_scale=best)
        save_pipeline(pipeline, checkpoint)
    metrics = {"guidance": guidance, "steps": steps, "schedulers": samplers, "best_guidance": best}
    metrics["data_sha256"] = _data_hash(data)
    write_record(name, {}, metrics, root, weights=checkpoint)
    return metrics


def recorded_verdicts(record: Record, part: str) -> Verdicts:
    """Return what was said of every picture of a set, for instance of "test".

    Raises:
        ValueError: The record has none; the message names the record and the nearest there is.
    """
    return Verdicts(**record.get(f"{part}.pictures"))


def _data_hash(data: Path | None) -> str:
    dataset = ICLEVRDataset(data)
    return data_hash(dataset.images, dataset.conditions)
