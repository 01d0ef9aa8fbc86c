"""The trials of what to predict: alike but for what they are named after, and recorded."""

import dataclasses

import pytest

from lab7.experiments import get_experiment
from lab7.records import read_record
from workshop.study import targets
from workshop.study.experiments import milestone_steps
from workshop.study.targets import BASE, TRIALS, record_targets, target_config


def test_trials_differ_in_nothing_else():
    configs = [target_config(trial) for trial in TRIALS]
    for trial, config in zip(TRIALS, configs, strict=True):
        found = {**config.unet, **config.noise}
        assert {name: found.pop(name) for name in trial} == trial
        rest = {k: v for k, v in {**BASE.unet, **BASE.noise}.items() if k not in trial}
        assert found == rest and dataclasses.replace(config, unet={}, noise={}) == (
            dataclasses.replace(BASE, unet={}, noise={})
        )
    assert len({config.to_json() for config in configs}) == len(TRIALS)
    assert len(milestone_steps(BASE)) == 4


def test_trials_are_recorded_and_not_run_twice(embedded_root, tmp_path, monkeypatch):
    (embedded_root / "valid.json").write_text('[["red cube"], ["cyan sphere", "blue cube"]]')
    smoke = get_experiment("smoke").config
    base = dataclasses.replace(smoke, num_steps=2, log_every=1, guidance_scale=1.0)
    monkeypatch.setattr(targets, "BASE", base)
    monkeypatch.setattr(targets, "TRIALS", TRIALS[:2])
    places = tmp_path / "runs", tmp_path / "results", embedded_root, "cpu"
    record_targets("targets", *places)
    rows = read_record("targets", tmp_path / "results").get("trials")
    assert [row["prediction_type"] for row in rows] == ["sample", "v_prediction"]
    assert [row["step"] for row in rows[0]["milestones"]] == [1, 2]
    monkeypatch.setattr("workshop.study.experiments.train", pytest.fail)
    record_targets("targets", *places)
