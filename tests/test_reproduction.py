"""Experiments within a time: what fits is trained, scored and recorded, the rest goes on later."""

import dataclasses

import pytest

from lab7.dataset import ICLEVRDataset
from lab7.experiments import get_experiment
from lab7.records import read_record
from workshop.study import reproduction
from workshop.study.reproduction import ORIGINALS, reproduce_experiments


@pytest.fixture
def reproduce(embedded_root, tmp_path):
    def run(*names, **options):
        return reproduce_experiments(
            names,
            ICLEVRDataset(embedded_root),
            embedded_root,
            tmp_path / "runs",
            tmp_path / "results",
            repetitions=1,
            device="cpu",
            **options,
        )

    return run


def test_an_experiment_is_recorded_once(reproduce, tmp_path, capsys):
    assert reproduce("smoke", epochs=1) == ["smoke"]
    record = read_record("smoke", tmp_path / "results")
    assert record.config["num_steps"] == 2, "nine pictures in batches of four"
    assert record.get("test.audit.num_pictures") == 2
    assert record.get("training.steps") == 2
    assert (tmp_path / "results" / "smoke" / "new_test.png").exists()
    assert not (tmp_path / "runs" / "smoke" / "states").exists()
    assert "exact scene" in capsys.readouterr().out
    assert reproduce("smoke", epochs=1) == ["smoke"]
    assert capsys.readouterr().out == "smoke has a record\n"


def test_what_does_not_fit_goes_on_later(reproduce, tmp_path, capsys, monkeypatch):
    config = dataclasses.replace(get_experiment("smoke").config, num_steps=3000)
    experiment = dataclasses.replace(get_experiment("smoke"), config=config)
    monkeypatch.setattr(reproduction, "get_experiment", lambda name: experiment)
    assert reproduce("smoke", seconds=2, reserve=1) == []
    assert "of 3,000 steps; start again to go on" in capsys.readouterr().out
    assert list((tmp_path / "runs" / "smoke" / "states").iterdir())
    assert not (tmp_path / "results").exists()


def test_no_time_and_unknown_names_are_refused(reproduce):
    with pytest.raises(ValueError, match="of 60 seconds 180 are kept for scoring: none is left"):
        reproduce("smoke", seconds=60)
    with pytest.raises(ValueError, match="did you mean 'original-cosine'"):
        reproduce("original-cosin")
    assert len(ORIGINALS) == 5
