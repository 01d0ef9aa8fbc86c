"""The pictures of i-CLEVR with their conditions: the embedded set or the course's own folder.

The embedded set keeps its pictures in one file, the pack `pictures.zip`: an AVIF strip for each
scene, its three steps from left to right. The course's folder has one PNG per picture in `iclevr/`.
Either is decoded once into a file of raw bytes in the user's cache, which later runs map into
memory instead of reading it.
"""

import hashlib
import io
import itertools
import os
import re
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import platformdirs
import torch
from PIL import Image
from tqdm import tqdm

from lab7.errors import MissingFileError, UserError
from lab7.files import read_json, write_atomically
from lab7.labels import LABELS, encode, load_conditions, load_objects, parse_labels

IMAGE_SIZE = 64  # pixels a side
STEPS = 3  # pictures of a scene: with one, two and three objects
PICTURE_SHAPE = (3, IMAGE_SIZE, IMAGE_SIZE)
STRIP_SHAPE = (IMAGE_SIZE, STEPS * IMAGE_SIZE, 3)  # of a scene in a pack
DATA_DIR = Path(__file__).resolve().parent.parent / "data"
SCORED = ("test", "new_test")  # the condition files that the course scores
CONDITION_FILES = (*SCORED, "valid", "unseen", "four_five")
NUM_UNSEEN = 136  # triples in unseen: as many as the course's train.json leaves out

_NUMBERED = re.compile(r"(0|[1-9][0-9]*)\.png")
_STEP_NAME = re.compile(rf"(.+)_([0-{STEPS - 1}])\.png")
_COURSE_SIZE = (320, 240)
# Part of every cache key: to be raised when decoding changes, so that old caches are left alone.
_CACHE_FORMAT = b"lab7 pictures 1"


def to_float(images: torch.Tensor) -> torch.Tensor:
    """Map uint8 pictures 0 … 255 to float32 in [-1, 1]."""
    return images.to(torch.float32) / 127.5 - 1.0


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Map float pictures in [-1, 1] to uint8 0 … 255, rounding and clipping what lies outside."""
    return ((images.to(torch.float32) + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)


def data_hash(images: torch.Tensor, conditions: torch.Tensor) -> str:
    """Return a SHA-256 of pictures (N, 3, 64, 64) uint8 and their conditions (N, 24)."""
    digest = hashlib.sha256()
    for part in (images, conditions):
        digest.update(part.cpu().contiguous().numpy())
    return digest.hexdigest()


def resolve_root(root: str | Path | None = None) -> Path:
    """Return the data folder: the argument, else the one `LAB7_DATA` names, else the embedded set.

    Raises:
        MissingFileError: There is no such folder.
        UserError: It is a file.
    """
    return _existing_folder(root or os.environ.get("LAB7_DATA") or DATA_DIR)


def named_conditions(name: str, root: str | Path | None = None) -> list[tuple[str, ...]]:
    """Return the conditions that go by a name in a data folder.

    The course's folder has test.json and new_test.json only. There `unseen` is drawn from the
    triples that its train.json does not show, and `valid` is the embedded set's without what test,
    new_test and unseen hold.

    Args:
        name: One of `CONDITION_FILES`.
        root: Data folder, see `resolve_root`.

    Raises:
        MissingFileError: A file is missing.
        UserError: A file is no list of conditions.
    """
    root = resolve_root(root)
    path = root / f"{name}.json"
    if path.exists() or name in SCORED:
        return load_conditions(path)
    if name == "unseen":
        return _unseen_triples(root)
    conditions = load_conditions(DATA_DIR / path.name)
    if name == "valid":
        others = [named_conditions(other, root) for other in (*SCORED, "unseen")]
        taken = {frozenset(labels) for labels in itertools.chain(*others)}
        conditions = [labels for labels in conditions if frozenset(labels) not in taken]
    return conditions


def cache_folder() -> Path:
    """Return where things are kept that take long to compute: `LAB7_CACHE`, else the user's."""
    cache = os.environ.get("LAB7_CACHE") or platformdirs.user_cache_dir("lab7", appauthor=False)
    return Path(cache)


def is_course(root: str | Path | None = None) -> bool:
    """Return whether a data folder, see `resolve_root`, holds the course's pictures."""
    return (resolve_root(root) / "iclevr").is_dir()


