"""Distillation: a generator of four passes, from one of many.

The student draws as DDPM does (Ho et al. 2020, eq. 7), but at four time steps alone. With
α = √ᾱ, σ = √(1 - ᾱ) and λ = log(α / σ), a step of DDPM from t to t' is the same as two: go from xt
straight towards x0, without noise (DDIM, J. Song et al. 2021, eq. 12), to a level s beyond t'; then
add noise, back up to t'. From the posterior's variance it follows that s is as far beyond t' as t'
is beyond t: λ(s) = 2 λ(t') - λ(t).

So there is one thing to learn for each of the four: the x0 towards which one straight way from xt
arrives at s where the teacher arrives in several steps, with guidance. Salimans & Ho (2022,
algorithm 2) make one step of two in this way, again and again; Meng et al. (2023, “On distillation
of guided diffusion models”) take guidance in, and draw with noise between the steps. Here one step
is made of two to four at once. After the last time step s is the picture itself.
"""

import hashlib
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
from lab7.devices import bfloat16_is_faster, prepare_device
from lab7.diffusion import alpha_sigma, convert_scheduler, predict_x0
from lab7.errors import UserError
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
from workshop.records import file_hash

# The student's time steps, and the teacher's steps from each to its s. With the cosine schedule λ
# grows by about one between two of them. Of those tried on `valid`, the fewest that the teacher
# itself draws with as well as with its own.
TIMESTEPS, TEACHER_STEPS = (979, 920, 800, 560), (3, 3, 4, 4)
AT_ONCE, IN_A_FILE = 16, 128  # trajectories that the teacher draws together, and that a file holds
FIRST_SEED = 10_000  # of the files: beyond those that pictures are drawn with
CONFIG = replace(
    get_experiment("ours").config, num_steps=2000, batch_size=8, learning_rate=5e-4,
    warmup_steps=50, weight_decay=0.0, ema_decay=0.995,
)  # fmt: skip


@dataclass(frozen=True)
class Leg:
    """What the student does in one pass: xs = xt_factor · xt + x0_factor · x0.

    Attributes:
        t: Time step that it starts at.
        s: Time step that it arrives at; -1: the picture.
        steps: How many the teacher takes.
        xt_factor: σs / σt.
        x0_factor: αs - αt · σs / σt.
    """

    t: int
    s: int
    steps: int
    xt_factor: float
    x0_factor: float


def plan_legs(scheduler: SchedulerMixin) -> list[Leg]:
    """Return the leg that begins at each of the student's time steps.

    Args:
        scheduler: The noise schedule.
    """
    levels = [alpha_sigma(scheduler, t) for t in range(scheduler.config.num_train_timesteps)]
    ratios = [math.log(alpha / sigma) for alpha, sigma in levels]
    legs = []
    for t, following, steps in zip(TIMESTEPS[:-1], TIMESTEPS[1:], TEACHER_STEPS[:-1], strict=True):
        wanted = 2 * ratios[following] - ratios[t]
        s = min(range(len(ratios)), key=lambda level, wanted=wanted: abs(ratios[level] - wanted))
        (alpha_t, sigma_t), (alpha_s, sigma_s) = levels[t], levels[s]
        xt_factor = sigma_s / sigma_t
        legs.append(Leg(t, s, steps, xt_factor, alpha_s - alpha_t * xt_factor))
    return [*legs, Leg(TIMESTEPS[-1], -1, TEACHER_STEPS[-1], 0.0, 1.0)]


def solve(
    teacher: ConditionalDDPMPipeline, xt: Tensor, cond: Tensor, times: Sequence[int]
) -> Tensor:
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
    scheduler, settings = teacher.scheduler, teacher.settings()
    low, high = settings["guidance_interval"]
    limit = teacher.unet.config.scaling_factor  # of x0 in the network's units
    last_x0, last_step = None, None
    for t, following in zip(times[:-1], times[1:], strict=True):
        weight = settings["guidance_scale"] if low <= t <= high else 1
        prediction = teacher.predict(xt, t, cond, weight).float()
        x0 = predict_x0(scheduler, prediction, t, xt).clamp(-limit, limit)
        if following < 0:
            return x0
        (alpha_t, sigma_t), (alpha, sigma) = (alpha_sigma(scheduler, at) for at in (t, following))
        step = math.log(alpha / sigma) - math.log(alpha_t / sigma_t)
        guess = x0 if last_x0 is None else x0 + (x0 - last_x0) * step / (2 * last_step)
        xt = sigma / sigma_t * xt - alpha * math.expm1(-step) * guess
        last_x0, last_step = x0, step
    return xt


