"""Every score of pictures, with its interval, from the verdicts of both judges on each picture."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lab7.auditor import Audit, Auditor, scene_ratios
from lab7.diffusion import scheduler_name
from lab7.errors import UserError, unknown
from lab7.estimates import Estimate, Values, difference
from lab7.evaluator import THRESHOLD, Evaluator, Scores, label_ratios, top_k_hits
from lab7.labels import LABELS, NUM_LABELS, encode
from lab7.pipeline import ConditionalDDPMPipeline
from lab7.records import Record, comparable

Conditions = Sequence[Sequence[str]]
Ratios = dict[str, tuple[Values, Values]]  # by score, numerators and denominators of pictures
_MORE_IS_BETTER = ("top_k", "exact_set", "precision", "recall", "f1", "exact_scene")


@dataclass(frozen=True)
class Verdicts:
    """What the judges say of each of B pictures, as records keep it: scores rest on nothing else.

    Attributes:
        conditions: N lists of labels.
        condition: For each picture, which of them it should show.
        seed: Of each picture; None for pictures from elsewhere.
        hits: How many of its k labels are among its k highest outputs of the evaluator.
        seen: The labels that pass the evaluator's threshold, as indices into `LABELS`.
        counted: The objects that the auditor finds, likewise, a label as often as it occurs; None
            if it was not asked.
        nearest: The distance to the nearest training picture; None if that was not asked.
    """

    conditions: list[list[str]]
    condition: list[int]
    seed: list[int] | None
    hits: list[int]
    seen: list[list[int]]
    counted: list[list[int]] | None = None
    nearest: list[float] | None = None

    def ratios(self) -> dict[str, Ratios]:
        """Return numerators and denominators (B,) of pictures, by part and score."""
        labels = encode(self.conditions)[self.condition]
        hits, seen = torch.tensor(self.hits), count_labels(self.seen) > 0
        parts = {"scores": label_ratios(hits, seen, labels)}
        if self.counted is not None:
            parts["audit"] = scene_ratios(count_labels(self.counted), labels)
        if self.nearest is not None:
            ones = torch.ones(len(self.nearest))
            parts["fidelity"] = {"nearest_distance": (self.nearest, ones)}
        return parts


@dataclass(frozen=True)
class Comparison:
    """How a score of one generator differs from that of another, over the same pictures.

    Attributes:
        difference: First minus second, with its interval over conditions.
        num_conditions: That both were asked for.
        training_seeds: Of each side, how many different ones its trainings have.
        verdict: "cannot be told apart" where the interval holds 0, or where the trainings of a side
            differ among themselves by as much; else "better" or "worse" with two training seeds or
            more on both sides, and "one seed: higher" or "one seed: lower" with fewer, as a second
            training could turn it round. Where more is not better, such as of extra objects, it
            says "higher" or "lower".
    """

    difference: Estimate
    num_conditions: int
    training_seeds: tuple[int, int]
    verdict: str


def draw_and_judge(
    pipeline: ConditionalDDPMPipeline,
    conditions: Conditions,
    evaluator: Evaluator,
    auditor: Auditor | None = None,
    repetitions: int = 4,
    first_seed: int = 0,
    progress: bool = True,
    **settings: Any,
) -> tuple[dict[str, Any], Tensor]:
    """Draw every condition several times, and have the pictures judged.

    Every picture counts: none is drawn again or chosen, and no judge has a part in drawing.

    Args:
        pipeline: The generator.
        conditions: N lists of labels.
        evaluator: See `judge_pictures`, as `auditor`.
        repetitions: R pictures of each condition. Condition i has the seed
            `first_seed + r * N + i` in repetition r.
        first_seed: See `repetitions`.
        progress: Whether to show a progress bar.
        settings: Of sampling; None takes the pipeline's own, see its `settings`.

    Returns:
        What `judge_pictures` returns, with the settings, the "scheduler", the "timesteps" that it
        took, "repetitions" and "first_seed"; and the pictures (R·N, 3, 64, 64) in [-1, 1],
        repetition by repetition.

    Raises:
        UserError: No repetition, or settings that are not valid.
    """
    if repetitions < 1:
        raise UserError(f"repetitions {repetitions} must be at least 1")
    settings = pipeline.settings(**settings)
    labels = encode(conditions).repeat(repetitions, 1)
    seeds = range(first_seed, first_seed + len(labels))
    # One call: its progress bar covers all repetitions.
    images = pipeline(labels, seeds, output_type="pt", progress=progress, **settings).images
    metrics = settings | {
        "scheduler": scheduler_name(pipeline.scheduler),
        "timesteps": pipeline.scheduler.timesteps.tolist(),
        "repetitions": repetitions,
        "first_seed": first_seed,
    }
    return metrics | judge_pictures(images, conditions, evaluator, auditor, seeds), images


def judge_pictures(
    images: Tensor,
    conditions: Conditions,
    evaluator: Evaluator,
    auditor: Auditor | None = None,
    seeds: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Have pictures judged, and score them.

    Args:
        images: (R·N, 3, 64, 64), R pictures of each condition, repetition by repetition.
        conditions: N lists of labels.
        evaluator: Sees the labels.
        auditor: Counts the objects.
        seeds: Those that the pictures were drawn with.

    Returns:
        "pictures", the `Verdicts`, and what `score_verdicts` makes of them.

    Raises:
        UserError: The number of pictures is no multiple of the number of conditions.
    """
    repetitions, rest = divmod(len(images), len(conditions) or 1)
    if rest or not repetitions or not conditions:
        raise UserError(f"{len(images)} pictures do not fit {len(conditions)} conditions")
    condition = list(range(len(conditions))) * repetitions
    labels = encode(conditions)[condition]
    probabilities = evaluator.predict(images)
    verdicts = Verdicts(
        [list(labels) for labels in conditions],
        condition,
        None if seeds is None else list(seeds),
        top_k_hits(probabilities, labels).tolist(),
        _list(probabilities >= THRESHOLD),
        None if auditor is None else _list(auditor.count(images)),
    )
    return score_verdicts(verdicts) | {"pictures": verdicts}


