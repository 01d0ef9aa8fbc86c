"""A student's own weights as a pipeline that everything here takes.

Most is read off the shapes of the weights. What they do not tell is given or assumed, and pictures
show whether that was right.
"""

import math
import os
import reprlib
from pathlib import Path
from typing import Any

from diffusers import DDPMScheduler

from lab7.dataset import IMAGE_SIZE, named_conditions
from lab7.diffusion import NOISE, convert_scheduler, set_steps
from lab7.errors import UserError, unknown
from lab7.evaluator import Evaluator
from lab7.files import read_json, require_place, user_path
from lab7.model import ConditionalUNet
from lab7.pipeline import ConditionalDDPMPipeline, fill_network, load_pipeline, save_pipeline
from lab7.sampling import write_samples
from workshop.course.options import NONE_GIVEN, USUAL, Options
from workshop.course.student_weights import (
    KNOWN,
    LAST,
    OTHERS,
    TIME,
    Weights,
    find_network,
    has_channels,
)

CHOICES = {
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "prediction_type": ("epsilon", "v_prediction", "sample"),
    "act_fn": ("silu", "swish", "mish", "gelu", "relu"),
}
# Of UNet2DModel's settings that weights do not tell, those that are no options of their own in
# `ConditionalUNet`. Beside those of `Options` only a folder of save_pretrained holds them.
UNET_OPTIONS = ("norm_eps", "act_fn", "flip_sin_to_cos", "freq_shift", "center_input_sample")
UNET_OPTIONS += ("downsample_padding", "mid_block_scale_factor")
SCHEDULE = ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end")
UNET = ("attention_head_dim", "norm_num_groups", "scaling_factor")
FILES = (".pth", ".pt", ".ckpt", ".bin", ".safetensors")
SAVED = "diffusion_pytorch_model"


def adopt(
    weights: Path,
    out: Path = Path("mine"),
    key: str | None = None,
    options: Options = NONE_GIVEN,
    steps: int = 20,
    guidance: float = 1.0,
    guidance_interval: tuple[int, int] | None = None,
    scheduler: str = "sde-dpmsolver++",
    evaluator: Path | None = None,
    data: Path | None = None,
    device: str | None = None,
) -> None:
    """Save a student's network as a pipeline, draw `test` with it and print its score.

    The arguments are those of the command, see `workshop.commands.adopt`.

    Raises:
        UserError: Weights that are not of such a network, or settings that do not fit it.
    """
    weights, out = user_path(weights), user_path(out)
    if weights.resolve().is_relative_to(out.resolve()):
        raise UserError(f"{out} holds the weights to adopt: choose another --out")
    if not math.isfinite(guidance):
        raise UserError(f"guidance {guidance} is no number: 1 is none")
    require_place(out)
    judge, conditions = Evaluator.load(evaluator, device, data), named_conditions("test", data)
    unet, noise, told = read_network(weights, key, options)
    sampler = convert_scheduler(noise, scheduler)
    set_steps(sampler, steps)  # before anything is written: is there such a number?
    pipeline = ConditionalDDPMPipeline(unet, sampler, steps, guidance, guidance_interval)
    pipeline(conditions[:1], output_type="pt", progress=False)  # refused if it is not finite
    save_pipeline(pipeline, out, half=False)
    print(told, f"saved {out}", sep="\n")
    drawn = write_samples(load_pipeline(out, device), conditions, out / "test", evaluator=judge)
    print(
        f"{len(conditions)} pictures of test in {out / 'test'} (see grid.png); accuracy by the "
        f"evaluator {drawn['scores']['top_k']['value']:.4f}: if your own are better, something "
        "assumed is wrong"
    )


def read_network(
    path: Path, key: str | None = None, options: Options = NONE_GIVEN
) -> tuple[ConditionalUNet, DDPMScheduler, str]:
    """Build a student's network and its noise schedule.

    Args:
        path: File or folder, see `adopt`.
        key: Where in the file the weights are.
        options: What weights do not tell.

    Returns:
        The network, whose outputs are those of the student's class to within float rounding; the
        schedule; and a text of what was read off and what was assumed.

    Raises:
        MissingFileError: No such file.
        UserError: It is damaged, could run code, or holds no network of the kinds known.
    """
    file, saved = _read_folder(path) if os.path.isdir(path) else (path, {})
    place, weights, betas = find_network(file, key)
    given, usual = options.given(), USUAL
    if given.keys() & SCHEDULE:
        saved.pop("trained_betas", None)
    elif betas:
        saved |= {"num_train_timesteps": len(betas), "trained_betas": betas}
        usual = {name: value for name, value in USUAL.items() if name not in SCHEDULE}
    settings = usual | saved | given
    form = _read_form(weights, place)
    unet = _build(form, weights, settings, place)
    noise = DDPMScheduler(**{name: settings[name] for name in NOISE if name in settings})
    read = form | form["unet_options"] | {n: x for n, x in saved.items() if n not in given}
    assumed = {name: x for name, x in usual.items() if name not in saved | given}
    assumed["pictures"] = f"{IMAGE_SIZE}×{IMAGE_SIZE} in [-1, 1]"
    if form["condition"] == "channels":
        assumed["input channels"] = "the picture's, then the labels'"
    told = {f"read off {place}": read, "given": given, "assumed": assumed}
    return unet, noise, "\n".join(_line(*source) for source in told.items() if source[1])


def _line(title: str, values: dict[str, Any]) -> str:
    shown = {n: reprlib.repr(x) if isinstance(x, list) else x for n, x in values.items()}
    shown.pop("unet_options", None)
    return f"{title}: {'; '.join(f'{name} {value}' for name, value in shown.items())}"


