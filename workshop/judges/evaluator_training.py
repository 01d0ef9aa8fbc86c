"""Training of our own evaluator on rendered scenes.

The recipe is the course's: its ResNet-18, pictures shrunk to 32×32 and scaled back to 64×64, binary
cross-entropy. What is added are random changes of the pictures, see `workshop.judges.augmentation`.
"""

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lab7.dataset import DATA_DIR, ICLEVRDataset, to_float
from lab7.devices import choose_device
from lab7.errors import UserError
from lab7.evaluator import (
    THRESHOLD,
    WEIGHTS,
    Evaluator,
    build_network,
    compute_scores,
    exact_set_accuracy,
    per_label_recall,
    top_k_accuracy,
)
from lab7.files import require_writable, write_atomically
from lab7.labels import LABELS, decode
from lab7.records import RESULTS_DIR, write_record
from lab7.sampling import to_grid
from workshop.judges.augmentation import augment, shrink
from workshop.judges.judge_training import JudgeConfig, Trainer, split

MISTAKES_SHOWN = 16  # of the test, in the record's picture


@dataclass(frozen=True)
class EvaluatorConfig(JudgeConfig):
    """Settings of a training, and of the changes that its pictures go through."""

    label_smoothing: float = 0.01  # targets are this and 1 minus this


