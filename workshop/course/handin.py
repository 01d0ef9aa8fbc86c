"""The zip that the course wants handed in: report, source, and the pictures of both files."""

import io
import json
import re
import tempfile
import zipfile
from pathlib import Path

from PIL import Image

from lab7.dataset import DATA_DIR, IMAGE_SIZE, SCORED, named_conditions
from lab7.errors import UserError
from lab7.evaluator import Evaluator
from lab7.files import require_writable, write_atomically
from lab7.pipeline import ConditionalDDPMPipeline
from lab7.records import file_hash, read_record
from lab7.sampling import write_samples
from report.build import build

SOURCE = (
    "lab7/*.*", "workshop/**/*.py", "notebooks/*.ipynb", "notebooks/*.py", "notebooks/*.png",
    "report/*.py", "report/report.typ", "report/references.yml", "tests/*.py", "Makefile",
    "README.md", "LICENSE", "pyproject.toml", "requirements*.txt",
)  # fmt: skip
LEAST_FRAMES = 8  # pictures in the denoising row, at least

_WORD = re.compile(r"[\w-]+")


def make_handin(
    student_id: str,
    name: str,
    pipeline: ConditionalDDPMPipeline,
    evaluator: Evaluator,
    *,
    output: Path,
    checkpoint: Path,
    results: Path,
    data: Path | None = None,
    seed: int = 0,
) -> tuple[Path, list[str]]:
    """Draw the pictures, build the report, pack both with the source, and check the whole.

    Args:
        student_id: Letters, digits, `-` and `_`, as `name`.
        name: See `student_id`.
        pipeline: The generator, loaded from `checkpoint`.
        evaluator: The judge of the pictures.
        output: Folder of the zip.
        checkpoint: Folder whose weights the record "ours" must be of.
        results: Folder of the records.
        data: Data folder, see `lab7.dataset.resolve_root`.
        seed: Of the first picture of each file.

    Returns:
        The path of LAB7_ID_NAME.zip, and what is in it, see `check_handin`.

    Raises:
        UserError: An ID or a name with other characters, a record of other weights, or a zip that
            would not be what the course wants, which is then not written.
    """
    for what, word in (("ID", student_id), ("name", name)):
        if not _WORD.fullmatch(word):
            raise UserError(
                f"{what} {word!r}: give letters, digits, '-' or '_', as in "
                "make handin ID=123456 NAME=Ada_Lovelace"
            )
    require_writable(output)
    record = read_record("ours", results)
    if record.environment.get("weights_sha256") != file_hash(checkpoint):
        raise UserError(
            f"the record 'ours' in {results} is of other weights than {checkpoint}: run "
            f"python -m lab7 evaluate --checkpoint {checkpoint} --record ours --results {results}"
        )
    title = f"LAB7_{student_id}_{name}"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        records_of = data if record.get("course.pictures") else None
        build(folder, results, records_of, f"{student_id} {name.replace('_', ' ')}")
        files = {"report.pdf": folder / "report.pdf"}
        for key in SCORED:
            drawn = folder / "images" / key
            drawn.parent.mkdir(exist_ok=True)
            conditions = named_conditions(key, data)
            write_samples(pipeline, conditions, drawn, seed, evaluator=evaluator)
            files |= {f"images/{key}/{file.name}": file for file in sorted(drawn.iterdir())}
        root = DATA_DIR.parent
        source = sorted(file for pattern in SOURCE for file in root.glob(pattern))
        files |= {f"source/{file.relative_to(root).as_posix()}": file for file in source}

        with zipfile.ZipFile(folder / "all.zip", "w", zipfile.ZIP_DEFLATED) as pack:
            for inside, file in files.items():
                pack.write(file, f"{title}/{inside}")
        lines = check_handin(folder / "all.zip", data)
        write_atomically(output / f"{title}.zip", (folder / "all.zip").read_bytes())
    return output / f"{title}.zip", lines


def check_handin(path: Path, data: Path | None = None) -> list[str]:
    """Check a zip against the course's list.

    Args:
        path: The zip.
        data: Data folder whose test.json and new_test.json the pictures are for.

    Returns:
        What is there, a line each.

    Raises:
        UserError: Something is missing or wrong; the message names all of it.
    """
    lines, wrong = [], []
    with zipfile.ZipFile(path) as pack:
        inside = {name.split("/", 1)[1]: pack.read(name) for name in pack.namelist()}
    if inside.get("report.pdf", b"").startswith(b"%PDF-"):
        lines.append(f"report.pdf        {len(inside['report.pdf']) / 1e6:.1f} MB")
    else:
        wrong.append("report.pdf")
    for key in SCORED:
        folder, count = f"images/{key}", len(named_conditions(key, data))
        found = {name for name in inside if re.fullmatch(rf"{folder}/\d+\.png", name)}
        wanted = {f"{folder}/{i}.png" for i in range(count)}
        wrong += sorted(found ^ wanted)
        sizes = {name: _size(inside[name]) for name in found & wanted}
        wrong += [name for name, size in sizes.items() if size != (IMAGE_SIZE, IMAGE_SIZE)]
        if _size(inside.get(f"{folder}/grid.png")) is None:
            wrong.append(f"{folder}/grid.png")
        width, _ = _size(inside.get(f"{folder}/denoising.png")) or (0, 0)
        if width < LEAST_FRAMES * IMAGE_SIZE:
            wrong.append(f"{folder}/denoising.png")
        try:
            accuracy = json.loads(inside[f"{folder}/samples.json"])["scores"]["top_k"]["value"]
            lines.append(f"{folder:17s} {count} pictures, a grid, accuracy {accuracy:.4f}")
        except (KeyError, ValueError):
            wrong.append(f"{folder}/samples.json")
    code = [name for name in inside if name.startswith("source/")]
    lines.append(f"source            {len(code)} files")
    if "source/lab7/training.py" not in inside:
        wrong.append("source/lab7")
    if wrong:
        raise UserError(f"the hand-in lacks, or has wrong: {', '.join(wrong)}")
    return lines


def _size(content: bytes | None) -> tuple[int, int] | None:
    """Return the width and height of a picture, None where there is none."""
    try:
        with Image.open(io.BytesIO(content or b""), formats=["PNG"]) as picture:
            picture.load()
            return picture.size
    except (OSError, SyntaxError):
        return None
