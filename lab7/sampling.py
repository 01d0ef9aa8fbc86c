"""Pictures on disk: the course's hand-in layout, grids, and the denoising row."""

import contextlib
import dataclasses
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision.utils import make_grid

from lab7.diffusion import scheduler_name
from lab7.errors import user_files
from lab7.evaluator import Evaluator, compute_scores
from lab7.files import read_json, require_place
from lab7.labels import LABELS, encode
from lab7.pipeline import ConditionalDDPMPipeline, to_pil

DENOISING_CONDITION = ("red sphere", "cyan cylinder", "cyan cube")  # the one the course asks for
DENOISING_FRAMES = 10
GRID_COLUMNS = 8
_BORDER = 2  # pixels, what make_grid leaves between pictures


def write_samples(
    pipeline: ConditionalDDPMPipeline,
    conditions: Sequence[Sequence[str]],
    output: str | Path,
    seed: int = 0,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    evaluator: Evaluator | None = None,
    progress: bool = True,
    denoising: Sequence[str] | None = None,
) -> dict:
    """Draw one picture for each condition into a folder as the course wants it handed in.

    The folder gets `0.png` … in the order of the conditions, `grid.png` with eight a row,
    `denoising.png` and `samples.json` with the settings, the conditions and the scores. It appears
    when all of it is done.

    Args:
        pipeline: The generator.
        conditions: N lists of labels.
        output: Folder to write; pictures of an earlier call in it are replaced.
        seed: Condition i has the seed `seed + i`.
        num_inference_steps: Of sampling; None takes the pipeline's own.
        guidance_scale: Of classifier-free guidance; None takes the pipeline's own.
        evaluator: The judge; None leaves the scores out.
        progress: Whether to show a progress bar.
        denoising: Labels of the denoising row, which has the seed `seed`; None takes the first
            condition, so that the row ends in 0.png.

    Returns:
        What samples.json holds.

    Raises:
        UserError: `output` cannot be written, or the settings are not valid.
    """
    seeds = range(seed, seed + len(conditions))
    with _finished_folder(Path(output)) as folder:
        settings = pipeline.settings(num_inference_steps, guidance_scale)
        images = pipeline(
            conditions, seeds=seeds, output_type="pt", progress=progress, **settings
        ).images
        frames = denoising_frames(pipeline, denoising or conditions[0], seed, **settings)
        summary = {
            "settings": settings | {"scheduler": scheduler_name(pipeline.scheduler), "seed": seed},
            "conditions": [list(condition) for condition in conditions],
        }
        if evaluator is not None:
            summary |= _judge(evaluator, images, encode(conditions))
        sheets = dict(enumerate(to_pil(images)))
        sheets |= {"grid": to_grid(images), "denoising": to_grid(frames, columns=len(frames))}
        with user_files(output):
            for name, sheet in sheets.items():
                sheet.save(folder / f"{name}.png")
            text = json.dumps(summary, indent=2) + "\n"
            (folder / "samples.json").write_text(text, encoding="utf-8")
        _drop_earlier(Path(output), len(conditions))
    return summary


def denoising_frames(
    pipeline: ConditionalDDPMPipeline,
    condition: Sequence[str] = DENOISING_CONDITION,
    seed: int = 0,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    count: int = DENOISING_FRAMES,
) -> Tensor:
    """Return the way from noise to picture, (count, 3, 64, 64) in [-1, 1].

    The frames are xt at steps evenly spread over the reverse process; the first is noise, the last
    the picture. With fewer steps than frames every step is shown once.
    """
    visited = []
    final = pipeline(
        [condition],
        seeds=[seed],
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        output_type="pt",
        callback=lambda step, t, xt, x0: visited.append(xt.cpu()),
        progress=False,
    ).images
    states = torch.cat([*visited, final])
    chosen = torch.linspace(0, len(states) - 1, min(count, len(states))).round().long()
    return states[chosen].clamp(-1, 1)


def to_grid(images: Tensor, columns: int = GRID_COLUMNS) -> Image.Image:
    """Put pictures (B, 3, H, W) in [-1, 1] on one sheet, by torchvision's `make_grid`."""
    images = images.cpu()
    if len(images) > 1:
        sheet = make_grid(images, nrow=columns, padding=_BORDER, pad_value=1.0)
    else:  # make_grid would leave out the border, which `split_grid` counts on
        sheet = F.pad(images[0], (_BORDER,) * 4, value=1.0)
    return to_pil(sheet[None])[0]


def _judge(evaluator: Evaluator, images: Tensor, labels: Tensor) -> dict:
    probabilities = evaluator.predict(images)
    seen = [
        {LABELS[i]: round(float(row[i]), 4) for i in row.argsort(descending=True)[:5].tolist()}
        for row in probabilities
    ]
    return {"scores": dataclasses.asdict(compute_scores(probabilities, labels)), "seen": seen}


def _drop_earlier(output: Path, count: int) -> None:
    """Remove the pictures beyond `count` that an earlier, longer call wrote."""
    written = output / "samples.json"
    if written.exists():
        for index in range(count, len(read_json(written).get("conditions", []))):
            (output / f"{index}.png").unlink(missing_ok=True)


@contextlib.contextmanager
def _finished_folder(output: Path) -> Iterator[Path]:
    """Give a temporary folder, whose files move to `output` if the block ends without an error."""
    with user_files(output):
        require_place(output)
        output.parent.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-")
    with temporary as folder:
        yield Path(folder)
        with user_files(output):
            output.mkdir(exist_ok=True)
            for file in Path(folder).iterdir():
                os.replace(file, output / file.name)
