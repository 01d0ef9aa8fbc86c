"""The benchmarks run and print a ratio."""

import runpy

from lab7.__main__ import ROOT


def test_sampling_prints_a_ratio(capsys):
    runpy.run_path(str(ROOT / "benchmarks" / "sampling.py"))["main"](1, 1, "cpu")
    last = capsys.readouterr().out.splitlines()[-1].split()
    assert last[0] == "ratio" and float(last[1]) > 1
