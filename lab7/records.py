"""Records of runs: what was run, where, with what, and what came out.

A run is a folder of `report/results/`: config.json (the settings), metrics.json (what was measured,
and under "environment" where and with what) and, for trainings, log.jsonl. Every number in the
notebooks, the README and the report is read from there.
"""

import dataclasses
import datetime
import importlib.metadata
import json
import math
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lab7.errors import MissingFileError, UserError, unknown, user_files
from lab7.estimates import Estimate, wilson
from lab7.files import read_json
from lab7.layouts import ROOT

RESULTS_DIR = ROOT / "report" / "results"

_PACKAGES = ("torch", "torchvision", "diffusers", "accelerate", "numpy", "pillow")


@dataclass(frozen=True)
class Record:
    """One run as it was written down."""

    name: str
    config: dict[str, Any]
    metrics: dict[str, Any]
    environment: dict[str, Any]

    def get(self, key: str) -> Any:
        """Return one metric.

        Args:
            key: Its path with dots, for instance "test.top_k.value".

        Raises:
            UserError: The record has no such metric; the message names the nearest.
        """
        value, above = self.metrics, ""
        for part in key.split("."):
            if not isinstance(value, dict) or part not in value:
                known = value if isinstance(value, dict) else ()
                raise unknown(f"metric of record {self.name!r}", key, [above + x for x in known])
            value, above = value[part], f"{above}{part}."
        return value


@user_files()
def read_record(run_name: str, root: str | Path = RESULTS_DIR) -> Record:
    """Read one record.

    Raises:
        UserError: There is none of that name; the message names the nearest.
    """
    folder = Path(root) / run_name
    if not (folder / "metrics.json").is_file():
        raise unknown(f"record of {root}", run_name, _record_names(Path(root)))
    metrics = read_json(folder / "metrics.json")
    measured_in = metrics.pop("environment", {})
    return Record(run_name, read_json(folder / "config.json"), metrics, measured_in)


def read_records(root: str | Path = RESULTS_DIR) -> dict[str, Record]:
    """Read all records, by name."""
    return {name: read_record(name, root) for name in _record_names(Path(root))}


def trainings(records: Mapping[str, Record], name: str) -> list[Record]:
    """Return the records of all trainings of an experiment: NAME and, of other seeds, NAME-seed1 …

    Args:
        records: By name.
        name: Of the experiment.

    Raises:
        UserError: There is none; the message names the nearest record.
    """
    found = [record for other, record in records.items() if other.split("-seed")[0] == name]
    if not found:
        raise unknown("record", name, records)
    return found


def comparable(
    records: Mapping[str, Record], part: str = "test"
) -> tuple[dict[str, Record], dict[str, str]]:
    """Choose the records whose scores can be compared picture by picture.

    They have the same budget and data of training, conditions, seeds and sampling steps, and none
    is of the same weights and guidance as another. The precision may differ, as machines do: under
    autocast weights, average and optimizer are float32 in any case.

    Args:
        records: By name.
        part: The set of conditions that is compared.

    Returns:
        The records that are like most of them, and by name why each of the others is left out, one
        line each.
    """
    kept, left_out, runs = {}, {}, {}
    for name, record in records.items():
        found = record.metrics.get(part, {})
        run = record.environment.get("weights_sha256", name), found.get("guidance_scale")
        if "pictures" not in found:
            left_out[name] = f"{name} has no verdicts on pictures of {part!r}"
        elif "training" not in record.metrics:
            left_out[name] = f"{name} does not say how it was trained"
        elif run in runs:
            left_out[name] = f"{name} is of the same run as {runs[run]}"
        else:
            kept[name], runs[run] = record, name
    facts = {name: _comparable_facts(record, part) for name, record in kept.items()}
    usual = max(facts.values(), key=list(facts.values()).count, default={})
    for name, found in facts.items():
        other = [
            what if isinstance(found[what], list) else f"{what}: {found[what]}, not {usual[what]}"
            for what in found
            if found[what] != usual[what]
        ]
        if other:
            del kept[name]
            left_out[name] = f"{name} differs from the rest of its table in {', '.join(other)}"
    return kept, left_out


