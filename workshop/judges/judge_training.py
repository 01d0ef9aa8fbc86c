"""What the trainings of the two judges have in common: settings, split, loop and record."""

import copy
import json
import math
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from lab7.auditor import Auditor
from lab7.dataset import to_float
from lab7.devices import bfloat16_is_faster, choose_device
from lab7.errors import UserError
from lab7.evaluator import Evaluator
from lab7.files import require_writable, write_atomically
from lab7.records import RESULTS_DIR
from lab7.sampling import to_grid
from workshop.judges.augmentation import Augmentation
from workshop.records import write_record

Judge = Evaluator | Auditor


@dataclass(frozen=True)
class JudgeTraining(Augmentation, ABC):
    """Settings of a judge's training; the evaluator's and the auditor's add what is their own.

    Throughout, pictures are (N, 3, 64, 64), and targets (N, …) say what they show.
    """

    name: ClassVar[str]  # of the judge and of its record
    judge: ClassVar[type[Judge]]
    weights: ClassVar[Path]  # those that come with the project

    validation_pictures: int = 900  # rows kept for choosing the epoch, those before the test's
    test_pictures: int = 3000  # rows kept for the final scores, the last ones
    epochs: int = 48  # passes over the training rows
    batch_size: int = 64  # pictures a step
    learning_rate: float = 2e-3  # peak of the one-cycle schedule
    warmup_share: float = 0.15  # of all steps, until the peak
    weight_decay: float = 0.05  # AdamW's, a step and unit of learning rate
    ema_decay: float = 0.998  # a step, of the averaged weights that are kept; 0 for none
    seed: int = 0  # of the first weights, the order of the pictures and their changes

    def __post_init__(self):
        for name in ("epochs", "batch_size", "learning_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"{name} {getattr(self, name)} must be above 0")

    def split(self, images: Tensor, targets: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Split the rows into those to train on, to validate on and to test on.

        Raises:
            UserError: Too few pictures.
        """
        held_out = self.validation_pictures + self.test_pictures
        if len(images) < held_out + self.batch_size:
            raise UserError(
                f"{len(images)} pictures are too few: {held_out} are held out and a batch has "
                f"{self.batch_size}"
            )
        sizes = [len(images) - held_out, self.validation_pictures, self.test_pictures]
        return list(zip(images.split(sizes), targets.split(sizes), strict=True))

    @abstractmethod
    def read(self, renders: str | Path) -> tuple[Tensor, Tensor]:
        """Read uint8 pictures and their targets, in the order of the scenes."""

    @abstractmethod
    def build(self) -> nn.Module:
        """Make the network, untrained."""

    @abstractmethod
    def change(self, images: Tensor, targets: Tensor, generator: torch.Generator) -> tuple:
        """Change a batch of uint8 pictures at random, and make them float in [-1, 1]."""

    @abstractmethod
    def loss(self, network: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        """Compute the loss of a changed batch."""

    @abstractmethod
    def score(self, judge: Judge, images: Tensor, targets: Tensor) -> dict[str, float]:
        """Score the averaged weights after an epoch on validation; the first score decides."""

    def adjust(self, judge: Judge, images: Tensor, targets: Tensor) -> None:
        """Set what is chosen on validation after training: here nothing."""

    @abstractmethod
    def examine(self, judge: Judge, images: Tensor, targets: Tensor) -> tuple[dict, Tensor]:
        """Return metrics of pictures that the judge never saw, and those of its worst mistakes."""


def train_judge(
    training: JudgeTraining,
    images: Tensor,
    targets: Tensor,
    output: str | Path,
    results_root: str | Path = RESULTS_DIR,
    device: str | torch.device | None = None,
) -> Judge:
    """Train a judge, keep its best epoch, and record how it does; nothing is written before.

    Args:
        training: The settings.
        images: (N, 3, 64, 64) uint8. Rows in the order of the scenes, so that no scene is on both
            sides of a split: the last rows are the test's, those before are for validation.
        targets: (N, …), what they show, see `JudgeTraining.read`.
        output: safetensors file for the weights of the epoch that was best on validation.
        results_root: Folder of the records.
        device: Where to train; None takes the best there is.

    Returns:
        The judge as loaded from `output`, whose scores are the record's.

    Raises:
        UserError: Too few pictures to train on, another ending, or a place that is not writable.
    """
    train, validation, test = training.split(images, targets)
    if Path(output).suffix != ".safetensors":
        raise UserError(f"weights are written as safetensors: {output} must end in .safetensors")
    for folder in (Path(output).parent, Path(results_root) / training.name):
        require_writable(folder)
    device = choose_device(device)
    network, log, metrics = _train_network(training, train, validation, device)
    judge = training.judge(network, device)
    training.adjust(judge, *validation)
    save_weights(judge.network, output)
    judge = training.judge.load(output, device)
    found, mistakes = training.examine(judge, *test)
    folder = write_record(
        training.name,
        training,
        metrics | found,
        results_root,
        seeds=[training.seed],
        weights=output,
    )
    write_atomically(folder / "log.jsonl", "".join(json.dumps(row) + "\n" for row in log))
    if len(mistakes):
        sheet = to_grid(to_float(mistakes))
        write_atomically(folder / "mistakes.png", lambda file: sheet.save(file, "PNG"))
    return judge


def train_on_renders(
    kind: type[JudgeTraining],
    renders: str | Path,
    output: str | Path | None = None,
    epochs: int | None = None,
    device: str | torch.device | None = None,
) -> Judge:
    """Train a judge on what `python -m lab7 render` wrote for it.

    Args:
        kind: `EvaluatorTraining` or `AuditorTraining`.
        renders: Folder of the renders.
        output: safetensors file; None replaces the weights that come with the project.
        epochs: Passes over the pictures; None takes the default.
        device: Where to train; None takes the best there is.
    """
    training = kind() if epochs is None else kind(epochs=epochs)
    images, targets = training.read(renders)
    return train_judge(training, images, targets, output or training.weights, device=device)


def _train_network(
    training: JudgeTraining,
    train: tuple[Tensor, Tensor],
    validation: tuple[Tensor, Tensor],
    device: torch.device,
) -> tuple[nn.Module, list[dict[str, Any]], dict[str, Any]]:
    """Train a network: the whole of training in one loop.

    Returns:
        The network with the averaged weights of its best epoch; the log, a row for each epoch; and
        for the record "validation", the scores of that epoch, and "training", what it took.
    """
    torch.manual_seed(training.seed)
    network = training.build().to(device, memory_format=torch.channels_last)
    images, targets = (part.to(device) for part in train)
    generator = torch.Generator(device).manual_seed(training.seed)
    size, steps = training.batch_size, len(images) // training.batch_size
    optimizer, schedule, average = _build_optimizer(training, network, training.epochs * steps)
    bf16 = _bfloat16_is_faster(training, network, images[:32], targets[:32])
    best, best_scores, log, started = None, {}, [], time.perf_counter()
    for epoch in range(1, training.epochs + 1):
        network.train()
        order, total = torch.randperm(len(images), generator=generator, device=device), 0.0
        batches = order[: steps * size].split(size)
        for rows in tqdm(batches, f"epoch {epoch} of {training.epochs}", leave=False):
            x, wanted = training.change(images[rows], targets[rows], generator)
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                loss = training.loss(network, x, wanted)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            average.update_parameters(network)
            total += loss.item()
        averaged = copy.deepcopy(average.module)
        scores = training.score(training.judge(averaged, device), *validation)
        seconds = time.perf_counter() - started
        log.append({"epoch": epoch, "loss": total / steps, **scores, "seconds": seconds})
        if best is None or tuple(scores.values()) > tuple(best_scores.values()):
            best, best_scores = averaged, scores
    took = {"num_pictures": len(images), "steps": training.epochs * steps, "seconds": seconds}
    took |= {"bf16": bf16, "parameters": sum(weight.numel() for weight in network.parameters())}
    chosen = best_scores | {"num_pictures": len(validation[0])}
    return best, log, {"validation": chosen, "training": took}


def _build_optimizer(training: JudgeTraining, network: nn.Module, steps: int) -> tuple:
    """Make AdamW, the one-cycle schedule of its learning rate, and the average of the weights."""
    rate, parameters = training.learning_rate, network.parameters()
    optimizer = torch.optim.AdamW(parameters, rate, weight_decay=training.weight_decay, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, steps + 1, pct_start=training.warmup_share, cycle_momentum=False
    )
    decay = get_ema_multi_avg_fn(training.ema_decay)
    return optimizer, schedule, AveragedModel(network, multi_avg_fn=decay, use_buffers=True)


def _bfloat16_is_faster(
    training: JudgeTraining, network: nn.Module, images: Tensor, targets: Tensor
) -> bool:
    """Try both ways on a copy: a step of the network itself would move its statistics."""
    network, x = copy.deepcopy(network), to_float(images)
    return bfloat16_is_faster(x.device, lambda: training.loss(network, x, targets).backward())


def save_weights(network: nn.Module, path: str | Path) -> None:
    """Write weights as safetensors: matrices in float16, the few others as they are."""
    tensors = {
        name: (tensor.half() if tensor.ndim > 1 else tensor).cpu().contiguous()
        for name, tensor in network.state_dict().items()
    }
    write_atomically(Path(path), safetensors.torch.save(tensors))
