# Every target works on a fresh clone: it makes .venv first. The README gives the plain commands.
PYTHON ?= python3
ifeq ($(OS),Windows_NT)
BIN := .venv/Scripts
else
BIN := .venv/bin
endif
RUN := $(BIN)/python

.PHONY: run test lab report notebooks handin experiments data bench

run: .venv/installed  ## Run copies of the notebooks and build the report, all into build/.
	$(RUN) notebooks/execute.py --output build/notebooks
	$(RUN) -m lab7 report --output build/report
	@$(RUN) notebooks/execute.py --summary build

test: .venv/installed-dev  ## Lint and test.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(RUN) -m pytest -n 2 --dist worksteal

lab: .venv/installed  ## Open the notebooks in JupyterLab.
	$(BIN)/jupyter lab --notebook-dir=notebooks

report: .venv/installed  ## Rebuild the committed report from report/results/.
	$(RUN) -m lab7 report --output report

notebooks: .venv/installed  ## Run the notebooks and store their outputs in place.
	$(RUN) notebooks/execute.py --in-place

handin: .venv/installed  ## Make the year's zip: make handin ID=123456 NAME=Ada_Lovelace YEAR=2026
	$(RUN) -m lab7 handin "$(ID)" "$(NAME)" $(if $(YEAR),--year "$(YEAR)") $(OPTIONS)

experiments: .venv/installed  ## Run the experiments of notebook 04 that have no record yet (hours).
	$(RUN) -m lab7 experiments

data: .venv/installed-dev  ## Draw the condition files and render the pictures anew (hours).
	$(RUN) -m lab7 render

bench: .venv/installed  ## Measure speed.
	for name in loading sampling training; do $(RUN) -m workshop.benchmarks.$$name || exit 1; done

.venv/installed: requirements.txt pyproject.toml
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'lab7 needs Python 3.11 or later')"
	test -x $(RUN) || $(PYTHON) -m venv .venv
	$(RUN) -m pip install --disable-pip-version-check -r requirements.txt -e .
	@touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt
	$(RUN) -m pip install --disable-pip-version-check -r requirements-dev.txt
	@touch $@
