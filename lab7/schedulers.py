"""Noise schedulers of diffusers: which there are, by name, and the x0 that a prediction means."""

import difflib
import inspect
from collections.abc import Iterable

import diffusers
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from torch import Tensor

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
    return cls.from_config(scheduler.config, **options)


def scheduler_name(scheduler: diffusers.SchedulerMixin) -> str:
    """Return the name that `convert_scheduler` knows a scheduler by, for instance "ddpm"."""
    if isinstance(scheduler, DPMSolverMultistepScheduler):
        return scheduler.config.algorithm_type
    return _short(type(scheduler).__name__)


def predict_x0(
    scheduler: diffusers.SchedulerMixin, prediction: Tensor, t: int, xt: Tensor
) -> Tensor:
    """Compute the x0 that a network's prediction at t stands for, cut to [-1, 1].

    Args:
        scheduler: Gives alphas_cumprod and the type of the prediction.
        prediction: Output of the network (B, 3, H, W).
        t: Time step 0 … T-1.
        xt: Noisy pictures of variance 1 as the network saw them (B, 3, H, W).

    Returns:
        x0 (B, 3, H, W): for epsilon from eq. 4 of Ho et al. 2020, for v from appendix D of
        Salimans & Ho 2022.
    """
    alpha_bar = scheduler.alphas_cumprod[t].to(xt.device)
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        x0 = (xt - (1 - alpha_bar).sqrt() * prediction) / alpha_bar.sqrt()
    elif kind == "v_prediction":
        x0 = alpha_bar.sqrt() * xt - (1 - alpha_bar).sqrt() * prediction
    else:
        x0 = prediction
    return x0.clamp(-1, 1)


def _compatibles(scheduler: diffusers.SchedulerMixin) -> list[type]:
    # diffusers lists stand-ins for what is not installed, and schedulers with betas of their own.
    found = [type(scheduler), *scheduler.compatibles]
    installed = [cls for cls in found if cls.__module__.startswith("diffusers.schedulers")]
    return [cls for cls in installed if "beta_schedule" in _parameters(cls)]


def _parameters(cls: type) -> Iterable[str]:
    return inspect.signature(cls.__init__).parameters


def _short(name: str) -> str:
    return name.lower().removesuffix("scheduler")