class ICLEVRDataset(torch.utils.data.Dataset):
    """All pictures of one split as one uint8 tensor, and their conditions.

    Rows stand in the order of the file names, that is by scene and then by step.

    Args:
        root: Data folder, see `resolve_root`. A folder with `iclevr/` is the course's, with PNGs
            of 320×240 (or 64×64); one with `pictures.zip` is an embedded set.
        split: `<split>.json` maps picture names to labels. The course has "train".

    Attributes:
        images: (N, 3, 64, 64) uint8, mapped from the cache: changes stay in this process.
        conditions: (N, 24) float32 multi-hot.
        names: N file names such as "CLEVR_train_000123_0.png".
        labels: N tuples of labels in the order in which the objects were added.
        course: Whether the pictures are the course's.

    Raises:
        MissingFileError: The folder or the split's file does not exist.
        UserError: The folder is not the course's, a label or picture is wrong or missing, or the
            pack is broken; the message names it.
    """

    def __init__(self, root: str | Path | None = None, split: str = "train"):
        root = resolve_root(root)
        _check_folder(root)
        self.course = is_course(root)
        load_objects(root / "objects.json")
        labels = _load_labels(root / f"{split}.json")
        self.names = list(labels)
        self.labels = list(labels.values())
        self.conditions = encode(self.labels)
        self.images = _load_pictures(root, self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a picture, (3, 64, 64) float32 in [-1, 1], and its condition, (24,) float32."""
        return to_float(self.images[index]), self.conditions[index]


def load_images(folder: str | Path, count: int | None = None) -> torch.Tensor:
    """Read the pictures `0.png, 1.png, …` of a folder.

    Args:
        folder: Holds PNGs of 64×64 (or 320×240); files with other names are left alone.
        count: How many there have to be; None takes all.

    Returns:
        (N, 3, 64, 64) uint8, in the order of the numbers.

    Raises:
        MissingFileError: There is no such folder.
        UserError: A picture is missing or unreadable, or there are more than `count`.
    """
    folder = _existing_folder(folder)
    numbers = [int(name[1]) for name in map(_NUMBERED.fullmatch, os.listdir(folder)) if name]
    if not numbers:
        raise UserError(f"{folder} holds no pictures named 0.png, 1.png, …")
    if count is None:
        count = len(numbers)
    elif max(numbers) >= count:
        raise UserError(
            f"{folder} holds {max(numbers)}.png, but just {count} pictures are wanted: "
            f"0.png … {count - 1}.png, one for each condition"
        )
    return torch.from_numpy(_decode_folder(folder, [f"{number}.png" for number in range(count)]))


def read_pack(path: str | Path) -> tuple[list[str], np.ndarray]:
    """Read every scene of a pack.

    Returns:
        The scenes' names, sorted, and their pictures: (S, 3, 64, 64, 3) uint8: scene, step,
        row, column, RGB.

    Raises:
        MissingFileError: No such file.
        UserError: The zip or one of its strips is broken.
    """
    with _open_pack(Path(path)) as pack:
        scenes = sorted(name.removesuffix(".avif") for name in pack.namelist())
    names = [f"{scene}_{step}.png" for scene in scenes for step in range(STEPS)]
    pictures = decode_pack(Path(path), names).reshape(len(scenes), STEPS, *PICTURE_SHAPE)
    return scenes, pictures.transpose(0, 1, 3, 4, 2)


def decode_pack(path: Path, names: Sequence[str]) -> np.ndarray:
    """Read pictures "<scene>_<step>.png" out of a pack into (N, 3, 64, 64) uint8."""
    with _open_pack(path) as pack:
        rows: dict[str, list[tuple[int, int]]] = {}
        for row, name in enumerate(names):
            match = _STEP_NAME.fullmatch(name)
            if not match or f"{match[1]}.avif" not in pack.NameToInfo:
                raise UserError(f"{path} has no picture {name}")
            rows.setdefault(match[1], []).append((row, int(match[2])))
        images = np.empty((len(names), *PICTURE_SHAPE), np.uint8)
        scenes = in_threads(lambda scene: _read_strip(pack, scene), list(rows), "unpacking")
        for pictures, places in zip(scenes, rows.values(), strict=True):
            for row, step in places:
                images[row] = pictures[step]
    return images


def in_threads(function: Callable, items: Sequence, description: str) -> Iterable:
    """Yield function(item) in order, computed by a few threads, with a bar if it is long work."""
    # disable=None shows the bar in a terminal only: a notebook that happens to fill the cache
    # must not differ from one that finds it filled.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        results = pool.map(function, items)
        yield from tqdm(
            results, description, len(items), disable=len(items) < 500 or None, leave=False
        )


def _unseen_triples(root: Path) -> list[tuple[str, ...]]:
    """Draw up to `NUM_UNSEEN` triples that train.json does not show, always the same."""
    shown = {frozenset(labels) for labels in _load_labels(root / "train.json").values()}
    unseen = [t for t in itertools.combinations(LABELS, 3) if frozenset(t) not in shown]
    drawn = np.random.default_rng(0).permutation(len(unseen))[:NUM_UNSEEN]
    return [unseen[i] for i in sorted(drawn)]


def _existing_folder(folder: str | Path) -> Path:
    folder = Path(folder).expanduser()
    if not folder.exists():
        raise MissingFileError(f"no folder {folder}")
    if not folder.is_dir():
        raise UserError(f"{folder} is a file, not a folder")
    return folder


def _check_folder(root: Path) -> None:
    missing = [name for name in ("objects.json", "train.json") if not (root / name).is_file()]
    if not (root / "iclevr").is_dir() and not (root / "pictures.zip").is_file():
        missing.append("iclevr/ (or pictures.zip)")
    if missing:
        parent = root.resolve().parent
        hint = f": did you mean {parent}?" if (parent / "train.json").is_file() else ""
        raise UserError(f"{root} is no i-CLEVR folder, it lacks {', '.join(missing)}{hint}")


def _load_labels(path: Path) -> dict[str, tuple[str, ...]]:
    entries = read_json(path)
    if not isinstance(entries, dict) or not entries:
        raise UserError(f"{path} does not map picture names to labels, as train.json does")
    labels = {}
    for name in sorted(entries):
        try:
            labels[name] = parse_labels(entries[name])
        except ValueError as error:
            raise UserError(f"{path}, picture {name}: {error}") from None
    return labels


def _load_pictures(root: Path, names: list[str]) -> torch.Tensor:
    """Return (N, 3, 64, 64) uint8 pictures, from the cache where it has them."""
    if (root / "iclevr").is_dir():
        source, decode, parts = root / "iclevr", _decode_folder, _describe_folder(root / "iclevr")
    else:
        source, decode = root / "pictures.zip", decode_pack
        parts = [source.read_bytes()]
    key = hashlib.sha256(b"\n".join([_CACHE_FORMAT, "\n".join(names).encode(), *parts]))
    cache = cache_folder()
    path = cache / f"pictures-{key.hexdigest()[:32]}.bin"
    images = _map_cache(path, len(names))
    if images is None:
        images = decode(source, names)
        try:
            write_atomically(path, lambda file: _dump(file, images))
        except OSError as error:
            warnings.warn(
                f"pictures are kept in memory and decoded again next time: no cache in "
                f"{cache} ({error.strerror}); set LAB7_CACHE to a folder",
                stacklevel=3,
            )
    return torch.from_numpy(images)


def _dump(file: io.BufferedWriter, images: np.ndarray) -> None:
    file.write(images)
    file.write(zlib.crc32(images).to_bytes(4, "little"))


def _map_cache(path: Path, count: int) -> np.ndarray | None:
    """Map a cache file copy-on-write, or return None where there is none that is intact."""
    size = count * int(np.prod(PICTURE_SHAPE))
    try:
        if path.stat().st_size != size + 4:
            return None
        content = np.memmap(path, np.uint8, mode="c")
    except OSError:
        return None
    # The source is known by its SHA-256 in the file's name. This check is against damage only, and
    # CRC-32 needs 0.04 s for the whole set where SHA-256 needs 0.15 to 0.7, more than all the rest.
    if zlib.crc32(content[:size]) != int.from_bytes(content[size:].tobytes(), "little"):
        return None
    return content[:size].reshape(count, *PICTURE_SHAPE)


def _describe_folder(folder: Path) -> list[bytes]:
    """Name, size and time of change of every picture: reading them all would take a minute."""
    with os.scandir(folder) as entries:
        files = sorted((entry.name, entry.stat()) for entry in entries)
    return [
        str(folder.resolve()).encode(),
        repr([(name, stat.st_size, stat.st_mtime_ns) for name, stat in files]).encode(),
    ]


def _decode_folder(folder: Path, names: Sequence[str]) -> np.ndarray:
    """Read PNGs into (N, 3, 64, 64) uint8."""
    present = set(os.listdir(folder))
    missing = [name for name in names if name not in present]
    if missing:
        more = f" and {len(missing) - 1} more of {len(names)} pictures" if missing[1:] else ""
        raise UserError(f"{folder} lacks {missing[0]}{more}")
    images = np.empty((len(names), *PICTURE_SHAPE), np.uint8)
    paths = [folder / name for name in names]
    for row, picture in enumerate(in_threads(_read_png, paths, "reading pictures")):
        images[row] = picture.transpose(2, 0, 1)
    return images


def _read_png(path: Path) -> np.ndarray:
    """Read one picture as the course's pipeline does: drop alpha, squeeze to 64×64."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            size, mode = image.size, image.mode
            allowed = size in (_COURSE_SIZE, (IMAGE_SIZE,) * 2) and mode in ("RGB", "RGBA")
            if allowed:
                # What torchvision's Resize((64, 64)) does to a PIL image: bilinear, antialiased.
                small = image.convert("RGB").resize((IMAGE_SIZE,) * 2, Image.Resampling.BILINEAR)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} is no complete PNG picture: {error}") from None
    if not allowed:
        raise UserError(
            f"{path} is {size[0]}×{size[1]} {mode}: pictures are 320×240 or 64×64, RGB or RGBA"
        )
    return np.asarray(small)


def _open_pack(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise UserError(f"{path} is a broken pack: {error}") from None


def _read_strip(pack: zipfile.ZipFile, scene: str) -> np.ndarray:
    """Decode one scene: (3, 3, 64, 64) uint8, step and then channel first."""
    try:
        with Image.open(io.BytesIO(pack.read(f"{scene}.avif")), formats=["AVIF"]) as image:
            strip = np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"{pack.filename} is broken at {scene}.avif: {error}") from None
    if strip.shape != STRIP_SHAPE:
        raise UserError(
            f"{pack.filename}: {scene}.avif is {strip.shape[1]}×{strip.shape[0]}, not "
            f"{STRIP_SHAPE[1]}×{STRIP_SHAPE[0]}"
        )
    return strip.reshape(IMAGE_SIZE, STEPS, IMAGE_SIZE, 3).transpose(1, 3, 0, 2)
