"""Scores of a generator: pictures drawn for conditions, judged by the evaluator."""

import dataclasses
import functools
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lab7.auditor import Auditor, compute_audit, list_objects
from lab7.dataset import SCORED, is_course
from lab7.evaluator import (
    THRESHOLD,
    Estimate,
    Evaluator,
    compute_scores,
    exact_set_accuracy,
    share,
    top_k_accuracy,
)
from lab7.fidelity import RealPictures
from lab7.files import require_writable, write_atomically
from lab7.labels import decode, encode, read_json
from lab7.pipeline import ConditionalDDPMPipeline, save_pipeline
from lab7.results import RESULTS_DIR, aggregate, read_log, write_record
from lab7.sampling import choose_sample_rows, denoising_frames, stack_grids, to_grid
from lab7.schedulers import convert_scheduler, scheduler_name

Conditions = Sequence[Sequence[str]]
PARTS = ("scores", "audit", "agreement", "fidelity")  # of what `scores` returns
_WORDS = {"num_pictures": "pictures", "num_conditions": "conditions", "top_k": "top-k", "f1": "F1"}


@dataclass(frozen=True)
class Agreement:
    """How often evaluator and auditor say the same of pictures.

    `same_labels`: both see the same labels, whatever their number. The four others share out all
    pictures by who finds exactly what was asked for: the evaluator its labels and no other, the
    auditor each just once.
    """

    same_labels: Estimate
    both_right: Estimate
    evaluator_alone: Estimate
    auditor_alone: Estimate
    both_wrong: Estimate


def score_pipeline(
    pipeline: ConditionalDDPMPipeline,
    evaluator: Evaluator,
    conditions: Conditions,
    repetitions: int = 4,
    first_seed: int = 0,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    progress: bool = True,
) -> tuple[dict[str, Any], Tensor]:
    """Draw every condition several times and score the pictures.

    Every picture counts: none is drawn again or chosen, and the evaluator has no part in drawing.

    Args:
        pipeline: The generator.
        evaluator: The judge.
        conditions: N lists of labels.
        repetitions: R pictures of each condition. Condition i has the seed
            `first_seed + r * N + i` in repetition r.
        first_seed: See `repetitions`.
        num_inference_steps: Of sampling; None takes the pipeline's own.
        guidance_scale: Of classifier-free guidance; None takes the pipeline's own.
        progress: Whether to show a progress bar.

    Returns:
        The scores with their settings, and the pictures (R·N, 3, 64, 64) in [-1, 1], repetition
        by repetition. In "scores" all repetitions are pooled, with intervals over conditions;
        "top_k" and "exact_set" are means over repetitions with intervals over those. "seen" lists
        the labels that pass the threshold in each picture.
    """
    if repetitions < 1:
        raise ValueError(f"repetitions {repetitions} must be at least 1")
    count = len(conditions)
    settings = pipeline.settings(num_inference_steps, guidance_scale)
    labels = encode(conditions).repeat(repetitions, 1)
    seeds = range(first_seed, first_seed + repetitions * count)
    images = pipeline(
        labels, seeds=seeds, output_type="pt", progress=progress, **settings
    ).images  # one call: its progress bar covers all repetitions
    probabilities = evaluator.predict(images)
    parts = list(zip(probabilities.split(count), labels.split(count), strict=True))
    top_k = [top_k_accuracy(p, y) for p, y in parts]
    exact_set = [exact_set_accuracy(p, y) for p, y in parts]
    groups = torch.arange(count).repeat(repetitions)
    metrics = settings | {
        "scheduler": scheduler_name(pipeline.scheduler),
        "repetitions": repetitions,
        "first_seed": first_seed,
        "scores": compute_scores(probabilities, labels, groups),
        "top_k": aggregate(top_k),
        "exact_set": aggregate(exact_set),
        "top_k_per_repetition": top_k,
        "exact_set_per_repetition": exact_set,
        "seen": decode(probabilities >= THRESHOLD),
    }
    return metrics, images


def scores(
    images: Tensor,
    conditions: Conditions,
    evaluator: Evaluator,
    auditor: Auditor,
    real: RealPictures | None = None,
) -> dict[str, Any]:
    """Say all that both judges make of pictures.

    Args:
        images: (R·N, 3, 64, 64), R pictures of each condition, repetition by repetition.
        conditions: N lists of labels.
        evaluator: Scores the labels.
        auditor: Counts the objects.
        real: The training pictures, to compare these with.

    Returns:
        "scores" and "seen", the labels that pass the threshold in each picture, by the evaluator;
        "audit" and "counted", the objects in each picture, by the auditor; "agreement" of both,
        see `compare_judges`; and with `real` "fidelity".

    Raises:
        ValueError: The number of pictures is no multiple of the number of conditions.
    """
    repetitions, rest = divmod(len(images), len(conditions) or 1)
    if rest or not repetitions or not conditions:
        raise ValueError(f"{len(images)} pictures do not fit {len(conditions)} conditions")
    labels = encode(conditions).repeat(repetitions, 1)
    groups = torch.arange(len(conditions)).repeat(repetitions)
    probabilities, counts = evaluator.predict(images), auditor.count(images)
    found = {
        "scores": compute_scores(probabilities, labels, groups),
        "audit": compute_audit(counts, labels, groups),
        "agreement": compare_judges(probabilities >= THRESHOLD, counts, labels, groups),
        "seen": decode(probabilities >= THRESHOLD),
        "counted": list_objects(counts),
    }
    return found if real is None else found | {"fidelity": real.compare(images, labels, groups)}


