"""Scores of a generator: pictures are drawn for conditions, both judges look at each, once, and all
scores follow from these verdicts."""

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lab7.auditor import Audit, Auditor, scene_ratios
from lab7.diffusion import scheduler_name
from lab7.errors import UserError
from lab7.estimates import Estimate, Values, mean, share
from lab7.evaluator import THRESHOLD, Evaluator, Scores, label_ratios, top_k_hits
from lab7.fidelity import Fidelity, RealPictures
from lab7.labels import LABELS, NUM_LABELS, encode
from lab7.pipeline import ConditionalDDPMPipeline

Conditions = Sequence[Sequence[str]]
Ratios = dict[str, tuple[Values, Values]]
PARTS = ("scores", "audit", "agreement", "fidelity")  # of what `score_verdicts` returns
_WORDS = {"top_k": "top-k", "f1": "F1"}


@dataclass(frozen=True)
class Agreement:
    """How often evaluator and auditor say the same of pictures.

    `same_labels`: both see the same labels, whatever their number. The four others share out all
    pictures by who finds exactly what was asked for: the evaluator its labels and no other, the
    auditor each exactly once.
    """

    same_labels: Estimate
    both_right: Estimate
    evaluator_alone: Estimate
    auditor_alone: Estimate
    both_wrong: Estimate