@user_files()
def append_log(path: str | Path, row: Mapping[str, Any]) -> None:
    """Add one row to a JSON-lines file, in one write, so that a reader never sees half a row."""
    path = Path(path)
    line = json.dumps(row, default=plain, allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab", buffering=0) as file:
        file.write(line.encode())


@user_files()
def read_log(path: str | Path) -> list[dict[str, Any]]:
    """Read the rows of a JSON-lines file.

    Raises:
        MissingFileError: There is no such file.
        UserError: A line is not JSON.
    """
    path, rows = Path(path), []
    if not path.is_file():
        raise MissingFileError(f"no log {path}")
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise UserError(f"{path}, line {number} is not JSON: {error}") from None
    return rows


def count_passes(drawn: Mapping[str, Any]) -> int:
    """Return how many passes of the network a picture takes: two for each step with guidance.

    Args:
        drawn: What `draw_and_judge` returned, for instance "test" of a record.
    """
    low, high = drawn.get("guidance_interval") or (0, math.inf)  # old records have none
    guided = drawn["guidance_scale"] != 1
    return sum(1 + (guided and low <= t <= high) for t in drawn["timesteps"])


def published() -> dict[str, Any]:
    """Return the figures that others published, each with its source."""
    return read_json(RESULTS_DIR / "published.json")


def original_scores() -> dict[str, dict[str, Estimate]]:
    """Return the original report's accuracies by experiment and condition file.

    Each is of one draw, so the interval is Wilson's for the objects of the file.
    """
    original = published()["original"]
    return {
        name: {k: wilson(round(row[k] * n), n) for k, n in original["objects"].items()}
        for name, row in original["experiments"].items()
    }


def environment() -> dict[str, Any]:
    """Return where a number comes from: versions, commit, machine, date (UTC).

    `git_changes` tells whether the code differed from the commit.
    """
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "git_commit": _git("rev-parse", "HEAD"),
        "git_changes": bool(_git("status", "--porcelain", "--", "lab7", "workshop")),
        "machine": describe_machine(),
    }


def describe_machine() -> str:
    """Return the machine in words, for instance "AMD EPYC, 2 cores, 24 GB; NVIDIA H200"."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
        name = found[1].strip() if found else name
    words = f"{name}, {os.cpu_count()} cores"
    if hasattr(os, "sysconf"):
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        words += f", {memory / 1e9:.0f} GB"
    if torch.cuda.is_available():
        words += f"; {torch.cuda.get_device_name()}"
    return words


def _comparable_facts(record: Record, part: str) -> dict[str, Any]:
    """Return what has to be the same for scores to be compared picture by picture."""
    training, found = record.metrics["training"], record.metrics[part]
    return {
        "the pictures of training": training["images"],
        "the training data": training.get("data_sha256"),
        "the origin of pictures and evaluator": record.metrics.get("course"),
        "the sampling steps": found.get("num_inference_steps"),
        "the conditions": [found["pictures"][key] for key in ("conditions", "condition")],
        "the seeds": found["pictures"]["seed"],
    }


def plain(value: Any) -> Any:
    """Turn a dataclass, tensor or array into what JSON knows."""
    if dataclasses.is_dataclass(value):
        return dataclasses.asdict(value)
    if isinstance(value, torch.Tensor | np.ndarray | np.generic):
        return value.tolist()
    raise TypeError(f"JSON does not know {type(value).__name__}")


def _record_names(root: Path) -> list[str]:
    return sorted(file.parent.name for file in root.glob("*/metrics.json"))


def _git(*arguments: str) -> str | None:
    """Return what git says about the project, None outside a repository."""
    try:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
