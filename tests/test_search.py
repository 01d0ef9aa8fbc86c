"""The search for the cheapest sampler: the finals, the choice, the log."""

import json
import shutil
from dataclasses import asdict

import pytest
import torch

from lab7.auditor import Auditor, AuditorNetwork
from lab7.diffusion import convert_scheduler
from lab7.evaluator import Evaluator, build_network
from lab7.labels import LABELS
from lab7.pipeline import SETTINGS, ConditionalDDPMPipeline, load_pipeline
from lab7.records import read_log, read_record
from lab7.scoring import Verdicts, draw_and_judge
from workshop.records import file_hash
from workshop.study import search
from workshop.study.search import (
    Candidate,
    draw_candidate,
    record_search,
    search_sampler,
)

CONDITIONS = [[label] for label in LABELS] * 4
CHEAP, MIDDLE, DEAR, DEAREST = (Candidate(num_inference_steps=count) for count in (8, 12, 16, 20))


def judged(wrong):
    """Draw pictures of which those of the given rows, by candidate, show nothing."""
    drawn = []

    def draw(candidate, conditions, repetitions):
        drawn.append((candidate, len(conditions), repetitions))
        condition = list(range(len(conditions))) * repetitions
        right = [row % 96 not in wrong[candidate] for row in range(len(condition))]
        labels = [LABELS.index(conditions[row][0]) for row in condition]
        seen = [[label] if hit else [] for label, hit in zip(labels, right, strict=True)]
        verdicts = Verdicts(conditions, condition, None, [*map(int, right)], seen, seen)
        passes = candidate.num_inference_steps
        return {"candidate": candidate, "passes": passes, "pictures": verdicts}

    return draw, drawn


def test_the_cheapest_is_chosen_that_cannot_be_told_from_the_default():
    draw, drawn = judged({DEAREST: {3, 4}, DEAR: {0}, MIDDLE: {1, 2}, CHEAP: range(60)})
    found = search_sampler(draw, CONDITIONS, (DEAREST, DEAR, MIDDLE, CHEAP), seeds=5)
    assert found["chosen"] == MIDDLE and "yardstick" not in found
    screen = [(candidate, 96, 3) for candidate in (DEAREST, DEAR, MIDDLE, CHEAP)]
    assert drawn == screen + [(candidate, 96, 5) for candidate in (CHEAP, MIDDLE, DEAR, DEAREST)]
    assert [row["worse"] for row in found["screen"]] == [False, False, False, True]
    worst = found["screen"][-1]
    assert worst["exact_set"].value == worst["exact_scene"].value == 36 / 96
    assert worst["difference"]["exact_set"].high < 0
    assert [row["worse"] for row in found["finals"]] == [True, False, False, False]


def test_only_the_best_of_the_screen_are_finalists():
    least = Candidate(num_inference_steps=4)
    wrong = {DEAREST: (), DEAR: {0}, MIDDLE: {1}, CHEAP: range(9), least: range(20)}
    draw, _ = judged(wrong)
    found = search_sampler(draw, CONDITIONS, tuple(wrong), yardstick=DEAREST, seeds=4)
    names = [str(one) for one in (CHEAP, MIDDLE, DEAR, DEAREST)]
    assert [row["name"] for row in found["finals"]] == names and found["chosen"] == MIDDLE
    assert [len(row["pictures"].condition) for row in found["yardstick"]] == [96, 96]


def test_the_default_stays_where_all_others_are_worse():
    draw, _ = judged({DEAREST: range(40), CHEAP: range(60), DEAR: range(90)})
    found = search_sampler(draw, CONDITIONS, (DEAREST, CHEAP, DEAR), seeds=2)
    assert found["chosen"] == DEAREST


@pytest.fixture
def judges():
    torch.manual_seed(0)
    auditor, evaluator = AuditorNetwork(), build_network()
    return {"evaluator": Evaluator(evaluator, "cpu"), "auditor": Auditor(auditor, "cpu")}


def test_a_candidate_is_drawn_as_it_says_and_once(pipeline, judges, tmp_path):
    seen, log = [], tmp_path / "log.jsonl"
    pipeline.unet.register_forward_pre_hook(
        lambda _, args: seen.append((int(args[1]), len(args[0])))
    )
    candidate = Candidate("ddim", 3, 2.5, (300, 700), 2.0)
    row = draw_candidate(candidate, CONDITIONS[:2], 2, log, pipeline, **judges)
    assert seen == 2 * [(995, 2), (796, 2), (498, 4)] and row["passes"] == 4
    again = draw_candidate(candidate, CONDITIONS[:2], 2, log, pipeline, **judges)
    assert again == row and len(seen) == 6
    draw_candidate(candidate, CONDITIONS[:2], 3, log, pipeline, **judges)
    assert len(seen) == 9 and len(read_log(log)) == 3, "only what is missing"


def test_a_candidate_without_a_shift_draws_as_the_pipeline_does(pipeline, judges, tmp_path):
    candidate = Candidate("ddim", 3, 2.5, (300, 700))
    row = draw_candidate(candidate, CONDITIONS[:2], 3, tmp_path / "log.jsonl", pipeline, **judges)
    settings = {name: getattr(candidate, name) for name in SETTINGS}
    drawing = ConditionalDDPMPipeline(
        pipeline.unet, convert_scheduler(pipeline.scheduler, "ddim"), **settings
    )
    expected, _ = draw_and_judge(drawing, CONDITIONS[:2], **judges, repetitions=3)
    assert row["pictures"] == expected["pictures"]


def test_the_record_holds_what_was_tried_and_the_choice(
    saved_pipeline, judges, tmp_path, monkeypatch
):
    mine = shutil.copytree(saved_pipeline, tmp_path / "pipeline")
    tried = (Candidate(num_inference_steps=3), Candidate(num_inference_steps=2, guidance_scale=2.0))
    monkeypatch.setattr(search, "CANDIDATES", tried)
    monkeypatch.setattr(search, "named_conditions", lambda name: CONDITIONS[:2])
    for judge in ("Evaluator", "Auditor"):
        loaded = judges[judge.lower()]
        monkeypatch.setattr(getattr(search, judge), "load", lambda device, loaded=loaded: loaded)
    found = record_search("s", mine, False, 3, True, tmp_path / "work", tmp_path, "cpu")
    record = read_record("s", tmp_path)
    assert record.get("chosen") == json.loads(json.dumps(asdict(found["chosen"])))
    assert record.environment["weights_sha256"] == file_hash(mine / "unet")
    assert [row["name"] for row in record.get("screen")] == [str(one) for one in tried]
    kept = load_pipeline(mine, "cpu")
    assert kept.settings() == {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in asdict(found["chosen"]).items()
        if name in SETTINGS
    }
    assert record_search("s", mine, False, 3, False, tmp_path / "work", tmp_path, "cpu") == found
