"""Training of a ConditionalUNet: one configuration, one run that can be stopped and resumed."""

import contextlib
import dataclasses
import math
import os
import time
import warnings
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast, broadcast_object_list, is_tensorboard_available
from diffusers import DDPMScheduler
from diffusers.training_utils import EMAModel, compute_density_for_timestep_sampling
from torch import Tensor
from tqdm import tqdm

from lab7.checkpoints import load_latest, save_state
from lab7.dataset import to_float
from lab7.devices import bfloat16_is_faster, choose_device, has_compiler, keep_freed_memory
from lab7.diffusion import convert_scheduler, diffusion_loss
from lab7.experiments import PRECISIONS, TrainConfig
from lab7.files import write_atomically
from lab7.model import ConditionalUNet
from lab7.muon import build_optimizers
from lab7.pipeline import ConditionalDDPMPipeline, load_pipeline, save_pipeline
from lab7.results import append_log
from lab7.run_folder import check_same_run, in_use, postponed_interrupts, prepare_folder, trim_log
from lab7.sampling import to_grid

SAMPLED = (  # what the rows of samples show
    *(("red sphere",), ("gray cube",), ("green cube", "brown cylinder")),
    *(("blue cube", "blue cylinder"), ("yellow sphere", "purple cylinder", "cyan cube")),
    *(("red cube", "gray sphere", "green cylinder"), ("red sphere", "cyan cylinder", "cyan cube")),
)
PRECISIONS_BY_DEVICE = {"cpu": ("auto", "float32", "bfloat16"), "mps": ("auto", "float32")}
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

    The order of the pictures is a function of (seed, epoch) and the noise one of (seed, step):
    a run that was stopped and resumed takes the same steps as one that was not.

    Args:
        config: What to do.
        dataset: The pictures.
        output_dir: Gets config.json, environment.json, log.jsonl, states/, pipeline/, samples/
            and TensorBoard's files.
        resume: Whether to go on from the latest state in `output_dir`; otherwise what is there
            is replaced.
        max_seconds: Save and stop after so many seconds of this call.
        callback: Called with each row of the log; training stops when it returns True.
        progress: Whether to show a progress bar.
        device: Where to train; see `choose_device`.

    Returns:
        The pipeline with the averaged weights.

    Raises:
        ValueError: If `output_dir` holds another run or is in use by one, the batch, the
            precision or the device does not fit, or the loss is no longer finite.
        KeyboardInterrupt: After Ctrl+C, a notebook's Stop or SIGTERM, when all is saved.
    """
    output_dir = Path(output_dir)
    if max_seconds is not None and not max_seconds > 0:
        raise ValueError(f"max_seconds {max_seconds} must be above 0")
    state = load_latest(output_dir / "states") if resume else None
    if resume:
        check_same_run(output_dir, config, state)
    run = Run(config, dataset, choose_device(device), output_dir)
    with contextlib.ExitStack() as stack:
        if run.is_main:
            stack.enter_context(in_use(output_dir))
            prepare_folder(output_dir, config, resume, getattr(dataset, "course", False))
            trim_log(output_dir / "log.jsonl", 0 if state is None else state["step"])
        run.accelerator.wait_for_everyone()
        run.restore(state)
        interrupted = stack.enter_context(postponed_interrupts())
        _go_on(run, max_seconds or math.inf, callback, progress and run.is_main, interrupted)
        if interrupted():
            raise KeyboardInterrupt
    return run.pipeline()


def _go_on(
    run: "Run",
    max_seconds: float,
    callback: Callable[[dict[str, Any]], Any] | None,
    progress: bool,
    interrupted: Callable[[], bool],
) -> None:
    """Train until the run is finished or has to stop, and save."""
    config, stop_at = run.config, run.seconds + max_seconds
    run.accelerator.init_trackers("tensorboard")
    stopped = run.agree(run.finished)
    if stopped:  # The settings of sampling may be others now.
        run.save_pipeline()
    bar = tqdm(
        desc=f"{run.images.device}, {run.precision}",
        total=config.num_steps * config.batch_size,
        initial=run.step * config.batch_size,
        unit=" pictures",
        unit_scale=True,
        disable=not progress,
    )
    while not stopped:
        run.update()
        bar.update(config.batch_size)
        stopped = run.agree(run.finished or run.seconds >= stop_at or interrupted())
        if stopped or run.step % config.log_every == 0:
            row = run.report()
            bar.set_postfix(loss=f"{row['loss']:.4f}", refresh=False)
            stopped |= run.agree(callback is not None and callback(row) is True)
        if stopped or run.step % config.save_every == 0:
            run.save()
        if config.sample_every and run.step % config.sample_every == 0:
            run.draw_samples()
    bar.close()
    run.accelerator.end_training()


class Run:
    """The state of a training run and what one step does to it.

    Args:
        config: What to do.
        dataset: The pictures; held on the device as uint8.
        device: Where to train; with several processes each has its own of this kind.
        output_dir: Where logs and states go.

    Raises:
        ValueError: A batch that is larger than the data or that the processes cannot share, or a
            precision that the device lacks.
    """

    def __init__(
        self, config: TrainConfig, dataset: Pictures, device: torch.device, output_dir: Path
    ):
        if config.batch_size > len(dataset.images):
            raise ValueError(
                f"batch_size {config.batch_size} is larger than the data: there are "
                f"{len(dataset.images)} pictures"
            )
        if device.type == "cpu":
            keep_freed_memory()
        self.config, self.output_dir = config, output_dir
        self.step, self.seconds = 0, 0.0
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            device = PartialState(cpu=device.type == "cpu").device
        self.images = dataset.images.to(device)
        self.conditions = dataset.conditions.to(device)
        self.order = PictureOrder(len(self.images), config.batch_size, config.seed, device)
        self.scheduler = DDPMScheduler(**config.noise)
        self.network = network = _build_unet(config).to(device)
        if device.type == "cuda":  # Tensor cores want it; processors are faster without.
            network.to(memory_format=torch.channels_last)
        self.ema = EMAModel(network.parameters(), decay=config.ema_decay, foreach=True)
        self.accelerator = _build_accelerator(config, network, output_dir)
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
        optimizers = build_optimizers(network, config.optimizer, config.weight_decay, dtype)
        self.unet, *self.optimizers = self.accelerator.prepare(network, *optimizers)
        if config.batch_size % self.accelerator.num_processes:
            raise ValueError(
                f"batch_size {config.batch_size} is not a multiple of the "
                f"{self.accelerator.num_processes} processes"
            )
        self._losses = torch.zeros(2, NOISE_LEVELS, device=device)  # sums, and of how many
        self._reported = (0, 0.0)

    @property
    def precision(self) -> str:
        """What the forward pass is computed in: "no" autocast, "bf16" or "fp16"."""
        return self.accelerator.mixed_precision

    @property
    def is_main(self) -> bool:
        """Whether this is the only process, or the one of several that writes."""
        return self.accelerator.is_main_process

    def agree(self, stop: bool) -> bool:
        """Tell whether any of the processes wants to stop."""
        if self.accelerator.num_processes == 1:
            return stop
        wish = torch.tensor(float(stop), device=self.images.device)
        return self.accelerator.reduce(wish).item() > 0

    @property
    def finished(self) -> bool:
        """Whether the steps or the time are used up."""
        budget = self.config.budget_seconds
        return self.step >= self.config.num_steps or (budget is not None and self.seconds >= budget)

    def update(self) -> None:
        """Do one optimizer step; nothing in it waits for the device."""
        started = time.perf_counter()
        lr = learning_rate(self.config, self.step, self._spent())
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
        x0, cond, t, noise = self.batch()
        with self.accelerator.autocast():
            losses = diffusion_loss(
                *(self.unet, self.scheduler, x0, cond, t, noise),
                scaling_factor=self.network.config.scaling_factor,
                snr_gamma=self.config.snr_gamma,
                reduction="none",
            )
        self.accelerator.backward(losses.mean())
        self.accelerator.clip_grad_norm_(self.network.parameters(), self.config.max_grad_norm)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.ema.step(self.network.parameters())
        level = t * NOISE_LEVELS // self.scheduler.config.num_train_timesteps
        # Not bincount, which on a GPU waits for all that is queued.
        self._losses.index_add_(1, level, torch.stack([losses.detach(), torch.ones_like(losses)]))
        self.step += 1
        self.seconds += time.perf_counter() - started

    def batch(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Draw x0, cond, t and noise of the present step: this process's share of the batch."""
        config, device = self.config, self.images.device
        rows = self.order(self.step)
        x0, cond = to_float(self.images[rows]), self.conditions[rows]
        generator = torch.Generator(device).manual_seed(_mix(config.seed, self.step))
        draw = {"generator": generator, "device": device}
        noise = torch.randn(x0.shape, **draw)
        t = self._draw_times(len(rows), generator)
        keep = torch.rand((len(rows), 1), **draw) >= config.label_dropout
        part = slice(self.accelerator.process_index, None, self.accelerator.num_processes)
        return x0[part], (cond * keep)[part], t[part], noise[part]

    def _draw_times(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw time steps (count,) in 0 … T-1."""
        share = compute_density_for_timestep_sampling(
            *(self.config.time_sampling, count, 0.0, 1.0),
            device=self.images.device,
            generator=generator,
        )
        last = self.scheduler.config.num_train_timesteps - 1
        return (share * (last + 1)).long().clamp(max=last)

    def report(self) -> dict[str, float]:
        """Write a row of the log: means since the row before."""
        started = time.perf_counter()
        step, seconds = self._reported
        sums, counts = self.accelerator.reduce(self._losses).tolist()
        loss = sum(sums) / sum(counts)
        if not math.isfinite(loss):
            raise ValueError(
                f"the loss is {loss} at step {self.step}: lower the learning rate; the last good "
                f"weights are in {self.output_dir}"
            )
        # On a GPU this is where the steps queued so far are waited for.
        self.seconds += time.perf_counter() - started
        images = (self.step - step) * self.config.batch_size
        row = {
            "step": self.step,
            "images": self.step * self.config.batch_size,
            "loss": loss,
            "lr": self.optimizers[0].param_groups[0]["lr"],
            "images_per_second": images / (self.seconds - seconds),
            "seconds": self.seconds,
        }
        levels = [a / b if b else None for a, b in zip(sums, counts, strict=True)]
        self._losses.zero_()
        self._reported = (self.step, self.seconds)
        if self.is_main:
            append_log(self.output_dir / "log.jsonl", row | {"loss_by_level": levels})
            self.accelerator.log({k: v for k, v in row.items() if k != "step"}, step=self.step)
        return row | {"loss_by_level": levels}

    def save(self) -> None:
        """Save a state to resume from, and the pipeline as it is now.

        Raises:
            ValueError: The weights are no longer finite; nothing is written.
        """
        if not all(weight.isfinite().all() for weight in self.network.parameters()):
            raise ValueError(
                f"the weights are no longer finite at step {self.step}: lower the learning rate; "
                f"the last good ones are in {self.output_dir}"
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
        save_state(self.output_dir / "states", self.step, state)
        self.save_pipeline()

    def save_pipeline(self) -> None:
        """Save the averaged weights as they are now."""
        if self.is_main:
            save_pipeline(self.pipeline(), self.output_dir / "pipeline")

    def draw_samples(self) -> None:
        """Draw a row of pictures, always for the same conditions and seeds."""
        if not self.is_main:
            return
        started = time.perf_counter()
        images = self.pipeline()(
            SAMPLED, seeds=range(len(SAMPLED)), output_type="pt", progress=False
        ).images
        sheet = to_grid(images, columns=len(images))
        path = self.output_dir / "samples" / f"step-{self.step:08d}.png"
        write_atomically(path, lambda file: sheet.save(file, "PNG"))
        self.seconds += time.perf_counter() - started

    def restore(self, state: dict[str, Any] | None) -> None:
        """Go back to a saved state; None leaves the run at its start."""
        if state is None:
            return
        self.step, self.seconds = state["step"], state["seconds"]
        self._reported = (self.step, self.seconds)
        self.network.load_state_dict(state["unet"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.ema.load_state_dict(state["ema"])
        self.ema.to(self.images.device)

    def _spent(self) -> float:
        """The seconds that the learning rate follows: the same in all processes."""
        if self.config.budget_seconds is None or self.accelerator.num_processes == 1:
            return self.seconds
        return broadcast(torch.tensor(self.seconds, device=self.images.device)).item()

    def pipeline(self) -> ConditionalDDPMPipeline:
        """Make a pipeline of the averaged weights."""
        config = self.config
        unet = ConditionalUNet(**config.unet).to(self.images.device).eval()
        self.ema.copy_to(unet.parameters())
        scheduler = convert_scheduler(self.scheduler, config.scheduler)
        return ConditionalDDPMPipeline(
            unet, scheduler, config.num_inference_steps, config.guidance_scale
        )


class PictureOrder:
    """Which pictures a step sees: each epoch goes through all of them in an order of its own.

    Args:
        count: Number of pictures N.
        batch_size: Pictures a step; a batch may reach over the end of an epoch.
        seed: Together with the number of the epoch decides its order.
        device: Where the indices are wanted.
    """

    def __init__(self, count: int, batch_size: int, seed: int, device: torch.device | str = "cpu"):
        self.count, self.batch_size, self.seed, self.device = count, batch_size, seed, device
        self._permutation = lru_cache(maxsize=2)(self._draw)

    def __call__(self, step: int) -> Tensor:
        """Return the indices (batch_size,) of a step."""
        epoch, start = divmod(step * self.batch_size, self.count)
        epochs = range(epoch, epoch + math.ceil((start + self.batch_size) / self.count))
        indices = torch.cat([self._permutation(epoch) for epoch in epochs])
        return indices[start : start + self.batch_size]

    def _draw(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(_mix(self.seed, epoch, 1))
        return torch.randperm(self.count, generator=generator).to(self.device)


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


def choose_precision(unet: ConditionalUNet) -> str:
    """Choose "bfloat16" autocast or "float32" for training a network where it is."""
    config = unet.config
    xt = torch.zeros(8, config.in_channels, config.sample_size, config.sample_size)
    cond = torch.zeros(8, config.num_labels)
    faster = bfloat16_is_faster(unet.device, lambda: unet(xt, 0, cond).sample.sum().backward())
    unet.zero_grad()
    return "bfloat16" if faster else "float32"


def should_compile(config: TrainConfig, device: torch.device) -> bool:
    """Tell whether a run wants `torch.compile`, see `TrainConfig.compile`."""
    if config.compile is not None:
        return config.compile
    return device.type == "cuda" and config.num_steps >= 2000


def _build_unet(config: TrainConfig) -> ConditionalUNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        unet = ConditionalUNet(**config.unet)
    if config.init_from is not None:
        try:
            unet.load_state_dict(load_pipeline(config.init_from, "cpu").unet.state_dict())
        except RuntimeError as error:
            raise ValueError(
                f"the weights in {config.init_from} do not fit this network: "
                + str(error).splitlines()[1].strip()
            ) from error
    return unet.train()


def _build_accelerator(config: TrainConfig, unet: ConditionalUNet, output_dir: Path) -> Accelerator:
    allowed = PRECISIONS_BY_DEVICE.get(unet.device.type, PRECISIONS)
    if config.precision not in allowed:
        raise ValueError(
            f"precision {config.precision!r} is not for {unet.device.type}: choose one of "
            f"{', '.join(allowed)}"
        )
    precision = choose_precision(unet) if config.precision == "auto" else config.precision
    precision = broadcast_object_list([precision])[0]  # the timings of processes may differ
    compiled = should_compile(config, unet.device) and has_compiler()
    if config.compile and not compiled:
        warnings.warn("no C++ compiler found: training without torch.compile", stacklevel=4)
    # Accelerate keeps the precision of the first Accelerator for the life of the process.
    AcceleratorState._reset_state(reset_partial_state=PartialState().num_processes == 1)
    return Accelerator(
        mixed_precision={"float32": "no", "bfloat16": "bf16", "float16": "fp16"}[precision],
        dynamo_backend="inductor" if compiled else "no",
        cpu=unet.device.type == "cpu",
        log_with="tensorboard" if config.tensorboard and is_tensorboard_available() else None,
        project_dir=output_dir,
    )


def _mix(*numbers: int) -> int:
    """Make one well-mixed seed of several numbers: neighbours would give related noise."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])
