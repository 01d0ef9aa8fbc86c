"""Run the notebooks from top to bottom.

python notebooks/execute.py --output build/notebooks   runs copies of the five notebooks
python notebooks/execute.py --in-place                 runs the committed ones and the solutions
python notebooks/execute.py --summary build            says what was made and how to open it

The metadata of a notebook that was run holds a hash of its cells and of every file that it reads.
"""

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from nbformat import NotebookNode

NOTEBOOKS = Path(__file__).resolve().parent
ROOT = NOTEBOOKS.parent
DATA = ("data/*.json", "data/pictures.zip")
GENERATOR = ("data/weights/generator/**/*", "report/results/ours/*")
EVALUATOR = "data/weights/evaluator.safetensors"
READS = {  # the files each notebook reads, as patterns
    "01_data_exploration": (*DATA, EVALUATOR, *GENERATOR),
    "02_training": (*DATA, EVALUATOR, *GENERATOR),
    "03_sampling": (
        "data/*.json",
        "data/weights/*",
        *GENERATOR,
        *(f"report/results/{name}/*" for name in ("sweep", "search-sampler")),
        "notebooks/picker.png",
    ),
    "04_ablations": (*GENERATOR, "report/results/**/*.json", "report/results/*/samples.png"),
    "05_judges": (
        *DATA,
        "data/weights/*",
        *GENERATOR,
        "report/results/published.json",
        "report/results/twin-cosine/test.png",
        *(f"report/results/{name}/*" for name in ("evaluator", "auditor", "judges")),
    ),
    "solutions": (*DATA, *GENERATOR, "report/results/*/*.json", "report/results/published.json"),
}


def main() -> int:
    """Do what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--output", type=Path, metavar="DIR", help="run copies into DIR")
    action.add_argument("--in-place", action="store_true", help="refresh the committed notebooks")
    action.add_argument("--summary", type=Path, metavar="DIR", help="say what was made in DIR")
    parser.add_argument("--profile", choices=("smoke", "demo", "full"), default="demo")
    arguments = parser.parse_args()
    if arguments.in_place and arguments.profile != "demo":
        parser.error("--in-place keeps what the demo profile gives; use --output for the others")
    if arguments.summary:
        return summarize(arguments.summary)
    names = [name for name in READS if arguments.in_place or name != "solutions"]
    started = time.perf_counter()
    for name in names:
        try:
            notebook = run(name, arguments.profile, print)
        except (CellExecutionError, DeadKernelError) as error:
            print(f"\n{name}.ipynb stopped: {describe(error)}", file=sys.stderr)
            return 1
        write(notebook, (arguments.output or NOTEBOOKS) / f"{name}.ipynb")
    print(f"{len(names)} notebooks in {time.perf_counter() - started:.0f} s")
    return 0


def run(name: str, profile: str, report: Callable = lambda *_, **__: None) -> NotebookNode:
    """Run a copy of one notebook and return it with its outputs.

    Args:
        name: Of the notebook, without its ending.
        profile: "smoke", "demo" or "full".
        report: Called as `print` before and after each cell.

    Raises:
        CellExecutionError: A cell failed.
    """
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    hashes = inputs(name, notebook)
    if profile != "demo":  # which the cell tagged `parameters` says itself
        tags = [cell.metadata.get("tags", []) for cell in notebook.cells]
        place = next(i for i, names in enumerate(tags) if "parameters" in names) + 1
        notebook.cells.insert(place, nbformat.v4.new_code_cell(f"PROFILE = {profile!r}"))
    codes = [cell.id for cell in notebook.cells if cell.cell_type == "code"]
    clock = [time.perf_counter()]

    def started(cell, cell_index):
        if cell.cell_type == "code":
            clock.append(time.perf_counter())
            place = f"[{codes.index(cell.id) + 1:2d}/{len(codes)}]"
            report(f"{name} {place} {cell.source.splitlines()[0]:.60}", end=" … ", flush=True)

    def done(cell, cell_index, execute_reply):
        report(f"{time.perf_counter() - clock[-1]:.1f} s", flush=True)

    client = NotebookClient(
        notebook,
        timeout=None,
        startup_timeout=300,
        record_timing=False,
        store_widget_state=False,
        resources={"metadata": {"path": str(NOTEBOOKS)}},
        extra_arguments=["--log-level=ERROR"],
        on_cell_start=started,
        on_cell_executed=done,
    )
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    client.execute(env=os.environ | {"PYTHONPATH": path, "LAB7_STATIC": "1"})
    notebook.metadata.language_info = {"name": "python"}  # the rest differs between machines
    notebook.metadata.lab7 = {"inputs": hashes}
    report(f"{name} took {time.perf_counter() - clock[0]:.0f} s\n", flush=True)
    return notebook


def inputs(name: str, notebook: NotebookNode) -> dict[str, str]:
    """Return short hashes of a notebook's cells and of the files it reads."""
    cells = [[cell.cell_type, cell.source] for cell in notebook.cells]
    contents = {"cells": json.dumps(cells).encode()}
    for path in sorted({path for pattern in READS[name] for path in ROOT.glob(pattern)}):
        if path.is_file():
            contents[path.relative_to(ROOT).as_posix()] = path.read_bytes()
    return {key: hashlib.sha256(value).hexdigest()[:16] for key, value in contents.items()}


def describe(error: CellExecutionError | DeadKernelError) -> str:
    """Return in a few lines which cell failed and why."""
    if isinstance(error, DeadKernelError):
        return "its kernel died (out of memory?)"
    source = str(error).split("------------------")[1].strip()
    return f"{error.ename}: {error.evalue}\nin the cell\n    " + source.replace("\n", "\n    ")


def write(notebook: NotebookNode, path: Path) -> None:
    """Write a notebook under a temporary name, then rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.unfinished")
    nbformat.write(notebook, unfinished)
    os.replace(unfinished, path)


def summarize(folder: Path) -> int:
    """Say what lies in a folder and how to open it."""
    print(f"Made in {folder}:")
    for path in sorted(p for end in ("ipynb", "pdf", "html") for p in folder.glob(f"*/*.{end}")):
        print(f"  {path.relative_to(folder).as_posix():40s} {path.stat().st_size / 1e6:5.1f} MB")
    jupyter = os.path.relpath(Path(sys.executable).parent / "jupyter")
    print(f"Notebooks:  {jupyter} lab --notebook-dir={folder / 'notebooks'}")
    print(f"Report:     {folder / 'report' / 'report.pdf'}, in a browser or a viewer")
    return 0


if __name__ == "__main__":
    sys.exit(main())
