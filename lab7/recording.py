"""Records of what generators scored, of the choice of their settings, and how they compare."""

import difflib
import functools
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from lab7.dataset import SCORED, ICLEVRDataset, data_hash
from lab7.diffusion import convert_scheduler, scheduler_name
from lab7.errors import UserError
from lab7.estimates import Estimate, difference
from lab7.evaluator import Evaluator
from lab7.files import read_json, require_writable, write_atomically
from lab7.layouts import find_layout
from lab7.pipeline import ConditionalDDPMPipeline, save_pipeline
from lab7.records import RESULTS_DIR, Record, read_log, write_record
from lab7.sampling import choose_sample_rows, denoising_frames, stack_grids, to_grid
from lab7.scoring import Conditions, Verdicts, draw_and_judge

# What a record keeps of how its run was started, as far as the run noted it.
_TRAINED = ("machine", "date", "git_commit", "packages", "precision", "data_sha256")


@dataclass(frozen=True)
class Comparison:
    """How a score of one generator differs from that of another.

    `difference` has its interval over conditions, which are the same on both sides, as the seeds
    are. `verdict`: "better", "worse" or "not to be told apart"; where a side has one training seed
    only, how much another training would differ is not known, and the verdict says so.
    """

    difference: Estimate
    verdict: str
    training_seeds: tuple[int, int]


