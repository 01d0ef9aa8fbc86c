"""Where the JSON files, the pictures and the evaluator of a data folder lie.

The course gives two archives, file.zip and iclevr.zip, which people unpack beside each other, into
one folder, or elsewhere. What belongs together is looked for in the folder that is named, then up
to two levels below it, then beside it; of two candidates none is chosen.
"""

import itertools
import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from lab7.errors import UserError
from lab7.files import existing_folder, read_json

ROOT = Path(__file__).resolve().parent.parent  # of the project
DATA_DIR = ROOT / "data"
PACK = "pictures.zip"  # the pictures of an embedded set

_JSON_FILES = ("objects.json", "train.json", "test.json", "new_test.json")
_CHECKPOINT = "checkpoint.pth"
_COURSE_FOLDERS = ("file", "iclevr")  # what its two archives unpack to
_MOST_FOLDERS = 300  # that a search lists


@dataclass(frozen=True)
class Layout:
    """Where a data folder keeps what; functions with an argument `root` take it in its place.

    Attributes:
        labels: Folder of the JSON files.
        pictures: Folder of the training's PNGs, or the pack of an embedded set; None without.
        evaluators: The course's weights: none, one file, or several of which one is to be named.
        course: Whether the files are the course's, not an embedded set's.
        summary: One line that says what was found.
    """

    labels: Path
    pictures: Path | None
    evaluators: list[Path]
    course: bool
    summary: str


Root = str | Path | Layout | None


def find_layout(root: Root = None, pictures: str | Path | None = None) -> Layout:
    """Find the files of the course, or those of an embedded set.

    Args:
        root: Folder in, below or beside which they lie. None takes `LAB7_DATA`, else `pictures`,
            else the embedded set. A layout is returned as it is.
        pictures: Folder in or below which the PNGs lie. None takes `LAB7_PICTURES`, else `root`.

    Raises:
        MissingFileError: There is no such folder.
        UserError: There are no JSON files, two folders of them, or two of pictures.
    """
    if isinstance(root, Layout):
        return root
    elsewhere = pictures or os.environ.get("LAB7_PICTURES")
    root = existing_folder(root or os.environ.get("LAB7_DATA") or elsewhere or DATA_DIR)
    labels = _find_labels(root)
    pack, course = labels / PACK, not os.path.isfile(labels / PACK)
    if pictures and not course:
        raise UserError(f"{labels} has pictures of its own, in {PACK}: leave {pictures} out")
    found, count = _find_pictures(root, labels, elsewhere) if course else (pack, PACK)
    evaluators = _find_evaluators(root, labels)
    judge = " or ".join(map(str, evaluators)) or "of this project"
    summary = f"JSON files in {labels}; {count}; evaluator {judge}"
    return Layout(labels, found, evaluators, course, summary)


def tree(root: Path, depth: int) -> Iterator[tuple[Path, set[str]]]:
    """Yield a folder and those up to `depth` levels below it, with the names in each.

    The nearest come first. Hidden folders and those that may not be read are left out; of a home
    directory, or the whole of a disk, only the course's own two are entered.
    """
    home, todo = Path(os.path.expanduser("~")).resolve(), [(root, depth)]
    for folder, left in itertools.islice(todo, _MOST_FOLDERS):  # it grows on the way
        try:
            entries = list(os.scandir(folder))
        except OSError:
            continue
        yield folder, {entry.name for entry in entries}
        whole = folder.resolve() in (home, *home.parents, Path(folder.resolve().anchor))
        below = sorted(entry.name for entry in entries if left and _may_enter(entry))
        own = [name for name in below if name in _COURSE_FOLDERS]
        todo += [(folder / name, left - 1) for name in dict.fromkeys(own if whole else own + below)]


def only(found: Collection[Path], what: str, setting: str) -> Path | None:
    """Return what was found, or None; refuse to choose where it is more than one."""
    if len(found) > 1:
        places = " and ".join(sorted(map(str, found)))
        raise UserError(f"{what} are found more than once, {places}: name one by {setting}")
    return next(iter(found), None)


def _may_enter(entry: os.DirEntry) -> bool:
    # What is named as a picture is not asked: on a network drive that takes its time.
    hidden = entry.name.startswith((".", "__"))
    return not hidden and not entry.name.endswith(".png") and os.path.isdir(entry)


def _nearest(root: Path, holds, beside: bool = True) -> dict[Path, set[str]]:
    """Return the folders for which `holds(folder, names)`: the root, or those below, or beside."""
    stages = [tree(root, 0), tree(root, 2)]
    if beside:  # the root, or what it is a link to
        places = dict.fromkeys([Path(os.path.abspath(root)).parent, root.resolve().parent])
        stages += [tree(place, 2) for place in places]
    for stage in stages:
        found = [(place, names) for place, names in stage if holds(place, names)]
        if found:  # two ways to one folder, by links, leave nothing to choose: the nearer is taken
            return dict({place.resolve(): (place, names) for place, names in found[::-1]}.values())
    return {}


def _find_labels(root: Path) -> Path:
    def holds(folder: Path, names: set[str]) -> bool:
        # An embedded set is taken where it was named, never by chance.
        return len(names.intersection(_JSON_FILES)) > 1 and (folder == root or PACK not in names)

    labels = only(_nearest(root, holds), "JSON files of the course", "--data or LAB7_DATA")
    if labels is None:
        raise UserError(
            f"{root} is no i-CLEVR folder: {', '.join(_JSON_FILES)} are not in, below or beside it "
            "(no home is searched); name the folder that file.zip and iclevr.zip are unpacked to"
        )
    return labels


def _find_pictures(root: Path, labels: Path, elsewhere) -> tuple[Path | None, str]:
    """Return the folder of the pictures, and how many of those in train.json it holds."""
    path = labels / "train.json"
    entries = read_json(path) if os.path.isfile(path) else {}
    wanted = set(entries) if isinstance(entries, dict) else set()
    place = existing_folder(elsewhere) if elsewhere else root
    found = _nearest(place, lambda _, names: not wanted.isdisjoint(names), not elsewhere)
    folder = only(found, "pictures of train.json", "--pictures or LAB7_PICTURES")
    if folder is None and elsewhere and wanted:
        raise UserError(f"{place} holds none of the pictures that {path} names: unpack iclevr.zip")
    count = len(wanted & found.get(folder, set()))
    whole = "" if count == len(wanted) else f" of {len(wanted):,}"
    return folder, f"{count:,}{whole} pictures in {folder}" if folder else "no training pictures"


def _find_evaluators(root: Path, labels: Path) -> list[Path]:
    """Return the course's weights: beside the JSON files, beside evaluator.py, or in the root."""
    beside = os.path.isfile(labels / PACK) or os.path.isfile(labels / _CHECKPOINT)
    both = {_CHECKPOINT, "evaluator.py"}
    folders = [labels] if beside else _nearest(root, lambda _, names: both <= names) or [root]
    return [folder / _CHECKPOINT for folder in folders if os.path.isfile(folder / _CHECKPOINT)]
