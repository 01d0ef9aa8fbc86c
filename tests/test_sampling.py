"""Pictures on disk: the hand-in layout, the grid, the denoising row; nothing half written."""

import errno
import json
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from lab7.auditor import Auditor, AuditorNetwork
from lab7.dataset import ICLEVRDataset, data_hash
from lab7.diffusion import scheduler_name
from lab7.errors import UserError
from lab7.evaluator import Evaluator, build_network
from lab7.fidelity import RealPictures
from lab7.pipeline import load_pipeline, to_pil
from lab7.plots import split_grid
from lab7.recording import record_generator, record_sweep, recorded_verdicts
from lab7.records import file_hash, read_record
from lab7.sampling import denoising_frames, to_grid, write_samples
from lab7.scoring import Verdicts, draw_and_judge, score_verdicts

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
    assert [len(seen) for seen in stored["seen"]] == [5, 5, 5]
    assert [p.name for p in tmp_path.iterdir()] == ["out"], "no temporary folder is left"


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
    with pytest.raises(UserError, match=r"No space left on device: .*denoising.png"):
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


def test_record_generator_keeps_scores_pictures_and_log(
    pipeline, saved_pipeline, evaluator, auditor, embedded_root, tmp_path
):
    run = tmp_path / "run"
    shutil.copytree(saved_pipeline, run / "pipeline")
    (run / "config.json").write_text('{"num_steps": 4}')
    (run / "environment.json").write_text(
        '{"machine": "mine", "date": "2026-01-01", "git_commit": null, "python": "3", '
        '"packages": {"torch": "1"}, "precision": "bfloat16", "data_sha256": "abc"}'
    )
    row = {"step": 4, "images": 16, "loss": 0.5, "images_per_second": 8.0, "seconds": 7.0}
    (run / "log.jsonl").write_text(json.dumps(row) + "\n")
    rows = {step: torch.rand(7, 3, 64, 64) for step in range(2, 42, 2)}
    (run / "samples").mkdir()
    for step, images in rows.items():
        to_grid(images, columns=7).save(run / "samples" / f"step-{step:08d}.png")
    sets = {"test": CONDITIONS, "valid": CONDITIONS[:2]}
    dataset = ICLEVRDataset(embedded_root)
    real = RealPictures(auditor, dataset)
    scored = {
        name: draw_and_judge(pipeline, conditions, evaluator, auditor, real, 2)
        for name, conditions in sets.items()
    }
    record_generator(
        "mine", pipeline, evaluator, scored, run / "pipeline", tmp_path / "results", embedded_root
    )
    folder = tmp_path / "results" / "mine"
    names = {"config.json", "metrics.json", "log.jsonl"}
    assert {path.name for path in folder.iterdir()} == names | {
        *("test.png", "denoising.png", "samples.png")
    }
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["training"]["images_per_second"] == 8
    assert metrics["training"]["machine"] == "mine"
    assert metrics["training"]["date"] == "2026-01-01" and "python" not in metrics["training"]
    steps = metrics["training"]["sample_steps"]
    assert (steps[0], steps[-1]) == (2, 40) and 4 < len(steps) <= 8 and steps == sorted(steps)
    drawn = split_grid(Image.open(folder / "samples.png")).reshape(len(steps), 7, 3, 64, 64)
    for step, row in zip(steps, drawn, strict=True):
        assert np.abs(row / 127.5 - 1 - rows[step].numpy()).max() < 0.01
    assert metrics["test"]["scores"]["num_pictures"] == 6
    assert metrics["test"]["audit"]["num_conditions"] == 3
    noted = ("packages", "precision", "data_sha256")
    assert [metrics["training"][key] for key in noted] == [{"torch": "1"}, "bfloat16", "abc"]
    assert metrics["data_sha256"] == data_hash(dataset.images, dataset.conditions)
    times = metrics["test"]["timesteps"]
    assert len(times) == metrics["test"]["num_inference_steps"] and times == sorted(times)[::-1]
    assert len(metrics["environment"]["weights_sha256"]) == 64
    record = read_record("mine", tmp_path / "results")
    for name, (found, _) in scored.items():
        verdicts = recorded_verdicts(record, name)
        assert verdicts == found["pictures"] and len(verdicts.seen) == 2 * len(sets[name])
        again = score_verdicts(verdicts)
        assert [again[part] for part in ("scores", "audit", "agreement")] == [
            found[part] for part in ("scores", "audit", "agreement")
        ]
        assert again["fidelity"].nearest_distance == found["fidelity"].nearest_distance


def test_record_sweep_tries_the_rest_at_the_best_guidance(
    pipeline, saved_pipeline, evaluator, embedded_root, tmp_path
):
    mine = shutil.copytree(saved_pipeline, tmp_path / "pipeline")
    tried = ((2.0, 1.0), (1,), ("DDIMScheduler", "dpmsolver++"))
    metrics = record_sweep(
        "s", pipeline, evaluator, CONDITIONS, *tried, 2, mine, tmp_path, True, embedded_root
    )

    def rows(name):
        keys = ("scheduler", "guidance_scale", "num_inference_steps")
        return [tuple(row[key] for key in keys) for row in metrics[name]]

    own, default = pipeline.config.num_inference_steps, scheduler_name(pipeline.scheduler)
    assert rows("guidance") == [(default, 1.0, own), (default, 2.0, own)]
    first, second = (row["top_k"].value for row in metrics["guidance"])
    best = 2.0 if second > first else 1.0
    assert metrics["best_guidance"] == best
    assert rows("steps") == [(default, best, 1)]
    assert rows("schedulers") == [("ddim", best, own), ("dpmsolver++", best, own)]
    assert load_pipeline(mine, "cpu").config.guidance_scale == best
    record = read_record("s", tmp_path)
    verdicts = Verdicts(**record.get("schedulers")[0]["pictures"])
    again = score_verdicts(verdicts)["scores"]
    assert (again.top_k, again.num_pictures) == (metrics["schedulers"][0]["top_k"], 6)
    assert verdicts.counted is None, "the auditor has no part in choices"
    assert record.environment["weights_sha256"] == file_hash(mine)