def _read_folder(folder: Path) -> tuple[Path, dict[str, Any]]:
    """Return the file of the weights in a folder of save_pretrained, and the settings beside it."""
    files = [file for name in ("", "unet/") for file in folder.glob(f"{name}{SAVED}.*")]
    files = sorted(file for file in files if file.suffix in FILES)
    if not files:
        others = ", ".join(sorted(f.name for f in folder.iterdir() if f.suffix in FILES)) or "none"
        wanted = f"give the file of your weights; in the folder there are {others}"
        raise UserError(f"{folder} has no {SAVED}.safetensors: {wanted}")
    settings = {}
    for file, names in (
        (files[-1].parent / "config.json", UNET + UNET_OPTIONS),
        (folder / "scheduler" / "scheduler_config.json", NOISE),
    ):
        if file.is_file():
            config = read_json(file)
            settings |= {name: config[name] for name in names if name in config}
    return files[-1], settings


def _read_form(weights: Weights, place: str) -> dict[str, Any]:
    """Return the arguments of `ConditionalUNet` that the shapes tell."""
    levels = range(len(_inside(weights, "down_blocks.")))
    try:
        channels = [len(weights[f"down_blocks.{i}.resnets.0.conv1.weight"]) for i in levels]
        shift = len(weights["down_blocks.0.resnets.0.time_emb_proj.weight"])
    except KeyError as error:
        raise UserError(f"{place} lacks {error.args[0]}: wanted is {KNOWN}; {OTHERS}") from None
    (down, downsampler), (up, upsampler) = (_blocks(weights, way, levels) for way in ("Down", "Up"))
    options = {
        "time_embedding_dim": len(weights[TIME]),
        "mid_block_type": "UNetMidBlock2D" if _inside(weights, "mid_block.") else None,
        "add_attention": bool(_inside(weights, "mid_block.attentions.")),
        "downsample_type": downsampler,
        "upsample_type": upsampler,
    }
    if not _inside(weights, "mid_block.attentions.0.group_norm."):
        options["attn_norm_num_groups"] = None
    return {
        "block_out_channels": channels,
        "layers_per_block": len(_inside(weights, "down_blocks.0.resnets.")),
        "down_block_types": down,
        "up_block_types": up,
        "resnet_time_scale_shift": "scale_shift" if shift == 2 * channels[0] else "default",
        "condition": "channels" if has_channels(weights) else "embedding",
        "patch_size": max(1, math.isqrt(len(weights[LAST]) // 3)),  # of a pixel_unshuffle
        "unet_options": options,
    }


def _blocks(weights: Weights, way: str, levels: range) -> tuple[list[str], str]:
    """Return the kinds of the blocks on a way, Down or Up, and the sampler of those that attend."""
    kinds, sampler = [], "conv"
    for level in levels:
        block = f"{way.lower()}_blocks.{level}."
        residual = "conv1" in _inside(weights, f"{block}{way.lower()}samplers.0.")
        if _inside(weights, f"{block}attentions."):
            kinds.append(f"Attn{way}Block2D")
            sampler = "resnet" if residual else sampler
        else:
            kinds.append(f"Resnet{way}sampleBlock2D" if residual else f"{way}Block2D")
    return kinds, sampler


def _inside(weights: Weights, start: str) -> set[str]:
    """Return what comes next in the names that begin so."""
    names = [name.removeprefix(start) for name in weights if name.startswith(start)]
    return {name.split(".")[0] for name in names}


def _build(
    form: dict[str, Any], weights: Weights, settings: dict[str, Any], place: str
) -> ConditionalUNet:
    """Build the network and fill it, or name the first weight or setting that does not fit."""
    _check(settings, form["block_out_channels"], weights)
    options = {name: settings[name] for name in UNET_OPTIONS if name in settings}
    given = {name: settings[name] for name in UNET if name in settings}
    given["unet_options"] = form["unet_options"] | options
    unet = ConditionalUNet(**form | given)
    own = unet.state_dict()
    surplus = [name for name in weights if name not in own]
    if surplus:
        raise UserError(f"{place}: {surplus[0]} has no place in {KNOWN}; {OTHERS}")
    broken = [name for name, weight in weights.items() if not weight.isfinite().all()]
    if broken:
        raise UserError(f"{place}: {broken[0]} is not finite: take an earlier checkpoint")
    fill_network(unet, weights, place)
    return unet.eval()


def _check(settings: dict[str, Any], channels: list[int], weights: Weights) -> None:
    """Raise a UserError for a setting that no network, or not this one, can have."""
    for name, value in settings.items():
        if name in CHOICES and value not in CHOICES[name]:
            raise unknown(name, value, CHOICES[name])
        if name in USUAL and isinstance(value, int | float) and not 0 < value < math.inf:
            raise UserError(f"{name} {value} must be above 0, and finite")
    start, end = (settings.get(name, 0) for name in ("beta_start", "beta_end"))
    if not start <= end < 1:
        raise UserError(f"beta_start {start} and beta_end {end}: they rise, and stay below 1")
    attended = [len(weight) for name, weight in weights.items() if name.endswith("to_q.weight")]
    for name, counts in (("attention_head_dim", attended), ("norm_num_groups", channels)):
        wrong = [count for count in counts if settings[name] and count % settings[name]]
        if wrong:
            raise UserError(
                f"{name} {settings[name]} does not divide {wrong[0]} channels: give that of your "
                f"network as --{name.replace('_', '-')}"
            )
