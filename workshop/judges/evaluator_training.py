"""Training of our own evaluator on rendered scenes.

As in the course, a ResNet-18 learns with binary cross-entropy from pictures that were shrunk to
32×32 and scaled back to 64×64. What is added are random changes of the pictures, see
`workshop.judges.augmentation`.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lab7.dataset import DATA_DIR, ICLEVRDataset, to_float
from lab7.evaluator import (
    THRESHOLD,
    WEIGHTS,
    Evaluator,
    Scores,
    build_network,
    label_ratios,
    top_k_accuracy,
    top_k_hits,
)
from lab7.labels import LABELS, decode
from workshop.judges.augmentation import augment, shrink
from workshop.judges.judge_training import JudgeTraining

MISTAKES_SHOWN = 16  # of the test, in the record's picture


@dataclass(frozen=True)
class EvaluatorTraining(JudgeTraining):
    """The training of the classifier; its targets are multi-hot labels (N, 24)."""

    name = "evaluator"
    judge = Evaluator
    weights = WEIGHTS

    label_smoothing: float = 0.01  # targets are this and 1 minus this

    def read(self, renders: str | Path) -> tuple[Tensor, Tensor]:
        """Read the embedded pictures and those of `python -m lab7 render evaluator`.

        The renders come last, so that they alone are validated and tested on.
        """
        sets = [ICLEVRDataset(DATA_DIR), ICLEVRDataset(renders)]
        images = torch.cat([part.images for part in sets])
        return images, torch.cat([part.conditions for part in sets])

    def build(self) -> nn.Module:
        return build_network()

    def change(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple:
        targets = labels * (1 - 2 * self.label_smoothing) + self.label_smoothing
        return augment(images, self, generator), targets

    def loss(self, network: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        """Compute the cross-entropy from logits: in bfloat16 a sigmoid rounds to 0 and 1."""
        *body, head = network.children()
        logits = nn.Sequential(*body, nn.Flatten(), head[0])(images)
        return F.binary_cross_entropy_with_logits(logits.float(), targets)

    def score(self, evaluator: Evaluator, images: Tensor, labels: Tensor) -> dict[str, float]:
        probabilities = evaluator.predict(images)
        exact_set = exact_set_accuracy(probabilities, labels)
        return {"exact_set": exact_set, "top_k": top_k_accuracy(probabilities, labels)}

    def examine(
        self, evaluator: Evaluator, images: Tensor, labels: Tensor
    ) -> tuple[dict[str, Any], Tensor]:
        """Return how the evaluator does on pictures that it never saw.

        Returns:
            "test": all scores; "test_small": those of the pictures shrunk and scaled back;
            "recall_per_label"; "by_count": the scores by the number of objects in a picture;
            "mistakes": see `list_mistakes`. And the pictures of the worst mistakes.
        """
        probabilities = evaluator.predict(images)
        small = evaluator.predict(shrink(to_float(images), self.small_size))
        recall = zip(LABELS, per_label_recall(probabilities, labels).tolist(), strict=True)
        counts = labels.sum(1).long()
        mistakes = list_mistakes(probabilities, labels)
        metrics = {
            "test": compute_scores(probabilities, labels),
            "test_small": compute_scores(small, labels),
            "recall_per_label": {k: None if math.isnan(share) else share for k, share in recall},
            "by_count": {
                count: compute_scores(probabilities[counts == count], labels[counts == count])
                for count in counts.unique().tolist()
            },
            "mistakes": mistakes,
        }
        return metrics, images[[mistake["row"] for mistake in mistakes[:MISTAKES_SHOWN]]]


def compute_scores(probabilities: Tensor, labels: Tensor, groups: Tensor | None = None) -> Scores:
    """Return all scores with their intervals, see `lab7.estimates.share`.

    Args:
        probabilities: (B, 24).
        labels: (B, 24) multi-hot.
        groups: (B,) integers; pictures with the same number share a condition and are resampled
            together. None: every picture has its own.

    Raises:
        UserError: Other shapes, or no label at all.
    """
    hits, seen = top_k_hits(probabilities, labels), probabilities.detach().cpu() >= THRESHOLD
    return Scores.of(label_ratios(hits, seen, labels.cpu()), groups)


def list_mistakes(probabilities: Tensor, labels: Tensor) -> list[dict[str, Any]]:
    """List the pictures whose labels (B, 24) are not exactly those seen, the worst first.

    Returns:
        For each picture "row", its "labels" and those "seen". The order is that of the margin: the
        lowest probability of a label that is there minus the highest of one that is not.
    """
    wanted, seen = labels > THRESHOLD, probabilities >= THRESHOLD
    lowest = probabilities.masked_fill(~wanted, 1).amin(1)
    margin = lowest - probabilities.masked_fill(wanted, 0).amax(1)
    wrong = (seen != wanted).any(1)
    rows = [row for row in margin.argsort(stable=True).tolist() if wrong[row]]
    pairs = zip(rows, decode(labels[rows]), decode(seen[rows]), strict=True)
    return [{"row": row, "labels": asked, "seen": found} for row, asked, found in pairs]


def exact_set_accuracy(probabilities: torch.Tensor, labels: torch.Tensor) -> float:
    """Return the share of pictures in which exactly the labels (B, 24) pass the threshold."""
    exact = ((probabilities >= THRESHOLD) == (labels > THRESHOLD)).all(1)
    return int(exact.sum()) / len(exact)


def per_label_recall(probabilities: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return (24,): of the pictures that have a label, the share in which it passes the threshold.

    Labels that no picture has give NaN.
    """
    wanted = labels > THRESHOLD
    return ((probabilities >= THRESHOLD) & wanted).sum(0) / wanted.sum(0)
