"""Scores: pictures are drawn and judged once, and every score follows from the verdicts."""

import pytest
import torch

from lab7.auditor import Auditor, AuditorNetwork, compute_audit
from lab7.evaluator import Evaluator, build_network, compute_scores
from lab7.labels import encode
from lab7.scoring import (
    Verdicts,
    draw_and_judge,
    judge_pictures,
    label_names,
    score_table,
    score_verdicts,
)

CONDITIONS = [("red cube",), ("blue sphere", "gray cylinder"), ("cyan cube", "cyan sphere")]
RED, BLUE = 1, 10  # indices of red cube and blue sphere


@pytest.fixture(scope="module")
def evaluator():
    torch.manual_seed(0)
    return Evaluator(build_network(), "cpu")


@pytest.fixture(scope="module")
def auditor():
    torch.manual_seed(0)
    return Auditor(AuditorNetwork(), "cpu")


@pytest.fixture
def images():
    return torch.rand(6, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1


def verdicts(counted, seen=None, condition=None, conditions=(("red cube",),)):
    """Verdicts of pictures of which objects were counted, as indices."""
    condition = condition or [0] * len(counted)
    hits = [len({RED} & set(row)) for row in counted]
    asked = [list(labels) for labels in conditions]
    return Verdicts(asked, condition, list(range(len(counted))), hits, seen or counted, counted)


def test_pictures_are_what_the_seeds_give(pipeline, evaluator):
    metrics, images = draw_and_judge(
        pipeline, CONDITIONS, evaluator, repetitions=2, first_seed=10, progress=False
    )
    assert images.shape == (6, 3, 64, 64)
    again = pipeline(CONDITIONS, seeds=[13, 14, 15], output_type="pt", progress=False).images
    assert torch.allclose(images[3:], again, atol=1e-4)
    pictures = metrics["pictures"]
    assert pictures.condition == [0, 1, 2, 0, 1, 2] and pictures.seed == [10, 11, 12, 13, 14, 15]
    assert pictures.conditions == [list(labels) for labels in CONDITIONS]
    assert metrics["scores"].num_pictures == 6 and metrics["scores"].num_conditions == 3
    assert metrics["guidance_scale"] == pipeline.config.guidance_scale
    assert metrics["timesteps"] == pipeline.scheduler.timesteps.tolist()
    with pytest.raises(ValueError, match="repetitions 0 must be at least 1"):
        draw_and_judge(pipeline, CONDITIONS, evaluator, repetitions=0)


def test_scores_are_those_of_both_judges(evaluator, auditor, images):
    found = judge_pictures(images, CONDITIONS, evaluator, auditor)
    labels, groups = encode(CONDITIONS).repeat(2, 1), torch.arange(3).repeat(2)
    probabilities, counts = evaluator.predict(images), auditor.count(images)
    assert found["scores"] == compute_scores(probabilities, labels, groups)
    assert found["audit"] == compute_audit(counts, labels, groups)
    assert "fidelity" not in found and found["pictures"].seed is None
    lines = score_table({"mine": found}).splitlines()
    assert lines[0].split() == ["mine"] and lines[1].split() == ["pictures", "6"]
    assert [line.split("  ")[0] for line in lines[2:]] == [
        "conditions", "labels",
        "top-k", "exact set", "precision", "recall", "F1",
        "exact scene", "extra", "missing", "swapped", "doubled", "other",
        "same labels", "both right", "evaluator alone", "auditor alone", "both wrong",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="5 pictures do not fit 3 conditions"):
        judge_pictures(images[:5], CONDITIONS, evaluator, auditor)
    with pytest.raises(ValueError, match="6 pictures do not fit 0 conditions"):
        judge_pictures(images, [], evaluator, auditor)


def test_each_judge_looks_once(pipeline, evaluator, auditor, monkeypatch):
    looks = {"evaluator": 0, "auditor": 0}

    def count(judge, method, name):
        def look(images, *rest):
            looks[name] += len(images)
            return method(images, *rest)

        monkeypatch.setattr(judge, method.__name__, look)

    count(evaluator, evaluator.predict, "evaluator")
    count(auditor, auditor.count, "auditor")
    draw_and_judge(pipeline, CONDITIONS, evaluator, auditor, repetitions=2, progress=False)
    assert looks == {"evaluator": 6, "auditor": 6}


def test_judges_agree_where_they_say_the_same():
    found = score_verdicts(
        verdicts(
            counted=[[RED], [RED, RED], [RED], [BLUE]],
            seen=[[RED], [RED], [0], []],
        )
    )["agreement"]
    assert found.same_labels.hits == 2
    kinds = (found.both_right, found.evaluator_alone, found.auditor_alone, found.both_wrong)
    assert [kind.hits for kind in kinds] == [1, 1, 1, 1]


def test_verdicts_keep_what_is_there_twice_and_what_is_empty():
    said = verdicts(counted=[[RED, RED], []])
    audit = said.ratios()["audit"]
    assert [part.tolist() for part in audit["exact_scene"]] == [[False, False], [1, 1]]
    assert audit["extra"][0].tolist() == [True, False]
    assert label_names(said.counted) == [["red cube", "red cube"], []]


def test_fidelity_is_recorded_picture_by_picture(evaluator, auditor, images):
    class Real:
        def compare(self, images, labels, groups):
            assert groups.tolist() == [0, 1, 2, 0, 1, 2]
            return "kernel", [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]

    found = judge_pictures(images, CONDITIONS, evaluator, auditor, Real())
    assert found["fidelity"].kernel_distance == "kernel"
    assert found["pictures"].nearest == [1, 2, 3, 4, 5, 6]
    nearest = found["fidelity"].nearest_distance
    assert nearest == score_verdicts(found["pictures"])["fidelity"].nearest_distance
    assert nearest.value == 3.5 and nearest.hits is None
