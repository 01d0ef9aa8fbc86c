"""The benchmarks run and print a ratio."""

import pytest
import torch

from lab7.records import read_record
from workshop.benchmarks import loading, sampling, training


def test_sampling_prints_a_ratio_and_records_what_it_is_of(capsys, tmp_path):
    sampling.main(1, 1, "cpu", "sampling", tmp_path)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    record = read_record("sampling", tmp_path)
    original = record.get("original.seconds_a_picture")
    ratios = {line[0]: float(line[3]) for line in lines if line[0] in ("ours", "fast")}
    for name, ratio in ratios.items():
        assert original / record.get(f"{name}.seconds_a_picture") == pytest.approx(ratio, abs=0.1)
        assert record.get(f"settings.{name}.num_inference_steps")
    assert 1 < ratios["ours"] <= max(ratios.values()) and record.environment["machine"]


def test_loading_prints_memory_and_a_ratio(capsys):
    loading.main(256, 64, 2, device="cpu")
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[-1][0] == "ratio" and float(lines[-1][1]) > 1
    assert all(0 < int(line[1]) < 1000 for line in lines if line[0] == "memory")


def test_loading_waits_for_a_gpu(monkeypatch):
    waits = []
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: waits.append(True))
    batches = [(torch.zeros(4, 3, 64, 64), torch.zeros(4, 24))] * 2
    assert loading.read(batches, torch.device("cpu")) > 0 and not waits
    assert loading.read(batches, torch.device("meta")) > 0 and waits == [True]


def test_training_prints_memory_the_share_of_reading_and_a_ratio(capsys):
    training.main(1, 1, 4, 16, "smoke", device="cpu")
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[-1][0] == "ratio" and float(lines[-1][1]) > 0
    peaks = {line[0]: float(line[3].replace(",", "")) for line in lines[1:3]}
    assert all(100 < peaks[name] < 4000 for name in ("reference", "lab7"))
    assert lines[3][0] == "reading" and 0 < float(lines[3][1].rstrip("%")) < 100
