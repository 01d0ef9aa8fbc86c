"""Training of the auditor: objects move with their pictures, the loss knows the right answer."""

import dataclasses

import numpy as np
import pytest
import torch

from lab7.auditor import Audit, Auditor, scene_ratios
from lab7.errors import UserError
from lab7.records import read_log, read_record
from workshop.judges.auditor_training import THRESHOLDS, AuditorTraining, detection_loss
from workshop.judges.judge_training import train_judge
from workshop.standin.scenes import label_counts

TINY = AuditorTraining(
    validation_pictures=8, test_pictures=16, epochs=3, batch_size=8, ema_decay=0.5, moved=0
)
NONE = [-1.0, -1.0, -1.0]


def generator():
    return torch.Generator().manual_seed(0)


def objects(*rows):
    """Objects (1, 5, 3) of one picture."""
    return torch.tensor([[*rows, *[NONE] * (5 - len(rows))]])


@pytest.fixture
def scenes():
    """48 pictures: a gray background with one or two squares, whose color is their label."""
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


def test_objects_move_with_their_pictures():
    images = torch.zeros(64, 3, 64, 64, dtype=torch.uint8)
    images[:, :, 20, 40] = 255
    there = objects([7, 40.5, 20.5]).repeat(64, 1, 1)
    moved, now = AuditorTraining().move(images, there, generator())
    places = set()
    for picture, (label, x, y) in zip(moved, now[:, 0].tolist(), strict=True):
        assert label == 7 and picture[:, int(y), int(x)].tolist() == [255] * 3
        assert (picture[0] == 255).sum() == 1
        places.add((x, y))
    assert len(places) > 20 and {x > 32 for x, _ in places} == {True, False}
    assert (now[:, 1:, 0] == -1).all(), "what is not there stays away"


def test_what_is_moved_in_repeats_the_edge():
    images = torch.arange(64, dtype=torch.uint8).expand(32, 3, 64, 64)
    training = AuditorTraining(mirrored=0.0)
    moved, now = training.move(images, objects([7, 32.5, 32.5]).repeat(32, 1, 1), generator())
    for picture, x in zip(moved, now[:, 0, 1].tolist(), strict=True):
        expected = (torch.arange(64) - int(x - 32.5)).clamp(0, 63)
        assert torch.equal(picture[0, 0].long(), expected)


def test_loss_is_low_for_the_right_answer_only():
    there = objects([3, 21.0, 41.0], [5, 51.0, 11.0])

    def answer(*cells):
        heatmap, labels = torch.full((1, 32, 32), -12.0), torch.zeros(1, 24, 32, 32)
        for label, column, row in cells:
            heatmap[0, row, column], labels[0, label, row, column] = 12.0, 20.0
        return detection_loss(heatmap, labels, there, 0.7).item()

    right = answer((3, 10, 20), (5, 25, 5))
    assert right < 0.01
    assert answer((3, 10, 20)) > right + 1, "a missing object"
    assert answer((3, 10, 20), (5, 25, 5), (7, 2, 2)) > right + 1, "one too many"
    assert answer((4, 10, 20), (5, 25, 5)) > right + 1, "a wrong label"


def test_training_finds_squares_and_records_it(scenes, tmp_path):
    output = tmp_path / "weights" / "auditor.safetensors"
    config = dataclasses.replace(TINY, epochs=12)
    auditor = train_judge(config, *scenes, output, tmp_path / "results", "cpu")
    log = read_log(tmp_path / "results" / "auditor" / "log.jsonl")
    assert len(log) == 12 and log[-1]["loss"] < 0.5 * log[0]["loss"]
    record = read_record("auditor", tmp_path / "results")
    assert record.get("test.num_pictures") == 16
    assert set(record.get("by_count")) == {"1", "2"}
    assert record.get("threshold") == pytest.approx(auditor.network.threshold.item())
    again = Audit.of(
        scene_ratios(
            Auditor.load(output, "cpu").count(scenes[0][-16:]), label_counts(scenes[1][-16:])
        )
    )
    assert again.exact_scene.value == record.get("test.exact_scene.value")


def test_the_threshold_is_the_middle_one_of_the_best():
    class Counter:
        """Counts right from thresholds of 0.3 to 0.5."""

        class network:
            threshold = torch.tensor(0.5)

        def count(self, images):
            return label_counts(there) * bool(0.29 < self.network.threshold < 0.51)

    there = objects([3, 21.0, 41.0], [3, 51.0, 11.0])
    AuditorTraining().adjust(Counter(), torch.zeros(1, 3, 64, 64), there)
    assert Counter.network.threshold.item() == pytest.approx(0.4) and len(THRESHOLDS) == 15


def test_too_few_pictures_are_refused(scenes, tmp_path):
    with pytest.raises(UserError, match="48 pictures are too few: 3900 are held out"):
        train_judge(AuditorTraining(), *scenes, tmp_path / "a", tmp_path)
    assert list(tmp_path.iterdir()) == []
