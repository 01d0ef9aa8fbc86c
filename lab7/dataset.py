"""The pictures of i-CLEVR with their conditions: the embedded set or the course's own folder.

The embedded set keeps its pictures in one file, the pack `pictures.zip`: an AVIF strip for each
scene, its three steps from left to right. The course has one PNG per picture, in folders that
`lab7.layouts` finds. Either is decoded once into the user's cache, which later runs map into memory
instead of reading the pictures.
"""

import hashlib
import io
import itertools
import os
import re
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from lab7.cache import cached
from lab7.errors import UserError, unknown, user_files
from lab7.files import read_json
from lab7.labels import LABELS, encode, load_conditions, load_objects, parse_labels
from lab7.layouts import DATA_DIR, Root, find_layout
from lab7.weight_files import explain_file

IMAGE_SIZE = 64  # pixels a side
STEPS = 3  # pictures of a scene: with one, two and three objects
PICTURE_SHAPE = (3, IMAGE_SIZE, IMAGE_SIZE)
STRIP_SHAPE = (IMAGE_SIZE, STEPS * IMAGE_SIZE, 3)  # of a scene in a pack
SCORED = ("test", "new_test")  # the condition files that the course scores
CONDITION_FILES = (*SCORED, "valid", "unseen", "four_five")
NUM_UNSEEN = 136  # triples in unseen: as many as the course's train.json leaves out

_STEP_NAME = re.compile(rf"(.+)_([0-{STEPS - 1}])\.png")
_COURSE_SIZE = (320, 240)
# Part of every cache key: to be raised when decoding changes, so that old caches are left alone.
_CACHE_FORMAT = b"lab7 pictures 2"


def to_float(images: torch.Tensor) -> torch.Tensor:
    """Map uint8 pictures 0 … 255 to float32 in [-1, 1]."""
    return images.to(torch.float32) / 127.5 - 1.0


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Map float pictures in [-1, 1] to uint8 0 … 255, rounding and clipping what lies outside."""
    return ((images.to(torch.float32) + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)


def picture_batches(
    images: torch.Tensor, batch_size: int, device: torch.device
) -> Iterator[torch.Tensor]:
    """Yield pictures (B, 3, 64, 64), uint8 or in [-1, 1], batch by batch as float32 on a device.

    Raises:
        UserError: Pictures of another shape.
    """
    if images.shape[1:] != PICTURE_SHAPE:
        wanted = f"(B, {', '.join(map(str, PICTURE_SHAPE))})"
        raise UserError(f"pictures must be {wanted}, not {tuple(images.shape)}")
    for batch in images.split(batch_size) if len(images) else ():
        batch = batch.to(device)
        yield to_float(batch) if batch.dtype == torch.uint8 else batch.float()


def squeeze(image: Image.Image) -> np.ndarray:
    """Return a picture of any size as (3, 64, 64) uint8, the way the course's pipeline does.

    That is what torchvision's Resize((64, 64)) does to a PIL image: bilinear, antialiased. Alpha is
    dropped.
    """
    small = image.convert("RGB").resize((IMAGE_SIZE,) * 2, Image.Resampling.BILINEAR)
    return np.asarray(small).transpose(2, 0, 1)


def data_hash(images: torch.Tensor, conditions: torch.Tensor) -> str:
    """Return a SHA-256 of pictures (N, 3, 64, 64) uint8 and their conditions (N, 24)."""
    digest = hashlib.sha256()
    for part in (images, conditions):
        digest.update(part.cpu().contiguous().numpy())
    return digest.hexdigest()


def named_conditions(name: str, root: Root = None) -> list[tuple[str, ...]]:
    """Return the conditions that go by a name in a data folder.

    The course's folder has test.json and new_test.json only. There `unseen` is drawn from the
    triples that its train.json does not show. `four_five` and `valid` are the embedded set's,
    `valid` without what test, new_test and unseen hold.

    Args:
        name: One of `CONDITION_FILES`, or of a file `<name>.json` in the folder.
        root: Data folder, see `find_layout`.

    Raises:
        MissingFileError: A file is missing.
        UserError: A file is no list of conditions, or there is none of that name.
    """
    layout = find_layout(root)
    path = layout.labels / f"{name}.json"
    if path.exists() or name in SCORED:
        return load_conditions(path)
    if name == "unseen":
        return _unseen_triples(layout.labels)
    if name not in CONDITION_FILES:
        allowed = f"Give a file, or one of {', '.join(CONDITION_FILES)}"
        raise unknown("condition file", name, CONDITION_FILES, allowed)
    conditions = load_conditions(DATA_DIR / path.name)
    if name == "valid":
        others = [named_conditions(other, layout) for other in (*SCORED, "unseen")]
        taken = {frozenset(labels) for labels in itertools.chain(*others)}
        conditions = [labels for labels in conditions if frozenset(labels) not in taken]
    return conditions


class ICLEVRDataset(torch.utils.data.Dataset):
    """All pictures of one split as one uint8 tensor, and their conditions.

    Rows stand in the order of the file names, that is by scene and then by step.

    Args:
        root: Data folder, see `find_layout`. The course's has PNGs of 320×240 (or 64×64); one with
            `pictures.zip` is an embedded set.
        split: `<split>.json` maps picture names to labels. The course has "train".
        pictures: Folder of the course's PNGs if they lie elsewhere, see `find_layout`.
        rescan: Whether to read all pictures anew. Otherwise those in the cache are taken as long as
            their folder keeps its time of change and its number of files.

    Attributes:
        images: (N, 3, 64, 64) uint8, mapped from the cache: changes stay in this process.
        conditions: (N, 24) float32 multi-hot.
        names: N file names such as "CLEVR_train_000123_0.png".
        labels: N tuples of labels in the order in which the objects were added.
        course: Whether the pictures are the course's.

    Raises:
        MissingFileError: The folder or the split's file does not exist.
        UserError: Files are missing, see `find_layout`; a label or picture is wrong or missing, or
            the pack is broken; the message names it.
    """

    def __init__(
        self,
        root: Root = None,
        split: str = "train",
        pictures: str | Path | None = None,
        rescan: bool = False,
    ):
        layout = find_layout(root, pictures)
        if layout.course and layout is not root:
            print(layout.summary)
        self.course = layout.course
        load_objects(layout.labels / "objects.json")
        labels = _load_labels(layout.labels / f"{split}.json")
        if layout.pictures is None:
            raise UserError(
                f"the pictures for {layout.labels / split}.json are neither in the folder that was "
                "named, two levels below nor beside it: name theirs by --pictures or LAB7_PICTURES"
            )
        self.names = list(labels)
        self.labels = list(labels.values())
        self.conditions = encode(self.labels)
        self.images = _load_pictures(layout.pictures, self.names, rescan)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a picture, (3, 64, 64) float32 in [-1, 1], and its condition, (24,) float32."""
        return to_float(self.images[index]), self.conditions[index]


