"""Scores of a generator: pictures drawn for conditions, judged by the evaluator."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lab7.auditor import Auditor, compute_audit, list_objects
from lab7.diffusion import scheduler_name
from lab7.estimates import Estimate, aggregate, share
from lab7.evaluator import (
    THRESHOLD,
    Evaluator,
    compute_scores,
    exact_set_accuracy,
    top_k_accuracy,
)
from lab7.fidelity import RealPictures
from lab7.labels import decode, encode
from lab7.pipeline import ConditionalDDPMPipeline

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
