"""The zip that the course wants handed in: report, source, and the pictures of both files."""

import io
import re
import tempfile
import unicodedata
import zipfile
from pathlib import Path

from lab7.dataset import SCORED, named_conditions
from lab7.errors import UserError
from lab7.evaluator import Evaluator
from lab7.files import require_writable, write_atomically
from lab7.layouts import DATA_DIR, find_layout
from lab7.pipeline import ConditionalDDPMPipeline, to_pil
from lab7.records import Record
from lab7.sampling import denoising_frames
from lab7.scoring import draw_and_judge
from report.build import build, needed_records
from report.handin import HandIn
from report.printing import needs_system_fonts
from workshop.course.handin_check import Finding, check_handin
from workshop.course.handouts import Handout
from workshop.records import file_hash

SOURCE = (
    "lab7/*.*", "notebooks/*.png", "workshop/**/*.py", "docs/*.md",
    "notebooks/*.ipynb", "notebooks/*.py",
    "report/**/*.py", "report/**/*.typ", "report/references.yml", "tests/*.py", "Makefile",
    "CITATION.cff", "README.md", "LICENSE", "pyproject.toml", "requirements*.txt",
)  # fmt: skip
LEAST_FRAMES = 8  # pictures in the denoising row, at least

_ID = re.compile(r"[\w-]+")
_NOT_IN_FILE_NAMES = '/\\:*?"<>|'  # of Windows, where graders may unpack it
_LONGEST_NAME = 180  # bytes; file systems take 255 for the zip's name
_EXAMPLE = "as in make handin ID=123456 NAME=Ada_Lovelace"


def make_handin(
    student_id: str,
    name: str,
    handout: Handout,
    pipeline: ConditionalDDPMPipeline,
    evaluator: Evaluator,
    *,
    output: Path,
    checkpoint: Path,
    results: Path,
    data: Path | None = None,
    seed: int = 0,
) -> tuple[Path, list[Finding]]:
    """Draw the pictures, build the report, pack both with the source, and check the whole.

    Args:
        student_id: Letters, digits, `-` and `_`.
        name: In any script, with blanks (or `_` for them), hyphens, apostrophes and dots.
        handout: What the year wants, see `find_handout`.
        pipeline: The generator, loaded from `checkpoint`.
        evaluator: The judge of the pictures.
        output: Folder of the zip.
        checkpoint: Folder whose weights the record "ours" must be of.
        results: Folder of the records.
        data: Data folder, see `lab7.layouts.find_layout`.
        seed: Of the first picture of each file.

    Returns:
        The path of the zip, and what is in it, see `check_handin`.

    Raises:
        UserError: An ID or a name that cannot be printed or be part of a file's name, a record of
            other weights, too few steps for the denoising row, or a zip that would not be what
            the course wants. Then no zip is written.
    """
    student_id, name = check_student(student_id, name)
    path = output / f"{handout.title(student_id, name)}.zip"
    require_writable(output)
    record = _record_of(checkpoint, results)
    handin = _draw(f"{student_id} {name}", handout, pipeline, evaluator, data, seed)
    packed = _pack(handin, results, data if record.get("course.pictures") else None)
    findings = check_handin(io.BytesIO(packed), path.name, handout, data)
    wrong = [str(finding) for finding in findings if not finding.harmless]
    if wrong:
        raise UserError(f"the hand-in is not what the course wants: {'; '.join(wrong)}")
    write_atomically(path, packed)
    return path, findings


def check_student(student_id: str, name: str) -> tuple[str, str]:
    """Return ID and name as they are printed: a blank for `_`, accents and letters as one.

    Raises:
        UserError: One of them is empty, or has characters that the name of a file or a line of
            text cannot have, or that no font has; the message names them.
    """
    if not _ID.fullmatch(student_id):
        raise UserError(f"ID {student_id!r}: give letters, digits, '-' or '_', {_EXAMPLE}")
    wrong = [c for c in name if c in _NOT_IN_FILE_NAMES or unicodedata.category(c)[0] == "C"]
    if wrong:
        raise UserError(
            f"name {name!r}: {', '.join(map(repr, wrong))} cannot be part of a file's name"
        )
    name = " ".join(unicodedata.normalize("NFC", name).replace("_", " ").split())
    if not any(map(str.isalpha, name)):
        raise UserError(f"name {name!r}: give letters, {_EXAMPLE}")
    if len(name.encode()) > _LONGEST_NAME:
        raise UserError(f"name {name!r} is too long for the name of a file: shorten it")
    needs_system_fonts(f"{student_id} {name}")
    return student_id, name


def _record_of(checkpoint: Path, results: Path) -> Record:
    """Read the record "ours", which the report is built from; it must be of `checkpoint`."""
    record = needed_records(results)["ours"]  # before anything is drawn
    if record.environment.get("weights_sha256") != file_hash(checkpoint / "unet"):
        raise UserError(
            f"the record 'ours' in {results} is of other weights than {checkpoint}: run "
            f"python -m lab7 evaluate --checkpoint {checkpoint} --record ours --results {results}"
        )
    return record


def _draw(
    student: str,
    handout: Handout,
    pipeline: ConditionalDDPMPipeline,
    evaluator: Evaluator,
    data: Path | None,
    seed: int,
) -> HandIn:
    """Draw the denoising row and one picture for each condition that the course scores."""
    frames = denoising_frames(pipeline, handout.denoising, seed)
    if len(frames) < LEAST_FRAMES:
        raise UserError(
            f"a denoising row of {len(frames)} pictures, as the checkpoint draws in "
            f"{len(frames) - 1} steps: the course wants at least {LEAST_FRAMES}"
        )
    scored = {
        key: draw_and_judge(
            pipeline, named_conditions(key, data), evaluator, repetitions=1, first_seed=seed
        )
        for key in SCORED
    }
    return HandIn(
        student=student,
        task=f"{handout.lab}, {handout.term}",
        scored=scored,
        denoised=handout.denoising,
        frames=frames,
        course_conditions=find_layout(data).course,
        course_evaluator=evaluator.path is not None and evaluator.path.suffix == ".pth",
    )


def _pack(handin: HandIn, results: Path, data: Path | None) -> bytes:
    """Build the report and return the zip. Nothing but the pictures lies in their folders."""
    root, content = DATA_DIR.parent, io.BytesIO()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        build(folder, results, data, handin)
        files = {"report.pdf": folder / "report.pdf"}
        for key, (_, images) in handin.scored.items():
            drawn = folder / "images" / key
            drawn.mkdir(parents=True)
            for index, picture in enumerate(to_pil(images)):
                picture.save(drawn / f"{index}.png")
                files[f"images/{key}/{index}.png"] = drawn / f"{index}.png"
        for file in sorted(file for pattern in SOURCE for file in root.glob(pattern)):
            files[f"source/{file.relative_to(root).as_posix()}"] = file
        with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as packed:
            for inside, file in files.items():
                packed.write(file, inside)
    return content.getvalue()
