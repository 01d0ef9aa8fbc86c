"""What is said about the judges, on inputs for which it is known."""

import functools

import pytest
import torch

from lab7.auditor import Auditor, AuditorNetwork, Sighting
from lab7.dataset import ICLEVRDataset
from lab7.evaluator import Evaluator, build_network
from lab7.labels import COLORS, LABELS, encode
from lab7.records import read_record
from workshop.judges import examination, fooling
from workshop.judges.auditor_training import AuditorTraining
from workshop.judges.examination import (
    calibration,
    change,
    confusions,
    examine_renders,
    match,
    object_recall,
)
from workshop.judges.fooling import make_adversarial, score_fooled
from workshop.judges.judge_training import save_weights

NONE = [-1.0, -1.0, -1.0]
RED_CUBE, BLUE_SPHERE, GRAY_CUBE = map(LABELS.index, ("red cube", "blue sphere", "gray cube"))


def objects(*rows):
    """Objects (1, 5, 3) of one picture."""
    return torch.tensor([[*rows, *[NONE] * (5 - len(rows))]])


def outputs(*labels, value=0.9):
    """Outputs (1, 24) of an evaluator that sees these labels."""
    return (value * encode([labels])).clamp(min=0.01)


def test_calibrated_outputs_have_no_error():
    generator = torch.Generator().manual_seed(0)
    outputs = torch.sigmoid(3 * torch.randn(4000, 24, generator=generator))
    found = calibration(outputs, (torch.rand(4000, 24, generator=generator) < outputs).float())
    assert found["error"] < 0.01 and len(found["bins"]) == 9
    uncertain = sum(row["there"].total for row in found["bins"])
    assert uncertain == found["num_outputs"] < 4000 * 24
    for row in found["bins"]:
        assert row["there"].low <= row["mean"] + 0.02 and row["mean"] - 0.02 <= row["there"].high


def test_the_calibration_error_is_the_gap():
    outputs = torch.full((50, 24), 0.8)
    labels = torch.zeros(50, 24)
    labels[:, :12] = 1
    found = calibration(outputs, labels)
    assert found["error"] == pytest.approx(0.3) and found["num_outputs"] == 1200
    assert [(row["there"].hits, row["there"].total) for row in found["bins"]] == [(600, 1200)]


def test_certain_outputs_do_not_count():
    outputs, labels = torch.full((5, 24), 0.999), torch.zeros(5, 24)
    assert calibration(outputs, labels) == {"error": None, "num_outputs": 0, "bins": []}


def test_objects_are_matched_with_the_nearest_sightings():
    there = objects([RED_CUBE, 20, 20], [BLUE_SPHERE, 24, 20], [GRAY_CUBE, 50, 50])
    seen = [("blue sphere", 25, 20), ("red cube", 21, 21), ("red cube", 50, 40)]
    named = match([[Sighting(label, x, y, 0.9) for label, x, y in seen]], there)
    assert named.tolist() == [[RED_CUBE, BLUE_SPHERE, -1, -1, -1]]
    assert match([[]], there).tolist() == [[-1] * 5]
    assert match([[Sighting("red cube", 1, 1, 0.9)]], objects()).tolist() == [[-1] * 5]


def test_recall_by_what_may_matter():
    there = torch.cat(
        [
            objects([RED_CUBE, 20, 20], [BLUE_SPHERE, 27, 20], [GRAY_CUBE, 20, 60]),
            objects([RED_CUBE, 30, 30]),
            objects([BLUE_SPHERE, 20, 50]),
        ]
    )
    probabilities = torch.cat(
        [outputs("red cube", "gray cube"), outputs("red cube"), outputs("red cube")]
    )
    named = torch.full((3, 5), -1)
    named[0, :3] = torch.tensor([RED_CUBE, BLUE_SPHERE, RED_CUBE])
    recall = object_recall(probabilities, named, there)
    hits = {n: {k: (e.hits, e.total) for k, e in row.items()} for n, row in recall["count"].items()}
    assert hits == {
        "1": {"evaluator": (1, 2), "auditor": (0, 2)},
        "3": {"evaluator": (2, 3), "auditor": (2, 3)},
    }
    near = {name: row["evaluator"].total for name, row in recall["neighbor"].items()}
    assert near == {"<10": 2, ">24": 1, "none": 2}
    assert sum(row["auditor"].total for row in recall["height"].values()) == 5


def test_a_label_is_taken_for_another_where_one_is_missed_and_the_other_seen():
    labels = encode([["red cube", "blue sphere"], ["red cube"]])
    probabilities = torch.cat([outputs("gray cube", "blue sphere"), outputs()])
    taken = confusions(probabilities, labels)
    assert taken.shape == (24, 24) and taken.nonzero().tolist() == [[RED_CUBE, GRAY_CUBE]]


def test_changes_do_what_they_say():
    x = torch.zeros(2, 3, 64, 64)
    x[:, :, 32, 32] = 1
    assert torch.equal(change(x, "blur", 0), x)
    blurred = change(x, "blur", 1.0)
    assert blurred[0, 0, 32, 32] == pytest.approx(1 / (2 * torch.pi), rel=0.02)
    assert change(x, "brightness", 0.1)[0, 0, 0, 0] == pytest.approx(0.2)
    assert change(x, "noise", 0.05)[:, :, :20].std() == pytest.approx(0.1, rel=0.05)
    with pytest.raises(ValueError, match="unknown change 'noisy': did you mean 'noise'"):
        change(x, "noisy", 1)


