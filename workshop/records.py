"""Writing the records of runs, which `lab7.records` reads."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lab7.errors import MissingFileError, UserError, user_files
from lab7.files import write_atomically
from lab7.records import RESULTS_DIR, environment, plain

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def write_record(
    run_name: str,
    config: Any,
    metrics: Mapping[str, Any],
    root: str | Path = RESULTS_DIR,
    *,
    seeds: Sequence[int] = (),
    weights: str | Path | None = None,
) -> Path:
    """Write down a run; one of the same name is replaced.

    Args:
        run_name: Name of the folder: letters, digits, `-`, `_` and `.`.
        config: The settings, a dict or a dataclass.
        metrics: What was measured; may hold dataclasses (`Scores`), tensors and arrays. Counts
            (pictures, conditions) belong here, beside what they are counts of.
        root: Folder of the records.
        seeds: The random seeds of the run.
        weights: File or folder whose hash is noted.

    Returns:
        The record's folder.

    Raises:
        UserError: A name that is no folder name, or `root` cannot be written.
        ValueError: "environment" among the metrics, or a value that JSON does not know (NaN).
        TypeError: A value of a type that JSON does not know.
    """
    require_name(run_name)
    if "environment" in metrics:
        raise ValueError("'environment' is no name for a metric: write_record fills it in")
    measured_in = environment() | {"seeds": list(seeds)}
    if weights is not None:
        measured_in["weights_sha256"] = file_hash(weights)
    metrics = {**metrics, "environment": measured_in}
    texts = {"config.json": _dump(config), "metrics.json": _dump(metrics)}
    folder = Path(root) / run_name
    for name, text in texts.items():
        write_atomically(folder / name, text)
    return folder


def require_name(name: str) -> str:
    """Return what may name a folder on any system, for instance that of a record.

    Raises:
        UserError: It has other characters than letters, digits, `-`, `_` and `.`.
    """
    if not _NAME.fullmatch(name):
        raise UserError(f"a record's name is letters, digits, '-', '_' and '.', not {name!r}")
    return name


@user_files()
def file_hash(path: str | Path) -> str:
    """Return the SHA-256 of a file, or of all files of a folder with their names."""
    path = Path(path)
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    if not path.is_dir():
        raise MissingFileError(f"no file or folder {path}")
    files = sorted(file for file in path.rglob("*") if file.is_file())
    lines = [f"{file.relative_to(path).as_posix()} {file_hash(file)}\n" for file in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _dump(value: Any) -> str:
    """Write JSON, each innermost list on one line."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False, default=plain)
    # A line break is always layout: within a string JSON writes it as an escape.
    return re.sub(r"\[\n[^\[\]{}]*\n *\]", _one_line, text) + "\n"


def _one_line(match: re.Match) -> str:
    return "[" + " ".join(line.lstrip() for line in match[0].split("\n")[1:-1]) + "]"