def train_evaluator(
    images: Tensor,
    labels: Tensor,
    config: EvaluatorConfig,
    output: str | Path = WEIGHTS,
    *,
    run_name: str = "evaluator",
    results_root: str | Path = RESULTS_DIR,
    states: str | Path | None = None,
    device: str | torch.device | None = None,
) -> Evaluator:
    """Train the classifier, keep its best epoch, and write down how it does.

    Args:
        images: (N, 3, 64, 64) uint8. Rows in the order of the scenes, so that no scene is on both
            sides of a cut: the last rows are the test's, those before are for validation.
        labels: (N, 24) multi-hot.
        config: The settings.
        output: safetensors file that gets the weights of the epoch in which the validation
            pictures were judged best. It and the record are written when all is done.
        run_name: Name of the record, see `write_record`.
        results_root: Folder of the records.
        states: Folder that keeps a state after each epoch, so that an interrupted training goes
            on; removed at the end. None keeps none.
        device: Where to train; None takes the best there is.

    Returns:
        The evaluator as loaded from `output`, whose scores are the record's.

    Raises:
        UserError: Arrays that do not fit each other, too few pictures to train on, or `states`
            of a training with other settings.
    """
    if labels.shape != (len(images), len(LABELS)):
        raise UserError(
            f"labels must be ({len(images)}, {len(LABELS)}) for {len(images)} pictures, "
            f"not {tuple(labels.shape)}"
        )
    train, validation, test = split(images, labels.float(), config)
    for file in (Path(output), Path(results_root) / run_name / "metrics.json"):
        require_writable(file.parent)
    device = choose_device(device)
    torch.manual_seed(config.seed)

    def change(images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple:
        smoothing = config.label_smoothing
        targets = labels * (1 - 2 * smoothing) + smoothing
        return augment(images, config, generator), targets

    def judge(network: nn.Module) -> dict[str, float]:
        probabilities = Evaluator(network, device).predict(validation[0])
        return {
            "exact_set": exact_set_accuracy(probabilities, validation[1]),
            "top_k": top_k_accuracy(probabilities, validation[1]),
        }

    trainer = Trainer(build_network(), *train, config, change, _loss, judge, device)
    Evaluator(trainer.train(states, "evaluator"), device).save(output)
    evaluator, best = Evaluator.load(output, device), trainer.best
    metrics = held_out_metrics(evaluator, *test, small_size=config.small_size) | {
        "validation": {
            "exact_set": best["exact_set"],
            "top_k": best["top_k"],
            "num_pictures": len(validation[0]),
        },
        "training": {
            "num_pictures": len(train[0]),
            "steps": config.epochs * trainer.steps_per_epoch,
            "seconds": trainer.log[-1]["seconds"],
            "bf16": trainer.bf16,
        },
    }
    folder = write_record(
        run_name, config, metrics, results_root, seeds=[config.seed], weights=output
    )
    worst = [mistake["row"] for mistake in metrics["mistakes"][:MISTAKES_SHOWN]]
    if worst:
        sheet = to_grid(to_float(test[0][worst]))
        write_atomically(folder / "mistakes.png", lambda file: sheet.save(file, "PNG"))
    write_atomically(folder / "log.jsonl", "".join(json.dumps(row) + "\n" for row in trainer.log))
    if states is not None:
        shutil.rmtree(states)
    return evaluator


def train_on_renders(
    renders: str | Path,
    output: str | Path | None = None,
    epochs: int | None = None,
    device: str | torch.device | None = None,
) -> Evaluator:
    """Train the classifier on the embedded pictures and on further renders of 1 … 5 objects.

    Args:
        renders: Folder that `python -m lab7 render evaluator` wrote; validation and test pictures
            are its last ones.
        output: safetensors file; None replaces the weights that come with the project.
        epochs: Passes over the pictures; None takes the default.
        device: Where to train; None takes the best there is.
    """
    config = EvaluatorConfig() if epochs is None else EvaluatorConfig(epochs=epochs)
    sets = [ICLEVRDataset(DATA_DIR), ICLEVRDataset(renders)]
    images = torch.cat([part.images for part in sets])
    labels = torch.cat([part.conditions for part in sets])
    states = DATA_DIR.parent / "runs" / "train-evaluator"
    return train_evaluator(images, labels, config, output or WEIGHTS, states=states, device=device)


def held_out_metrics(
    evaluator: Evaluator, images: Tensor, labels: Tensor, small_size: int = 32
) -> dict:
    """Return how an evaluator does on pictures (N, 3, 64, 64) uint8 that it never saw.

    Returns:
        "test": all scores; "test_small": those of the pictures shrunk and scaled back;
        "recall_per_label"; "by_count": the scores by the number of objects in a picture;
        "mistakes": see `list_mistakes`.
    """
    probabilities = evaluator.predict(images)
    small = shrink(to_float(images), small_size)
    counts = labels.sum(1).long()
    recall = per_label_recall(probabilities, labels)
    return {
        "test": compute_scores(probabilities, labels),
        "test_small": compute_scores(evaluator.predict(small), labels),
        "recall_per_label": {
            label: None if math.isnan(value) else value
            for label, value in zip(LABELS, recall.tolist(), strict=True)
        },
        "by_count": {
            count: compute_scores(probabilities[counts == count], labels[counts == count])
            for count in counts.unique().tolist()
            if count
        },
        "mistakes": list_mistakes(probabilities, labels),
    }


def list_mistakes(probabilities: Tensor, labels: Tensor) -> list[dict]:
    """List the pictures whose labels (B, 24) are not exactly those seen, the worst first.

    Returns:
        For each picture "row", its "labels" and those "seen". The order is that of the margin: the
        lowest probability of a label that is there minus the highest of one that is not.
    """
    wanted = labels > THRESHOLD
    lowest = probabilities.masked_fill(~wanted, 1).amin(1)
    margin = lowest - probabilities.masked_fill(wanted, 0).amax(1)
    seen = probabilities >= THRESHOLD
    wrong = (seen != wanted).any(1)
    rows = [row for row in margin.argsort(stable=True).tolist() if wrong[row]]
    pairs = zip(rows, decode(labels[rows]), decode(seen[rows]), strict=True)
    return [{"row": row, "labels": asked, "seen": found} for row, asked, found in pairs]


def _loss(network: nn.Module, x: Tensor, targets: Tensor) -> Tensor:
    """Return the binary cross-entropy, from the logits: in bfloat16 a sigmoid rounds to 0 and 1."""
    *body, head = network.children()
    logits = nn.Sequential(*body, nn.Flatten(), head[0])
    return F.binary_cross_entropy_with_logits(logits(x).float(), targets)
