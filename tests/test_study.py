"""The experiments of notebook 04: run once, scored on the way, gone on with."""

import dataclasses
import json

import pytest

from lab7.experiments import EXPERIMENTS, TWINS, get_experiment
from lab7.records import read_log, read_record
from workshop.study import experiments
from workshop.study.experiments import PLAN, milestone_steps, run_experiments, trial_config


@pytest.fixture
def run(embedded_root, tmp_path, monkeypatch):
    """Run trials that are the smoke test's under other names, on nine pictures and few sets."""
    for name in ("valid", "unseen", "four_five"):
        (embedded_root / f"{name}.json").write_text('[["red cube"], ["cyan sphere", "blue cube"]]')
    config = dataclasses.replace(get_experiment("smoke").config, num_steps=8, log_every=1)
    small = {name: dataclasses.replace(EXPERIMENTS[name], config=config) for name in PLAN[:2]}
    monkeypatch.setattr(experiments, "get_experiment", lambda name: small[name])

    def run(*trials):
        places = embedded_root, tmp_path / "runs", tmp_path / "results"
        run_experiments(trials, *places, repetitions=1, device="cpu")

    return run


def test_a_trial_is_recorded_once(run, tmp_path, capsys):
    run(PLAN[0])
    record = read_record(PLAN[0], tmp_path / "results")
    assert [row["step"] for row in record.get("milestones")] == [1, 2, 4, 8]
    assert all(row["audit"]["num_pictures"] == 2 for row in record.get("milestones"))
    assert record.get("test.audit.num_pictures") == 2 and record.get("training.steps") == 8
    assert not (tmp_path / "runs" / PLAN[0] / "states").exists()
    before = (tmp_path / "results" / PLAN[0] / "metrics.json").read_bytes()
    capsys.readouterr()
    run(PLAN[0])
    assert capsys.readouterr().out.split() == [PLAN[0], "has", "a", "record"]
    assert (tmp_path / "results" / PLAN[0] / "metrics.json").read_bytes() == before


def test_an_interrupted_trial_goes_on(run, tmp_path, monkeypatch, capsys):
    train, stops = experiments.train, []

    def interrupted(*args, **options):
        if len(stops) == 2:
            stops.append("now")
            raise KeyboardInterrupt
        stops.append("no")
        return train(*args, **options)

    monkeypatch.setattr(experiments, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(f"{PLAN[1]}@3")
    folder = tmp_path / "runs" / f"{PLAN[1]}-seed3"
    assert len(json.loads((folder / "milestones.json").read_text())) == 2
    run(f"{PLAN[1]}@3")
    assert "2 of 8 steps" in capsys.readouterr().out.replace(" 0.0 hours", "")
    assert [row["step"] for row in read_log(folder / "log.jsonl")] == list(range(1, 9))
    assert read_record(f"{PLAN[1]}-seed3", tmp_path / "results").config["seed"] == 3


def test_twins_differ_in_one_thing_each():
    base = get_experiment("twin-baseline").config
    for name in TWINS[1:]:
        config = get_experiment(name).config
        sides = [{**vars(side), **side.unet, **side.noise} for side in (base, config)]
        changed = {key for key in sides[0] if sides[0][key] != sides[1][key]}
        assert len(changed - {"unet", "noise"}) == 1


def test_milestones_are_rows_of_the_log():
    for trial in PLAN:
        config = trial_config(trial)
        steps = milestone_steps(config)
        assert len(steps) == 4 and steps[-1] == config.num_steps
        assert all(step % config.log_every == 0 for step in steps)


@pytest.mark.parametrize(
    ("trial", "message"),
    [("twin-cosin", "did you mean 'twin-cosine'"), ("twin-cosine@x", "no whole number")],
)
def test_unknown_trials_are_refused(trial, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run_experiments([trial], output=tmp_path, results=tmp_path)
