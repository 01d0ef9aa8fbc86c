"""Training of a ConditionalUNet: one loop that can be stopped at any step and goes on as if not."""

import contextlib
import dataclasses
import math
import os
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast
from diffusers import DDPMScheduler
from diffusers.training_utils import EMAModel, compute_density_for_timestep_sampling
from torch import Tensor
from tqdm import tqdm

from lab7.checkpoints import (
    in_use,
    load_latest,
    open_folder,
    postponed_interrupts,
    read_environment,
    save_state,
)
from lab7.dataset import data_hash, to_float
from lab7.devices import build_accelerator, choose_device, keep_freed_memory
from lab7.diffusion import convert_scheduler, diffusion_loss
from lab7.errors import UserError
from lab7.experiments import TrainConfig
from lab7.files import write_atomically
from lab7.model import ConditionalUNet
from lab7.muon import build_optimizers
from lab7.pipeline import ConditionalDDPMPipeline, load_pipeline, save_pipeline
from lab7.records import append_log
from lab7.sampling import to_grid

SAMPLED = (  # what the rows of samples show
    ("red sphere",),
    ("gray cube",),
    ("green cube", "brown cylinder"),
    ("blue cube", "blue cylinder"),
    ("yellow sphere", "purple cylinder", "cyan cube"),
    ("red cube", "gray sphere", "green cylinder"),
    ("red sphere", "cyan cylinder", "cyan cube"),
)
NOISE_LEVELS = 10  # equal parts of the time steps, for which the loss is logged apart


class Pictures(Protocol):
    """What to train on: uint8 pictures (N, 3, 64, 64) and multi-hot conditions (N, 24)."""

    images: Tensor
    conditions: Tensor


