"""Pictures on disk: the hand-in layout, the grid, the denoising row; nothing half written."""

import errno
import json
import os

import numpy as np
import pytest
import torch
from PIL import Image

from lab7.auditor import Auditor, AuditorNetwork
from lab7.errors import UserError
from lab7.evaluator import Evaluator, build_network
from lab7.labels import LABELS
from lab7.pipeline import to_pil
from lab7.plots import split_grid
from lab7.sampling import denoising_frames, to_grid, write_samples

CONDITIONS = [("red cube",), ("blue sphere", "gray cylinder"), ("cyan cube", "cyan sphere")]


@pytest.fixture(scope="module")
def evaluator():
    torch.manual_seed(0)
    return Evaluator(build_network(), "cpu")


def test_write_samples_follows_the_course_layout(pipeline, evaluator, tmp_path):
    summary = write_samples(pipeline, CONDITIONS, tmp_path / "out", 5, evaluator=evaluator)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    wanted = {"grid.png", "denoising.png", "samples.json"}
    assert names == {"0.png", "1.png", "2.png"} | wanted
    drawn = pipeline(CONDITIONS, seeds=[5, 6, 7], progress=False).images
    for index, picture in enumerate(drawn):
        stored = Image.open(tmp_path / "out" / f"{index}.png")
        assert stored.size == (64, 64) and stored.mode == "RGB"
        assert (np.asarray(stored) == np.asarray(picture)).all()
    stored = json.loads((tmp_path / "out" / "samples.json").read_text())
    assert stored["conditions"] == [list(c) for c in CONDITIONS]
    assert stored["settings"]["seed"] == 5
    assert stored["scores"]["top_k"]["value"] == summary["scores"]["top_k"]["value"]
    pictures = torch.from_numpy(np.stack([np.asarray(picture) for picture in drawn]))
    probabilities = evaluator.predict(pictures.movedim(3, 1))
    above = [[LABELS[i] for i in row.nonzero()[:, 0]] for row in probabilities >= 0.5]
    assert stored["seen"] == above and above[0]
    assert [p.name for p in tmp_path.iterdir()] == ["out"], "no temporary folder is left"


def test_the_denoising_row_is_of_what_was_asked_for(pipeline, tmp_path):
    def difference(picture, **options):
        write_samples(pipeline, CONDITIONS, tmp_path, 5, **options)
        last = split_grid(Image.open(tmp_path / "denoising.png"))[-1].transpose(1, 2, 0)
        return np.abs(last.astype(int) - np.asarray(picture)).max()

    first, other = pipeline([*CONDITIONS[:1], CONDITIONS[2]], seeds=[5, 5], progress=False).images
    assert difference(first) <= 1 < difference(other), "0.png, to float rounding"
    assert difference(other, denoising=CONDITIONS[2]) <= 1


def test_a_shorter_call_leaves_no_pictures_of_a_longer_one(pipeline, tmp_path):
    write_samples(pipeline, CONDITIONS, tmp_path)
    (tmp_path / "7.png").write_text("mine")
    write_samples(pipeline, CONDITIONS[:1], tmp_path)
    assert sorted(path.name for path in tmp_path.glob("[0-9]*")) == ["0.png", "7.png"]


def test_write_samples_refuses_a_file_before_drawing(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ValueError, match="out is a file, not a folder"):
        write_samples(None, CONDITIONS, tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


def test_write_samples_leaves_nothing_after_an_error(pipeline, tmp_path):
    with pytest.raises(ValueError, match="num_inference_steps"):
        write_samples(pipeline, CONDITIONS, tmp_path / "out", num_inference_steps=5000)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_said_and_leaves_what_was_there(pipeline, tmp_path, monkeypatch):
    write_samples(pipeline, CONDITIONS, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    written = Image.Image.save

    def save(picture, path, *arguments):
        if path.stem == "denoising":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        written(picture, path, *arguments)

    monkeypatch.setattr(Image.Image, "save", save)
    with pytest.raises(UserError, match=r"No space left on device: .*out"):
        write_samples(pipeline, CONDITIONS[:1], tmp_path / "out", 5)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "no temporary folder is left"


def test_denoising_frames_go_from_noise_to_the_picture(pipeline):
    condition = CONDITIONS[1]
    frames = denoising_frames(pipeline, condition, 3, num_inference_steps=12, count=8)
    assert frames.shape == (8, 3, 64, 64)
    generator = torch.Generator().manual_seed(3)
    assert torch.allclose(frames[0], torch.randn(3, 64, 64, generator=generator).clamp(-1, 1))
    options = {"seeds": [3], "num_inference_steps": 12, "output_type": "pt", "progress": False}
    assert torch.equal(frames[-1], pipeline([condition], **options).images[0])
    part = {"guidance_interval": [300, 700]}
    frames = denoising_frames(pipeline, condition, 3, num_inference_steps=12, **part)
    assert torch.equal(frames[-1], pipeline([condition], **options, **part).images[0])
    assert len(denoising_frames(pipeline, condition, 3, num_inference_steps=2)) == 3


@pytest.fixture
def auditor():
    torch.manual_seed(0)
    return Auditor(AuditorNetwork(), "cpu")


def test_grid_has_eight_a_row_in_order():
    shades = torch.linspace(-1, 1, 10)[:, None, None, None].expand(10, 3, 64, 64)
    sheet = np.asarray(to_grid(shades))
    assert sheet.shape == (2 * 66 + 2, 8 * 66 + 2, 3)
    for index, picture in enumerate(to_pil(shades)):
        row, column = divmod(index, 8)
        assert (sheet[66 * row + 30, 66 * column + 30] == np.asarray(picture)[0, 0]).all()


def test_grid_of_one_picture_has_its_border_too():
    sheet = to_grid(torch.zeros(1, 3, 64, 64))
    assert sheet.size == (68, 68) and len(split_grid(sheet)) == 1
