import json
import os

import numpy as np
import pytest
import torch

from lab7.errors import UserError
from lab7.records import (
    Record,
    append_log,
    comparable,
    count_passes,
    describe_machine,
    original_scores,
    published,
    read_log,
    read_record,
    read_records,
    trainings,
)
from workshop.judges.evaluator_training import compute_scores
from workshop.records import file_hash, write_record


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "weights.bin"
    path.write_bytes(b"abc")
    return path


def test_record_is_read_as_it_was_written(tmp_path, weights):
    labels = torch.eye(24)
    metrics = {
        "test": compute_scores(labels, labels),
        "loss": torch.tensor(0.25),
        "curve": np.array([1.0, 2.0]),
        "count": np.int64(3),
        "by_count": {1: 0.5},
    }
    folder = write_record(
        "a-run", {"rate": 0.1}, metrics, tmp_path / "results", seeds=[0, 1], weights=weights
    )
    assert sorted(os.listdir(folder)) == ["config.json", "metrics.json"]
    record = read_record("a-run", tmp_path / "results")
    assert record.name == "a-run" and record.config == {"rate": 0.1}
    assert record.get("test.top_k.value") == 1.0
    assert record.get("test.num_pictures") == 24
    assert record.get("by_count.1") == 0.5
    assert record.metrics["curve"] == [1, 2] and record.metrics["loss"] == 0.25
    assert record.environment["seeds"] == [0, 1]
    assert record.environment["packages"]["torch"] == torch.__version__.split("+")[0]
    assert record.environment["machine"] == describe_machine()
    assert record.environment["weights_sha256"].startswith("ba7816bf8f01cfea")
    assert {"date", "git_commit", "git_changes", "python"} <= set(record.environment)


def test_writing_again_replaces(tmp_path):
    write_record("run", {}, {"score": 0.1}, tmp_path)
    write_record("run", {}, {"score": 0.2}, tmp_path)
    write_record("other", {}, {"score": 0.3}, tmp_path)
    scores = {name: record.get("score") for name, record in read_records(tmp_path).items()}
    assert scores == {"other": 0.3, "run": 0.2}


def test_missing_record_or_metric_is_named(tmp_path):
    with pytest.raises(UserError, match="unknown record of .* 'ours': there is none"):
        read_record("ours", tmp_path)
    write_record("original-cosine", {}, {"test": {"top_k": {"value": 0.9}}}, tmp_path)
    with pytest.raises(UserError, match="did you mean 'original-cosine'"):
        read_record("original-cosin", tmp_path)
    record = read_record("original-cosine", tmp_path)
    with pytest.raises(UserError, match="'test.topk.value': did you mean 'test.top_k'"):
        record.get("test.topk.value")
    with pytest.raises(UserError, match="'speed': did you mean 'test'"):
        record.get("speed")
    with pytest.raises(UserError, match="'test.top_k.value.low': there is none"):
        record.get("test.top_k.value.low")


@pytest.mark.parametrize("name", ["", "../up", "a/b", ".hidden", "two words"])
def test_names_that_are_no_folder_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match="a record's name is"):
        write_record(name, {}, {}, tmp_path)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}, object()])
def test_values_that_json_lacks_leave_the_old_record(tmp_path, value):
    write_record("run", {}, {"score": 0.1}, tmp_path)
    with pytest.raises((ValueError, TypeError), match="JSON"):
        write_record("run", {"new": True}, {"score": value}, tmp_path)
    record = read_record("run", tmp_path)
    assert (record.config, record.get("score")) == ({}, 0.1)


def test_environment_is_not_overwritten_by_a_metric(tmp_path):
    with pytest.raises(ValueError, match="'environment'"):
        write_record("run", {}, {"environment": 1}, tmp_path)


def test_places_that_cannot_be_written_or_read_are_the_users(tmp_path):
    (tmp_path / "file").write_text("no folder")
    for write in (
        lambda: write_record("run", {}, {}, tmp_path / "file"),
        lambda: append_log(tmp_path / "file" / "log.jsonl", {"step": 1}),
    ):
        with pytest.raises(UserError, match="file"):
            write()


def test_a_list_is_on_one_line(tmp_path):
    words = ["a  [b\n  ]", "{c}", "d\u2028e"]
    metrics = {"seen": [[0, 12], [], [3]], "words": words, "rows": [{"x": [1, 2]}]}
    folder = write_record("run", {}, metrics, tmp_path)
    lines = [line.strip() for line in (folder / "metrics.json").read_text().splitlines()]
    for line in ("[0, 12],", "[],", "[3]", '"x": [1, 2]'):
        assert line in lines
    assert read_record("run", tmp_path).metrics == metrics


def make(name, images=6000, data="abc", precision="float32", seeds=(0, 1), run=None):
    """A record of two pictures."""
    pictures = {"conditions": [["red cube"]], "condition": [0, 0], "seed": list(seeds)}
    training = {"images": images, "data_sha256": data, "precision": precision}
    metrics = {"test": {"pictures": pictures, "guidance_scale": 1.0}, "training": training}
    return Record(name, {}, metrics, {"weights_sha256": run or name})


