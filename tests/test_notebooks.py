"""The notebooks: their form, what is stored in them, and a run of each in the smoke profile."""

import ast
import re
import sys
from pathlib import Path

import execute
import nbformat
import pytest
import torch
from conftest import write_course
from nbclient.exceptions import CellExecutionError

from lab7.evaluator import build_network
from lab7.labels import LABELS

ROOT = Path(__file__).resolve().parent.parent
WIDGET = "application/vnd.jupyter.widget-view+json"
RUN = "run `make notebooks`"
NAMES = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))


@pytest.fixture
def made_up(tmp_path, monkeypatch):
    """A folder of notebooks that holds just what a test puts there."""
    monkeypatch.setattr(execute, "NOTEBOOKS", tmp_path)
    monkeypatch.setattr(execute, "READS", {"02_made_up": ("data/objects.json",)})

    def add(*sources):
        cells = [nbformat.v4.new_code_cell(source) for source in ('PROFILE = "demo"', *sources)]
        cells[0].metadata["tags"] = ["parameters"]
        notebook = nbformat.v4.new_notebook(cells=cells)
        nbformat.write(notebook, tmp_path / "02_made_up.ipynb")

    return add


def read(name):
    return nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def text(cell):
    """What a cell shows as text, without what stands for a picture."""
    shown = []
    for output in cell.outputs:
        data = output.get("data", {})
        if not any(kind.startswith("image/") for kind in data):
            shown.append(output.get("text") or data.get("text/markdown") or data.get("text/plain"))
    return shown


@pytest.mark.parametrize("name", NAMES)
def test_form(name):
    notebook = read(name)
    nbformat.validate(notebook)
    first, *_ = notebook.cells
    assert first.cell_type == "markdown" and first.source.startswith("# ")
    tagged = [c for c in code_cells(notebook) if "parameters" in c.metadata.get("tags", [])]
    assert len(tagged) == 1 and tagged[0].source.startswith('PROFILE = "demo"')
    headings = "\n".join(c.source for c in notebook.cells if c.cell_type == "markdown")
    if name != "solutions":
        for wanted in ("Question.", "Answer.", "Needs", "# Conclusion", "# Exercises", "# Refer"):
            assert wanted in headings


@pytest.mark.parametrize("name", [name for name in NAMES if name != "solutions"])
def test_sections_ask_and_answer(name):
    notebook = read(name)
    text = "\n".join(c.source for c in notebook.cells if c.cell_type == "markdown")
    sections, _, exercises = text.partition("## Conclusion")
    for section in re.split(r"^## (?=\d)", sections, flags=re.M)[1:]:
        questions = re.findall(r"\*\*(?:Before you|Question)", section)
        assert 1 <= len(questions) == section.count("<details>") == section.count("</details>")
    gaps = sum("check(answer," in cell.source for cell in code_cells(notebook))
    open_ones = len(re.findall(r"^\*\*\d\.\*\* \*Open\.\*", exercises, flags=re.M))
    assert gaps and gaps + open_ones == len(re.findall(r"^\*\*\d\.\*\*", exercises, flags=re.M))


@pytest.mark.parametrize("name", NAMES)
def test_cells_are_short_and_define_little(name):
    definitions = 0
    for cell in code_cells(read(name)):
        lines = [line for line in cell.source.splitlines() if line.strip()]
        assert max(map(len, lines)) <= 100
        if not cell.source.startswith(("import", "from")):
            assert len(lines) <= 15, cell.source
        for node in ast.walk(ast.parse(cell.source)):
            assert not isinstance(node, ast.ClassDef | ast.While), cell.source
            definitions += isinstance(node, ast.FunctionDef)
    assert definitions <= 2, "what is needed once is written out where it is needed"


@pytest.mark.parametrize("name", NAMES)
def test_stored_outputs(name):
    cells = code_cells(read(name))
    assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)], RUN
    for output in (output for cell in cells for output in cell.outputs):
        assert output.output_type != "error"
        assert output.get("name") != "stderr", output.text
        assert WIDGET not in output.get("data", {})


