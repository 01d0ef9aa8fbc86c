"""The diffusion process: noise schedules, what a network predicts, the loss, samplers by name."""

from collections.abc import Sequence
from pathlib import Path

import diffusers
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers import DPMSolverMultistepScheduler as DPMSolver
from diffusers import UniPCMultistepScheduler as UniPC
from diffusers.training_utils import compute_snr
from torch import Tensor
from torch.nn import functional as F

from lab7.errors import UserError, unknown
from lab7.files import read_json

# The settings of a scheduler that are its noise schedule; the others are the sampler's.
_BETAS = ("beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")
NOISE = ("num_train_timesteps", "prediction_type", *_BETAS)
# For DPM-Solver the cosine schedule's end (log-SNR below -5.1, where beta was clipped) is left out,
# as diffusers advises. What is not named here is diffusers' default.
_SOLVER = {"lambda_min_clipped": -5.1}
_SDE = _SOLVER | {"algorithm_type": "sde-dpmsolver++"}
SAMPLERS = {
    "ddpm": (DDPMScheduler, {"timestep_spacing": "trailing", "clip_sample": False}),
    "ddim": (DPMSolver, _SOLVER | {"solver_order": 1}),
    "dpmsolver++": (DPMSolver, _SOLVER),
    "sde-dpmsolver++": (DPMSolver, _SDE),
    "unipcmultistep": (UniPC, {}),
}
STOCHASTIC = ("ddpm", "sde-dpmsolver++")  # those that add fresh noise at each step
# By the names that saved pipelines hold; diffusers' own DDIM becomes "ddim" here.
CLASSES = {cls.__name__: cls for cls, _ in SAMPLERS.values()} | {"DDIMScheduler": DDIMScheduler}


def convert_scheduler(scheduler: diffusers.SchedulerMixin, name: str) -> diffusers.SchedulerMixin:
    """Make the named sampler, with the noise schedule of a given scheduler.

    Nothing but the noise schedule is taken from the given scheduler, so a name always means the
    same sampler. No sampler clips x0: the pipeline does.

    Args:
        scheduler: Any scheduler with the noise schedule.
        name: Case and an ending "Scheduler" do not matter. One of
            "ddpm": ancestral sampling (Ho et al. 2020, eq. 7), with fresh noise at each step;
            "ddim": without noise (J. Song et al. 2021, eq. 12 with σ = 0). It is DPM-Solver++ of
            order 1, and computed as such: diffusers' `DDIMScheduler` steps back by T // n, which
            misses its own time steps where n does not divide T;
            "dpmsolver++": DPM-Solver++(2M) (Lu et al. 2022, algorithm 2);
            "sde-dpmsolver++": the same with fresh noise, SDE-DPM-Solver++(2M) of that paper;
            "unipcmultistep": UniPC of order 2 with B₂(h) (Zhao et al. 2023).

    Returns:
        The sampler; `set_steps` sets its time steps.

    Raises:
        UserError: If there is no sampler of that name.
    """
    name = _short(name)
    if name not in SAMPLERS:
        raise unknown("scheduler", name, SAMPLERS)
    cls, settings = SAMPLERS[name]
    noise = {key: scheduler.config[key] for key in NOISE if key in scheduler.config}
    return cls(**noise, **settings)


def scheduler_name(scheduler: diffusers.SchedulerMixin) -> str:
    """Return the name that `convert_scheduler` knows a scheduler by, for instance "ddpm".

    Raises:
        UserError: If it is none of the samplers offered.
    """
    name = _short(type(scheduler).__name__)
    if isinstance(scheduler, DPMSolver):
        name = "ddim" if scheduler.config.solver_order == 1 else scheduler.config.algorithm_type
    if name not in SAMPLERS:
        raise unknown("scheduler", name, SAMPLERS)
    return name


def load_scheduler(folder: Path, class_name: str) -> diffusers.SchedulerMixin:
    """Read a scheduler from the folder that diffusers saved it in.

    Args:
        folder: With scheduler_config.json.
        class_name: Of the scheduler in diffusers, from model_index.json.

    Raises:
        UserError: If it is none of the samplers offered, or the file is missing or broken.
    """
    if class_name not in CLASSES:
        raise unknown("scheduler", class_name, CLASSES)
    return CLASSES[class_name].from_config(dict(read_json(folder / "scheduler_config.json")))


