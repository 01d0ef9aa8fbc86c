"""Records of the project: of a generator's scores, and of the choice of its sampling settings."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from lab7.auditor import Auditor, AuditorNetwork
from lab7.dataset import CONDITION_FILES, ICLEVRDataset, data_hash
from lab7.diffusion import scheduler_name
from lab7.errors import UserError
from lab7.estimates import mean
from lab7.evaluator import Evaluator, build_network
from lab7.experiments import get_experiment
from lab7.pipeline import load_pipeline
from lab7.plots import split_grid
from lab7.records import read_record, read_records
from lab7.sampling import to_grid
from lab7.scoring import Verdicts, draw_and_judge, score_verdicts
from report.build import accuracy_table, build
from workshop.judges.fidelity import Agreement, RealPictures
from workshop.records import file_hash
from workshop.study.evaluation import Judges, score_generator
from workshop.study.recording import record_generator, record_sweep, require_same_pictures

CONDITIONS = [("red cube",), ("blue sphere", "gray cylinder"), ("cyan cube", "cyan sphere")]


@pytest.fixture(scope="module")
def evaluator():
    torch.manual_seed(0)
    return Evaluator(build_network(), "cpu")


@pytest.fixture
def real(embedded_root):
    torch.manual_seed(0)
    return RealPictures(Auditor(AuditorNetwork(), "cpu"), ICLEVRDataset(embedded_root))


@pytest.fixture
def run(saved_pipeline, tmp_path):
    """Folder of a training of four steps that drew twenty rows of samples."""
    folder = tmp_path / "run"
    shutil.copytree(saved_pipeline, folder / "pipeline")
    config = dataclasses.asdict(get_experiment("ours").config)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "environment.json").write_text(
        '{"machine": "mine", "date": "2026-01-01", "git_commit": null, "python": "3", '
        '"packages": {"torch": "1"}, "precision": "bfloat16", "data_sha256": "abc"}'
    )
    row = {"step": 4, "images": 16, "loss": 0.5, "lr": 0.1, "images_per_second": 8.0}
    (folder / "log.jsonl").write_text(json.dumps(row | {"seconds": 7.0}) + "\n")
    (folder / "samples").mkdir()
    for step in range(2, 42, 2):
        pictures = torch.full((7, 3, 64, 64), step / 42)
        to_grid(pictures, columns=7).save(folder / "samples" / f"step-{step:08d}.png")
    return folder


def test_record_generator_keeps_scores_pictures_and_log(
    pipeline, evaluator, real, run, embedded_root, tmp_path
):
    sets = {"test": CONDITIONS, "valid": CONDITIONS[:2]}
    scored = score_generator(pipeline, sets, Judges(evaluator, real.auditor, real), 2)
    record_generator(
        "mine", pipeline, evaluator, scored, run / "pipeline", tmp_path / "results", embedded_root
    )
    folder = tmp_path / "results" / "mine"
    names = {"config.json", "metrics.json", "log.jsonl"}
    assert {path.name for path in folder.iterdir()} == names | {
        *("test.png", "denoising.png", "samples.png")
    }
    assert (folder / "log.jsonl").read_bytes() == (run / "log.jsonl").read_bytes()
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["training"]["images_per_second"] == 8
    assert metrics["training"]["machine"] == "mine"
    assert metrics["training"]["date"] == "2026-01-01" and "python" not in metrics["training"]
    steps = metrics["training"]["sample_steps"]
    assert (steps[0], steps[-1]) == (2, 40) and 4 < len(steps) <= 8 and steps == sorted(steps)
    drawn = split_grid(Image.open(folder / "samples.png")).reshape(len(steps), 7, 3, 64, 64)
    for step, row in zip(steps, drawn, strict=True):
        assert np.abs(row / 127.5 - 1 - step / 42).max() < 0.01
    assert metrics["test"]["scores"]["num_pictures"] == 6
    assert metrics["test"]["audit"]["num_conditions"] == 3
    noted = ("packages", "precision", "data_sha256")
    assert [metrics["training"][key] for key in noted] == [{"torch": "1"}, "bfloat16", "abc"]
    dataset = ICLEVRDataset(embedded_root)
    assert metrics["data_sha256"] == data_hash(dataset.images, dataset.conditions)
    times = metrics["test"]["timesteps"]
    assert len(times) == metrics["test"]["num_inference_steps"] and times == sorted(times)[::-1]
    assert len(metrics["environment"]["weights_sha256"]) == 64
    record = read_record("mine", tmp_path / "results")
    for name, (found, _) in scored.items():
        verdicts = Verdicts(**record.get(f"{name}.pictures"))
        assert verdicts == found["pictures"] and len(verdicts.seen) == 2 * len(sets[name])
        again = score_verdicts(verdicts)
        assert [again[part] for part in ("scores", "audit")] == [found["scores"], found["audit"]]
        assert Agreement.of(verdicts) == found["agreement"]
        assert mean(verdicts.nearest, verdicts.condition) == found["fidelity"].nearest_distance


def test_report_and_readme_read_new_records(
    pipeline, evaluator, real, run, embedded_root, tmp_path
):
    results, mine = tmp_path / "results", run / "pipeline"
    sets = dict.fromkeys(CONDITION_FILES, CONDITIONS)
    scored = score_generator(pipeline, sets, Judges(evaluator, real.auditor, real), 1)
    record_generator("ours", pipeline, evaluator, scored, mine, results, embedded_root)
    tried = ((1.0, 2.0), (1, 2), ("sde-dpmsolver++", "ddim", "ddpm", "dpmsolver++"))
    record_sweep(
        "sweep", pipeline, evaluator, CONDITIONS, *tried, 1, mine, results, data=embedded_root
    )
    build(tmp_path / "report", results, embedded_root)
    top_k = read_record("ours", results).get("test.scores.top_k")
    shown = "{value:.3f} ({low:.3f}–{high:.3f})".format(**top_k)
    assert shown in (tmp_path / "report" / "report.html").read_text().replace("\xa0", " ")
    assert shown in accuracy_table(read_records(results))


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
    assert record.environment["weights_sha256"] == file_hash(mine / "unet")
    pictures = draw_and_judge(pipeline, CONDITIONS, evaluator, repetitions=2, guidance_scale=2.0)
    assert metrics["guidance"][1]["pictures"] == pictures[0]["pictures"], "the shipped sampler"


def test_a_setting_of_two_lists_is_drawn_once(pipeline, saved_pipeline, embedded_root, tmp_path):
    evaluator, looks = Evaluator(build_network(), "cpu"), []
    predict = evaluator.predict
    evaluator.predict = lambda images: looks.append(len(images)) or predict(images)
    own, sampler = pipeline.config.num_inference_steps, scheduler_name(pipeline.scheduler)
    tried = ((1.0,), (own,), (sampler,))
    record_sweep(
        "s", pipeline, evaluator, CONDITIONS, *tried, 1, saved_pipeline, tmp_path,
        data=embedded_root,
    )  # fmt: skip
    assert looks == [3]


def test_what_cannot_be_swept_is_refused_before_drawing(pipeline, saved_pipeline, tmp_path):
    (tmp_path / "file").write_text("no folder")
    for tried, root, message in (
        (((), (1,), ("ddim",)), tmp_path, "no guidance scales"),
        (((1.0,), (1,), ("ddimm",)), tmp_path, "did you mean 'ddim'"),
        (((1.0,), (1,), ("ddim",)), tmp_path / "file", "file"),
    ):
        with pytest.raises(UserError, match=message):
            record_sweep("s", pipeline, None, CONDITIONS, *tried, 1, saved_pipeline, root)


def test_a_generator_of_the_courses_pictures_is_not_scored_on_others(run, embedded_root):
    require_same_pictures(run / "pipeline", embedded_root)
    (run / "environment.json").write_text('{"course_pictures": true}')
    with pytest.raises(UserError, match="run was trained on other pictures"):
        require_same_pictures(run / "pipeline", embedded_root)