def decode_pack(path: Path, names: Sequence[str]) -> np.ndarray:
    """Read pictures "<scene>_<step>.png" out of a pack into (N, 3, 64, 64) uint8."""
    with open_pack(path) as pack:
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


def in_threads(
    function: Callable, items: Sequence, description: str, always_show: bool = False
) -> Iterator:
    """Yield function(item) in order, computed by a few threads, with a bar if it is long work.

    The bar is for terminals, unless `always_show`: a committed notebook that happens to fill the
    cache must not differ from one that finds it filled.
    """
    disable = len(items) < 500 or (False if always_show else None)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        results = pool.map(function, items)
        yield from tqdm(results, description, len(items), disable=disable, leave=False)


def _unseen_triples(root: Path) -> list[tuple[str, ...]]:
    """Draw up to `NUM_UNSEEN` triples that train.json does not show, always the same."""
    shown = {frozenset(labels) for labels in _load_labels(root / "train.json").values()}
    unseen = [t for t in itertools.combinations(LABELS, 3) if frozenset(t) not in shown]
    drawn = np.random.default_rng(0).permutation(len(unseen))[:NUM_UNSEEN]
    return [unseen[i] for i in sorted(drawn)]


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


def _load_pictures(source: Path, names: list[str], rescan: bool) -> torch.Tensor:
    """Return the pictures (N, 3, 64, 64) uint8 of a folder or pack, from the cache if it can."""
    with user_files():
        if source.is_dir():  # to ask after each file would take a minute on a network drive
            state = f"{source.resolve()} {source.stat().st_mtime_ns} {len(os.listdir(source))}"
            decode, content = _decode_folder, state.encode()
        else:
            decode, content = decode_pack, source.read_bytes()
    key = hashlib.sha256(b"\n".join([_CACHE_FORMAT, "\n".join(names).encode(), content]))
    name = f"pictures-{key.hexdigest()[:32]}"
    return torch.from_numpy(cached(name, lambda: decode(source, names), rescan))


def _decode_folder(folder: Path, names: Sequence[str]) -> np.ndarray:
    """Read PNGs into (N, 3, 64, 64) uint8."""
    missing = sorted(set(names).difference(os.listdir(folder)))
    if missing:
        raise UserError(
            f"{folder} lacks {len(missing):,} of {len(names):,} pictures, first of all "
            f"{missing[0]}: unpack iclevr.zip again"
        )
    images = np.empty((len(names), *PICTURE_SHAPE), np.uint8)
    paths = [folder / name for name in names]
    pictures = in_threads(_read_png, paths, "reading pictures", always_show=True)
    for row, picture in enumerate(pictures):
        images[row] = picture
    return images


def _read_png(path: Path) -> np.ndarray:
    """Read one picture of the course into (3, 64, 64) uint8, see `squeeze`."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            size, mode = image.size, image.mode
            allowed = size in (_COURSE_SIZE, (IMAGE_SIZE,) * 2) and mode in ("RGB", "RGBA")
            picture = squeeze(image) if allowed else None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        what = explain_file(path) or f"is no complete PNG picture: {error}"
        raise UserError(f"{path} {what}") from None
    if not allowed:
        raise UserError(
            f"{path} is {size[0]}×{size[1]} {mode}: pictures are 320×240 or 64×64, RGB or RGBA"
        )
    return picture


def open_pack(path: Path) -> zipfile.ZipFile:
    """Open a pack.

    Raises:
        MissingFileError: No such file.
        UserError: It is no zip.
    """
    try:
        with user_files():
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