def score_verdicts(verdicts: Verdicts) -> dict[str, Any]:
    """Score pictures from what was said of each, for instance from a record's "pictures".

    Returns:
        "scores" of the evaluator, and the "audit" of the auditor if it was asked. All intervals are
        over conditions.
    """
    parts, groups = verdicts.ratios(), verdicts.condition
    found = {"scores": Scores.of(parts["scores"], groups)}
    if "audit" in parts:
        found["audit"] = Audit.of(parts["audit"], groups)
    return found


def label_names(lists: Iterable[Sequence[int]]) -> list[list[str]]:
    """Return the labels that lists of indices stand for, as "seen" and "counted" hold them."""
    return [[LABELS[index] for index in indices] for indices in lists]


def compare_paired(
    first: Sequence[Record], second: Sequence[Record], part: str = "test", score: str = "top_k"
) -> Comparison:
    """Compare a score of two generators, picture by picture of the same conditions and seeds.

    Args:
        first: The records of the one, a record for each of its trainings.
        second: The same of the other.
        part: The set of conditions.
        score: Any score of pictures, for instance "top_k" or "exact_scene".

    Raises:
        UserError: Unknown names, or records that are not `comparable`; the message names them.
    """
    named = {record.name: record for record in (*first, *second)}
    for record in (*first, *second):
        if named[record.name] != record:
            raise UserError(f"two different records are named {record.name!r}")
    _, left_out = comparable(named, part)
    if left_out or not first or not second:
        raise UserError("; ".join(left_out.values()) or "no records on one side: give at least one")
    sides = [np.stack([_ratio(record, part, score) for record in side]) for side in (first, second)]
    pooled, condition = [side.sum(0) for side in sides], first[0].get(f"{part}.pictures.condition")
    found = difference(pooled[0], pooled[1], condition)
    seeds = tuple(len({record.config.get("seed") for record in side}) for side in (first, second))
    spread = max(np.ptp(side[:, 0].sum(1) / np.maximum(side[:, 1].sum(1), 1)) for side in sides)
    verdict = _verdict(found, min(seeds), spread, score)
    return Comparison(found, len(set(condition)), seeds, verdict)


def _ratio(record: Record, part: str, score: str) -> np.ndarray:
    """Return numerators and denominators of a score of a record's pictures, (2, B)."""
    parts = Verdicts(**record.get(f"{part}.pictures")).ratios()
    known = {name: ratio for ratios in parts.values() for name, ratio in ratios.items()}
    if score not in known:
        raise unknown("score", score, known)
    return np.stack([np.asarray(column, dtype=float) for column in known[score]])


def _verdict(found: Estimate, seeds: int, spread: float, score: str) -> str:
    """Say which side is better, see `Comparison`."""
    if found.low <= 0 <= found.high or spread >= abs(found.value):
        return "cannot be told apart"
    word = "higher" if found.value > 0 else "lower"
    if seeds == 1:
        return f"one seed: {word}"
    return {"higher": "better", "lower": "worse"}[word] if score in _MORE_IS_BETTER else word


def _list(counts: Tensor) -> list[list[int]]:
    """Return the labels of each row of counts (B, 24) as indices, each as often as it occurs."""
    return [np.repeat(np.arange(NUM_LABELS), row).tolist() for row in counts.long().numpy()]


def count_labels(lists: Iterable[Sequence[int]]) -> Tensor:
    """Return (B, 24): how often each label occurs in lists of indices, see `Verdicts`."""
    rows = [np.bincount(np.array(row, dtype=int), minlength=NUM_LABELS) for row in lists]
    return torch.from_numpy(np.stack(rows))
