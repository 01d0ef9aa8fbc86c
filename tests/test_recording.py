"""Comparisons of recorded runs: paired, and only of what belongs together."""

import dataclasses

import pytest

from lab7.recording import comparable, compare_paired
from lab7.records import Record, read_record, write_record
from lab7.scoring import Verdicts, score_verdicts

RED, BLUE = 1, 10  # indices of red cube and blue sphere


def make(name, wrong=0, seed=0, images=6000, data="abc", first_seed=0, **changes):
    """A record of 40 pictures of 20 conditions, the first few of which are wrong."""
    drawn = [[BLUE] if row % 20 < wrong else [RED] for row in range(40)]
    hits = [int(row == [RED]) for row in drawn]
    seeds = list(range(first_seed, first_seed + 40))
    verdicts = Verdicts([["red cube"]] * 20, list(range(20)) * 2, seeds, hits, drawn, drawn)
    found = {"num_inference_steps": 20, "pictures": dataclasses.asdict(verdicts)}
    found |= score_verdicts(verdicts) | changes
    training = {"images": images, "data_sha256": data}
    metrics = {"test": found, "training": training}
    return Record(name, {"seed": seed}, metrics, {"weights_sha256": name})


def test_one_training_seed_is_said():
    found = compare_paired(make("a"), make("b", wrong=8))
    assert found.difference.value == 0.4 and found.difference.low > 0
    assert (found.verdict, found.training_seeds) == ("better (one training seed)", (1, 1))
    assert compare_paired(make("a", 8), make("b")).verdict == "worse (one training seed)"
    assert compare_paired(make("a"), make("b", wrong=1)).verdict == "not to be told apart"
    assert compare_paired(make("a", 3), make("b", 3)).difference.value == 0
    many = [make("b", 8, seed) for seed in (0, 1)]
    assert compare_paired(make("a"), many).verdict == "better (one training seed)"
    twice = [make("a"), make("c")]
    assert compare_paired(twice, many).training_seeds == (1, 2), "the same seed is no second one"


def test_difference_pools_trainings_and_pairs_conditions():
    first, second = make("a"), make("b", wrong=5)
    found = compare_paired(first, second).difference
    assert found.value == 0.25 and 0 < found.low < 0.25 < found.high
    both = compare_paired([first, second], second, score="exact_scene").difference
    assert both.value == pytest.approx(0.125)
    turned = compare_paired(second, first).difference
    assert (turned.low, turned.high) == pytest.approx((-found.high, -found.low))
    first.metrics["test"]["pictures"]["nearest"] = [3.0] * 40
    second.metrics["test"]["pictures"]["nearest"] = [1.0] * 40
    assert compare_paired(first, second, score="nearest_distance").difference.value == 2


def test_better_needs_trainings_that_differ_by_less():
    first = [make("a", 0, seed=0), make("b", 1, seed=1)]
    assert compare_paired(first, [make("c", 9, 0), make("d", 10, 1)]).verdict == "better"
    assert compare_paired([make("c", 9, 0), make("d", 10, 1)], first).verdict == "worse"
    unsteady = [make("c", 3, 0), make("d", 15, 1)]
    found = compare_paired(first, unsteady, score="exact_scene")
    assert found.difference.low > 0 and found.verdict == "not to be told apart"


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (make("b", images=3000), "'a' and 'b' .* pictures of training .6000 and 3000"),
        (make("b", data="xyz"), "'a' and 'b' .* training data .abc and xyz"),
        (make("b", first_seed=1), "'a' and 'b' .* differ in seeds$"),
        (make("b", num_inference_steps=5), "'a' and 'b' .* sampling steps .20 and 5"),
    ],
)
def test_what_cannot_be_paired_is_refused(other, message):
    with pytest.raises(ValueError, match=message):
        compare_paired(make("a"), other)


def test_other_conditions_and_unknown_names_are_refused():
    other = make("b")
    other.metrics["test"]["pictures"]["conditions"][3] = ["gray cube"]
    with pytest.raises(ValueError, match="differ in conditions$"):
        compare_paired(make("a"), other)
    course = make("b")
    course.metrics["course"] = {"pictures": False, "evaluator": True}
    with pytest.raises(ValueError, match="differ in origin of pictures and evaluator .None and"):
        compare_paired(make("a"), course)
    with pytest.raises(ValueError, match="record 'a' has no 'tset.pictures'.*did you mean 'test'"):
        compare_paired(make("a"), make("b"), "tset")
    with pytest.raises(ValueError, match="no score 'topk': did you mean 'top_k'"):
        compare_paired(make("a"), make("b"), score="topk")
    with pytest.raises(ValueError, match="no records"):
        compare_paired([], make("b"))


def test_comparison_of_records_on_disk(tmp_path):
    for record in (make("a"), make("b", wrong=8)):
        write_record(record.name, record.config, record.metrics, tmp_path)
    first, second = (read_record(name, tmp_path) for name in "ab")
    assert compare_paired(first, second) == compare_paired(make("a"), make("b", wrong=8))


def test_a_table_is_of_one_budget_one_data_set_and_one_record_a_run():
    again, untrained, empty = make("again"), make("untrained"), make("empty")
    again.environment["weights_sha256"] = "a"
    del untrained.metrics["training"], empty.metrics["test"]
    records = [make("short", images=3000), make("a"), make("b", 2), make("c", data="xyz")]
    records = {record.name: record for record in [*records, again, untrained, empty]}
    kept, left_out = comparable(records)
    assert list(kept) == ["a", "b"]
    assert left_out == {
        "short": "short was trained on 3,000 pictures, the rest of its table on 6,000",
        "c": "c was trained on another data set than the rest of its table",
        "again": "again is of the same run as a",
        "untrained": "untrained has no noted training",
        "empty": "empty has no scores of 'test'",
    }
    assert comparable({}) == ({}, {})