def test_adversarial_images_raise_the_score_and_stay_near():
    torch.manual_seed(0)
    evaluator = Evaluator(build_network(), "cpu")
    images, labels = torch.rand(4, 3, 64, 64) * 2 - 1, torch.zeros(4, 24)
    labels[:, :2] = 1
    fakes = make_adversarial(evaluator, images, labels, steps=10)
    assert (fakes - images).abs().max() <= 2 * 16 / 255 + 1e-6 and fakes.abs().max() <= 1
    before, after = (evaluator.predict(x)[labels > 0].mean() for x in (images, fakes))
    assert after > before + 0.01


@pytest.fixture
def pictures():
    """60 pictures of up to five objects, half with a label that occurs twice; noise to look at."""
    generator = torch.Generator().manual_seed(0)
    there = torch.full((60, 5, 3), -1.0)
    for row in range(60):
        labels = torch.randperm(24, generator=generator)[: 1 + row % 5].tolist()
        if row % 2:
            labels = [*labels[:3], labels[0]]
        for number, label in enumerate(labels):
            there[row, number] = torch.tensor([label, 8 + 12 * number, 10 + row % 40])
    images = torch.randint(0, 256, (60, 3, 64, 64), generator=generator).byte()
    images[:, :, 0, 0] = torch.arange(60)[:, None].byte()  # its number, for `Right`
    return images, there


class Right:
    """A judge that knows each picture by the number in its corner."""

    device = "cpu"

    def __init__(self, there):
        labels = there[:, :, 0].long()
        self.counts = torch.nn.functional.one_hot(labels + 1, 25).sum(1)[:, 1:]

    def _rows(self, images):
        return ((images[:, 0, 0, 0] + 1) * 127.5).round().long()

    def predict(self, images):
        return (self.counts[self._rows(images)] > 0) * 0.98 + 0.01

    def count(self, images):
        return self.counts[self._rows(images)]


def test_right_judges_are_fooled_as_far_as_the_scores_allow(pictures, monkeypatch):
    monkeypatch.setattr(fooling, "make_adversarial", lambda evaluator, images, labels: images)
    judge = Right(pictures[1])
    found = score_fooled(judge, judge, *pictures)
    assert {name: row["exact_scene"].value for name, row in found.items()} == {
        "as asked": 1, "one too many": 0, "one twice": 0, "one missing": 0, "swapped": 0,
        "deceived": 0,
    }  # fmt: skip
    assert {name: row["exact_set"].value for name, row in found.items()} == {
        "as asked": 1, "one too many": 0, "one twice": 1, "one missing": 0, "swapped": 0,
        "deceived": 0,
    }  # fmt: skip
    assert found["one twice"]["top_k"].value == 1
    assert all(row["num_pictures"] for row in found.values())


def test_a_missing_object_has_any_of_the_labels_that_are_not_there():
    counts = encode([["gray cube", "red cube"]]).long().repeat(400, 1)
    asked = fooling._one_more(counts)
    extra = asked - counts
    assert (extra.sum(1) == 1).all() and not (extra * counts).any()
    drawn = extra.sum(0)[2:]
    assert drawn.min() > 4 and drawn.max() < 40, "each of the 22 about 18 times"
    assert torch.equal(fooling._one_more(counts), asked), "with a fixed seed"


def test_swapped_colors_keep_shapes_and_colors():
    kind = torch.tensor([[RED_CUBE, BLUE_SPHERE, GRAY_CUBE, -1, -1], [0, 8, 9, -1, -1]])
    rows, asked = fooling._swapped(torch.tensor([3, 5]), kind.repeat(3, 1)[[0] * 3 + [0, 0, 1]])
    assert rows.tolist() == [3], "the other has twice the same color"
    assert sorted(LABELS[i] for i in asked[0].nonzero()[:, 0]) == [
        "blue cube", "gray cube", "red sphere"
    ]  # fmt: skip
    assert len(COLORS) == 8


def test_a_whole_examination_is_written_down(pictures, embedded_root, tmp_path, monkeypatch):
    few = {"validation_pictures": 4, "test_pictures": 50, "batch_size": 2}
    monkeypatch.setattr(examination, "AuditorTraining", functools.partial(AuditorTraining, **few))
    monkeypatch.setattr(examination, "read_scenes", lambda folder: pictures)
    monkeypatch.setattr(fooling, "make_adversarial", functools.partial(make_adversarial, steps=2))
    torch.manual_seed(0)
    judges = Evaluator(build_network(), "cpu"), Auditor(AuditorNetwork(), "cpu")
    save_weights(judges[0].network, tmp_path / "evaluator.safetensors")
    judges[0].path = tmp_path / "evaluator.safetensors"
    examine_renders(*judges, tmp_path, ICLEVRDataset(embedded_root), results_root=tmp_path)
    record = read_record("judges", tmp_path)
    assert 0 < record.get("num_pictures") < 50, "without repeated labels"
    assert record.get("calibration.num_pictures") > record.get("num_pictures")
    assert record.get("fidelity.copied.nearest_distance.value") == pytest.approx(0, abs=1e-3)
    assert record.get("fidelity.real.nearest_distance.value") > 0.01
    assert [row["amount"] for row in record.get("changes.noise")] == [0, 0.025, 0.05, 0.1, 0.15]
    assert len(record.get("confusion.evaluator.taken")) == 24