def score_sets(
    pipeline: ConditionalDDPMPipeline,
    evaluator: Evaluator,
    auditor: Auditor,
    real: RealPictures | None,
    sets: dict[str, Conditions],
    repetitions: int = 4,
    **settings: Any,
) -> dict[str, tuple[dict[str, Any], Tensor]]:
    """Draw sets of conditions, by name, and have both judges score them.

    Returns:
        By name what `score_pipeline` returns, to its metrics added those of `scores`.
    """
    scored = {}
    for name, conditions in sets.items():
        metrics, images = score_pipeline(pipeline, evaluator, conditions, repetitions, **settings)
        metrics |= scores(images, conditions, evaluator, auditor, real)
        scored[name] = metrics, images
    return scored


def compare_judges(seen: Tensor, counts: Tensor, labels: Tensor, groups: Tensor) -> Agreement:
    """Count how often evaluator and auditor say the same of pictures.

    Args:
        seen: (B, 24) bool, the labels that the evaluator sees.
        counts: (B, 24), how often the auditor finds each.
        labels: (B, 24) multi-hot, those asked for.
        groups: (B,), see `compute_scores`.
    """
    ones, wanted = torch.ones(len(seen)), labels > THRESHOLD
    right, exact = (seen == wanted).all(1), (counts == wanted.long()).all(1)
    shares = {
        "same_labels": (seen == (counts > 0)).all(1),
        "both_right": right & exact,
        "evaluator_alone": right & ~exact,
        "auditor_alone": exact & ~right,
        "both_wrong": ~right & ~exact,
    }
    return Agreement(**{name: share(part, ones, groups) for name, part in shares.items()})


def score_table(sets: dict[str, dict[str, Any]]) -> str:
    """Write scores as a table, a column a set of conditions.

    Args:
        sets: By name, what `scores` returned.
    """
    first = next(iter(sets.values()))
    rows = [["", *sets]]
    for name in ("num_pictures", "num_conditions"):
        rows.append([_WORDS[name], *(str(getattr(m["scores"], name)) for m in sets.values())])
    for part in [part for part in PARTS if part in first]:
        for field in dataclasses.fields(first[part]):
            if not field.name.startswith("num_"):
                cells = [_cell(getattr(metrics[part], field.name)) for metrics in sets.values()]
                rows.append([_WORDS.get(field.name, field.name.replace("_", " ")), *cells])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def _cell(estimate: Estimate | None) -> str:
    if estimate is None:
        return "–"
    value, low, high = estimate.value, estimate.low, estimate.high
    if estimate.hits is None:
        return f"{value:.5f} [{low:.5f}, {high:.5f}]"
    return f"{value:.4f} [{low:.3f}, {high:.3f}] {estimate.hits}/{estimate.total}"


def failed_pictures(conditions: Conditions, counted: Conditions) -> list[int]:
    """Return the rows of pictures, repetition by repetition, that are not exactly as asked."""
    return [
        row
        for row, objects in enumerate(counted)
        if sorted(objects) != sorted(conditions[row % len(conditions)])
    ]


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
    says whether the pictures and the evaluator are the course's or this project's.

    Args:
        name: Of the record.
        pipeline: The generator.
        evaluator: The judge.
        scored: What `score_sets` returned; of "seen" and "counted" the first repetition is kept.
        checkpoint: Folder that the pipeline was loaded from; where it lies in the folder of a
            training run, the record gets the run's configuration and log.
        root: Folder of the records.
        data: Data folder that the conditions are of, see `resolve_root`.
        settings: Of sampling, see `score_pipeline`.

    Returns:
        The record's folder.

    Raises:
        ValueError: See `require_same_pictures`.
    """
    course_judge = evaluator.path is not None and evaluator.path.suffix == ".pth"
    metrics = {"course": {"pictures": is_course(data), "evaluator": course_judge}}
    run, config, grids = checkpoint.parent, {}, {}
    trained_here = (run / "log.jsonl").exists()
    if trained_here:
        require_same_pictures(checkpoint, data)
        where = read_json(run / "environment.json")
        config = read_json(run / "config.json")
        metrics["training"] = training_summary(read_log(run / "log.jsonl"), pipeline)
        metrics["training"] |= {key: where[key] for key in ("machine", "date", "git_commit")}
        rows = choose_sample_rows(run / "samples")
        if rows:
            metrics["training"]["sample_steps"] = list(rows)
            grids["samples"] = stack_grids(list(rows.values()))
    for key, (found, images) in scored.items():
        first = len(images) // found["repetitions"]
        metrics[key] = found | {name: found[name][:first] for name in ("seen", "counted")}
        if key in SCORED:
            grids[key] = to_grid(images[:first])
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

    Returns:
        "guidance", "steps" and "schedulers": lists of rows with the settings and the pooled
        scores; "best_guidance": the scale with the highest top-k accuracy, of equals the lowest.
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
        metrics, _ = score_pipeline(
            drawing[sampler], evaluator, conditions, repetitions, **settings
        )
        scores = metrics["scores"]
        return {"scheduler": sampler, **settings, "repetitions": repetitions} | {
            "top_k": scores.top_k,
            "exact_set": scores.exact_set,
        }

    own_steps = own["num_inference_steps"]
    guidance = [row(own_sampler, own_steps, w) for w in sorted(guidance_scales)]
    best = max(guidance, key=lambda scored: scored["top_k"].value)["guidance_scale"]
    steps = [row(own_sampler, n, best) for n in step_counts]
    samplers = [row(scheduler_name(s), own_steps, best) for s in others]
    if keep:
        pipeline.register_to_config(guidance_scale=best)
        save_pipeline(pipeline, checkpoint)
    metrics = {"guidance": guidance, "steps": steps, "schedulers": samplers, "best_guidance": best}
    write_record(name, {}, metrics, root, weights=checkpoint)
    return metrics