@torch.inference_mode()
def draw_trajectories(
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
        for leg in legs:
            xt = torch.randn((AT_ONCE, 3, 64, 64), generator=generator).to(teacher.device)
            if before is not None:
                xt = _add_noise(teacher.scheduler, xs, xt, before.s, leg.t)
            whole = leg.s - leg.t
            times = [leg.t + round(whole * i / leg.steps) for i in range(leg.steps + 1)]
            with torch.autocast(teacher.device.type, torch.bfloat16, enabled=bfloat16):
                xs = solve(teacher, xt, cond, times)
            before = leg
            begun.append(xt.half().cpu())
            ended.append(xs.half().cpu())
    shape = (-1, len(legs), AT_ONCE, 3, 64, 64)
    xt, xs = (torch.stack(x).view(shape).transpose(1, 2).flatten(0, 1) for x in (begun, ended))
    return {"xt": xt.contiguous(), "xs": xs.contiguous(), "cond": torch.cat(conds)}


def leg_errors(
    unet: ConditionalUNet,
    scheduler: SchedulerMixin,
    trajectories: dict[str, Tensor],
    legs: Sequence[Leg],
) -> Tensor:
    """Return the squared error of the x0 that a network predicts for each leg, (legs,).

    Args:
        unet: The network.
        scheduler: Its noise schedule.
        trajectories: See `draw_trajectories`; any number of them.
        legs: See `plan_legs`.
    """
    xt, xs = (trajectories[name].to(unet.device).float() for name in ("xt", "xs"))
    cond = trajectories["cond"].to(unet.device).repeat_interleave(len(legs), 0)
    t = torch.tensor([leg.t for leg in legs], device=unet.device).repeat(len(xt))
    prediction = unet(xt.flatten(0, 1), t, cond).sample.float().view_as(xt)
    errors = []
    for number, leg in enumerate(legs):
        x0 = predict_x0(scheduler, prediction[:, number], leg.t, xt[:, number])
        wanted = (xs[:, number] - leg.xt_factor * xt[:, number]) / leg.x0_factor
        errors.append((x0 - wanted).square().mean())
    return torch.stack(errors)


def train_student(
    teacher: ConditionalDDPMPipeline,
    trajectories: dict[str, Tensor],
    legs: Sequence[Leg],
    config: TrainConfig,
    bfloat16: bool,
) -> ConditionalUNet:
    """Train a copy of the teacher's network to go each leg in one pass.

    Each leg's error is divided by its error before training, when the network goes the leg in one
    pass without guidance.

    Args:
        teacher: The full generator.
        trajectories: See `draw_trajectories`.
        legs: See `plan_legs`.
        config: Steps, trajectories a step, optimizer, learning rate, average and seed.
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
        some = {name: part[rows] for name, part in trajectories.items()}
        with torch.autocast(teacher.device.type, torch.bfloat16, enabled=bfloat16):
            return leg_errors(network, teacher.scheduler, some, legs)

    generator, count = torch.Generator().manual_seed(config.seed), len(trajectories["cond"])
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
    """Draw the teacher's trajectories, train the student, and save it as a pipeline.

    Args:
        checkpoint: Folder of the teacher.
        output: Folder of the student.
        work: Folder of the trajectories; files that lie there are not drawn again.
        files: How many, of `IN_A_FILE` trajectories each.
        config: Of the student's training.
        data: Folder whose conditions the teacher draws, see `find_layout`.
        device: See `choose_device`.

    Raises:
        UserError: A folder cannot be read or written.
    """
    if files < 1:
        raise UserError(f"files {files} must be at least 1")
    require_generator_place(output)
    teacher, dataset = load_pipeline(checkpoint, device), ICLEVRDataset(data)
    if teacher.known_timesteps or Path(output).resolve() == Path(checkpoint).resolve():
        raise UserError(
            f"{checkpoint} cannot teach {output}: give a full generator, another folder"
        )
    legs, place = plan_legs(teacher.scheduler), prepare_device(teacher.device)
    # What another teacher, or one with other guidance or legs, has drawn is not taken.
    drawn_by = f"{file_hash(checkpoint)} {legs}"
    work = work / hashlib.sha256(drawn_by.encode()).hexdigest()[:12]
    require_writable(work)
    xt, cond = torch.zeros(AT_ONCE, 3, 64, 64, device=place), torch.zeros(AT_ONCE, 24, device=place)
    with torch.inference_mode():
        bfloat16 = bfloat16_is_faster(place, lambda: teacher.predict(xt, 0, cond, 1))
    parts = []
    for number in tqdm(range(files), unit=" files"):
        path = work / f"{number:04d}.safetensors"
        if not path.exists():
            seed = FIRST_SEED + number
            write_atomically(path, save(draw_trajectories(teacher, dataset, seed, legs, bfloat16)))
        parts.append(load_file(path))
    trajectories = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    student = train_student(teacher, trajectories, legs, config, bfloat16)
    scheduler = convert_scheduler(teacher.scheduler, "ddpm")
    pipeline = ConditionalDDPMPipeline(student, scheduler, num_inference_steps=len(legs))
    save_pipeline(pipeline, output)
    return pipeline


def _add_noise(scheduler: SchedulerMixin, xs: Tensor, noise: Tensor, s: int, t: int) -> Tensor:
    """Add noise to xs, up to the time step t."""
    (alpha_s, sigma_s), (alpha_t, sigma_t) = (alpha_sigma(scheduler, at) for at in (s, t))
    ratio = alpha_t / alpha_s
    return ratio * xs + (sigma_t**2 - (ratio * sigma_s) ** 2) ** 0.5 * noise
