"""The stand-in in the course's layout: what other code of this lab finds in it."""

import json

import pytest
import torch
from PIL import Image
from torch import nn
from torchvision import models

from lab7.dataset import ICLEVRDataset
from lab7.evaluator import WEIGHTS, Evaluator
from workshop.course import export as module
from workshop.course.export import export


@pytest.fixture
def exported(tmp_path, embedded_root, monkeypatch):
    monkeypatch.setattr(module, "DATA_DIR", embedded_root)
    export(tmp_path / "new" / "course")
    return tmp_path / "new" / "course"


def test_folder_reads_back_equal(exported, embedded_root):
    ours, theirs = ICLEVRDataset(embedded_root), ICLEVRDataset(exported)
    assert theirs.course and theirs.names == ours.names and theirs.labels == ours.labels
    assert torch.equal(theirs.images, ours.images)
    assert torch.equal(theirs.conditions, ours.conditions)


def test_files_are_those_of_the_course(exported, embedded_root):
    names = {"objects.json", "train.json", "test.json", "new_test.json", "checkpoint.pth"}
    assert {file.name for file in exported.iterdir()} == names | {"README.txt", "iclevr"}
    for name in names - {"checkpoint.pth"}:
        text = (exported / name).read_text()
        assert text == json.dumps(json.loads((embedded_root / name).read_text()))
    with Image.open(exported / "iclevr" / "CLEVR_train_000007_0.png") as picture:
        assert (picture.format, picture.mode, picture.size) == ("PNG", "RGB", (64, 64))
    readme = (exported / "README.txt").read_text("utf-8")
    assert "9 pictures of 64x64, rendered" in readme and "not the course's data" in readme


def test_checkpoint_loads_as_in_the_courses_evaluator(exported):
    network = models.resnet18(weights=None)
    network.fc = nn.Sequential(nn.Linear(512, 24), nn.Sigmoid())
    network.load_state_dict(torch.load(exported / "checkpoint.pth")["model"])
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        assert torch.equal(network.eval()(images), Evaluator.load(WEIGHTS, "cpu").predict(images))


def test_an_empty_folder_is_taken_and_any_other_left_alone(tmp_path, embedded_root, monkeypatch):
    monkeypatch.setattr(module, "DATA_DIR", embedded_root)
    (tmp_path / "empty").mkdir()
    export(tmp_path / "empty")
    before = sorted(tmp_path.rglob("*"))
    for taken in (tmp_path / "empty", tmp_path / "empty" / "train.json"):
        with pytest.raises(ValueError, match="is not an empty folder: choose a new one"):
            export(taken)
    with pytest.raises(ValueError, match="train.json is a file, not a folder"):
        export(tmp_path / "empty" / "train.json" / "new")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_nothing_half_is_left(tmp_path, embedded_root, monkeypatch, error):
    def stop(*_):
        raise error

    monkeypatch.setattr(module, "DATA_DIR", embedded_root)
    monkeypatch.setattr(torch, "save", stop)
    with pytest.raises((KeyboardInterrupt, ValueError)):
        export(tmp_path / "course")
    assert not [path for path in tmp_path.iterdir() if "course" in path.name]
