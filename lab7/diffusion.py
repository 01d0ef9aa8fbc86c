"""The diffusion process: noise schedules, what a network predicts, the loss, samplers by name."""

import difflib
import inspect
from collections.abc import Iterable

import diffusers
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from diffusers.training_utils import compute_snr
from torch import Tensor
from torch.nn import functional as F

ALGORITHMS = ("dpmsolver++", "sde-dpmsolver++")  # of DPM-Solver: without and with fresh noise


def convert_scheduler(
    scheduler: diffusers.SchedulerMixin, name: str, **options
) -> diffusers.SchedulerMixin:
    """Make another scheduler for the same noise schedule.

    Args:
        scheduler: Any scheduler of the noise schedule.
        name: "dpmsolver++" (Lu et al. 2022, algorithm 2), "sde-dpmsolver++" (the same with fresh
            noise at each step), or a class name in diffusers, whose ending "Scheduler" and case do
            not matter: "ddpm", "ddim", "unipcmultistep", "eulerdiscrete", …
        options: Settings that the new scheduler shall have.

    Returns:
        The scheduler. For DPM-Solver, whose steps are even in log-SNR, the cosine schedule's end
        (log-SNR below -5.1, where beta was clipped) is left out, as diffusers advises. DDIM's time
        steps are set to "trailing": its formula steps back by T // n, which others do not line up
        with.

    Raises:
        ValueError: If no compatible scheduler has that name.
    """
    classes = {_short(cls.__name__): cls for cls in _compatibles(scheduler)}
    classes |= dict.fromkeys(ALGORITHMS, DPMSolverMultistepScheduler)
    if _short(name) not in classes:
        close = difflib.get_close_matches(_short(name), classes, 1, cutoff=0)[0]
        raise ValueError(
            f"unknown scheduler {name!r}: did you mean {close!r}? Choose one of {sorted(classes)}"
        )
    cls = classes[_short(name)]
    if _short(name) in ALGORITHMS:
        options = {"algorithm_type": _short(name)} | options
    cosine = scheduler.config.beta_schedule == "squaredcos_cap_v2"
    if cosine and "lambda_min_clipped" in _parameters(cls):
        options = {"lambda_min_clipped": -5.1} | options
    if cls is DDIMScheduler:
        options = {"timestep_spacing": "trailing"} | options
    options = {"clip_sample": False, "thresholding": False} | options  # the pipeline clips x0
    return cls.from_config(scheduler.config, **options)


def scheduler_name(scheduler: diffusers.SchedulerMixin) -> str:
    """Return the name that `convert_scheduler` knows a scheduler by, for instance "ddpm"."""
    if isinstance(scheduler, DPMSolverMultistepScheduler):
        return scheduler.config.algorithm_type
    return _short(type(scheduler).__name__)


def diffusion_loss(
    unet: torch.nn.Module,
    scheduler: DDPMScheduler,
    x0: Tensor,
    cond: Tensor,
    t: Tensor,
    noise: Tensor,
    scaling_factor: float = 1.0,
    snr_gamma: float | None = None,
    reduction: str = "mean",
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
        reduction: "mean" over the batch, or "none".

    Returns:
        The squared error as a mean over pixels and channels, in float32: a scalar, or (B,).
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
    return loss.mean() if reduction == "mean" else loss


def predict_x0(
    scheduler: diffusers.SchedulerMixin, prediction: Tensor, t: int, xt: Tensor
) -> Tensor:
    """Compute the x0 that a network's prediction at t stands for.

    Args:
        scheduler: Gives alphas_cumprod and the type of the prediction.
        prediction: Output of the network (B, 3, H, W).
        t: Time step 0 … T-1.
        xt: Noisy pictures of variance 1 as the network saw them (B, 3, H, W).

    Returns:
        x0 (B, 3, H, W), not clipped: for epsilon from eq. 4 of Ho et al. 2020, for v from
        appendix D of Salimans & Ho 2022.
    """
    alpha, sigma = _alpha_sigma(scheduler, t)
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return (xt - sigma * prediction) / alpha
    if kind == "v_prediction":
        return alpha * xt - sigma * prediction
    return prediction


def prediction_of(scheduler: diffusers.SchedulerMixin, x0: Tensor, t: int, xt: Tensor) -> Tensor:
    """Compute the prediction at t that stands for x0: the inverse of `predict_x0`."""
    alpha, sigma = _alpha_sigma(scheduler, t)
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return (xt - alpha * x0) / sigma
    if kind == "v_prediction":
        return (alpha * xt - x0) / sigma
    return x0


def _alpha_sigma(scheduler: diffusers.SchedulerMixin, t: int) -> tuple[float, float]:
    """Return what x0 and the noise are multiplied by at t: √ᾱ and √(1 - ᾱ)."""
    alpha_bar = float(scheduler.alphas_cumprod[t])
    return alpha_bar**0.5, (1 - alpha_bar) ** 0.5


def _compatibles(scheduler: diffusers.SchedulerMixin) -> list[type]:
    # diffusers lists stand-ins for what is not installed, and schedulers with betas of their own.
    found = [type(scheduler), *scheduler.compatibles]
    installed = [cls for cls in found if cls.__module__.startswith("diffusers.schedulers")]
    return [cls for cls in installed if "beta_schedule" in _parameters(cls)]


def _parameters(cls: type) -> Iterable[str]:
    return inspect.signature(cls.__init__).parameters


def _short(name: str) -> str:
    return name.lower().removesuffix("scheduler")