def test_a_table_is_of_one_budget_and_data_set_and_one_record_a_run():
    untrained, empty, unguided = make("untrained"), make("empty"), make("unguided", run="a")
    course, slow = make("course"), make("slow")
    course.metrics["course"], slow.metrics["test"]["num_inference_steps"] = "theirs", 1000
    del untrained.metrics["training"], empty.metrics["test"]
    unguided.metrics["test"]["guidance_scale"] = 3.0
    made = [make("short", images=3000), make("a"), make("b"), make("c", data="xyz")]
    made += [
        make("again", run="a"),
        make("half", precision="bfloat16"),
        make("other", seeds=(1, 2)),
    ]
    made += [untrained, empty, unguided, course, slow]
    kept, left_out = comparable({record.name: record for record in made})
    assert list(kept) == ["a", "b", "half", "unguided"], "the same run with other settings counts"
    rest = "differs from the rest of its table in"
    assert left_out == {
        "short": f"short {rest} the pictures of training: 3000, not 6000",
        "c": f"c {rest} the training data: xyz, not abc",
        "other": f"other {rest} the seeds",
        "course": f"course {rest} the origin of pictures and evaluator: theirs, not None",
        "slow": f"slow {rest} the sampling steps: 1000, not None",
        "again": "again is of the same run as a",
        "untrained": "untrained does not say how it was trained",
        "empty": "empty has no verdicts on pictures of 'test'",
    }
    assert comparable({}) == ({}, {})


def test_trainings_of_an_experiment_are_found_by_name():
    records = {name: make(name) for name in ("cosine", "cosine-seed1", "cosine-x0", "linear-seed2")}
    assert [record.name for record in trainings(records, "cosine")] == ["cosine", "cosine-seed1"]
    assert [record.name for record in trainings(records, "linear")] == ["linear-seed2"]
    with pytest.raises(UserError, match="'linaer': did you mean 'linear-seed2'"):
        trainings(records, "linaer")
    with pytest.raises(UserError, match="'cosine': there is none"):
        trainings({}, "cosine")


def test_log_grows_by_rows(tmp_path):
    path = tmp_path / "run" / "log.jsonl"
    append_log(path, {"step": 1, "loss": 0.5})
    append_log(path, {"step": 2, "loss": torch.tensor(0.25)})
    assert read_log(path) == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25}]
    with pytest.raises(ValueError):
        append_log(path, {"loss": float("nan")})
    assert len(read_log(path)) == 2


def test_broken_or_absent_log_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no log .*log.jsonl"):
        read_log(tmp_path / "log.jsonl")
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n{"step"')
    with pytest.raises(ValueError, match="log.jsonl, line 2 is not JSON"):
        read_log(tmp_path / "log.jsonl")


def test_hash_of_a_folder_follows_names_and_contents(tmp_path):
    folder = tmp_path / "model"
    (folder / "unet").mkdir(parents=True)
    (folder / "unet" / "a.bin").write_bytes(b"1")
    before = file_hash(folder)
    assert before == file_hash(folder)
    (folder / "unet" / "a.bin").write_bytes(b"2")
    changed = file_hash(folder)
    (folder / "unet" / "a.bin").rename(folder / "unet" / "b.bin")
    assert len({before, changed, file_hash(folder)}) == 3
    with pytest.raises(FileNotFoundError, match="nowhere"):
        file_hash(tmp_path / "nowhere")


def test_published_figures_are_whole_numbers_of_objects():
    original = published()["original"]
    assert original["source"] and published()["peers"]["source"]
    assert len(original["experiments"]) == 5
    for experiment in original["experiments"].values():
        for name, count in original["objects"].items():
            objects = experiment[name] * count
            assert objects == pytest.approx(round(objects), abs=1e-3)
    peers = [value for value in published()["peers"].values() if isinstance(value, dict)]
    assert all(peer["source"] for peer in peers)


def test_original_scores_have_the_intervals_of_their_objects():
    cosine = original_scores()["original-cosine"]
    shown = {k: (e.hits, e.total, round(e.low, 3), round(e.high, 3)) for k, e in cosine.items()}
    assert shown == {"test": (67, 72, 0.848, 0.97), "new_test": (82, 84, 0.917, 0.993)}


def test_published_is_plain_json():
    assert json.loads(json.dumps(published())) == published()


@pytest.mark.parametrize(
    ("scale", "interval", "count"),
    [
        (3.0, None, 6),
        (1.0, None, 3),
        (3.0, [400, 950], 4),
        (3.0, [0, 999], 6),
        (3.0, [500, 990], 5),
    ],
)
def test_guided_steps_take_two_passes(scale, interval, count):
    settings = {"guidance_scale": scale, "timesteps": [990, 500, 10]}
    if interval:
        settings["guidance_interval"] = interval
    assert count_passes(settings) == count
