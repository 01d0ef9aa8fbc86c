"""Training of a ConditionalUNet: one configuration, one run that can be stopped and resumed."""

import json
import math
import shutil
import time
import warnings
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import is_tensorboard_available
from diffusers import DDPMScheduler
from diffusers.training_utils import EMAModel, compute_snr
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from lab7.checkpoints import load_latest, save_state
from lab7.dataset import to_float
from lab7.devices import bfloat16_is_faster, choose_device, has_compiler
from lab7.experiments import TrainConfig
from lab7.files import require_writable, write_atomically
from lab7.model import ConditionalUNet
from lab7.pipeline import ConditionalDDPMPipeline, load_pipeline, save_pipeline
from lab7.results import append_log, environment
from lab7.schedulers import convert_scheduler

# What may differ between a run and its resumption: none of it changes the course of training.
FREE_FIELDS = (
    *("precision", "compile", "log_every", "save_every", "tensorboard"),
    *("scheduler", "scheduler_options", "num_inference_steps", "guidance_scale"),
)


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
        output_dir: Gets config.json, environment.json, log.jsonl, states/, pipeline/ and
            TensorBoard's files.
        resume: Whether to go on from the latest state in `output_dir`; otherwise what is there
            is replaced.
        max_seconds: Save and stop after so many seconds of this call.
        callback: Called with each row of the log; training stops when it returns True.
        progress: Whether to show a progress bar.
        device: Where to train; see `choose_device`.

    Returns:
        The pipeline with the averaged weights.

    Raises:
        ValueError: If `output_dir` holds another run, or the loss is no longer finite.
    """
    output_dir = Path(output_dir)
    if max_seconds is not None and not max_seconds > 0:
        raise ValueError(f"max_seconds {max_seconds} must be above 0")
    if resume:
        _check_same_run(output_dir / "config.json", config)
    run = Run(config, dataset, choose_device(device), output_dir)
    _prepare_folder(output_dir, config, resume, getattr(dataset, "course", False))
    run.accelerator.init_trackers("tensorboard")
    run.restore(load_latest(output_dir / "states"))
    _trim_log(output_dir / "log.jsonl", run.step)
    stop_at = run.seconds + (math.inf if max_seconds is None else max_seconds)
    how = f"{run.images.device}, {run.precision}"
    bar = tqdm(desc=how, total=config.num_steps, initial=run.step, disable=not progress)
    stopped = run.finished
    if stopped:  # The settings of sampling may be others now.
        save_pipeline(run.pipeline(), output_dir / "pipeline")
    while not stopped:
        run.update()
        bar.update()
        stopped = run.finished or run.seconds >= stop_at
        if stopped or run.step % config.log_every == 0:
            row = run.report()
            bar.set_postfix(loss=f"{row['loss']:.4f}", refresh=False)
            stopped |= callback is not None and callback(row) is True
        if stopped or run.step % config.save_every == 0:
            run.save()
    bar.close()
    run.accelerator.end_training()
    return run.pipeline()


def diffusion_loss(
    unet: torch.nn.Module,
    scheduler: DDPMScheduler,
    x0: Tensor,
    cond: Tensor,
    t: Tensor,
    noise: Tensor,
    snr_gamma: float | None = None,
) -> Tensor:
    """Compute the training loss of a batch.

    Args:
        unet: Called with (xt, t, cond).
        scheduler: The noise schedule; its `prediction_type` decides the target.
        x0: Pictures (B, 3, H, W) in [-1, 1].
        cond: Multi-hot conditions (B, 24).
        t: Time steps (B,) in 0 … T-1.
        noise: Standard normal noise (B, 3, H, W).
        snr_gamma: Weight the loss by min(SNR, gamma) in units of x0 (Hang et al. 2023, eq. 8).

    Returns:
        The mean squared error (Ho et al. 2020, eq. 14), a scalar.
    """
    xt = scheduler.add_noise(x0, noise, t)
    kind = scheduler.config.prediction_type
    if kind == "v_prediction":
        target = scheduler.get_velocity(x0, noise, t)
    else:
        target = noise if kind == "epsilon" else x0
    prediction = unet(xt, t, cond, return_dict=False)[0]
    loss = F.mse_loss(prediction.float(), target, reduction="none").mean(dim=(1, 2, 3))
    if snr_gamma is not None:
        snr = compute_snr(scheduler, t)
        in_x0 = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}[kind]
        loss = loss * snr.clamp(max=snr_gamma) / in_x0
    return loss.mean()


class Run:
    """The state of a training run and what one step does to it.

    Args:
        config: What to do.
        dataset: The pictures; held on the device as uint8.
        device: Where to train.
        output_dir: Where logs and states go.
    """

    def __init__(
        self, config: TrainConfig, dataset: Pictures, device: torch.device, output_dir: Path
    ):
        self.config, self.output_dir = config, output_dir
        self.step, self.seconds = 0, 0.0
        self.images = dataset.images.to(device)
        self.conditions = dataset.conditions.to(device)
        self.order = PictureOrder(len(self.images), config.batch_size, config.seed, device)
        self.scheduler = DDPMScheduler(**config.noise)
        self.network = network = _build_unet(config).to(device)
        if device.type == "cuda":  # Tensor cores want it; processors are faster without.
            network.to(memory_format=torch.channels_last)
        self.ema = EMAModel(network.parameters(), decay=config.ema_decay, foreach=True)
        self.optimizer = torch.optim.AdamW(
            network.parameters(), weight_decay=config.weight_decay, fused=True
        )
        self.accelerator = _build_accelerator(config, network, output_dir)
        self.unet, self.optimizer = self.accelerator.prepare(network, self.optimizer)
        self._loss = torch.zeros((), device=device)
        self._reported = (0, 0.0)

    @property
    def precision(self) -> str:
        """What the forward pass is computed in: "no" autocast, "bf16" or "fp16"."""
        return self.accelerator.mixed_precision

    @property
    def finished(self) -> bool:
        """Whether the steps or the time are used up."""
        budget = self.config.budget_seconds
        return self.step >= self.config.num_steps or (budget is not None and self.seconds >= budget)

    def update(self) -> None:
        """Do one optimizer step; nothing in it waits for the device."""
        started = time.perf_counter()
        lr = learning_rate(self.config, self.step, self.seconds)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        with self.accelerator.autocast():
            loss = diffusion_loss(
                self.unet, self.scheduler, *self.batch(), snr_gamma=self.config.snr_gamma
            )
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self.network.parameters(), self.config.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.step(self.network.parameters())
        self._loss += loss.detach()
        self.step += 1
        self.seconds += time.perf_counter() - started

    def batch(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Draw x0, cond, t and noise of the present step."""
        config, device = self.config, self.images.device
        rows = self.order(self.step)
        x0, cond = to_float(self.images[rows]), self.conditions[rows]
        generator = torch.Generator(device).manual_seed(_mix(config.seed, self.step))
        draw = {"generator": generator, "device": device}
        noise = torch.randn(x0.shape, **draw)
        t = torch.randint(self.scheduler.config.num_train_timesteps, (len(rows),), **draw)
        keep = torch.rand((len(rows), 1), **draw) >= config.label_dropout
        return x0, cond * keep, t, noise

    def report(self) -> dict[str, float]:
        """Write a row of the log: means since the row before."""
        started = time.perf_counter()
        step, seconds = self._reported
        loss = self._loss.item() / (self.step - step)
        if not math.isfinite(loss):
            raise ValueError(f"the loss is {loss} at step {self.step}: lower the learning rate")
        # On a GPU this is where the steps queued so far are waited for.
        self.seconds += time.perf_counter() - started
        images = (self.step - step) * self.config.batch_size
        row = {
            "step": self.step,
            "images": self.step * self.config.batch_size,
            "loss": loss,
            "lr": self.optimizer.param_groups[0]["lr"],
            "images_per_second": images / (self.seconds - seconds),
            "seconds": self.seconds,
        }
        self._loss.zero_()
        self._reported = (self.step, self.seconds)
        append_log(self.output_dir / "log.jsonl", row)
        self.accelerator.log({k: v for k, v in row.items() if k != "step"}, step=self.step)
        return row

    def save(self) -> None:
        """Save a state to resume from, and the pipeline as it is now."""
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "unet": self.network.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        save_state(self.output_dir / "states", self.step, state)
        save_pipeline(self.pipeline(), self.output_dir / "pipeline")

    def restore(self, state: dict[str, Any] | None) -> None:
        """Go back to a saved state; None leaves the run at its start."""
        if state is None:
            return
        self.step, self.seconds = state["step"], state["seconds"]
        self._reported = (self.step, self.seconds)
        self.network.load_state_dict(state["unet"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.ema.load_state_dict(state["ema"])
        self.ema.to(self.images.device)

    def pipeline(self) -> ConditionalDDPMPipeline:
        """Make a pipeline of the averaged weights."""
        config = self.config
        unet = ConditionalUNet(**config.unet).to(self.images.device).eval()
        self.ema.copy_to(unet.parameters())
        scheduler = convert_scheduler(self.scheduler, config.scheduler, **config.scheduler_options)
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
    precision = choose_precision(unet) if config.precision == "auto" else config.precision
    compiled = config.compile and has_compiler()
    if config.compile and not compiled:
        warnings.warn("no C++ compiler found: training without torch.compile", stacklevel=4)
    # Accelerate keeps the precision of the first Accelerator for the life of the process.
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(
        mixed_precision={"float32": "no", "bfloat16": "bf16", "float16": "fp16"}[precision],
        dynamo_backend="inductor" if compiled else "no",
        cpu=unet.device.type == "cpu",
        log_with="tensorboard" if config.tensorboard and is_tensorboard_available() else None,
        project_dir=output_dir,
    )


def _prepare_folder(output_dir: Path, config: TrainConfig, resume: bool, course: bool) -> None:
    """Make the folder of a run and note in it what the run is; without `resume`, empty it first."""
    require_writable(output_dir)
    if not resume:
        for name in ("states", "tensorboard", "pipeline"):
            shutil.rmtree(output_dir / name, ignore_errors=True)
        for name in ("config.json", "environment.json", "log.jsonl"):
            (output_dir / name).unlink(missing_ok=True)
    write_atomically(output_dir / "config.json", config.to_json())
    where = environment() | {"course_pictures": course}
    write_atomically(output_dir / "environment.json", json.dumps(where, indent=2) + "\n")


def _check_same_run(path: Path, config: TrainConfig) -> None:
    if not path.exists():
        return
    before, now = json.loads(path.read_text(encoding="utf-8")), json.loads(config.to_json())
    for name in now:
        if name not in FREE_FIELDS and before.get(name) != now[name]:
            raise ValueError(
                f"{path.parent} holds a run with {name} = {before.get(name)}, not {now[name]}: "
                "choose another folder, or do not resume"
            )


def _trim_log(path: Path, step: int) -> None:
    """Drop the rows beyond the state that a run goes on from: it will write them again."""
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        write_atomically(path, "".join(line for line in lines if json.loads(line)["step"] <= step))


def _mix(*numbers: int) -> int:
    """Make one well-mixed seed of several numbers: neighbours would give related noise."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])
