"""Distillation: a generator of four passes, from one of many.

The student draws as DDPM does (Ho et al. 2020, eq. 7), but at four time steps alone. A step of DDPM
from t to t' does the same as two: go from xt straight towards x0, without noise (DDIM, J. Song et
al. 2021, eq. 12), to a level s beyond t'; then add noise, back up to t'. With λ = log(α / σ), half
the log signal-to-noise ratio, the posterior's variance puts s as far beyond t' as t' is beyond t:
λ(s) = 2 λ(t') - λ(t).

So there is one thing to learn for each of the four: the x0 towards which one straight way from xt
arrives at s where the teacher arrives in several steps, with guidance. Salimans & Ho (2022,
algorithm 2) make one step of two in this way, and again and again; here one is made of two to four
at once. After the last time step s is the picture itself.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers import SchedulerMixin
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save
from torch import Tensor
from tqdm import tqdm

from lab7.dataset import ICLEVRDataset
from lab7.devices import bfloat16_is_faster
from lab7.diffusion import convert_scheduler, predict_x0
from lab7.experiments import TrainConfig, get_experiment
from lab7.files import require_writable, write_atomically
from lab7.model import ConditionalUNet
from lab7.muon import build_optimizers
from lab7.pipeline import (
    ConditionalDDPMPipeline,
    load_pipeline,
    require_generator_place,
    save_pipeline,
)
from lab7.training import learning_rate

TIMESTEPS = (979, 940, 860, 706)  # the student's; λ grows by about one between two of them
TEACHER_STEPS = (2, 3, 4, 4)  # on the way from each to its s
AT_ONCE, IN_A_FILE = 16, 128  # ways that the teacher goes together, and that lie in one file
CONFIG = replace(
    get_experiment("ours").config, batch_size=8, learning_rate=5e-4, warmup_steps=50,
    weight_decay=0.0, ema_decay=0.995,
)  # fmt: skip


@dataclass(frozen=True)
class Leg:
    """What the student does in one pass: xs = keep · xt + towards · x0.

    Attributes:
        t: Time step that it starts at.
        s: Time step that it arrives at; -1: the picture.
        keep: See above.
        towards: See above.
    """

    t: int
    s: int
    keep: float
    towards: float


def plan_legs(scheduler: SchedulerMixin, timesteps: Sequence[int] = TIMESTEPS) -> list[Leg]:
    """Return the leg that begins at each of the time steps."""
    levels = torch.arange(scheduler.config.num_train_timesteps)
    alphas, sigmas = _alpha_sigma(scheduler, levels)
    log_ratio = (alphas / sigmas).log()
    legs = []
    for t, following in zip(timesteps[:-1], timesteps[1:], strict=True):
        s = int((log_ratio - (2 * log_ratio[following] - log_ratio[t])).abs().argmin())
        keep = float(sigmas[s] / sigmas[t])
        legs.append(Leg(t, s, keep, float(alphas[s]) - float(alphas[t]) * keep))
    return [*legs, Leg(timesteps[-1], -1, 0.0, 1.0)]


def go(teacher: ConditionalDDPMPipeline, xt: Tensor, cond: Tensor, times: Sequence[int]) -> Tensor:
    """Go on from xt without fresh noise, guided as the teacher's settings say.

    This is DPM-Solver++(2M) (Lu et al. 2022, algorithm 2); diffusers' own ends at the picture only.

    Args:
        teacher: The full generator.
        xt: Noisy pictures (B, 3, 64, 64) at the first of the time steps.
        cond: Multi-hot conditions (B, 24).
        times: Time steps, falling; -1 as the last is the picture.

    Returns:
        xt at the last of the time steps.
    """
    scheduler, settings, before = teacher.scheduler, teacher.settings(), None
    low, high = settings["guidance_interval"]
    for t, following in zip(times[:-1], times[1:], strict=True):
        weight = settings["guidance_scale"] if low <= t <= high else 1
        prediction = teacher.predict(xt, t, cond, weight).float()
        x0 = predict_x0(scheduler, prediction, t, xt).clamp(-1, 1)
        if following < 0:
            return x0
        alphas, sigmas = _alpha_sigma(scheduler, torch.tensor([t, following]))
        step = float((alphas / sigmas).log().diff())
        guess = x0 if before is None else x0 + (x0 - before[0]) * step / (2 * before[1])
        xt = sigmas[1] / sigmas[0] * xt - alphas[1] * math.expm1(-step) * guess
        before = x0, step
    return xt


@torch.inference_mode()
def draw_ways(
    teacher: ConditionalDDPMPipeline,
    dataset: ICLEVRDataset,
    seed: int,
    legs: Sequence[Leg],
    bfloat16: bool,
) -> dict[str, Tensor]:
    """Let the teacher draw pictures as the student will: leg by leg, with fresh noise between.

    Args:
        teacher: The full generator.
        dataset: Its conditions are drawn for; its pictures are not used.
        seed: Of conditions and noise.
        legs: See `plan_legs`.
        bfloat16: Whether to autocast.

    Returns:
        "xt" and "xs", where the legs begin and end, (N, legs, 3, 64, 64) float16; "cond" (N, 24).
    """
    generator = torch.Generator().manual_seed(seed)
    begun, ended, conds = [], [], []
    for _ in range(IN_A_FILE // AT_ONCE):
        rows = torch.randint(len(dataset), (AT_ONCE,), generator=generator)
        conds.append(dataset.conditions[rows].float())
        cond, xs, before = conds[-1].to(teacher.device), None, None
        for leg, steps in zip(legs, TEACHER_STEPS, strict=True):
            xt = torch.randn((AT_ONCE, 3, 64, 64), generator=generator).to(teacher.device)
            if before is not None:
                xt = _add_noise(teacher.scheduler, xs, xt, before.s, leg.t)
            times = [round(leg.t + (leg.s - leg.t) * i / steps) for i in range(steps + 1)]
            with torch.autocast(teacher.device.type, torch.bfloat16, enabled=bfloat16):
                xs = go(teacher, xt, cond, times)
            before = leg
            begun.append(xt.half().cpu())
            ended.append(xs.half().cpu())
    shape = (-1, len(legs), AT_ONCE, 3, 64, 64)
    xt, xs = (torch.stack(x).view(shape).transpose(1, 2).flatten(0, 1) for x in (begun, ended))
    return {"xt": xt.contiguous(), "xs": xs.contiguous(), "cond": torch.cat(conds)}


def leg_errors(
    unet: ConditionalUNet, scheduler: SchedulerMixin, ways: dict[str, Tensor], legs: Sequence[Leg]
) -> Tensor:
    """Return the squared error of the x0 that a network predicts for each leg, (legs,).

    Args:
        unet: The network.
        scheduler: Its noise schedule.
        ways: See `draw_ways`; any number of them.
        legs: See `plan_legs`.
    """
    xt, xs = (ways[name].to(unet.device).float() for name in ("xt", "xs"))
    cond = ways["cond"].to(unet.device).repeat_interleave(len(legs), 0)
    t = torch.tensor([leg.t for leg in legs], device=unet.device).repeat(len(xt))
    prediction = unet(xt.flatten(0, 1), t, cond).sample.float().view_as(xt)
    errors = []
    for number, leg in enumerate(legs):
        x0 = predict_x0(scheduler, prediction[:, number], leg.t, xt[:, number])
        wanted = (xs[:, number] - leg.keep * xt[:, number]) / leg.towards
        errors.append((x0 - wanted).square().mean())
    return torch.stack(errors)


def train_student(
    teacher: ConditionalDDPMPipeline,
    ways: dict[str, Tensor],
    legs: Sequence[Leg],
    config: TrainConfig,
    bfloat16: bool,
) -> ConditionalUNet:
    """Train a copy of the teacher's network to go each leg in one pass.

    The error of each leg counts in units of what it is before training: in one pass, and without
    guidance.

    Args:
        teacher: The full generator.
        ways: See `draw_ways`.
        legs: See `plan_legs`.
        config: Steps, ways a step, optimizer, learning rate, average and seed.
        bfloat16: Whether to autocast.

    Returns:
        The network with the averaged weights.
    """
    network = ConditionalUNet.from_config(teacher.unet.config, timesteps=[leg.t for leg in legs])
    network.load_state_dict(teacher.unet.state_dict())
    network.to(teacher.device)
    ema = EMAModel(network.parameters(), decay=config.ema_decay, foreach=True)
    optimizers = build_optimizers(network, config, "bfloat16" if bfloat16 else "float32")

    def errors(rows: Tensor) -> Tensor:
        some = {name: part[rows] for name, part in ways.items()}
        with torch.autocast(teacher.device.type, torch.bfloat16, enabled=bfloat16):
            return leg_errors(network, teacher.scheduler, some, legs)

    generator, count = torch.Generator().manual_seed(config.seed), len(ways["cond"])
    with torch.no_grad():
        unit = errors(torch.arange(min(count, 64)))
    bar = tqdm(range(config.num_steps), unit=" steps")
    for step in bar:
        rows = torch.randint(count, (config.batch_size,), generator=generator)
        relative = errors(rows) / unit
        relative.mean().backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), config.max_grad_norm)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, step)
            optimizer.step()
            optimizer.zero_grad()
        ema.step(network.parameters())
        bar.set_postfix_str(" ".join(f"{x:.2f}" for x in relative.tolist()), refresh=False)
    ema.copy_to(network.parameters())
    return network.eval()


def distill(
    checkpoint: Path,
    output: Path,
    work: Path,
    files: int,
    config: TrainConfig = CONFIG,
    data: Path | None = None,
    device: str | None = None,
) -> ConditionalDDPMPipeline:
    """Draw the teacher's ways, train the student, and save it as a pipeline.

    Args:
        checkpoint: Folder of the teacher.
        output: Folder of the student.
        work: Folder of the ways; files that lie there are not drawn again.
        files: How many, of `IN_A_FILE` ways each.
        config: Of the student's training.
        data: Folder whose conditions the teacher draws, see `find_layout`.
        device: See `choose_device`.

    Raises:
        UserError: A folder cannot be read or written.
    """
    require_generator_place(output)
    require_writable(work)
    teacher, dataset = load_pipeline(checkpoint, device), ICLEVRDataset(data)
    legs, place = plan_legs(teacher.scheduler), teacher.device
    example = torch.zeros(AT_ONCE, 3, 64, 64, device=place), torch.zeros(AT_ONCE, 24, device=place)
    with torch.inference_mode():
        bfloat16 = bfloat16_is_faster(place, lambda: teacher.predict(example[0], 0, example[1], 1))
    for number in tqdm(range(files), unit=" files"):
        path = work / f"{number:04d}.safetensors"
        if path.exists():
            continue
        write_atomically(path, save(draw_ways(teacher, dataset, 10_000 + number, legs, bfloat16)))
    parts = [load_file(work / f"{number:04d}.safetensors") for number in range(files)]
    ways = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    student = train_student(teacher, ways, legs, config, bfloat16)
    scheduler = convert_scheduler(teacher.scheduler, "ddpm")
    pipeline = ConditionalDDPMPipeline(student, scheduler, num_inference_steps=len(legs))
    save_pipeline(pipeline, output)
    return pipeline


def _alpha_sigma(scheduler: SchedulerMixin, t: Tensor) -> tuple[Tensor, Tensor]:
    """Return the factors of x0 and of the noise at time steps: √ᾱ and √(1 - ᾱ)."""
    alpha_bar = scheduler.alphas_cumprod.cpu()[t].double()
    return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()


def _add_noise(scheduler: SchedulerMixin, xs: Tensor, noise: Tensor, s: int, t: int) -> Tensor:
    """Add noise to xs, up to the time step t."""
    alphas, sigmas = _alpha_sigma(scheduler, torch.tensor([s, t]))
    ratio = float(alphas[1] / alphas[0])
    return ratio * xs + float(sigmas[1] ** 2 - (ratio * sigmas[0]) ** 2) ** 0.5 * noise
