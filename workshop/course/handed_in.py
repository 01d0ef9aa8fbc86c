"""Pictures that somebody hands in: numbered files in a folder, or in the zip of a hand-in."""

import contextlib
import itertools
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lab7.dataset import IMAGE_SIZE, SCORED, squeeze, to_float
from lab7.errors import UserError, user_files
from lab7.files import existing_file, user_path
from lab7.layouts import only
from lab7.weight_files import explain_file

_NUMBERED = re.compile(r"(.*?)([0-9]+)\.(png|jpe?g)", re.IGNORECASE)  # 0.png, 00.PNG, test_0.jpg
_ENCODINGS = ("utf-8", "big5", "gbk", "cp437")  # of names in a zip; the last takes any bytes
_MOST_FOLDERS = 300  # that are looked into

Place = Path | zipfile.Path  # a file or folder, on disk or in a zip
Files = dict[str, Place]  # those of a folder, by name


def read_handed_in(
    path: str | Path, counts: Mapping[str, int]
) -> dict[str, tuple[Tensor, list[str]]]:
    """Read the numbered pictures of a hand-in.

    Args:
        path: Folder or zip. Each set of pictures lies in a folder of its name; one set alone may
            also lie in a folder of another name, or in `path` itself.
        counts: How many pictures each set has, by its name, for instance "test".

    Returns:
        By name (N, 3, 64, 64) in [-1, 1], in the order of the numbers; and notes to show: numbers
        that do not begin at 0, a resizing, files that were left aside.

    Raises:
        UserError: There is no such folder or zip; it is not plain which pictures are meant; or one
            is missing, broken, or no square of the size of the others. The message names it.
    """
    with user_files():
        path = user_path(path)
        folders, others = _numbered_folders(path)
        alone = len(counts) == 1
        chosen = {name: _choose(path, folders, name, alone, others) for name in counts}
        return {name: _read(place, folders[place], counts[name]) for name, place in chosen.items()}


def _numbered_folders(path: Path) -> tuple[dict[Place, Files], list[str]]:
    """Return the folders in which pictures bear numbers, the topmost first, and other files."""
    todo, found, others = [path if path.is_dir() else zipfile.Path(_open_zip(path))], {}, []
    for place in itertools.islice(todo, _MOST_FOLDERS):  # it grows on the way
        files = {file.name: file for file in place.iterdir() if not file.name.startswith("._")}
        if any(map(_NUMBERED.fullmatch, files)):
            found[place] = files
        inner = [name for name, file in files.items() if name != "__MACOSX" and file.is_dir()]
        todo += [files[name] for name in inner]
        others += [name for name in files if name not in inner and place not in found]
    return found, others


def _open_zip(path: Path) -> zipfile.ZipFile:
    path = existing_file(path)
    for encoding in _ENCODINGS:
        with contextlib.suppress(UnicodeDecodeError, zipfile.BadZipFile, NotImplementedError):
            archive, names = zipfile.ZipFile(path, metadata_encoding=encoding), set()
            for info in archive.infolist():  # some tools of Windows write backslashes
                info.filename = info.filename.replace("\\", "/").lstrip("/") or "./"
                if info.filename in names and not info.is_dir():
                    raise UserError(f"{path} holds {info.filename} twice: pack it anew")
                names.add(info.filename)
                archive.NameToInfo[info.filename] = info
                if info.flag_bits & 1:
                    raise UserError(f"{path} needs a password: unpack it, and name its folder")
            return archive
    what = explain_file(path).replace("the file in it", "its folder")
    cut = ", perhaps cut off: copy or download it again" if path.suffix.lower() == ".zip" else ""
    raise UserError(f"{path} {what or f'is neither a folder nor a zip of pictures{cut}'}")


