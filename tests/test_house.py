"""Imports run one way: the lab knows neither the workshop nor the report."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter

import nbformat
import pytest

from lab7.layouts import ROOT

PACKAGES = ("lab7", "workshop", "report")
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): ast.parse(path.read_text("utf-8"))
    for package in PACKAGES
    for path in (ROOT / package).rglob("*.py")
}
MAY = {  # what modules may import of ours; the longest beginning of a name decides
    "lab7": ("lab7",),
    "lab7.__main__": PACKAGES,
    "report": ("lab7", "report", "workshop.judges.plots"),
    "workshop": ("lab7", "workshop"),
    "workshop.commands": PACKAGES,
    "workshop.course": PACKAGES,
}


def imports(tree):
    """The modules of ours that some code imports."""
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert not any(getattr(node, "level", 0) for node in nodes), "no relative imports"
    found = set()
    for node in nodes:
        start = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
        names = {start + alias.name for alias in node.names}
        found |= names & MODULES.keys() or ({node.module} if start else names)
    return {name for name in found if name.split(".")[0] in PACKAGES}


def test_modules_import_what_they_may():
    for name, tree in MODULES.items():
        rule = max((start for start in MAY if name.startswith(start)), key=len)
        assert all(other.startswith(MAY[rule]) for other in imports(tree)), name


def test_a_command_imports_what_it_needs():
    """Nobody waits for PyTorch to see --help."""
    code = "import sys, lab7.__main__, workshop.commands; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


def test_no_import_goes_in_a_circle():
    TopologicalSorter({name: imports(tree) for name, tree in MODULES.items()}).prepare()


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda p: p.stem)
def test_notebooks_import_the_lab(path):
    cells = [cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]
    allowed = ("lab7", "workshop") if path.stem == "05_judges" else ("lab7",)
    assert all(name.startswith(allowed) for name in imports(ast.parse("\n".join(cells))))