def record_generator(
    name: str,
    pipeline: ConditionalDDPMPipeline,
    evaluator: Evaluator,
    scored: dict[str, tuple[dict[str, Any], Tensor]],
    checkpoint: Path,
    root: Path = RESULTS_DIR,
    data: Path | None = None,
    extra: dict[str, Any] | None = None,
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
        settings: Of sampling, see `draw_and_judge`.

    Returns:
        The record's folder.

    Raises:
        UserError: See `require_same_pictures`.
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


def training_summary(log: list[dict], pipeline: ConditionalDDPMPipeline) -> dict[str, Any]:
    """Return what a training took.

    Its time is that of its pictures at the median speed of the log's rows: on a machine that does
    nothing else, and without pauses.
    """
    last, speed = log[-1], float(np.median([row["images_per_second"] for row in log]))
    return {
        "steps": last["step"],
        "images": last["images"],
        "seconds": last["images"] / speed,
        "images_per_second": speed,
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
        data: Data folder that the conditions are of, see `find_layout`.

    Returns:
        "guidance", "steps" and "schedulers": lists of rows with the settings, two scores and all
        verdicts; "best_guidance": the scale with the highest top-k accuracy, of equals the lowest.
    """
    if not guidance_scales:
        raise UserError("no guidance scales to try: give at least one")
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
        UserError: The record has none; the message names the record and the nearest there is.
    """
    return Verdicts(**record.get(f"{part}.pictures"))


def compare_paired(
    first: Record | Sequence[Record],
    second: Record | Sequence[Record],
    part: str = "test",
    score: str = "top_k",
) -> Comparison:
    """Compare a score of two generators, picture by picture of the same conditions and seeds.

    The first is "better" where the interval of the difference is above 0 and, with two training
    seeds or more on both sides, the scores of no side spread over as much as the difference.

    Args:
        first: The record of a generator, or one for each of its trainings.
        second: The same of the other.
        part: The set of conditions.
        score: Any score, for instance "top_k" or "exact_scene".

    Raises:
        UserError: Unknown names, or records that cannot be compared; the message names them.
    """
    sides = [[side] if isinstance(side, Record) else list(side) for side in (first, second)]
    if not all(sides):
        raise UserError("no records on one side: give one for each training")
    _require_alike([*sides[0], *sides[1]], part)
    pairs = [[_ratio(record, part, score) for record in side] for side in sides]
    sums = [np.sum(side, axis=0) for side in pairs]  # over trainings: above and below, (2, B)
    found = difference(sums[0], sums[1], recorded_verdicts(sides[0][0], part).condition)
    seeds = tuple(len({record.config.get("seed") for record in side}) for side in sides)
    word = "better" if found.value > 0 else "worse"
    if found.low <= 0 <= found.high:
        word = "not to be told apart"
    elif min(seeds) == 1:
        word += " (one training seed)"
    elif max(map(_spread, pairs)) >= abs(found.value):
        word = "not to be told apart"
    return Comparison(found, word, seeds)


def comparable(
    records: Mapping[str, Record], part: str = "test"
) -> tuple[dict[str, Record], dict[str, str]]:
    """Find out which records belong into one table: of one budget and one data set.

    Args:
        records: By name.
        part: The set of conditions that the table is of.

    Returns:
        Those that stay, and by name why each of the others is left out, one line each.
    """
    kept, left_out, runs = {}, {}, {}
    for name, record in records.items():
        weights = record.environment.get("weights_sha256", name)
        if "scores" not in record.metrics.get(part, {}):
            left_out[name] = f"{name} has no scores of {part!r}"
        elif "training" not in record.metrics:
            left_out[name] = f"{name} has no noted training"
        elif weights in runs:
            left_out[name] = f"{name} is of the same run as {runs[weights]}"
        else:
            kept[name], runs[weights] = record, name
    facts = {name: _trained_on(record) for name, record in kept.items()}
    usual = Counter(facts.values()).most_common(1)[0][0] if facts else None
    for name, (budget, data) in facts.items():
        if (budget, data) != usual:
            del kept[name]
            what = f"{budget:,} pictures, the rest of its table on {usual[0]:,}"
            what = what if budget != usual[0] else "another data set than the rest of its table"
            left_out[name] = f"{name} was trained on {what}"
    return kept, left_out


def _trained_on(record: Record) -> tuple[int, str | None]:
    """Return on how many pictures a run was trained (steps times batch), and their hash."""
    training = record.get("training")
    return training["images"], training.get("data_sha256")


def _require_alike(records: Sequence[Record], part: str) -> None:
    """Refuse records whose verdicts cannot be compared picture by picture."""
    facts = []
    for record in records:
        verdicts, (budget, data) = recorded_verdicts(record, part), _trained_on(record)
        facts.append(
            {
                "conditions": [verdicts.conditions, verdicts.condition],
                "seeds": verdicts.seed,
                "origin of pictures and evaluator": record.metrics.get("course"),
                "sampling steps": record.get(f"{part}.num_inference_steps"),
                "pictures of training": budget,
                "training data": data,
            }
        )
    for record, found in zip(records, facts, strict=True):
        other = [name for name in found if found[name] != facts[0][name]]
        if other:
            values = facts[0][other[0]], found[other[0]]
            shown = f" ({values[0]} and {values[1]})" if not isinstance(values[0], list) else ""
            raise UserError(
                f"records {records[0].name!r} and {record.name!r} cannot be compared: "
                f"they differ in {other[0]}{shown}"
            )


def _ratio(record: Record, part: str, score: str) -> np.ndarray:
    """Return what each picture adds above and below the line of a score, (2, B)."""
    parts = recorded_verdicts(record, part).ratios()
    known = {name: pair for pairs in parts.values() for name, pair in pairs.items()}
    if score not in known:
        close = difflib.get_close_matches(score, known, 1, cutoff=0)[0]
        raise UserError(
            f"no score {score!r}: did you mean {close!r}? Choose one of {', '.join(known)}"
        )
    return np.stack([np.asarray(column, dtype=float) for column in known[score]])


def _spread(pairs: Sequence[np.ndarray]) -> float:
    """Return how far apart the scores of several trainings are."""
    scores = [above.sum() / max(below.sum(), 1) for above, below in pairs]
    return max(scores) - min(scores)


def _data_hash(data: Path | None) -> str:
    dataset = ICLEVRDataset(data)
    return data_hash(dataset.images, dataset.conditions)
