"""ConditionalDDPMPipeline: from labels and seeds to pictures."""

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lab7 import diffusion
from lab7.dataset import to_uint8
from lab7.devices import choose_device
from lab7.errors import MissingFileError, UserError, unknown, user_files
from lab7.files import read_json, require_place, user_path
from lab7.labels import NUM_LABELS, encode, parse_condition
from lab7.layouts import DATA_DIR
from lab7.model import ConditionalUNet

GENERATOR_DIR, FAST_DIR = DATA_DIR / "weights" / "generator", DATA_DIR / "weights" / "fast"
# Of sampling, saved with a pipeline.
SETTINGS = ("num_inference_steps", "guidance_scale", "guidance_interval")
_WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
Conditions = str | Sequence[Sequence[str]] | Tensor


class ConditionalDDPMPipeline(DiffusionPipeline):
    """Draws pictures that show given sets of labels, with classifier-free guidance.

    A seed belongs to a picture: its starting noise, and the noise of a stochastic scheduler, come
    from a generator of its own, so that the batch around it does not change it.

    Args:
        unet: The network.
        scheduler: One of the samplers that `convert_scheduler` knows. The pipeline makes its own
            from it, so settings other than those of the noise schedule are not taken over.
        num_inference_steps: Steps of a call that names none; saved with the pipeline.
        guidance_scale: Guidance of a call that names none; saved with the pipeline.
        guidance_interval: Time steps with guidance, likewise; None: all.
    """

    def __init__(
        self,
        unet: ConditionalUNet,
        scheduler: diffusers.SchedulerMixin,
        num_inference_steps: int = 20,
        guidance_scale: float = 1.0,
        guidance_interval: Sequence[int] | None = None,
    ):
        super().__init__()
        sampler = diffusion.convert_scheduler(scheduler, diffusion.scheduler_name(scheduler))
        self.register_modules(unet=unet, scheduler=sampler)
        self.register_to_config(
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            guidance_interval=guidance_interval or [0, sampler.config.num_train_timesteps - 1],
        )

    @property
    def known_timesteps(self) -> list[int] | None:
        """The time steps that a distilled network knows, see `ConditionalUNet`; None: all."""
        return getattr(self.unet.config, "timesteps", None)

    @torch.no_grad()
    def __call__(
        self,
        conditions: Conditions,
        seeds: Sequence[int] | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        output_type: str = "pil",
        batch_size: int | None = None,
        callback: Callable[[int, int, Tensor, Tensor], None] | None = None,
        progress: bool = True,
        guidance_interval: Sequence[int] | None = None,
    ) -> ImagePipelineOutput:
        """Draw one picture for each condition.

        Args:
            conditions: Lists of labels, a multi-hot tensor (B, 24), or one condition as text
                ("red cube, blue cylinder").
            seeds: One integer for each picture; 0 … B-1 by default.
            num_inference_steps: Steps of the sampler, see `set_steps`.
            guidance_scale: Weight w of classifier-free guidance (Ho & Salimans 2022, eq. 6 with
                w here for their 1 + w): `uncond + w * (cond - uncond)`; 1 turns it off.
            output_type: "pil" for a list of pictures, "pt" for a tensor (B, 3, 64, 64) in [-1, 1].
            batch_size: Pictures drawn at once; None: 24 on a processor, 256 on a GPU. Guidance
                doubles it for the network, and from 64 on diffusers' upsampling leaves
                channels-last, which costs a quarter on a processor.
            callback: Called after each step of each batch with the number of the step, the time
                step t, xt (b, 3, 64, 64) before the step, and the x0 in [-1, 1] predicted from it.
            progress: Whether to show a progress bar.
            guidance_interval: The lowest and the highest time step t with guidance; the others take
                one pass of the network, not two (Kynkäänniemi et al. 2024).

        Returns:
            The pictures as `.images`.

        Raises:
            UserError: If a condition, the seeds or a setting is not valid, or a picture is not
                finite.
        """
        cond = _encode_conditions(conditions)
        seeds = range(len(cond)) if seeds is None else seeds
        settings = self.settings(num_inference_steps, guidance_scale, guidance_interval)
        if len(seeds) != len(cond):
            raise UserError(f"{len(seeds)} seeds for {len(cond)} pictures: give one for each")
        if output_type not in ("pil", "pt"):
            raise unknown("output_type", output_type, ("pil", "pt"))
        batch_size = batch_size or (24 if self.device.type == "cpu" else 256)
        batches = range(0, len(cond), batch_size)
        images = []
        self.set_progress_bar_config(disable=not progress, leave=False)
        with self.progress_bar(total=len(batches) * settings["num_inference_steps"]) as bar:
            for start in batches:
                rows = slice(start, start + batch_size)
                reverse = self.reverse(cond[rows], seeds[rows], **settings)
                for step, (t, xt, x0, xt_next) in enumerate(reverse):  # noqa: B007
                    bar.update()
                    if callback is not None:
                        callback(step, t, xt, x0)
                images.append(xt_next.clamp(-1, 1).cpu())
        images = torch.cat(images)
        return ImagePipelineOutput(images=images if output_type == "pt" else to_pil(images))

    def settings(
        self,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_interval: Sequence[int] | None = None,
    ) -> dict[str, Any]:
        """Return the settings of sampling, with the pipeline's own where None is given.

        Raises:
            UserError: If the interval of guidance is out of range, or a distilled network shall be
                guided.
        """
        given = (num_inference_steps, guidance_scale, guidance_interval)
        found = {
            name: self.config[name] if value is None else value
            for name, value in zip(SETTINGS, given, strict=True)
        }
        if self.known_timesteps and found["guidance_scale"] != 1:
            raise UserError("guidance is built into this network: leave guidance_scale at 1")
        low, high = found["guidance_interval"] = list(found["guidance_interval"])
        last = self.scheduler.config.num_train_timesteps - 1
        if not 0 <= low <= high <= last:
            raise UserError(f"guidance_interval {low} {high}: the lower t first, within 0 … {last}")
        return found

    @torch.no_grad()
    def reverse(
        self, cond: Tensor, seeds: Sequence[int], **settings: Any
    ) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
        """Run the reverse process of one batch.

        Args:
            cond: Multi-hot conditions (B, 24).
            seeds: One integer for each picture.
            settings: num_inference_steps and what else `settings` takes.

        Yields:
            At each step t, xt (B, 3, 64, 64) as the network sees it, the x0 in [-1, 1] predicted
            from it, and the next xt in units of x0: after the last step, the picture.

        Raises:
            UserError: If a setting is out of range, or a picture is not finite.
        """
        steps, guidance_scale, (low, high) = self.settings(**settings).values()
        config, cond = self.unet.config, cond.to(self.device)
        sampler, scale = diffusion.scheduler_name(self.scheduler), config.scaling_factor
        diffusion.set_steps(self.scheduler, steps, self.known_timesteps)
        generators = [torch.Generator("cpu").manual_seed(int(seed)) for seed in seeds]
        extra = {"generator": generators} if sampler in diffusion.STOCHASTIC else {}
        shape = (config.in_channels, config.sample_size, config.sample_size)
        xt = torch.stack([torch.randn(shape, generator=g) for g in generators]).to(self.device)
        for t in self.scheduler.timesteps:
            weight = guidance_scale if low <= t <= high else 1
            prediction = self.predict(xt, t.to(self.device), cond, weight)
            x0 = diffusion.predict_x0(self.scheduler, prediction, int(t), xt) / scale
            x0 = x0.clamp(-1, 1)  # where guidance, and errors at high noise, drive it out
            clipped = diffusion.prediction_of(self.scheduler, x0 * scale, int(t), xt)
            xt_next = self.scheduler.step(clipped, t, xt, **extra).prev_sample
            if not (prediction.isfinite().all() & xt_next.isfinite().all()):
                raise UserError(
                    f"a picture is not finite at t = {int(t)}: sampler {sampler}, "
                    f"{steps} steps, guidance_scale {guidance_scale}"
                )
            yield int(t), xt, x0, xt_next / scale
            xt = xt_next

    def predict(self, xt: Tensor, t: Tensor | int, cond: Tensor, guidance_scale: float) -> Tensor:
        """Predict with guidance (Ho & Salimans 2022, eq. 6), both predictions in one batch.

        Args:
            xt: Noisy pictures (B, 3, 64, 64), as the network sees them.
            t: Time step 0 … T-1.
            cond: Multi-hot conditions (B, 24).
            guidance_scale: Its weight; 1: one prediction, with the condition, is enough.
        """
        if guidance_scale == 1:
            return self.unet(xt, t, cond).sample
        both = torch.cat([torch.zeros_like(cond), cond])
        uncond, conditional = self.unet(torch.cat([xt, xt]), t, both).sample.chunk(2)
        return uncond + guidance_scale * (conditional - uncond)