def set_steps(
    scheduler: diffusers.SchedulerMixin,
    num_inference_steps: int,
    known: Sequence[int] | None = None,
) -> None:
    """Set the time steps of the reverse process: as many different ones as asked for.

    Args:
        scheduler: What `convert_scheduler` made.
        num_inference_steps: 1 … T, for "unipcmultistep" 1 … T-1.
        known: Time steps to choose from, see `ConditionalUNet`: the first, the last, and some of
            those between.

    Raises:
        UserError: If the number of steps is out of range, or a sampler but "ddpm" is given `known`.
    """
    total = scheduler.config.num_train_timesteps
    if known and not isinstance(scheduler, DDPMScheduler):
        raise UserError(f"a distilled network's sampler is ddpm, not {scheduler_name(scheduler)}")
    # UniPC takes no time steps but those it sets itself, and these leave t = 0 out.
    longest = len(known) if known else total - isinstance(scheduler, UniPC)
    if not 1 <= num_inference_steps <= longest:
        nearest = min(max(num_inference_steps, 1), longest)
        raise UserError(
            f"num_inference_steps {num_inference_steps} is not within 1 … {longest} for "
            f"{scheduler_name(scheduler)}: the nearest is {nearest}"
        )
    if known:
        chosen = torch.linspace(0, len(known) - 1, num_inference_steps).round().int()
        return scheduler.set_timesteps(timesteps=[known[i] for i in chosen])
    scheduler.set_timesteps(num_inference_steps)
    if len(set(scheduler.timesteps.tolist()) - {-1}) < len(scheduler.timesteps):
        # Rounding errors gave DDPM a step at t = -1 (61 of 1000, for instance), or DPM-Solver has
        # fewer levels of noise left than steps (996 of 1000 with the cosine schedule).
        countdown = range(num_inference_steps, 0, -1)
        times = [round(total * i / num_inference_steps) - 1 for i in countdown]
        scheduler.set_timesteps(timesteps=times)


def diffusion_loss(
    unet: torch.nn.Module,
    scheduler: DDPMScheduler,
    x0: Tensor,
    cond: Tensor,
    t: Tensor,
    noise: Tensor,
    scaling_factor: float = 1.0,
    snr_gamma: float | None = None,
) -> Tensor:
    """Compute the training loss of a batch (Ho et al. 2020, eq. 14).

    Args:
        unet: Called with (xt, t, cond).
        scheduler: The noise schedule; its `prediction_type` decides the target.
        x0: Pictures (B, 3, H, W) in [-1, 1].
        cond: Multi-hot conditions (B, 24).
        t: Time steps (B,) in 0 … T-1.
        noise: Standard normal noise (B, 3, H, W).
        scaling_factor: What x0 is multiplied by before noise is added, see `ConditionalUNet`.
        snr_gamma: Weight the loss by min(SNR, gamma) in units of x0 (Hang et al. 2023, eq. 8).

    Returns:
        The squared error of each picture, (B,) float32: a mean over pixels and channels.
    """
    x0 = x0 * scaling_factor
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
    return loss


def predict_x0(
    scheduler: diffusers.SchedulerMixin, prediction: Tensor, t: int, xt: Tensor
) -> Tensor:
    """Compute x0 from a network's prediction at t.

    Args:
        scheduler: Gives alphas_cumprod and the type of the prediction.
        prediction: Output of the network (B, 3, H, W).
        t: Time step 0 … T-1.
        xt: Noisy pictures of variance 1 as the network saw them (B, 3, H, W).

    Returns:
        x0 (B, 3, H, W), not clipped; for epsilon by eq. 4 of Ho et al. 2020, for v by appendix D
        of Salimans & Ho 2022.
    """
    alpha, sigma = alpha_sigma(scheduler, t)
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return (xt - sigma * prediction) / alpha
    if kind == "v_prediction":
        return alpha * xt - sigma * prediction
    return prediction


def prediction_of(scheduler: diffusers.SchedulerMixin, x0: Tensor, t: int, xt: Tensor) -> Tensor:
    """Compute the prediction at t from x0: the inverse of `predict_x0`."""
    alpha, sigma = alpha_sigma(scheduler, t)
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return (xt - alpha * x0) / sigma
    if kind == "v_prediction":
        return (alpha * xt - x0) / sigma
    return x0


def alpha_sigma(scheduler: diffusers.SchedulerMixin, t: int) -> tuple[float, float]:
    """Return the factors of x0 and of the noise at t: √ᾱ and √(1 - ᾱ)."""
    alpha_bar = float(scheduler.alphas_cumprod[t])
    return alpha_bar**0.5, (1 - alpha_bar) ** 0.5


def _short(name: str) -> str:
    return name.lower().removesuffix("scheduler")
