"""The named experiments are what the report says they are."""

import json
from math import prod

import pytest
import torch

from lab7.experiments import EXPERIMENTS, TrainConfig, get_experiment
from lab7.model import ConditionalUNet


def count_parameters(name: str) -> int:
    with torch.device("meta"):
        unet = ConditionalUNet(**get_experiment(name).config.unet)
    return sum(prod(p.shape) for p in unet.parameters())


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("original-baseline", 113.7),
        ("original-cosine", 113.7),
        ("original-one-layer", 77.4),
        ("original-half-channels", 28.4),
    ],
)
def test_sizes_of_the_original(name, millions):
    assert count_parameters(name) / 1e6 == pytest.approx(millions, abs=0.06)


def test_ours_fits_in_14_megabytes():
    assert count_parameters("ours") * 2 < 13.9e6


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_json_round_trip(name):
    config = EXPERIMENTS[name].config
    assert TrainConfig(**json.loads(config.to_json())) == config


def test_original_differs_in_one_thing_each():
    baseline = json.loads(get_experiment("original-baseline").config.to_json())
    changed = {
        "original-channels": {"condition"},
        "original-one-layer": {"layers_per_block"},
        "original-half-channels": {"block_out_channels"},
        "original-cosine": {"beta_schedule"},
    }
    for name, expected in changed.items():
        config = json.loads(get_experiment(name).config.to_json())
        assert {k for k in config if config[k] != baseline[k]} <= {"unet", "noise"}
        flat, before = (c["unet"] | c["noise"] for c in (config, baseline))
        assert {k for k in flat if flat[k] != before[k]} == expected


def test_unknown_name():
    with pytest.raises(ValueError, match="'original-cosin': did you mean 'original-cosine'"):
        get_experiment("original-cosin")
