"""Pictures on disk: the course's hand-in layout, grids, and the denoising row."""

import dataclasses
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision.utils import make_grid

from lab7.diffusion import scheduler_name
from lab7.errors import user_files
from lab7.evaluator import Evaluator
from lab7.files import read_json, require_place
from lab7.labels import encode
from lab7.pipeline import ConditionalDDPMPipeline, to_pil
from lab7.scoring import judge_pictures, label_names

DENOISING_CONDITION = ("red sphere", "cyan cylinder", "cyan cube")  # the one the course asks for
DENOISING_FRAMES = 10
GRID_COLUMNS = 8
_BORDER = 2  # pixels, what make_grid leaves between pictures


def write_samples(
    pipeline: ConditionalDDPMPipeline,
    conditions: Sequence[Sequence[str]],
    output: str | Path,
    seed: int = 0,
    evaluator: Evaluator | None = None,
    denoising: Sequence[str] | None = None,
    **settings: Any,
) -> dict:
    """Draw one picture for each condition into a folder, as the course wants it handed in.

    The folder gets `0.png` … in the order of the conditions, `grid.png` with eight pictures a row,
    `denoising.png`, and `samples.json` with the settings, the conditions, the scores and the labels
    that the evaluator sees. Nothing is written before all of it is done.

    Args:
        pipeline: The generator.
        conditions: N lists of labels.
        output: Folder to write; the pictures of an earlier call in it are replaced.
        seed: Condition i has the seed `seed + i`.
        evaluator: The judge; None leaves the scores out.
        denoising: Labels of the denoising row, which has the seed `seed`; None takes the first
            condition, so that the row ends in 0.png.
        settings: Of sampling; None takes the pipeline's own, see its `settings`.

    Returns:
        What samples.json holds.

    Raises:
        UserError: `output` is a file or cannot be written, or the settings are not valid.
    """
    output = Path(output)
    require_place(output)
    seeds = range(seed, seed + len(conditions))
    settings = pipeline.settings(**settings)
    images = pipeline(conditions, seeds=seeds, output_type="pt", **settings).images
    frames = denoising_frames(pipeline, denoising or conditions[0], seed, **settings)
    summary = {
        "settings": settings | {"scheduler": scheduler_name(pipeline.scheduler), "seed": seed},
        "conditions": [list(condition) for condition in conditions],
    }
    if evaluator is not None:
        found = judge_pictures(images, conditions, evaluator)
        summary["scores"] = dataclasses.asdict(found["scores"])
        summary["seen"] = label_names(found["pictures"].seen)
    pictures = {str(index): picture for index, picture in enumerate(to_pil(images))}
    pictures |= {"grid": to_grid(images), "denoising": to_grid(frames, columns=len(frames))}
    with user_files(output):
        _write_whole(output, pictures, summary)
    return summary


def denoising_frames(
    pipeline: ConditionalDDPMPipeline,
    condition: Sequence[str] = DENOISING_CONDITION,
    seed: int = 0,
    count: int = DENOISING_FRAMES,
    **settings: Any,
) -> Tensor:
    """Return the way from noise to picture, (count, 3, 64, 64) in [-1, 1].

    The frames are xt at evenly spaced steps of the reverse process; the first is noise, the last
    the picture. With fewer steps than frames, every step is shown once.
    """
    states = []
    for _, xt, _, xt_next in pipeline.reverse(encode([condition]), [seed], **settings):  # noqa: B007
        states.append(xt.cpu())
    states = torch.cat([*states, xt_next.cpu()])
    chosen = torch.linspace(0, len(states) - 1, min(count, len(states))).round().long()
    return states[chosen].clamp(-1, 1)


def to_grid(images: Tensor, columns: int = GRID_COLUMNS) -> Image.Image:
    """Put pictures (B, 3, H, W) in [-1, 1] on one sheet, as torchvision's `make_grid` does.

    A single picture gets a border as well, which `make_grid` would leave out.
    """
    tiles = F.pad(images.cpu(), (0, _BORDER, 0, _BORDER), value=1.0)
    sheet = make_grid(tiles, nrow=columns, padding=0, pad_value=1.0)
    return to_pil(F.pad(sheet, (_BORDER, 0, _BORDER, 0), value=1.0)[None])[0]


def _drop_earlier(output: Path, count: int) -> None:
    """Remove the pictures beyond `count` that an earlier, longer call wrote."""
    written = output / "samples.json"
    if written.exists():
        for index in range(count, len(read_json(written).get("conditions", []))):
            (output / f"{index}.png").unlink(missing_ok=True)


def _write_whole(output: Path, pictures: dict[str, Image.Image], summary: dict) -> None:
    """Write PNGs by name, and samples.json, into a folder: all of it or nothing."""
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output, prefix=".samples-") as temporary:
        folder = Path(temporary)
        for name, picture in pictures.items():
            picture.save(folder / f"{name}.png")
        text = json.dumps(summary, indent=2) + "\n"
        (folder / "samples.json").write_text(text, encoding="utf-8")
        _drop_earlier(output, len(summary["conditions"]))
        for file in folder.iterdir():
            os.replace(file, output / file.name)