def load_pipeline(
    path: str | Path | None = None,
    device: str | torch.device | None = None,
    scheduler: str | None = None,
) -> ConditionalDDPMPipeline:
    """Load a saved pipeline, by default the one that comes with the repository.

    The parts are put together here, not by `from_pretrained`, so that a file cannot name code to
    import.

    Args:
        path: Folder that `save_pretrained` wrote.
        device: Where to run; see `choose_device`.
        scheduler: Name of another scheduler to sample with; see `convert_scheduler`.

    Returns:
        The pipeline, in float32.

    Raises:
        MissingFileError: If the folder or its weights are missing.
        UserError: If the folder does not hold such a pipeline.
    """
    path = GENERATOR_DIR if path is None else user_path(path)
    with user_files():
        for part in ("model_index.json", _WEIGHTS):
            if not (path / part).is_file():
                raise MissingFileError(f"no saved generator in {path}: {part} is missing")
    try:
        index = read_json(path / "model_index.json")
        own_scheduler = diffusion.load_scheduler(path / "scheduler", index["scheduler"][1])
        settings = {name: index[name] for name in SETTINGS if name in index}
        weights, config = load_file(path / _WEIGHTS), dict(read_json(path / "unet" / "config.json"))
    except (OSError, LookupError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{path} does not hold a saved generator: {error}") from error
    # Beyond the try: a mistake in model.py is no broken file, and keeps its traceback.
    with torch.random.fork_rng(devices=[]):
        unet = ConditionalUNet.from_config(config)
    fill_network(unet, weights, path)
    unet = unet.eval().to(memory_format=torch.channels_last)  # draws batches half as fast again
    if scheduler is not None:
        own_scheduler = diffusion.convert_scheduler(own_scheduler, scheduler)
    return ConditionalDDPMPipeline(unet, own_scheduler, **settings).to(choose_device(device))


def fill_network(unet: ConditionalUNet, weights: Mapping[str, Tensor], source: str | Path) -> None:
    """Copy weights into a network.

    Args:
        unet: The network.
        weights: By name, of any floating-point type.
        source: Where they are from, for the message.

    Raises:
        UserError: They are of another network; the message names the first that differs.
    """
    wanted = {name: tuple(weight.shape) for name, weight in unet.state_dict().items()}
    found = {name: tuple(weight.shape) for name, weight in weights.items()}
    for name in wanted | found:
        if found.get(name) != wanted.get(name):
            raise UserError(
                f"the weights in {source} do not fit this network: {name} is {found.get(name)} "
                f"there, not {wanted.get(name)}"
            )
    unet.load_state_dict(weights)


def save_pipeline(pipeline: ConditionalDDPMPipeline, path: str | Path, half: bool = True) -> None:
    """Save a pipeline in diffusers' layout, the weights in float16 (half the size on disk).

    `load_pipeline` and `from_pretrained` take them back to float32; the rounding, a relative
    2⁻¹¹ at most, is far below what a picture shows.

    Args:
        pipeline: What to save; it is left as it is.
        path: Folder to write; a saved pipeline there is replaced once the new one is complete.
        half: Whether to save in float16; else the weights are kept to the last bit.

    Raises:
        UserError: If the folder holds something else.
    """
    path = Path(path)
    require_generator_place(path)
    unet = ConditionalUNet.from_config(pipeline.unet.config)
    unet = unet.half() if half else unet
    unet.load_state_dict(pipeline.unet.state_dict())
    copy = ConditionalDDPMPipeline(unet, pipeline.scheduler, **pipeline.settings())
    unfinished = path.with_name(path.name + ".unfinished")
    try:
        with user_files():
            copy.save_pretrained(unfinished)
            shutil.rmtree(path, ignore_errors=True)
            os.replace(unfinished, path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def require_generator_place(path: Path) -> None:
    """Find out whether a pipeline could be saved in a folder.

    Raises:
        UserError: The folder holds something else, or see `require_place`.
    """
    require_place(path)
    if path.exists() and not (path / "model_index.json").is_file():
        raise UserError(f"{path} is not a saved generator, so it is not replaced by one")


def to_pil(images: Tensor) -> list[Image.Image]:
    """Turn pictures (B, 3, H, W) in [-1, 1] into PIL images."""
    return [Image.fromarray(x) for x in to_uint8(images).permute(0, 2, 3, 1).cpu().numpy()]


def _encode_conditions(conditions: Conditions) -> Tensor:
    if isinstance(conditions, str):
        conditions = [parse_condition(conditions)]
    cond = conditions.float() if isinstance(conditions, Tensor) else encode(conditions)
    if cond.ndim != 2 or cond.shape[1] != NUM_LABELS:
        raise UserError(f"conditions are {tuple(cond.shape)}: expected (B, {NUM_LABELS})")
    if len(cond) == 0:
        raise UserError("no conditions: give at least one list of labels")
    return cond
