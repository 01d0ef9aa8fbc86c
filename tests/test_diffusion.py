"""Samplers, checked with networks that know the answer."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMScheduler, SchedulerMixin
from torch import Tensor, nn

from lab7.diffusion import (
    SAMPLERS,
    convert_scheduler,
    predict_x0,
    prediction_of,
    scheduler_name,
    set_steps,
)
from lab7.pipeline import ConditionalDDPMPipeline

KINDS = ("epsilon", "v_prediction", "sample")
SCHEDULES = ("linear", "squaredcos_cap_v2")
MEAN = torch.linspace(-0.2, 0.6, 3 * 8 * 8).reshape(1, 3, 8, 8)
STD = 0.15
Steps = list[tuple[int, Tensor, Tensor, Tensor]]


class Ideal(nn.Module):
    """The best possible prediction where pictures are MEAN with noise of `std` in every pixel."""

    device = torch.device("cpu")

    def __init__(self, scheduler: SchedulerMixin, std: float, scaling_factor: float):
        super().__init__()
        self.mean, self.std = MEAN * scaling_factor, std * scaling_factor
        self.kind, self.alphas_cumprod = scheduler.config.prediction_type, scheduler.alphas_cumprod
        self.config = SimpleNamespace(in_channels=3, sample_size=8, scaling_factor=scaling_factor)

    def forward(self, xt: Tensor, t: Tensor, cond: Tensor) -> SimpleNamespace:
        a2 = self.alphas_cumprod[t]
        a, b = a2.sqrt(), (1 - a2).sqrt()
        gain = a * self.std**2 / (a2 * self.std**2 + 1 - a2)  # E[x0 | xt] of a normal distribution
        x0 = self.mean + gain * (xt - a * self.mean)
        noise = (xt - a * x0) / b
        predictions = {"epsilon": noise, "v_prediction": a * noise - b * x0, "sample": x0}
        return SimpleNamespace(sample=predictions[self.kind])


def run(
    name: str,
    steps: int,
    schedule: str = "squaredcos_cap_v2",
    kind: str = "v_prediction",
    scaling_factor: float = 1.0,
    std: float = STD,
    total: int = 1000,
) -> Steps:
    """Draw eight pictures, or one where all are the same."""
    noise = DDPMScheduler(total, beta_schedule=schedule, prediction_type=kind)
    ideal = Ideal(noise, std, scaling_factor)
    pipeline = ConditionalDDPMPipeline(ideal, convert_scheduler(noise, name))
    count = 8 if std else 1
    cond, seeds = torch.zeros(count, 24), range(count)
    return list(pipeline.reverse(cond, seeds, num_inference_steps=steps))


@pytest.mark.parametrize("scaling_factor", [1.0, 8.0])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_reach_a_known_picture(name, schedule, kind, scaling_factor):
    for steps in (1, 2, 3, 20):
        path = run(name, steps, schedule, kind, scaling_factor, std=0)
        assert torch.allclose(path[-1][3], MEAN, atol=1e-2 if steps == 1 else 1e-4)


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_draw_the_right_distribution_at_every_number_of_steps(name):
    for steps in (*range(1, 51), 61, 334, 999):
        path = run(name, steps, SCHEDULES[steps % 2], KINDS[steps % 3])
        times = [t for t, *_ in path]
        assert len(path) == steps and times == sorted(set(times), reverse=True)
        assert times[0] >= 995 and times[-1] >= 0
        error = path[-1][3] - MEAN
        assert error.mean().abs() < 0.015
        # A step that is long averages over what it skips: too little spread, never much too much.
        assert (0.9 if steps > 300 else 0) * STD < error.std() < 1.1 * STD


@pytest.mark.parametrize("name", SAMPLERS)
def test_few_time_steps_in_training(name):
    for steps in range(1, 10 if name == "unipcmultistep" else 11):
        path = run(name, steps, std=0, total=10)
        assert len(path) == steps and torch.allclose(path[-1][3], MEAN, atol=1e-4)


def steps_of(name: str) -> list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
    """Return xt, x0, the next xt and both alphas_cumprod of each step but the last."""
    bars, path = DDPMScheduler(beta_schedule="squaredcos_cap_v2").alphas_cumprod, run(name, 7)
    return [
        (xt, x0, xs, bars[t], bars[s])
        for (t, xt, x0, xs), (s, *_) in zip(path, path[1:], strict=False)
    ]


def test_ddim_is_its_formula():
    for xt, x0, xs, a_t, a_s in steps_of("ddim"):
        noise = (xt - a_t.sqrt() * x0) / (1 - a_t).sqrt()
        assert torch.allclose(xs, a_s.sqrt() * x0 + (1 - a_s).sqrt() * noise, atol=1e-5)


def test_ddpm_is_its_formula():
    for xt, x0, xs, a_t, a_s in steps_of("ddpm"):
        alpha = a_t / a_s
        mean = (a_s.sqrt() * (1 - alpha) * x0 + alpha.sqrt() * (1 - a_s) * xt) / (1 - a_t)
        fresh = (xs - mean) / ((1 - a_s) / (1 - a_t) * (1 - alpha)).sqrt()
        assert fresh.mean().abs() < 0.1 and abs(fresh.std() - 1) < 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_predicted_x0(kind):
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type=kind)
    x0, noise, t = torch.rand(2, 3, 8, 8) * 2 - 1, torch.randn(2, 3, 8, 8), torch.tensor([300] * 2)
    prediction = {
        "epsilon": noise,
        "v_prediction": scheduler.get_velocity(x0, noise, t),
        "sample": x0,
    }[kind]
    xt = scheduler.add_noise(x0, noise, t)
    assert torch.allclose(predict_x0(scheduler, prediction, 300, xt), x0, atol=1e-4)
    assert torch.allclose(prediction_of(scheduler, x0, 300, xt), prediction, atol=1e-4)


def test_cosine_end_is_left_out_for_dpm_solver_only():
    noise = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    for name, schedule, start in (
        ("dpmsolver++", noise, 995),
        ("dpmsolver++", DDPMScheduler(), 999),
        ("ddpm", noise, 999),
    ):
        sampler = convert_scheduler(schedule, name)
        set_steps(sampler, 20)
        assert sampler.timesteps[0] == start


def test_names_of_schedulers():
    for name in SAMPLERS:
        sampler = convert_scheduler(DDPMScheduler(), f"{name.upper()}Scheduler")
        assert scheduler_name(sampler) == name
    with pytest.raises(ValueError, match="unknown scheduler 'ddimm': did you mean 'ddim'"):
        convert_scheduler(DDPMScheduler(), "ddimm")


def test_the_longest_run_of_unipc_is_said():
    with pytest.raises(ValueError, match="1000 is not within 1 … 999 for unipc.* nearest is 999$"):
        set_steps(convert_scheduler(DDPMScheduler(), "unipcmultistep"), 1000)
