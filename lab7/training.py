"""Training of a ConditionalUNet: one loop, which can be stopped at any step and resumed exactly."""

import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from diffusers import DDPMScheduler
from diffusers.training_utils import EMAModel
from torch import Tensor
from tqdm import tqdm

from lab7 import checkpoints
from lab7.batches import Batches, Pictures
from lab7.dataset import data_hash
from lab7.devices import build_accelerator, choose_device, choose_precision, prepare_device
from lab7.diffusion import convert_scheduler, diffusion_loss
from lab7.errors import UserError, user_files
from lab7.experiments import TrainConfig
from lab7.files import write_atomically
from lab7.model import ConditionalUNet
from lab7.muon import build_optimizers
from lab7.pipeline import (
    SETTINGS,
    ConditionalDDPMPipeline,
    fill_network,
    load_pipeline,
    save_pipeline,
)
from lab7.records import append_log
from lab7.sampling import to_grid

SAMPLED = (  # conditions of the samples that a training draws
    ("red sphere",), ("gray cube",), ("green cube", "brown cylinder"),
    ("blue cube", "blue cylinder"), ("yellow sphere", "purple cylinder", "cyan cube"),
    ("red cube", "gray sphere", "green cylinder"), ("red sphere", "cyan cylinder", "cyan cube"),
)  # fmt: skip
NOISE_LEVELS = 10  # equal parts of the time steps; the loss of each is logged
Callback = Callable[[dict[str, Any]], Any] | None


def train(
    config: TrainConfig,
    dataset: Pictures,
    output_dir: str | Path,
    resume: bool = True,
    max_seconds: float | None = None,
    callback: Callback = None,
    progress: bool = True,
    device: str | torch.device | None = None,
) -> ConditionalDDPMPipeline:
    """Train a network and save it as a pipeline.

    The batch of a step is a function of (seed, step): a run that was stopped and resumed takes the
    same steps as one that was not.

    Args:
        config: What to do.
        dataset: The pictures.
        output_dir: Gets config.json, environment.json, log.jsonl, states/, pipeline/, samples/
            and TensorBoard's files.
        resume: Whether to go on from the latest state in `output_dir`; otherwise what is there
            is replaced.
        max_seconds: Save and stop within so many seconds of this call.
        callback: Called with each row of the log; training stops when it returns True.
        progress: Whether to show a progress bar.
        device: Where to train; see `choose_device`.

    Returns:
        The pipeline with the averaged weights.

    Raises:
        UserError: If `output_dir` holds another run or is in use by one, the batch, the
            precision or the device does not fit, or the loss is no longer finite.
        KeyboardInterrupt: After Ctrl+C, a notebook's Stop or SIGTERM, when all is saved.
    """
    if max_seconds is not None and not max_seconds > 0:
        raise UserError(f"max_seconds {max_seconds} must be above 0")
    deadline = time.perf_counter() + (max_seconds or math.inf)
    folder, device = Path(output_dir), choose_device(device)
    with checkpoints.in_use(folder):
        run = Run(config, dataset, device, folder, resume)
        with checkpoints.postponed_interrupts() as interrupted, run.open(progress):
            _loop(run, deadline, callback, interrupted)
            run.accelerator.end_training()
            if interrupted():
                raise KeyboardInterrupt
        return run.pipeline()


def _loop(run: "Run", deadline: float, callback: Callback, interrupted: Callable[[], bool]) -> None:
    """Train until the run is finished or has to stop: the whole of training at a glance."""
    config, network, accelerator = run.config, run.network, run.accelerator
    scale, stopped = network.config.scaling_factor, run.agree(run.finished)
    while not stopped:
        x0, cond, t, noise = run.batches(run.step)
        loss = diffusion_loss(run.unet, run.scheduler, x0, cond, t, noise, scale, config.snr_gamma)
        accelerator.backward(loss.mean())
        accelerator.clip_grad_norm_(network.parameters(), config.max_grad_norm)
        run.step_optimizers(learning_rate(config, run.step, run.spent()))
        run.ema.step(network.parameters())
        run.count(t, loss.detach())

        late = time.perf_counter() + run.seconds_to_save >= deadline
        stopped = run.agree(run.finished or late or interrupted())
        if stopped or run.step % config.log_every == 0:
            row = run.log()
            stopped |= run.agree(callback is not None and callback(row) is True)
        if stopped or run.step % config.save_every == 0:
            run.save()
        if config.sample_every and run.step % config.sample_every == 0:
            run.draw_samples()


