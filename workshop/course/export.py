"""The stand-in as a folder in the course's layout and format, for other code of this lab."""

import json
import os
import tempfile
from pathlib import Path

import torch
from PIL import Image

from lab7.dataset import ICLEVRDataset, in_threads
from lab7.errors import UserError, user_files
from lab7.evaluator import WEIGHTS, Evaluator
from lab7.files import read_json, require_writable, user_path
from lab7.layouts import DATA_DIR

JSON_FILES = ("objects", "train", "test", "new_test")
README = """\
A stand-in for the course's i-CLEVR, in its layout and format, written by `python -m lab7 export`.
It is not the course's data, and none of the course's files is in it:

iclevr/          {pictures} pictures of 64x64, rendered with Mitsuba 3 for the project lab7
                 in the manner of CLEVR (Johnson et al. 2017) and i-CLEVR (El-Nouby et al. 2019)
train.json       the labels of these pictures
test.json        conditions of the project's own, as many and of the same kind as the course's;
new_test.json    likewise
objects.json     the 24 labels and their indices, as in the course
checkpoint.pth   the project's own evaluator under the key "model": a ResNet-18 of the course's form

Scores on this folder are therefore not the course's: say so wherever they stand beside such.
The pictures and label files are dedicated to the public domain (CC0 1.0); the weights come under
the project's MIT licence.
"""


def export(folder: Path) -> None:
    """Write the stand-in in the course's layout and format.

    Args:
        folder: Folder to write: a new or an empty one. It appears once all of it is written.
    """
    folder = user_path(folder).absolute()
    require_writable(folder.parent)
    with user_files():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"{folder} is not an empty folder: choose a new one")
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as made:
            whole = Path(made) / folder.name
            count = _write(whole)
            if folder.exists():
                folder.rmdir()  # not every system renames onto an empty folder
            os.replace(whole, folder)
    print(f"saved {folder}: {count:,} pictures of the stand-in, its conditions and its evaluator")


def _write(folder: Path) -> int:
    """Write all files, and return the number of pictures."""
    dataset = ICLEVRDataset(DATA_DIR)
    (folder / "iclevr").mkdir(parents=True)

    def save(row: int) -> None:
        picture = Image.fromarray(dataset.images[row].permute(1, 2, 0).numpy())
        picture.save(folder / "iclevr" / dataset.names[row])

    for _ in in_threads(save, range(len(dataset)), "writing pictures"):
        pass
    for name in JSON_FILES:
        text = json.dumps(read_json(DATA_DIR / f"{name}.json"))
        (folder / f"{name}.json").write_text(text, encoding="utf-8")
    evaluator = Evaluator.load(WEIGHTS, "cpu")
    torch.save({"model": evaluator.network.state_dict()}, folder / "checkpoint.pth")
    (folder / "README.txt").write_text(README.format(pictures=f"{len(dataset):,}"), "utf-8")
    return len(dataset)
