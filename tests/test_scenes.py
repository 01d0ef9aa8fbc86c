"""The draws: course statistics, no overlap between sets, the same from the same seed."""

import itertools
import json
from collections import Counter

import numpy as np
import pytest
import torch

from lab7.dataset import DATA_DIR, ICLEVRDataset
from lab7.labels import LABELS, load_conditions
from workshop.standin import scenes as standin
from workshop.standin.packing import write_pack
from workshop.standin.scenes import (
    draw_auditor,
    draw_conditions,
    draw_evaluator,
    draw_train,
    label_counts,
    read_scenes,
    render_set,
    write_json,
)


@pytest.fixture(scope="module")
def drawn():
    return {name: [frozenset(c) for c in cs] for name, cs in draw_conditions().items()}


@pytest.fixture(scope="module")
def train():
    return draw_train()


def test_condition_files_have_the_course_statistics(drawn):
    sizes = {name: Counter(map(len, conditions)) for name, conditions in drawn.items()}
    assert sizes["test"] == {1: 6, 2: 12, 3: 14}
    assert sizes["new_test"] == {2: 12, 3: 20}
    assert sizes["valid"].total() == 128
    assert sizes["unseen"] == {3: 136}
    assert set(sizes["four_five"]) == {4, 5}


def test_no_condition_occurs_twice_or_in_two_files(drawn):
    everything = [condition for conditions in drawn.values() for condition in conditions]
    assert len(everything) == len(set(everything))


def test_new_test_is_rich_in_shared_colors_and_shapes(drawn):
    def shares(condition):
        words = [label.split() for label in condition]
        return any(a[0] == b[0] or a[1] == b[1] for a, b in itertools.combinations(words, 2))

    rich = sum(map(shares, drawn["new_test"])) / 32
    assert rich >= 0.85
    assert rich > sum(map(shares, (c for c in drawn["test"] if len(c) > 1))) / 26


def test_train_shows_every_single_pair_and_seen_triple_and_no_unseen_one(drawn, train):
    assert len(train) == 6003
    assert len({plan.labels[0] for plan in train}) == 24
    assert len({frozenset(plan.labels[:2]) for plan in train}) == 276
    triples = {frozenset(plan.labels) for plan in train}
    assert len(triples) == 2024 - 136
    assert not triples & set(drawn["unseen"])


def test_draws_repeat_and_depend_on_the_seed(train):
    assert draw_train() == train
    assert draw_train(seed=1) != train
    assert draw_conditions() == draw_conditions()
    assert draw_conditions(seed=1) != draw_conditions()


def test_evaluator_scenes_cover_one_to_five_objects_and_grow_without_change():
    plans = draw_evaluator(30)
    assert {count for plan in plans for count in plan.counts} == {1, 2, 3, 4, 5}
    assert all(len(set(plan.labels)) == 5 for plan in plans)
    assert draw_evaluator(60)[:30] == plans


def test_committed_files_are_these_draws(drawn, train):
    for name, conditions in drawn.items():
        assert [frozenset(c) for c in load_conditions(DATA_DIR / f"{name}.json")] == conditions
    labels = json.loads((DATA_DIR / "train.json").read_text())
    assert len(labels) == 18_009
    for plan in train[::500]:
        for step in range(3):
            assert labels[f"{plan.name}_{step}.png"] == list(plan.labels[: step + 1])


def test_auditor_scenes_have_doubles_at_every_number_of_objects():
    plans = draw_auditor(60)
    doubled = set()
    for plan in plans:
        doubled |= {k for k in plan.counts if len(set(plan.labels[:k])) < k}
    assert doubled == {2, 3, 4, 5}
    assert sum(len(set(plan.labels)) == 5 for plan in plans) == 30
    assert draw_auditor(90)[:60] == plans


def fake_scene(plan):
    pictures = np.zeros((3, 64, 64, 3), np.uint8)
    pictures[:] = LABELS.index(plan.labels[0]) * 10
    return pictures, np.arange(2 * len(plan.labels)).reshape(-1, 2)