class Run:
    """A training run: its network, average, optimizers and batches, and what the loop does to them.

    Args:
        config: What to do.
        dataset: The pictures; held on the device as uint8.
        device: Of the training; with several processes each has its own of this kind.
        folder: For states, logs and samples.
        resume: Whether to go on from the latest state in the folder, in its precision.

    Raises:
        UserError: A batch that is larger than the data or that the processes cannot share, or a
            precision that the device lacks.
    """

    def __init__(
        self,
        config: TrainConfig,
        dataset: Pictures,
        device: torch.device,
        folder: Path,
        resume: bool = True,
    ):
        size, n = config.batch_size, len(dataset.images)
        if size > n:
            raise UserError(f"batch_size {size} is larger than the data: there are {n} pictures")
        self.config, self.dataset, self.folder, self.resume = config, dataset, folder, resume
        self.step, self.seconds_to_save, self._started = 0, 0.0, time.perf_counter()
        self.device = device = prepare_device(device)
        self.scheduler = DDPMScheduler(**config.noise)
        self.network = _build_unet(config).to(device)
        if device.type == "cuda":  # Tensor cores want it; processors are faster without.
            self.network.to(memory_format=torch.channels_last)
        self.ema = EMAModel(self.network.parameters(), decay=config.ema_decay, foreach=True)
        before = checkpoints.read_environment(folder).get("precision") if resume else None
        self.precision = choose_precision(config, self.network, before)
        self.accelerator = build_accelerator(config, device, folder, self.precision)
        optimizers = build_optimizers(self.network, config, self.precision)
        self.unet, *self.optimizers = self.accelerator.prepare(self.network, *optimizers)
        process, processes = self.accelerator.process_index, self.accelerator.num_processes
        if size % processes:
            raise UserError(f"batch_size {size} is not a multiple of the {processes} processes")
        self.batches = Batches(config, dataset, device, share=(process, processes))
        self._losses = torch.zeros(2, NOISE_LEVELS, device=device)  # sums, and of how many
        self._logged = (0, 0.0)  # step and seconds of the last row of the log

    @property
    def seconds(self) -> float:
        """Time of all calls so far, by the clock."""
        return time.perf_counter() - self._started

    @property
    def finished(self) -> bool:
        """Whether the steps or the time are used up."""
        config = self.config
        return self.step >= config.num_steps or self.seconds >= (config.budget_seconds or math.inf)

    def agree(self, stop: bool) -> bool:
        """Tell whether any of the processes wants to stop."""
        return any(gather_object([stop]))

    def spent(self) -> float:
        """Return the seconds that the learning rate follows: the same in all processes."""
        return broadcast_object_list([self.seconds])[0] if self.config.budget_seconds else 0.0

    @user_files()
    def open(self, progress: bool) -> tqdm:
        """Describe the run in its folder, resume from its latest state, save, and show a bar.

        Saving first shows at once whether the folder can be written, and how long that takes.
        """
        facts = {
            "course_pictures": getattr(self.dataset, "course", False),
            "num_pictures": len(self.dataset.images),
            "data_sha256": data_hash(self.dataset.images, self.dataset.conditions),
            "precision": self.precision,
        }
        states = self.folder / "states"
        state = checkpoints.load_latest(states, self.device) if self.resume else None
        if self.accelerator.is_main_process:
            checkpoints.open_folder(self.folder, self.config, facts, state, self.resume)
        self.accelerator.wait_for_everyone()
        if state is not None:
            self.restore(state)
        self.accelerator.init_trackers("tensorboard")
        self.save()
        self._bar = tqdm(
            desc=f"{self.device}, {self.precision}",
            total=self.config.num_steps * self.config.batch_size,
            initial=self.step * self.config.batch_size,
            unit=" pictures",
            unit_scale=True,
            disable=not (progress and self.accelerator.is_main_process),
        )
        return self._bar

    def step_optimizers(self, lr: float) -> None:
        """Update the weights; nothing here waits for a GPU."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad()

    def count(self, t: Tensor, losses: Tensor) -> None:
        """Count a step, and add its losses (B,) to those of their noise level."""
        level = t * NOISE_LEVELS // self.scheduler.config.num_train_timesteps
        # Not bincount, which on a GPU waits for everything that is queued.
        self._losses.index_add_(1, level, torch.stack([losses, torch.ones_like(losses)]))
        self.step += 1
        self._bar.update(self.config.batch_size)

    @user_files()
    def log(self) -> dict[str, Any]:
        """Write a row of the log: means since the previous row."""
        sums, counts = self.accelerator.reduce(self._losses).tolist()
        self._losses.zero_()
        loss = sum(sums) / sum(counts)
        self._require(math.isfinite(loss), f"the loss is {loss}")
        step, seconds, size = self.step, self.seconds, self.config.batch_size
        images, elapsed = (step - self._logged[0]) * size, seconds - self._logged[1]
        self._logged = (step, seconds)
        row = {
            "step": step,
            "images": step * size,
            "loss": loss,
            "lr": self.optimizers[0].param_groups[0]["lr"],
            "images_per_second": images / elapsed,
            "seconds": seconds,
            "loss_by_level": [a / b if b else None for a, b in zip(sums, counts, strict=True)],
        }
        self._bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
        if self.accelerator.is_main_process:
            append_log(self.folder / "log.jsonl", row)
            self.accelerator.log({k: v for k, v in row.items() if k != "step"}, step=step)
        return row

    @user_files()
    def save(self) -> None:
        """Save a state to resume from, and the pipeline as it is now.

        Raises:
            UserError: The weights are no longer finite; nothing is written.
        """
        started = time.perf_counter()
        finite = all(weight.isfinite().all() for weight in self.network.parameters())
        self._require(finite, "the weights are no longer finite")
        if self.accelerator.is_main_process:
            state = {
                "config": dataclasses.asdict(self.config),
                "step": self.step,
                "seconds": self.seconds,
                "unet": self.network.state_dict(),
                "ema": self.ema.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            }
            checkpoints.save_state(self.folder / "states", self.step, state)
            save_pipeline(self.pipeline(), self.folder / "pipeline")
        self.seconds_to_save = max(self.seconds_to_save, time.perf_counter() - started)

    def restore(self, state: dict[str, Any]) -> None:
        """Go back to a saved state."""
        self.step, self._started = state["step"], time.perf_counter() - state["seconds"]
        self._logged = (self.step, state["seconds"])
        self.network.load_state_dict(state["unet"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.ema.load_state_dict(state["ema"])

    def pipeline(self) -> ConditionalDDPMPipeline:
        """Make a pipeline of the averaged weights."""
        config = self.config
        unet = ConditionalUNet(**config.unet).to(self.device).eval()
        self.ema.copy_to(unet.parameters())
        scheduler = convert_scheduler(self.scheduler, config.scheduler)
        settings = {name: getattr(config, name) for name in SETTINGS}
        return ConditionalDDPMPipeline(unet, scheduler, **settings)

    def draw_samples(self) -> None:
        """Draw a row of samples, always of the same conditions and seeds."""
        if self.accelerator.is_main_process:
            images = self.pipeline()(SAMPLED, output_type="pt", progress=False).images
            sheet = to_grid(images, columns=len(images))
            path = self.folder / "samples" / f"step-{self.step:08d}.png"
            write_atomically(path, lambda file: sheet.save(file, "PNG"))

    def _require(self, finite: bool, problem: str) -> None:
        """Stop a training that has diverged."""
        if not finite:
            raise UserError(
                f"{problem} at step {self.step}: lower the learning rate; the last good weights "
                f"are in {self.folder}"
            )


def learning_rate(config: TrainConfig, step: int, seconds: float = 0.0) -> float:
    """Compute the learning rate of a step: a linear warm-up, then half a cosine down to 0.

    Without a budget this is diffusers' `get_cosine_schedule_with_warmup`; with one, the cosine
    follows the time if that runs out before the steps do.

    Args:
        config: The run.
        step: Optimizer steps done.
        seconds: Time spent.
    """
    if step < config.warmup_steps:
        return config.learning_rate * step / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.num_steps - config.warmup_steps)
    done = min(1.0, max(done, seconds / (config.budget_seconds or math.inf)))
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def _build_unet(config: TrainConfig) -> ConditionalUNet:
    """Make the network with its first weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        unet = ConditionalUNet(**config.unet)
    if config.init_from is not None:
        weights = load_pipeline(config.init_from, "cpu").unet.state_dict()
        fill_network(unet, weights, config.init_from)
    return unet.train()
