"""Training of our own evaluator on rendered scenes.

The recipe is the course's: its ResNet-18, pictures shrunk to 32×32 and scaled back to 64×64, binary
cross-entropy. What is added are random changes of the pictures, see `lab7.augmentation`.
"""

import dataclasses
import json
import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm.auto import tqdm

from lab7.augmentation import Augmentation, augment, shrink
from lab7.checkpoints import load_latest, save_state
from lab7.dataset import DATA_DIR, ICLEVRDataset, to_float
from lab7.devices import bfloat16_is_faster, choose_device
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
from lab7.packs import IMAGE_SIZE
from lab7.results import RESULTS_DIR, write_record
from lab7.sampling import to_grid

MISTAKES_SHOWN = 16  # of the test, in the record's picture


@dataclass(frozen=True)
class EvaluatorConfig(Augmentation):
    """Settings of a training, and of the changes that its pictures go through."""

    validation_pictures: int = 900  # rows kept for choosing the epoch, those before the test's
    test_pictures: int = 3000  # rows kept for the final scores, the last ones
    epochs: int = 48  # passes over the training rows
    batch_size: int = 64  # pictures a step
    learning_rate: float = 2e-3  # peak of the one-cycle schedule
    warmup_share: float = 0.15  # of all steps, until the peak
    weight_decay: float = 0.05  # AdamW's, a step and unit of learning rate
    label_smoothing: float = 0.01  # targets are this and 1 minus this
    ema_decay: float = 0.998  # a step, of the averaged weights that are kept; 0 for none
    seed: int = 0  # of the first weights, the order of the pictures and their changes

    def __post_init__(self):
        for name in ("epochs", "batch_size", "learning_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} {getattr(self, name)} must be above 0")


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
        ValueError: Arrays that do not fit each other, too few pictures to train on, or `states`
            of a training with other settings.
    """
    train, validation, test = _split(images, labels, config)
    for file in (Path(output), Path(results_root) / run_name / "metrics.json"):
        require_writable(file.parent)
    device = choose_device(device)
    torch.manual_seed(config.seed)
    trainer = _Trainer(train, config, device)
    if states is not None:
        trainer.restore(load_latest(states, device))
    steps = trainer.steps_per_epoch
    with tqdm(desc="evaluator", total=config.epochs * steps, unit="step") as bar:
        bar.update(trainer.epochs_done * steps)
        while trainer.epochs_done < config.epochs:
            trainer.run_epoch(bar, *validation)
            if states is not None:
                save_state(states, trainer.epochs_done, trainer.state(), keep=1)
    trainer.best_evaluator().save(output)
    evaluator = Evaluator.load(output, device)
    best = max(trainer.log, key=_validation_score)
    metrics = held_out_metrics(evaluator, *test, small_size=config.small_size) | {
        "validation": {
            "exact_set": best["exact_set"],
            "top_k": best["top_k"],
            "num_pictures": len(validation[0]),
        },
        "training": {
            "num_pictures": len(train[0]),
            "steps": config.epochs * steps,
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
        "test_small": evaluator.scores(small, labels),
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


_PARTS = ("network", "average", "optimizer", "schedule")  # of a state, each with a state_dict


class _Trainer:
    """Holds what changes during a training and runs one epoch at a time."""

    def __init__(self, train: tuple[Tensor, Tensor], config: EvaluatorConfig, device: torch.device):
        self.images, self.labels = train[0].to(device), train[1].to(device, torch.float32)
        self.config, self.device = config, device
        self.settings = dataclasses.asdict(config) | {"training pictures": len(self.images)}
        self.network = build_network().to(device, memory_format=torch.channels_last)
        self.bf16 = bfloat16_is_faster(device, _probe)
        self.steps_per_epoch = len(self.images) // config.batch_size
        self.generator = torch.Generator(device).manual_seed(config.seed)
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(),
            config.learning_rate,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer,
            config.learning_rate,
            total_steps=config.epochs * self.steps_per_epoch + 1,
            pct_start=config.warmup_share,
            cycle_momentum=False,
        )
        average = get_ema_multi_avg_fn(config.ema_decay)
        self.average = AveragedModel(self.network, multi_avg_fn=average, use_buffers=True)
        self.log: list[dict] = []  # a row for each epoch
        self.best: dict[str, Tensor] = {}  # averaged weights of the best epoch so far

    @property
    def epochs_done(self) -> int:
        return len(self.log)

    def run_epoch(self, bar: tqdm, images: Tensor, labels: Tensor) -> None:
        """Train on all pictures once, in a new order, then judge those of the validation."""
        start = time.perf_counter()
        row = {"epoch": self.epochs_done + 1} | self._train(bar)
        evaluator = self._evaluator(self.average.module.state_dict())
        probabilities = evaluator.predict(images)
        row["exact_set"] = exact_set_accuracy(probabilities, labels)
        row["top_k"] = top_k_accuracy(probabilities, labels)
        before = self.log[-1]["seconds"] if self.log else 0.0
        row["seconds"] = before + time.perf_counter() - start
        if all(_validation_score(row) > _validation_score(other) for other in self.log):
            self.best = evaluator.network.state_dict()
        self.log.append(row)

    def best_evaluator(self) -> Evaluator:
        """Return the evaluator of the best epoch."""
        return self._evaluator(self.best)

    def state(self) -> dict:
        """Return what `restore` needs to go on from here."""
        parts = {name: getattr(self, name).state_dict() for name in _PARTS}
        return parts | {
            "settings": self.settings,
            "generator": self.generator.get_state(),
            "log": self.log,
            "best": self.best,
        }

    def restore(self, state: dict | None) -> None:
        """Go back to a state; None leaves the training at its start."""
        if state is None:
            return
        for name, value in self.settings.items():
            if state["settings"][name] != value:
                raise ValueError(
                    f"an unfinished training with {name} = {state['settings'][name]}, not {value}, "
                    "is to go on: use its settings, or remove its states"
                )
        for name in _PARTS:
            getattr(self, name).load_state_dict(state[name])
        self.generator.set_state(state["generator"].cpu())
        self.log, self.best = state["log"], state["best"]

    def _train(self, bar: tqdm) -> dict:
        """Go through all pictures once; return what is logged of it."""
        self.network.train()
        order = torch.randperm(len(self.images), generator=self.generator, device=self.device)
        size, total, start = self.config.batch_size, 0.0, time.perf_counter()
        for rows in order[: self.steps_per_epoch * size].split(size):
            loss = self._step(self.images[rows], self.labels[rows])
            total += loss
            bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
            bar.update()
        return {
            "loss": total / self.steps_per_epoch,
            "learning_rate": self.schedule.get_last_lr()[0],
            "pictures_per_second": self.steps_per_epoch * size / (time.perf_counter() - start),
        }

    def _evaluator(self, weights: dict[str, Tensor]) -> Evaluator:
        network = build_network().to(memory_format=torch.channels_last)
        network.load_state_dict(weights)
        return Evaluator(network, self.device)

    def _step(self, images: Tensor, labels: Tensor) -> float:
        x = augment(images, self.config, self.generator)
        smoothing = self.config.label_smoothing
        targets = labels * (1 - 2 * smoothing) + smoothing
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            loss = _loss(self.network, x, targets)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        self.average.update_parameters(self.network)
        return loss.item()


def _validation_score(row: dict) -> tuple[float, float]:
    """Return what decides which epoch is the best."""
    return row["exact_set"], row["top_k"]


def _loss(network: nn.Module, x: Tensor, targets: Tensor) -> Tensor:
    """Return the binary cross-entropy, from the logits: in bfloat16 a sigmoid rounds to 0 and 1."""
    *body, head = network.children()
    logits = nn.Sequential(*body, nn.Flatten(), head[0])
    outputs = logits(x.contiguous(memory_format=torch.channels_last))
    return F.binary_cross_entropy_with_logits(outputs.float(), targets)


def _probe() -> None:
    """A step of a network of its own: a step of the real one would move its statistics."""
    x = torch.randn(32, 3, IMAGE_SIZE, IMAGE_SIZE)
    network = build_network().to(memory_format=torch.channels_last)
    _loss(network, x, torch.full((32, len(LABELS)), 0.1)).backward()


def _split(images: Tensor, labels: Tensor, config: EvaluatorConfig) -> list[tuple[Tensor, Tensor]]:
    """Cut the rows into those to train on, to validate on, and to test on."""
    kept = config.validation_pictures + config.test_pictures
    wanted = (3, IMAGE_SIZE, IMAGE_SIZE)
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1:] != wanted:
        raise ValueError(
            f"pictures must be (N, 3, {IMAGE_SIZE}, {IMAGE_SIZE}) uint8, "
            f"not {tuple(images.shape)} {images.dtype}"
        )
    if labels.shape != (len(images), len(LABELS)):
        raise ValueError(
            f"labels must be ({len(images)}, {len(LABELS)}) for {len(images)} pictures, "
            f"not {tuple(labels.shape)}"
        )
    if len(images) < kept + config.batch_size:
        raise ValueError(
            f"{len(images)} pictures are too few: {kept} are held out and a batch has "
            f"{config.batch_size}"
        )
    sizes = [len(images) - kept, config.validation_pictures, config.test_pictures]
    return list(zip(images.split(sizes), labels.split(sizes), strict=True))