def _topmost(places: list[Place]) -> list[Place]:
    """Leave out folders that lie in another of them."""
    starts = [f"{place}".rstrip("/") + "/" for place in places]
    inner = [any(a != b and a.startswith(b) for b in starts) for a in starts]
    return [place for place, lies_in in zip(places, inner, strict=True) if not lies_in]


def _choose(
    path: Path, folders: dict[Place, Files], name: str, alone: bool, unnumbered: list[str]
) -> Place:
    """Return the folder named as a set, or where there is just this set the topmost one."""
    named = {place: re.sub("[- ]", "_", place.name.lower()) for place in folders}
    exact = [place for place in folders if named[place] == name.removeprefix("file-")]
    others = SCORED if name in SCORED else ()  # the one's pictures are not the other's
    rest = [place for place in folders if alone and named[place] not in others]
    place = only(_topmost(exact or rest), "numbered pictures", "--images")
    if place is None:
        wanted = f"{name}/0.png, {name}/1.png, …" if name in SCORED else "0.png, 1.png, …"
        step = "say by --conditions what its pictures show" if folders else "number them so"
        if unnumbered and not folders:
            step += f": PNG or JPEG files; there are {', '.join(sorted(unnumbered)[:3])}"
        raise UserError(f"{path} holds no {wanted}: {step}")
    return place


def _read(place: Place, files: Files, count: int) -> tuple[Tensor, list[str]]:
    names, notes = _in_order(place, files, count)
    images = [_decode(files[name]) for name in names]
    sizes = [image.size for image in images]
    width, height = usual = max(sizes, key=sizes.count)
    for name, size in zip(names, sizes, strict=True):
        if size != usual or width != height:
            most = f", where most are {width}×{height}" if size != usual else ""
            raise UserError(
                f"{files[name]} is {size[0]}×{size[1]}{most}: wanted are squares of one size, and "
                "no grid among them"
            )
    if width != IMAGE_SIZE:
        notes.append(f"resized from {width}×{height} to {IMAGE_SIZE}×{IMAGE_SIZE}")
    pictures = np.stack([squeeze(image) for image in images])
    return to_float(torch.from_numpy(pictures)), notes


def _in_order(place: Place, files: Files, count: int) -> tuple[list[str], list[str]]:
    """Return the names of the pictures 0, 1, … or 1, 2, …, and notes on what else is the case."""
    matches = [match for match in map(_NUMBERED.fullmatch, files) if match]
    matches.sort(key=lambda match: (int(match[2]), match[0]))
    for a, b in itertools.pairwise(matches):
        if a[1] != b[1] or int(a[2]) == int(b[2]):
            raise UserError(f"{place} holds two numberings, to which {a[0]} and {b[0]} belong")
    numbers = [int(match[2]) for match in matches]
    first = min(numbers[0], 1)
    odd = sorted(set(numbers) ^ set(range(first, first + count)))
    if odd:
        what = f"{'has' if odd[0] in numbers else 'lacks'} {matches[0][1]}{odd[0]}.png"
        wanted = f"{count} pictures, {first} … {first + count - 1}, one for each condition"
        raise UserError(f"{place} {what}: wanted are {wanted}; there are {len(numbers)}")
    names = [match[0] for match in matches]
    aside = ", ".join(sorted(files.keys() - set(names)))
    notes = [f"left aside, without a number: {aside}"] if aside else []
    return names, notes + ["numbered from 1"] * first


def _decode(file: Place) -> Image.Image:
    """Read a picture of any mode as RGB."""
    try:
        with file.open("rb") as content, Image.open(content, formats=["PNG", "JPEG"]) as image:
            if image.mode.startswith("I"):  # 16 bits, which Pillow would clip
                image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
            return image.convert("RGBA" if image.mode == "P" else "RGB").convert("RGB")
    except Exception:  # a broken file makes Pillow and zipfile raise almost anything
        what = explain_file(file) if isinstance(file, Path) else ""
        found = f": it {what}" if what else ""
        raise UserError(f"{file} is no complete PNG or JPEG picture{found}") from None