def train(
    config: TrainConfig,
    dataset: Pictures,
    output_dir: str | Path,
    resume: bool = True,
    max_seconds: float | None = None,
    callback: Callable[[dict[str, float]], Any] | None = None,
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
    with contextlib.ExitStack() as stack:
        if int(os.environ.get("RANK", 0)) == 0:
            stack.enter_context(in_use(folder))
        run = Run(config, dataset, device, folder, resume)
        interrupted = stack.enter_context(postponed_interrupts())
        run.open(resume, progress)
        _loop(run, deadline, callback, interrupted)
        run.close()
        if interrupted():
            raise KeyboardInterrupt
    return run.pipeline()


def _loop(
    run: "Run",
    deadline: float,
    callback: Callable[[dict[str, float]], Any] | None,
    interrupted: Callable[[], bool],
) -> None:
    """Train until the run is finished or has to stop: the whole of training at a glance."""
    config, stopped = run.config, run.agree(run.finished)
    while not stopped:
        x0, cond, t, noise = run.batches(run.step)
        with run.accelerator.autocast():
            losses = diffusion_loss(
                run.unet,
                run.scheduler,
                x0,
                cond,
                t,
                noise,
                scaling_factor=run.network.config.scaling_factor,
                snr_gamma=config.snr_gamma,
                reduction="none",
            )
        run.accelerator.backward(losses.mean())
        run.accelerator.clip_grad_norm_(run.network.parameters(), config.max_grad_norm)
        run.step_optimizers(learning_rate(config, run.step, run.spent()))
        run.ema.step(run.network.parameters())
        run.count(t, losses.detach())

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
    """What a training run consists of, and what is done with it beside the loop.

    Args:
        config: What to do.
        dataset: The pictures; held on the device as uint8.
        device: Where to train; with several processes each has its own of this kind.
        folder: Where logs and states go.
        resume: Whether the run may have been started before, in another precision than "auto"
            would choose now.

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
        if config.batch_size > len(dataset.images):
            raise UserError(
                f"batch_size {config.batch_size} is larger than the data: there are "
                f"{len(dataset.images)} pictures"
            )
        if device.type == "cpu":
            keep_freed_memory()
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            device = PartialState(cpu=device.type == "cpu").device
        self.config, self.dataset, self.device, self.folder = config, dataset, device, folder
        self.step, self.seconds_to_save = 0, 0.0
        self._started = time.perf_counter()
        self.scheduler = DDPMScheduler(**config.noise)
        self.network = _build_unet(config).to(device)
        if device.type == "cuda":  # Tensor cores want it; processors are faster without.
            self.network.to(memory_format=torch.channels_last)
        self.ema = EMAModel(self.network.parameters(), decay=config.ema_decay, foreach=True)
        before = read_environment(folder).get("precision") if resume else None
        self.accelerator = build_accelerator(config, self.network, folder, before)
        dtype = torch.bfloat16 if self.precision == "bfloat16" else torch.float32
        optimizers = build_optimizers(self.network, config.optimizer, config.weight_decay, dtype)
        self.unet, *self.optimizers = self.accelerator.prepare(self.network, *optimizers)
        self.batches = Batches(config, dataset, device, self.accelerator)
        self._losses = torch.zeros(2, NOISE_LEVELS, device=device)  # sums, and of how many
        self._logged = (0, 0.0)

    @property
    def precision(self) -> str:
        """What the forward pass is computed in."""
        names = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}
        return names[self.accelerator.mixed_precision]

    @property
    def is_main(self) -> bool:
        """Whether this is the only process, or the one of several that writes."""
        return self.accelerator.is_main_process

    @property
    def seconds(self) -> float:
        """Time of all calls so far, by the clock."""
        return time.perf_counter() - self._started

    @property
    def finished(self) -> bool:
        """Whether the steps or the time are used up."""
        budget = self.config.budget_seconds
        return self.step >= self.config.num_steps or (budget is not None and self.seconds >= budget)

    def agree(self, stop: bool) -> bool:
        """Tell whether any of the processes wants to stop."""
        if self.accelerator.num_processes == 1:
            return stop
        wish = torch.tensor(float(stop), device=self.device)
        return self.accelerator.reduce(wish).item() > 0

    def spent(self) -> float:
        """Return the seconds that the learning rate follows: the same in all processes."""
        if self.config.budget_seconds is None or self.accelerator.num_processes == 1:
            return self.seconds
        return broadcast(torch.tensor(self.seconds, device=self.device)).item()

    def open(self, resume: bool, progress: bool) -> None:
        """Note in the folder what the run is, go on from its latest state, and save.

        Saving first shows at once whether the place can be written, and how long that takes.
        """
        facts = {
            "course_pictures": getattr(self.dataset, "course", False),
            "num_pictures": len(self.dataset.images),
            "data_sha256": data_hash(self.dataset.images, self.dataset.conditions),
            "precision": self.precision,
        }
        state = load_latest(self.folder / "states") if resume else None
        if self.is_main:
            open_folder(self.folder, self.config, facts, state, resume)
        self.accelerator.wait_for_everyone()
        self.restore(state)
        self.accelerator.init_trackers("tensorboard")
        if self.finished:  # The settings of sampling may be others now.
            self.save_pipeline()
        else:
            self.save()
        self._bar = tqdm(
            desc=f"{self.device}, {self.precision}",
            total=self.config.num_steps * self.config.batch_size,
            initial=self.step * self.config.batch_size,
            unit=" pictures",
            unit_scale=True,
            disable=not (progress and self.is_main),
        )

    def close(self) -> None:
        """End the progress bar and TensorBoard's files."""
        self._bar.close()
        self.accelerator.end_training()

    def step_optimizers(self, lr: float) -> None:
        """Change the weights by their gradients; nothing in it waits for a GPU."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad()

    def count(self, t: Tensor, losses: Tensor) -> None:
        """Count a step, and keep its losses (B,) by level of noise."""
        level = t * NOISE_LEVELS // self.scheduler.config.num_train_timesteps
        # Not bincount, which on a GPU waits for all that is queued.
        self._losses.index_add_(1, level, torch.stack([losses, torch.ones_like(losses)]))
        self.step += 1
        self._bar.update(self.config.batch_size)

    def log(self) -> dict[str, Any]:
        """Write a row of the log: means since the row before."""
        step, seconds = self._logged
        sums, counts = self.accelerator.reduce(self._losses).tolist()
        loss = sum(sums) / sum(counts)
        if not math.isfinite(loss):
            raise UserError(
                f"the loss is {loss} at step {self.step}: lower the learning rate; the last good "
                f"weights are in {self.folder}"
            )
        self._logged = (self.step, self.seconds)
        row = {
            "step": self.step,
            "images": self.step * self.config.batch_size,
            "loss": loss,
            "lr": self.optimizers[0].param_groups[0]["lr"],
            "images_per_second": (self.step - step)
            * self.config.batch_size
            / (self._logged[1] - seconds),
            "seconds": self._logged[1],
        }
        levels = [a / b if b else None for a, b in zip(sums, counts, strict=True)]
        self._losses.zero_()
        self._bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
        if self.is_main:
            append_log(self.folder / "log.jsonl", row | {"loss_by_level": levels})
            self.accelerator.log({k: v for k, v in row.items() if k != "step"}, step=self.step)
        return row | {"loss_by_level": levels}

    def save(self) -> None:
        """Save a state to resume from, and the pipeline as it is now.

        Raises:
            UserError: The weights are no longer finite; nothing is written.
        """
        started = time.perf_counter()
        if not all(weight.isfinite().all() for weight in self.network.parameters()):
            raise UserError(
                f"the weights are no longer finite at step {self.step}: lower the learning rate; "
                f"the last good ones are in {self.folder}"
            )
        if not self.is_main:
            return
        state = {
            "config": dataclasses.asdict(self.config),
            "step": self.step,
            "seconds": self.seconds,
            "unet": self.network.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        save_state(self.folder / "states", self.step, state)
        self.save_pipeline()
        self.seconds_to_save = max(self.seconds_to_save, time.perf_counter() - started)

    def restore(self, state: dict[str, Any] | None) -> None:
        """Go back to a saved state; None leaves the run at its start."""
        if state is None:
            return
        self.step, self._started = state["step"], time.perf_counter() - state["seconds"]
        self._logged = (self.step, state["seconds"])
        self.network.load_state_dict(state["unet"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.ema.load_state_dict(state["ema"])
        self.ema.to(self.device)

    def pipeline(self) -> ConditionalDDPMPipeline:
        """Make a pipeline of the averaged weights."""
        config = self.config
        unet = ConditionalUNet(**config.unet).to(self.device).eval()
        self.ema.copy_to(unet.parameters())
        return ConditionalDDPMPipeline(
            unet,
            convert_scheduler(self.scheduler, config.scheduler),
            config.num_inference_steps,
            config.guidance_scale,
        )

    def save_pipeline(self) -> None:
        """Save the averaged weights as they are now."""
        if self.is_main:
            save_pipeline(self.pipeline(), self.folder / "pipeline")

    def draw_samples(self) -> None:
        """Draw a row of pictures, always for the same conditions and seeds."""
        if not self.is_main:
            return
        seeds = range(len(SAMPLED))
        images = self.pipeline()(SAMPLED, seeds=seeds, output_type="pt", progress=False).images
        sheet = to_grid(images, columns=len(images))
        path = self.folder / "samples" / f"step-{self.step:08d}.png"
        write_atomically(path, lambda file: sheet.save(file, "PNG"))


class Batches:
    """The batch of each step, as a function of (seed, step) alone.

    Each epoch goes through all pictures in an order of its own; a batch may reach over its end.

    Args:
        config: Its seed, batch size, label dropout and time sampling count.
        dataset: The pictures.
        device: Where the batches are wanted.
        accelerator: With several processes, each gets its share of a batch.

    Raises:
        UserError: The processes cannot share a batch evenly.
    """

    def __init__(
        self,
        config: TrainConfig,
        dataset: Pictures,
        device: torch.device,
        accelerator: Accelerator | None = None,
    ):
        index, processes = 0, 1
        if accelerator is not None:
            index, processes = accelerator.process_index, accelerator.num_processes
        if config.batch_size % processes:
            raise UserError(
                f"batch_size {config.batch_size} is not a multiple of the {processes} processes"
            )
        self.config, self.device = config, device
        self.images, self.conditions = dataset.images.to(device), dataset.conditions.to(device)
        self.num_timesteps = DDPMScheduler(**config.noise).config.num_train_timesteps
        self._share = slice(index, None, processes)
        self._permutation = lru_cache(maxsize=2)(self._draw_permutation)

    def __call__(self, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return x0 (B, 3, 64, 64), cond (B, 24), t (B,) in 0 … T-1 and noise of a step."""
        config, device = self.config, self.device
        rows = self.rows(step)
        x0, cond = to_float(self.images[rows]), self.conditions[rows]
        generator = torch.Generator(device).manual_seed(_mix(config.seed, step))
        noise = torch.randn(x0.shape, generator=generator, device=device)
        share = compute_density_for_timestep_sampling(
            config.time_sampling, len(rows), 0.0, 1.0, device=device, generator=generator
        )
        t = (share * self.num_timesteps).long().clamp(max=self.num_timesteps - 1)
        draw = torch.rand((len(rows), 1), generator=generator, device=device)
        cond = cond * (draw >= config.label_dropout)
        return x0[self._share], cond[self._share], t[self._share], noise[self._share]

    def rows(self, step: int) -> Tensor:
        """Return which pictures a step sees, (batch_size,)."""
        count, size = len(self.images), self.config.batch_size
        epoch, start = divmod(step * size, count)
        epochs = range(epoch, epoch + math.ceil((start + size) / count))
        indices = torch.cat([self._permutation(epoch) for epoch in epochs])
        return indices[start : start + size]

    def _draw_permutation(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(_mix(self.config.seed, epoch, 1))
        return torch.randperm(len(self.images), generator=generator).to(self.device)


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
    spent = (step - config.warmup_steps) / max(1, config.num_steps - config.warmup_steps)
    if config.budget_seconds is not None:
        spent = min(1.0, max(spent, seconds / config.budget_seconds))
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * spent))


def _build_unet(config: TrainConfig) -> ConditionalUNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        unet = ConditionalUNet(**config.unet)
    if config.init_from is not None:
        try:
            unet.load_state_dict(load_pipeline(config.init_from, "cpu").unet.state_dict())
        except RuntimeError as error:
            raise UserError(
                f"the weights in {config.init_from} do not fit this network: "
                + str(error).splitlines()[1].strip()
            ) from error
    return unet.train()


def _mix(*numbers: int) -> int:
    """Make one well-mixed seed of several numbers: neighbours would give related noise."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])
