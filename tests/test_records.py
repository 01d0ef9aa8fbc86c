import json
import os

import numpy as np
import pytest
import torch

from lab7.evaluator import compute_scores
from lab7.records import (
    append_log,
    describe_machine,
    file_hash,
    original_scores,
    published,
    read_log,
    read_record,
    read_records,
    write_record,
)


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
    with pytest.raises(ValueError, match="no record 'ours'.*holds nothing"):
        read_record("ours", tmp_path)
    write_record("original-cosine", {}, {"test": {"top_k": {"value": 0.9}}}, tmp_path)
    with pytest.raises(ValueError, match="did you mean 'original-cosine'"):
        read_record("original-cosin", tmp_path)
    record = read_record("original-cosine", tmp_path)
    with pytest.raises(ValueError, match=r"no 'test.topk.value': test holds top_k.*'top_k'"):
        record.get("test.topk.value")
    with pytest.raises(ValueError, match="no 'speed': its metrics holds test"):
        record.get("speed")
    with pytest.raises(ValueError, match="test.top_k.value holds nothing"):
        record.get("test.top_k.value.low")


@pytest.mark.parametrize("name", ["", "../up", "a/b", ".hidden", "two words"])
def test_names_that_are_no_folder_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match="a record's name is"):
        write_record(name, {}, {}, tmp_path)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}, object()])
def test_values_that_json_lacks_leave_the_old_record(tmp_path, value):
    write_record("run", {}, {"score": 0.1}, tmp_path)
    with pytest.raises(ValueError, match="a record cannot hold this"):
        write_record("run", {"new": True}, {"score": value}, tmp_path)
    record = read_record("run", tmp_path)
    assert (record.config, record.get("score")) == ({}, 0.1)


def test_environment_is_not_overwritten_by_a_metric(tmp_path):
    with pytest.raises(ValueError, match="'environment'"):
        write_record("run", {}, {"environment": 1}, tmp_path)


def test_a_list_stands_on_one_line(tmp_path):
    words = ["a  [b\n  ]", "{c}", "d"]
    metrics = {"seen": [[0, 12], [], [3]], "words": words, "rows": [{"x": [1, 2]}]}
    folder = write_record("run", {}, metrics, tmp_path)
    lines = [line.strip() for line in (folder / "metrics.json").read_text().splitlines()]
    for line in ("[0, 12],", "[],", "[3]", '"x": [1, 2]'):
        assert line in lines
    assert read_record("run", tmp_path).metrics == metrics


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