@pytest.fixture
def in_process(monkeypatch):
    """Scenes are rendered in this process."""

    class InProcess:
        def __init__(self, workers): ...
        def __enter__(self):
            return self

        def __exit__(self, *_): ...
        def imap_unordered(self, function, jobs):
            return map(function, jobs)

    class Context:
        Pool = InProcess

    monkeypatch.setattr(standin.multiprocessing, "get_context", lambda _: Context)


def test_scenes_with_doubles_are_described(tmp_path, monkeypatch, in_process):
    monkeypatch.setattr(standin, "render_scene", fake_scene)
    plans = draw_auditor(30)
    render_set(plans, tmp_path / "set", tmp_path / "work")
    scenes = json.loads((tmp_path / "set" / "scenes.json").read_text())
    assert list(scenes) == [plan.name for plan in plans]
    scene = scenes[plans[7].name]
    assert scene["labels"] == list(plans[7].labels) and scene["counts"] == list(plans[7].counts)
    assert scene["centres"][4] == [8, 9]


def test_render_set_goes_on_where_it_was(tmp_path, monkeypatch, in_process):
    plans, made = draw_train()[:60], []

    def scene(plan):
        made.append(plan.name)
        if len(made) == 40:
            raise KeyboardInterrupt
        return fake_scene(plan)

    monkeypatch.setattr(standin, "render_scene", scene)
    with pytest.raises(KeyboardInterrupt):
        render_set(plans, tmp_path / "set", tmp_path / "work")
    assert not (tmp_path / "set").exists()
    render_set(plans, tmp_path / "set", tmp_path / "work")
    assert made.count(plans[0].name) == 1, "the first chunk was finished and is not made again"
    monkeypatch.setenv("LAB7_CACHE", str(tmp_path / "cache"))
    data = ICLEVRDataset(tmp_path / "set")
    assert len(data) == 180
    assert data.labels[5] == plans[1].labels
    assert abs(int(data.images[3].float().mean()) - fake_scene(plans[1])[0].mean()) <= 2


def test_scenes_are_read_as_they_were_written(tmp_path):
    labels = ["red cube", "red cube", "blue sphere", "gray cube", "gray cube"]
    centers = [[10.0 * i, 5.0 * i] for i in range(5)]
    strip = np.full((3, 64, 64, 3), 100, np.uint8)
    write_pack(tmp_path / "pictures.zip", [("a", strip), ("b", strip)], speed=8)
    scene = {"labels": labels, "counts": [1, 4, 5], "centres": centers}
    write_json(tmp_path / "scenes.json", {"b": scene, "a": scene | {"counts": [2, 4, 5]}})
    images, there = read_scenes(tmp_path)
    assert images.shape == (6, 3, 64, 64) and images.dtype == torch.uint8
    counts = label_counts(there)
    assert counts.sum(1).tolist() == [2, 4, 5, 1, 4, 5]
    assert counts[0, LABELS.index("red cube")] == 2
    assert there[5, 4].tolist() == [LABELS.index("gray cube"), 40.0, 20.0]


def test_label_counts():
    objects = torch.tensor([[[1, 5, 5], [1, 9, 9], [23, 1, 1]], [[-1, -1, -1]] * 3])
    counts = label_counts(objects)
    assert counts[0].nonzero().flatten().tolist() == [1, 23]
    assert counts[0, 1] == 2 and counts[1].sum() == 0


def test_write_json_has_one_entry_a_line(tmp_path):
    write_json(tmp_path / "a.json", {"x": ["red cube"], "y": []})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": ["red cube"], "y": []}
    assert len((tmp_path / "a.json").read_text().splitlines()) == 4
    write_json(tmp_path / "b.json", [["red cube"], ["blue cube"]])
    assert json.loads((tmp_path / "b.json").read_text()) == [["red cube"], ["blue cube"]]
