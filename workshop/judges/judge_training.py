"""What the trainings of the two judges, evaluator and auditor, have in common."""

import copy
import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from lab7.checkpoints import load_latest, save_state
from lab7.dataset import IMAGE_SIZE, to_float
from lab7.devices import bfloat16_is_faster
from lab7.errors import UserError
from workshop.judges.augmentation import Augmentation

Change = Callable[[Tensor, Tensor, torch.Generator], tuple[Tensor, Tensor]]
Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]
Judge = Callable[[nn.Module], dict[str, float]]
_PARTS = ("network", "average", "optimizer", "schedule")  # of a state, each with a state_dict


@dataclass(frozen=True)
class JudgeConfig(Augmentation):
    """Settings of a training, and of the changes that its pictures go through."""

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


class Trainer:
    """Trains a network on pictures and keeps the averaged weights of its best epoch.

    Args:
        network: With its first weights; moved to the device.
        images: (N, 3, 64, 64) uint8.
        targets: (N, …), what the pictures show.
        config: The settings.
        change: Changes a batch of both at random, and makes the pictures float.
        loss: Gets the network and a changed batch.
        judge: Scores the averaged network after each epoch, the scores that decide first.
        device: Where to train.
    """

    def __init__(
        self,
        network: nn.Module,
        images: Tensor,
        targets: Tensor,
        config: JudgeConfig,
        change: Change,
        loss: Loss,
        judge: Judge,
        device: torch.device,
    ):
        self.network = network.to(device, memory_format=torch.channels_last)
        self.images, self.targets = images.to(device), targets.to(device)
        self.config, self.device = config, device
        self.change, self.loss, self.judge = change, loss, judge
        self.settings = dataclasses.asdict(config) | {"training pictures": len(images)}
        self.steps_per_epoch = len(images) // config.batch_size
        self.generator = torch.Generator(device).manual_seed(config.seed)
        self.bf16 = bfloat16_is_faster(device, self._probe)
        self.optimizer = torch.optim.AdamW(
            network.parameters(),
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
        self.average = AveragedModel(network, multi_avg_fn=average, use_buffers=True)
        self.log: list[dict] = []  # a row for each epoch
        self._best: dict[str, Tensor] = {}  # averaged weights of the best epoch so far

    @property
    def epochs_done(self) -> int:
        return len(self.log)

    @property
    def best(self) -> dict:
        """The row of the best epoch."""
        return max(self.log, key=self._rank)

    def train(self, states: str | Path | None, description: str) -> nn.Module:
        """Train to the end and return the network with the averaged weights of its best epoch.

        Args:
            states: Folder that keeps a state after each epoch, from which an interrupted training
                goes on; None keeps none.
            description: Of the progress bar.

        Raises:
            UserError: `states` is of a training with other settings.
        """
        if states is not None:
            self._restore(load_latest(states, self.device))
        steps = self.steps_per_epoch
        with tqdm(desc=description, total=self.config.epochs * steps, unit="step") as bar:
            bar.update(self.epochs_done * steps)
            while self.epochs_done < self.config.epochs:
                self.run_epoch(bar)
                if states is not None:
                    save_state(states, self.epochs_done, self._state(), keep=1)
        return self._with_weights(self._best)

    def run_epoch(self, bar: tqdm) -> None:
        """Train on all pictures once, in a new order, then have the average judged."""
        start = time.perf_counter()
        row = {"epoch": self.epochs_done + 1} | self._train_once(bar)
        average = self._with_weights(self.average.module.state_dict())
        self._scores = tuple(scores := self.judge(average))
        row |= scores
        before = self.log[-1]["seconds"] if self.log else 0.0
        row["seconds"] = before + time.perf_counter() - start
        if all(self._rank(row) > self._rank(other) for other in self.log):
            self._best = average.state_dict()
        self.log.append(row)

    def _rank(self, row: dict) -> tuple[float, ...]:
        return tuple(row[name] for name in self._scores)

    def _train_once(self, bar: tqdm) -> dict:
        """Go through all pictures once; return what is logged of it."""
        self.network.train()
        order = torch.randperm(len(self.images), generator=self.generator, device=self.device)
        size, total, start = self.config.batch_size, 0.0, time.perf_counter()
        for rows in order[: self.steps_per_epoch * size].split(size):
            loss = self._step(self.images[rows], self.targets[rows])
            total += loss
            bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
            bar.update()
        return {
            "loss": total / self.steps_per_epoch,
            "learning_rate": self.schedule.get_last_lr()[0],
            "pictures_per_second": self.steps_per_epoch * size / (time.perf_counter() - start),
        }

    def _step(self, images: Tensor, targets: Tensor) -> float:
        x, targets = self.change(images, targets, self.generator)
        x = x.contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            loss = self.loss(self.network, x, targets)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        self.average.update_parameters(self.network)
        return loss.item()

    def _probe(self) -> None:
        """Do a step with copies: one of the network itself would move its statistics."""
        network = copy.deepcopy(self.network)
        x = to_float(self.images[:32]).contiguous(memory_format=torch.channels_last)
        self.loss(network, x, self.targets[:32]).backward()

    def _with_weights(self, weights: dict[str, Tensor]) -> nn.Module:
        network = copy.deepcopy(self.network)
        network.load_state_dict(weights)
        return network.eval()

    def _state(self) -> dict:
        """Return what `_restore` needs to go on from here."""
        parts = {name: getattr(self, name).state_dict() for name in _PARTS}
        return parts | {
            "settings": self.settings,
            "generator": self.generator.get_state(),
            "log": self.log,
            "scores": self._scores,
            "best": self._best,
        }

    def _restore(self, state: dict | None) -> None:
        """Go back to a state; None leaves the training at its start."""
        if state is None:
            return
        for name, value in self.settings.items():
            if state["settings"][name] != value:
                raise UserError(
                    f"an unfinished training with {name} = {state['settings'][name]}, not {value}, "
                    "is to go on: use its settings, or remove its states"
                )
        for name in _PARTS:
            getattr(self, name).load_state_dict(state[name])
        self.generator.set_state(state["generator"].cpu())
        self.log, self._scores, self._best = state["log"], state["scores"], state["best"]


def split(images: Tensor, targets: Tensor, config: JudgeConfig) -> list[tuple[Tensor, Tensor]]:
    """Cut the rows into those to train on, to validate on, and to test on.

    Raises:
        UserError: Arrays that do not fit each other, or too few pictures.
    """
    kept = config.validation_pictures + config.test_pictures
    wanted = (3, IMAGE_SIZE, IMAGE_SIZE)
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1:] != wanted:
        raise UserError(
            f"pictures must be (N, 3, {IMAGE_SIZE}, {IMAGE_SIZE}) uint8, "
            f"not {tuple(images.shape)} {images.dtype}"
        )
    if len(targets) != len(images):
        raise UserError(f"there are {len(targets)} targets for {len(images)} pictures")
    if len(images) < kept + config.batch_size:
        raise UserError(
            f"{len(images)} pictures are too few: {kept} are held out and a batch has "
            f"{config.batch_size}"
        )
    sizes = [len(images) - kept, config.validation_pictures, config.test_pictures]
    return list(zip(images.split(sizes), targets.split(sizes), strict=True))
