"""Distillation: what the student is to learn, and that it learns it."""

from dataclasses import replace

import pytest
import torch
from diffusers import DDPMScheduler

from lab7.dataset import ICLEVRDataset
from lab7.diffusion import convert_scheduler, prediction_of, set_steps
from lab7.model import ConditionalUNet
from lab7.pipeline import ConditionalDDPMPipeline, load_pipeline
from workshop.study import distill
from workshop.study.distill import CONFIG, TIMESTEPS, plan_legs

PICTURE = torch.linspace(-0.5, 0.5, 64).expand(3, 64, 64)


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(distill, "AT_ONCE", 2)
    monkeypatch.setattr(distill, "IN_A_FILE", 4)


def scheduler(prediction_type="v_prediction"):
    return DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type=prediction_type)


def test_a_leg_and_fresh_noise_are_a_step_of_ddpm():
    sampler = convert_scheduler(scheduler("sample"), "ddpm")
    set_steps(sampler, 4, TIMESTEPS)
    assert sampler.timesteps.tolist() == list(TIMESTEPS)
    xt, x0 = torch.randn(2, 1, 1, 1000, 1000, generator=torch.Generator().manual_seed(0))
    for leg, following in zip(plan_legs(scheduler()), (*TIMESTEPS[1:], -1), strict=True):
        step = sampler.step(x0, leg.t, xt, generator=torch.Generator().manual_seed(1)).prev_sample
        noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(1))
        arrived = leg.xt_factor * xt + leg.x0_factor * x0
        if following >= 0:
            arrived = distill._add_noise(scheduler(), arrived, noise, leg.s, following)
        assert (step - arrived).square().mean() < 1e-5  # s is a whole number


@pytest.mark.parametrize("kind", ["v_prediction", "sample", "epsilon"])
def test_a_teacher_that_knows_the_picture_arrives_exactly(kind):
    noise = scheduler(kind)
    teacher = ConditionalDDPMPipeline(ConditionalUNet(**CONFIG.unet), noise)
    teacher.predict = lambda xt, t, cond, weight: prediction_of(noise, PICTURE, t, xt)
    xt, cond = torch.randn(2, 3, 64, 64), torch.zeros(2, 24)
    for leg in plan_legs(noise):
        times = [leg.t, (leg.t + leg.s) // 2, leg.s]
        arrived = distill.solve(teacher, xt, cond, times)
        assert torch.allclose(arrived, leg.xt_factor * xt + leg.x0_factor * PICTURE, atol=1e-3)


def test_a_student_learns_its_legs(saved_pipeline, few, embedded_root):
    teacher, legs = load_pipeline(saved_pipeline, "cpu"), plan_legs(scheduler())
    trajectories = distill.draw_trajectories(
        teacher, ICLEVRDataset(embedded_root), 0, legs, bfloat16=False
    )
    again = distill.draw_trajectories(
        teacher, ICLEVRDataset(embedded_root), 0, legs, bfloat16=False
    )
    assert (
        trajectories["xt"].shape == trajectories["xs"].shape == (4, 4, 3, 64, 64)
        and len(trajectories["cond"]) == 4
    )
    assert all(torch.equal(trajectories[name], again[name]) for name in trajectories)
    config = replace(CONFIG, num_steps=60, batch_size=4, warmup_steps=5, ema_decay=0.8)
    student = distill.train_student(teacher, trajectories, legs, config, bfloat16=False)
    with torch.no_grad():
        before, after = (
            distill.leg_errors(unet, teacher.scheduler, trajectories, legs)
            for unet in (teacher.unet, student)
        )
    assert (after < 0.9 * before).all() and after.mean() < 0.75 * before.mean()
    assert student.config.timesteps == list(TIMESTEPS)


def test_distill_saves_a_generator_and_does_not_draw_twice(
    saved_pipeline, few, embedded_root, tmp_path, monkeypatch
):
    work, output = tmp_path / "trajectories", tmp_path / "fast"
    config = replace(CONFIG, num_steps=1, batch_size=1)
    distill.distill(saved_pipeline, output, work, 2, config, embedded_root, "cpu")
    fast = load_pipeline(output, "cpu")
    assert fast.known_timesteps == list(TIMESTEPS) and fast.config.num_inference_steps == 4
    assert fast.config.guidance_scale == 1
    fast("red cube", output_type="pt", progress=False)
    assert fast.scheduler.timesteps.tolist() == list(TIMESTEPS)
    fast("red cube", num_inference_steps=2, progress=False)
    assert fast.scheduler.timesteps.tolist() == [TIMESTEPS[0], TIMESTEPS[-1]]
    with pytest.raises(ValueError, match="num_inference_steps 5 is not within 1 … 4 for ddpm"):
        fast("red cube", num_inference_steps=5, progress=False)
    for sampler in ("unipcmultistep", "ddim"):
        with pytest.raises(ValueError, match=f"network's sampler is ddpm, not {sampler}"):
            load_pipeline(output, "cpu", sampler)("red cube", progress=False)
    with pytest.raises(ValueError, match="guidance is built into this network: leave .* at 1"):
        fast("red cube", guidance_scale=3.0, progress=False)

    drawn, draw = [], distill.draw_trajectories
    monkeypatch.setattr(
        distill, "draw_trajectories", lambda *args: drawn.append(args[2]) or draw(*args)
    )
    distill.distill(saved_pipeline, output, work, 3, config, embedded_root, "cpu")
    assert len(drawn) == 1  # the third file
    monkeypatch.setattr(distill, "TEACHER_STEPS", (1, 1, 1, 1))
    distill.distill(saved_pipeline, output, work, 1, config, embedded_root, "cpu")
    assert len(drawn) == 2  # along other legs
    for teacher, student, count in (
        (saved_pipeline, saved_pipeline, 1),
        (output, tmp_path / "other", 1),
        (saved_pipeline, output, 0),
    ):
        with pytest.raises(ValueError, match="cannot teach|files 0 must be at least 1"):
            distill.distill(teacher, student, work, count, config, embedded_root, "cpu")
    (tmp_path / "mine").mkdir()
    with pytest.raises(ValueError, match="mine is not a saved generator"):
        distill.distill(saved_pipeline, tmp_path / "mine", work, 1, config, embedded_root, "cpu")
