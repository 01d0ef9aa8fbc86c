"""The benchmarks run and print a ratio."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from lab7.experiments import get_experiment
from lab7.model import ConditionalUNet
from workshop.benchmarks import loading, sampling, training


def test_sampling_prints_a_ratio(capsys):
    sampling.main(1, 1, "cpu")
    last = capsys.readouterr().out.splitlines()[-1].split()
    assert last[0] == "ratio" and float(last[1]) > 1


def test_loading_prints_memory_and_a_ratio(capsys):
    loading.main(256, 64, 2)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[-1][0] == "ratio" and float(lines[-1][1]) > 1
    assert all(0 < int(line[1]) < 1000 for line in lines if line[0] == "memory")


def test_training_prints_memory_where_time_goes_and_a_ratio(capsys):
    training.main(1, 1, 4, 16, "smoke", table_batch=0, device="cpu")
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[-1][0] == "ratio" and float(lines[-1][1]) > 0
    peaks = {line[0]: float(line[3].replace(",", "")) for line in lines[1:3]}
    assert all(100 < peaks[name] < 4000 for name in ("reference", "lab7"))
    assert lines[3][:3] == ["reading", "the", "pictures"]
    assert any(line[0].startswith("aten::") for line in lines[4:-1])


def test_training_counts_three_forward_passes_of_work():
    config = get_experiment("smoke").config
    with FlopCounterMode(display=False) as forward:
        ConditionalUNet(**config.unet)(torch.zeros(1, 3, 64, 64), 0, torch.zeros(1, 24))
    assert 2.9 < training.gflop(config) * 1e9 / forward.get_total_flops() <= 3
