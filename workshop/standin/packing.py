"""Packs: the pictures of many scenes in one file, an AVIF strip of three for each scene."""

import io
import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from lab7.dataset import (
    PICTURE_SHAPE,
    STEPS,
    STRIP_SHAPE,
    decode_pack,
    in_threads,
    open_pack,
)
from lab7.files import write_atomically


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
        strip = Image.fromarray(pictures[name].transpose(1, 0, 2, 3).reshape(STRIP_SHAPE))
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
        The scenes' names, sorted, and their pictures: (S, 3, 64, 64, 3) uint8: scene, step,
        row, column, RGB.

    Raises:
        MissingFileError: No such file.
        UserError: The zip or one of its strips is broken.
    """
    with open_pack(Path(path)) as pack:
        scenes = sorted(name.removesuffix(".avif") for name in pack.namelist())
    names = [f"{scene}_{step}.png" for scene in scenes for step in range(STEPS)]
    pictures = decode_pack(Path(path), names).reshape(len(scenes), STEPS, *PICTURE_SHAPE)
    return scenes, pictures.transpose(0, 1, 3, 4, 2)