@dataclass(frozen=True)
class Verdicts:
    """What the judges say of each of B pictures, as records keep it: scores rest on nothing else.

    Attributes:
        conditions: N lists of labels.
        condition: For each picture, which of them it should show.
        seed: Of each picture; None for pictures from elsewhere.
        hits: How many of its k labels are among its k highest outputs of the evaluator.
        seen: The labels that pass the evaluator's threshold, as indices into `LABELS`.
        counted: The objects that the auditor finds, likewise, a label as often as it is there; None
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
        """Return by part and score what each picture adds above and below the line, (B,) each."""
        labels, ones = encode(self.conditions)[self.condition], torch.ones(len(self.condition))
        seen = _count(self.seen) > 0
        parts = {"scores": label_ratios(torch.tensor(self.hits), seen, labels)}
        if self.counted is not None:
            counts = _count(self.counted)
            right, exact = (seen == (labels > 0)).all(1), (counts == labels).all(1)
            agreement = {
                "same_labels": (seen == (counts > 0)).all(1),
                "both_right": right & exact,
                "evaluator_alone": right & ~exact,
                "auditor_alone": exact & ~right,
                "both_wrong": ~right & ~exact,
            }
            parts["audit"] = scene_ratios(counts, labels)
            parts["agreement"] = {name: (part, ones) for name, part in agreement.items()}
        if self.nearest is not None:
            parts["fidelity"] = {"nearest_distance": (self.nearest, ones)}
        return parts


def draw_and_judge(
    pipeline: ConditionalDDPMPipeline,
    conditions: Conditions,
    evaluator: Evaluator,
    auditor: Auditor | None = None,
    real: RealPictures | None = None,
    repetitions: int = 4,
    first_seed: int = 0,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    progress: bool = True,
) -> tuple[dict[str, Any], Tensor]:
    """Draw every condition several times, and have the pictures judged.

    Every picture counts: none is drawn again or chosen, and no judge has a part in drawing.

    Args:
        pipeline: The generator.
        conditions: N lists of labels.
        evaluator: See `judge_pictures`, as `auditor` and `real`.
        repetitions: R pictures of each condition. Condition i has the seed
            `first_seed + r * N + i` in repetition r.
        first_seed: See `repetitions`.
        num_inference_steps: Of sampling; None takes the pipeline's own.
        guidance_scale: Of classifier-free guidance; None takes the pipeline's own.
        progress: Whether to show a progress bar.

    Returns:
        What `judge_pictures` returns, with the settings and the "timesteps" that the sampler took;
        and the pictures (R·N, 3, 64, 64) in [-1, 1], repetition by repetition.
    """
    if repetitions < 1:
        raise UserError(f"repetitions {repetitions} must be at least 1")
    settings = pipeline.settings(num_inference_steps, guidance_scale)
    labels = encode(conditions).repeat(repetitions, 1)
    seeds = range(first_seed, first_seed + len(labels))
    images = pipeline(
        labels, seeds=seeds, output_type="pt", progress=progress, **settings
    ).images  # one call: its progress bar covers all repetitions
    metrics = settings | {
        "scheduler": scheduler_name(pipeline.scheduler),
        "timesteps": pipeline.scheduler.timesteps.tolist(),
        "repetitions": repetitions,
        "first_seed": first_seed,
    }
    return metrics | judge_pictures(images, conditions, evaluator, auditor, real, seeds), images


def judge_pictures(
    images: Tensor,
    conditions: Conditions,
    evaluator: Evaluator,
    auditor: Auditor | None = None,
    real: RealPictures | None = None,
    seeds: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Have pictures judged, and score them.

    Args:
        images: (R·N, 3, 64, 64), R pictures of each condition, repetition by repetition.
        conditions: N lists of labels.
        evaluator: Sees the labels.
        auditor: Counts the objects.
        real: The training pictures, to compare these with.
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
    labels, groups = encode(conditions)[condition], torch.tensor(condition)
    probabilities = evaluator.predict(images)
    kernel, nearest = real.compare(images, labels, groups) if real else (None, None)
    verdicts = Verdicts(
        [list(labels) for labels in conditions],
        condition,
        None if seeds is None else list(seeds),
        top_k_hits(probabilities, labels).tolist(),
        _list(probabilities >= THRESHOLD),
        None if auditor is None else _list(auditor.count(images)),
        nearest,
    )
    found = score_verdicts(verdicts)
    if real:
        found["fidelity"] = dataclasses.replace(found["fidelity"], kernel_distance=kernel)
    return found | {"pictures": verdicts}


def score_verdicts(verdicts: Verdicts) -> dict[str, Any]:
    """Score pictures from what was said of each, for instance from a record's "pictures".

    Returns:
        "scores" of the evaluator, and as far as they were asked for the "audit" of the auditor, the
        "agreement" of both, and the "fidelity", without the kernel distance, which pictures have
        as a set. All intervals are over conditions.
    """
    parts, groups = verdicts.ratios(), verdicts.condition
    found = {"scores": Scores.of(parts["scores"], groups)}
    if "audit" in parts:
        found["audit"] = Audit.of(parts["audit"], groups)
        shares = parts["agreement"].items()
        found["agreement"] = Agreement(**{name: share(a, b, groups) for name, (a, b) in shares})
    if "fidelity" in parts:
        found["fidelity"] = Fidelity(None, mean(verdicts.nearest, groups))
    return found


def score_table(sets: dict[str, dict[str, Any]]) -> str:
    """Write scores as a table, a column a set of conditions.

    Args:
        sets: By name, what `judge_pictures` returned.
    """
    found = [{} for _ in sets]
    for values, metrics in zip(found, sets.values(), strict=True):
        for part in PARTS:
            values |= vars(metrics[part]) if part in metrics else {}
    rows = [["", *sets]]
    for name in found[0]:
        words = _WORDS.get(name, name.removeprefix("num_").replace("_", " "))
        rows.append([words, *(_cell(values[name]) for values in found)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def _cell(found: Estimate | int | None) -> str:
    if not isinstance(found, Estimate):
        return "–" if found is None else str(found)
    if found.hits is None:
        return f"{found.value:.5f} [{found.low:.5f}, {found.high:.5f}]"
    return f"{found.value:.4f} [{found.low:.3f}, {found.high:.3f}] {found.hits}/{found.total}"


def label_names(lists: Iterable[Sequence[int]]) -> list[list[str]]:
    """Return the labels that lists of indices stand for, as "seen" and "counted" hold them."""
    return [[LABELS[index] for index in indices] for indices in lists]


def _list(counts: Tensor) -> list[list[int]]:
    """Return the labels of each row of counts (B, 24) as indices, each as often as it is there."""
    return [np.repeat(np.arange(NUM_LABELS), row).tolist() for row in counts.long().numpy()]


def _count(lists: Iterable[Sequence[int]]) -> Tensor:
    """Return what `_list` made a list of, (B, 24)."""
    rows = [np.bincount(np.array(row, dtype=int), minlength=NUM_LABELS) for row in lists]
    return torch.from_numpy(np.stack(rows))
