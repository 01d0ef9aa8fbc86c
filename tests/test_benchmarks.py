"""The benchmarks run and print a ratio."""

import runpy

import pytest

from lab7.__main__ import ROOT


@pytest.fixture(autouse=True)
def beside_each_other(monkeypatch):
    """Run as a script, a benchmark can import the files next to it."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")


def run(name, *arguments):
    runpy.run_path(str(ROOT / "benchmarks" / f"{name}.py"))["main"](*arguments)


def test_sampling_prints_a_ratio(capsys):
    run("sampling", 1, 1, "cpu")
    last = capsys.readouterr().out.splitlines()[-1].split()
    assert last[0] == "ratio" and float(last[1]) > 1


def test_loading_prints_memory_and_a_ratio(capsys):
    run("loading", 256, 64, 2)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[-1][0] == "ratio" and float(lines[-1][1]) > 1
    assert all(0 < int(line[1]) < 1000 for line in lines if line[0] == "memory")
