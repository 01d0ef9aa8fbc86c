"""Training of the auditor: objects move with their pictures, the loss knows the right answer."""

import dataclasses

import numpy as np
import pytest
import torch

from lab7.auditor import Auditor, compute_audit
from lab7.labels import LABELS
from lab7.records import read_log, read_record
from workshop.judges.auditor_training import (
    AuditorConfig,
    detection_loss,
    label_counts,
    move,
    read_scenes,
    train_auditor,
)
from workshop.standin.packing import write_pack
from workshop.standin.scenes import write_json

TINY = AuditorConfig(
    validation_pictures=8, test_pictures=16, epochs=3, batch_size=8, ema_decay=0.5, moved=0
)
NONE = [-1.0, -1.0, -1.0]


def objects(*rows):
    """Objects (1, 5, 3) of one picture."""
    return torch.tensor([[*rows, *[NONE] * (5 - len(rows))]])


@pytest.fixture
def scenes():
    """48 pictures: a gray ground with one or two squares, whose color is their label."""
    rng = np.random.default_rng(0)
    images = torch.full((48, 3, 64, 64), 120, dtype=torch.uint8)
    there = torch.full((48, 5, 3), -1.0)
    for picture in range(48):
        for number in range(1 + picture % 2):
            label, x, y = rng.integers(3), 16 + 32 * number, int(rng.integers(12, 52))
            color = 255 * torch.eye(3)[label].to(torch.uint8)[:, None, None]
            images[picture, :, y - 5 : y + 5, x - 5 : x + 5] = color
            there[picture, number] = torch.tensor([label, x, y])
    return images, there


def test_label_counts():
    counts = label_counts(torch.cat([objects([1, 5, 5], [1, 9, 9], [23, 1, 1]), objects()]))
    assert counts[0].nonzero().flatten().tolist() == [1, 23]
    assert counts[0, 1] == 2 and counts[1].sum() == 0


def test_objects_move_with_their_pictures():
    images = torch.zeros(64, 3, 64, 64, dtype=torch.uint8)
    images[:, :, 20, 40] = 255
    there = objects([7, 40.5, 20.5]).repeat(64, 1, 1)
    moved, now = move(images, there, AuditorConfig(), torch.Generator().manual_seed(0))
    places = set()
    for picture, (label, x, y) in zip(moved, now[:, 0].tolist(), strict=True):
        assert label == 7 and picture[:, int(y), int(x)].tolist() == [255] * 3
        assert (picture[0] == 255).sum() == 1
        places.add((x, y))
    assert len(places) > 20 and {x > 32 for x, _ in places} == {True, False}
    assert (now[:, 1:, 0] == -1).all(), "what is not there stays away"


def test_loss_is_low_for_the_right_answer_only():
    there = objects([3, 21.0, 41.0], [5, 51.0, 11.0])

    def answer(*cells):
        middles, names = torch.full((1, 32, 32), -12.0), torch.zeros(1, 24, 32, 32)
        for label, column, row in cells:
            middles[0, row, column], names[0, label, row, column] = 12.0, 20.0
        return detection_loss(middles, names, there, 0.7).item()

    right = answer((3, 10, 20), (5, 25, 5))
    assert right < 0.01
    assert answer((3, 10, 20)) > right + 1, "a missing object"
    assert answer((3, 10, 20), (5, 25, 5), (7, 2, 2)) > right + 1, "one too many"
    assert answer((4, 10, 20), (5, 25, 5)) > right + 1, "a wrong label"


def test_training_finds_squares_and_records_it(scenes, tmp_path):
    output = tmp_path / "weights" / "auditor.safetensors"
    config = dataclasses.replace(TINY, epochs=12)
    auditor = train_auditor(
        *scenes, config, output, run_name="tiny", results_root=tmp_path / "results", device="cpu"
    )
    log = read_log(tmp_path / "results" / "tiny" / "log.jsonl")
    assert len(log) == 12 and log[-1]["loss"] < 0.5 * log[0]["loss"]
    record = read_record("tiny", tmp_path / "results")
    assert record.get("test.num_pictures") == 16
    assert set(record.get("by_count")) == {"1", "2"}
    assert record.get("threshold") == pytest.approx(auditor.network.threshold.item())
    again = compute_audit(
        Auditor.load(output, "cpu").count(scenes[0][-16:]), label_counts(scenes[1][-16:])
    )
    assert again.exact_scene.value == record.get("test.exact_scene.value")


def test_scenes_are_read_as_they_were_written(tmp_path):
    labels = ["red cube", "red cube", "blue sphere", "gray cube", "gray cube"]
    middles = [[10.0 * i, 5.0 * i] for i in range(5)]
    strip = np.full((3, 64, 64, 3), 100, np.uint8)
    write_pack(tmp_path / "pictures.zip", [("a", strip), ("b", strip)], speed=8)
    scene = {"labels": labels, "counts": [1, 4, 5], "centres": middles}
    write_json(tmp_path / "scenes.json", {"b": scene, "a": scene | {"counts": [2, 4, 5]}})
    images, there = read_scenes(tmp_path)
    assert images.shape == (6, 3, 64, 64) and images.dtype == torch.uint8
    counts = label_counts(there)
    assert counts.sum(1).tolist() == [2, 4, 5, 1, 4, 5]
    assert counts[0, LABELS.index("red cube")] == 2
    assert there[5, 4].tolist() == [LABELS.index("gray cube"), 40.0, 20.0]


def test_too_few_pictures_are_refused(scenes, tmp_path):
    with pytest.raises(ValueError, match="48 pictures are too few"):
        train_auditor(*scenes, AuditorConfig(), tmp_path / "a", results_root=tmp_path)
    assert list(tmp_path.iterdir()) == []
