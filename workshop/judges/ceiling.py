"""The ceiling of every score: what the judges say of renders of the conditions themselves."""

import multiprocessing
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from lab7.auditor import Auditor
from lab7.dataset import SCORED, STEPS, ICLEVRDataset, decode_pack, to_float
from lab7.evaluator import Evaluator
from lab7.files import require_writable, write_atomically
from lab7.records import RESULTS_DIR
from lab7.sampling import to_grid
from lab7.scoring import Conditions, judge_pictures
from workshop.judges.fidelity import RealPictures, describe
from workshop.records import write_record
from workshop.standin.packing import write_pack
from workshop.standin.scenes import ScenePlan, render_scene


def record_ceiling(
    sets: Mapping[str, Conditions],
    evaluator: Evaluator,
    auditor: Auditor,
    dataset: ICLEVRDataset,
    repetitions: int = 8,
    workers: int | None = None,
    run_name: str = "ceiling",
    results_root: str | Path = RESULTS_DIR,
) -> dict[str, Any]:
    """Render every condition several times, have the pictures judged, and write a record.

    As that of a generator, the record gets the grids of `test` and `new_test`, first repetition.

    Args:
        sets: Conditions, by the name of their set.
        evaluator: The course's or this project's.
        auditor: The other judge.
        dataset: The generator's training pictures, which the distances are to.
        repetitions: Pictures of each condition.
        workers: Processes that render; None takes one for each processor.
        run_name: Name of the record, see `write_record`.
        results_root: Folder of the records.

    Returns:
        By set, what `describe` returned, as of a generator's pictures.
    """
    require_writable(Path(results_root) / run_name)
    real = RealPictures(auditor, dataset)
    found, sheets = {}, {}
    for name, conditions in sets.items():
        images = render_conditions(name, conditions, repetitions, workers)
        judged = judge_pictures(images, conditions, evaluator, auditor)
        found[name] = {"repetitions": repetitions} | describe(judged, images, real)
        if name in SCORED:
            sheets[name] = to_grid(to_float(images[: len(conditions)]))
    config = {"repetitions": repetitions}
    folder = write_record(run_name, config, found, results_root, weights=evaluator.path)
    for name, sheet in sheets.items():
        write_atomically(folder / f"{name}.png", partial(sheet.save, format="PNG"))
    return found


def render_conditions(
    name: str, conditions: Conditions, repetitions: int, workers: int | None = None
) -> Tensor:
    """Render scenes that training has not, compressed as its pictures are.

    Args:
        name: Of the set: the same name, the same scenes.
        conditions: N lists of labels.
        repetitions: R pictures of each.
        workers: Processes; None takes one for each processor.

    Returns:
        (R·N, 3, 64, 64) uint8, repetition by repetition.
    """
    plans = [
        ScenePlan(f"CLEVR_ceiling_{name}_{repetition}_{number:03d}", tuple(labels), (len(labels),))
        for repetition in range(repetitions)
        for number, labels in enumerate(conditions)
    ]
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        drawn = pool.imap(render_scene, plans, chunksize=4)
        progress = tqdm(drawn, f"rendering {name}", len(plans), disable=None)
        return compress([pictures[0] for pictures, _ in progress])


def compress(pictures: Sequence[np.ndarray]) -> Tensor:
    """Return B pictures (64, 64, 3) uint8 as they come out of a pack, (B, 3, 64, 64)."""
    filled = [*pictures, *pictures[-1:] * (-len(pictures) % STEPS)]  # a strip holds three
    strips = {f"{i:06d}": np.stack(filled[i : i + STEPS]) for i in range(0, len(filled), STEPS)}
    names = [f"{strip}_{step}.png" for strip in strips for step in range(STEPS)]
    with tempfile.TemporaryDirectory() as folder:
        pack = Path(folder) / "pictures.zip"
        write_pack(pack, strips.items())
        return torch.from_numpy(decode_pack(pack, names[: len(pictures)]))
