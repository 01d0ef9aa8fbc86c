"""Packs: the pictures of many scenes in one file, an AVIF strip of three for each scene."""

import io
import os
import re
import zipfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from lab7.files import write_atomically

IMAGE_SIZE = 64  # pixels a side
STEPS = 3  # pictures of a scene: with one, two and three objects
PICTURE_SHAPE = (3, IMAGE_SIZE, IMAGE_SIZE)

_STEP_NAME = re.compile(rf"(.+)_([0-{STEPS - 1}])\.png")
_STRIP_SHAPE = (IMAGE_SIZE, STEPS * IMAGE_SIZE, 3)


def write_pack(
    path: str | Path,
    scenes: Iterable[tuple[str, np.ndarray]],
    quality: int = 90,
    subsampling: str = "4:4:4",
    speed: int = 4,
) -> None:
    """Write scenes as one uncompressed zip of AVIF strips, the three steps from left to right.

    The same scenes give the same bytes with the same version of Pillow. The file appears under
    its name only when it is complete.

    Args:
        path: The zip to write.
        scenes: Pairs of a scene's name ("CLEVR_train_000123") and its pictures, uint8
            (3, 64, 64, 3): step, row, column, RGB.
        quality: Of AVIF, 0 … 100.
        subsampling: Of the color planes; anything but "4:4:4" blurs colors.
        speed: Of the encoder, 0 (smallest file) … 10 (fastest).
    """

    def encode_strip(name: str) -> bytes:
        strip = Image.fromarray(pictures[name].transpose(1, 0, 2, 3).reshape(_STRIP_SHAPE))
        buffer = io.BytesIO()
        strip.save(
            buffer,
            "AVIF",
            quality=quality,
            subsampling=subsampling,
            speed=speed,
            # The default tuning, for the eye, is 0.4 dB worse at the same size.
            advanced={"tune": "ssim"},
            # With several threads the bytes could depend on the machine.
            max_threads=1,
        )
        return buffer.getvalue()

    pictures = dict(scenes)
    names = sorted(pictures)

    def write(file: io.BufferedWriter) -> None:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as pack:
            for name, strip in zip(names, in_threads(encode_strip, names, "packing"), strict=True):
                info = zipfile.ZipInfo(f"{name}.avif", date_time=(1980, 1, 1, 0, 0, 0))
                info.create_system = 3
                info.external_attr = 0o644 << 16
                pack.writestr(info, strip)

    write_atomically(Path(path), write)


def read_pack(path: str | Path) -> tuple[list[str], np.ndarray]:
    """Read every scene of a pack.

    Returns:
        The scenes' names, sorted, and their pictures: (S, 3, 64, 64, 3) uint8 as `write_pack`
        takes them.

    Raises:
        FileNotFoundError: No such file.
        ValueError: The zip or one of its strips is broken.
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
                raise ValueError(f"{path} has no picture {name}")
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


def _open_pack(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} is a broken pack: {error}") from None


def _read_strip(pack: zipfile.ZipFile, scene: str) -> np.ndarray:
    """Decode one scene: (3, 3, 64, 64) uint8, step and then channel first."""
    try:
        with Image.open(io.BytesIO(pack.read(f"{scene}.avif")), formats=["AVIF"]) as image:
            strip = np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{pack.filename} is broken at {scene}.avif: {error}") from None
    if strip.shape != _STRIP_SHAPE:
        raise ValueError(
            f"{pack.filename}: {scene}.avif is {strip.shape[1]}×{strip.shape[0]}, not "
            f"{_STRIP_SHAPE[1]}×{_STRIP_SHAPE[0]}"
        )
    return strip.reshape(IMAGE_SIZE, STEPS, IMAGE_SIZE, 3).transpose(1, 3, 0, 2)