@pytest.mark.parametrize("name", NAMES)
def test_stored_outputs_are_up_to_date(name):
    notebook = read(name)
    now, stored = execute.inputs(name, notebook), notebook.metadata.lab7.inputs
    changed = [key for key in {**now, **stored} if now.get(key) != stored.get(key)]
    assert not changed, RUN


@pytest.mark.parametrize("name", NAMES)
def test_smoke_run_shows_what_is_stored(name):
    """Cells tagged `exact` show the same in any profile and on any machine."""
    fresh, stored = execute.run(name, "smoke"), read(name)
    outputs = {cell.id: text(cell) for cell in code_cells(fresh)}
    for cell in code_cells(stored):
        if "exact" in cell.metadata.get("tags", []):
            assert outputs[cell.id] == text(cell), cell.source
    said = "\n".join(str(line) for lines in outputs.values() for line in lines)
    assert "False" not in said  # what is written out by hand equals the package's


@pytest.mark.parametrize("name", NAMES)
def test_notebooks_run_on_the_courses_files(name, tmp_path, cache_dir, monkeypatch):
    scenes = {f"CLEVR_train_{i:06d}": [LABELS[i], LABELS[i + 8], LABELS[i + 16]] for i in range(8)}
    course = write_course(tmp_path / "course", scenes)
    torch.save({"model": build_network().state_dict()}, course / "checkpoint.pth")
    monkeypatch.setenv("LAB7_DATA", str(course))
    said = "\n".join(str(text(cell)) for cell in code_cells(execute.run(name, "smoke")))
    assert "False" not in said
    if name == "01_data_exploration":
        assert "24 pictures" in said


def test_profile_is_set_behind_the_parameters(made_up):
    made_up("print(PROFILE)")
    *_, last = execute.run("02_made_up", "smoke").cells
    assert last.outputs[0].text == "smoke\n"


def test_lab7_and_the_static_picker_are_there(made_up, monkeypatch):
    monkeypatch.delenv("PYTHONPATH", raising=False)
    made_up("import os, lab7; print(lab7.__file__); print(os.environ['LAB7_STATIC'])")
    *_, last = execute.run("02_made_up", "demo").cells
    assert last.outputs[0].text.splitlines() == [str(ROOT / "lab7" / "__init__.py"), "1"]


def test_failing_cell_is_named(made_up, monkeypatch, capsys, tmp_path):
    made_up("x = 1", "y = x / 0", "z = 2")
    with pytest.raises(CellExecutionError):
        execute.run("02_made_up", "smoke")
    output = tmp_path / "output"
    monkeypatch.setattr(sys, "argv", ["execute.py", "--output", str(output)])
    assert execute.main() == 1
    error = capsys.readouterr().err
    assert "02_made_up" in error and "ZeroDivisionError" in error and "y = x / 0" in error
    assert len(error.splitlines()) <= 8 and not output.exists()


def test_copies_and_in_place(made_up, monkeypatch, capsys, tmp_path):
    made_up("print(6 * 7)")
    monkeypatch.setattr(sys, "argv", ["execute.py", "--output", str(tmp_path / "copies")])
    assert execute.main() == 0
    assert "[ 2/2] print(6 * 7) …" in capsys.readouterr().out
    stored = tmp_path / "02_made_up.ipynb"
    notebooks = [nbformat.read(p, 4) for p in (stored, tmp_path / "copies" / stored.name)]
    assert [bool(notebook.cells[1].outputs) for notebook in notebooks] == [False, True]
    monkeypatch.setattr(sys, "argv", ["execute.py", "--in-place"])
    assert execute.main() == 0
    notebook = nbformat.read(stored, as_version=4)
    assert len(notebook.cells) == 2 and notebook.cells[1].outputs[0].text == "42\n"
    assert notebook.metadata.lab7.inputs == execute.inputs("02_made_up", notebook)


def test_summary(capsys, tmp_path):
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks" / "01.ipynb").write_text("{}")
    assert execute.summarize(tmp_path) == 0
    shown = capsys.readouterr().out
    assert "notebooks/01.ipynb" in shown and "jupyter lab" in shown and "report.pdf" in shown
