"""What the report counts itself: failures, operations, code."""

import ast
import copy
import dataclasses
import shutil

import pytest
import torch

from lab7.dataset import CONDITION_FILES
from lab7.experiments import get_experiment
from lab7.labels import LABELS
from lab7.records import RESULTS_DIR, Record, count_passes, read_record
from lab7.training import learning_rate
from report.build import accuracy_table
from report.facts import compare_fast, cost, failures, listing, signal
from report.figures import draw_seeds

# For each set its conditions, and what the auditor counts in two pictures of each.
SEEN = {
    "test": {("red cube",): [["red cube"], ["blue cube"]]},
    "new_test": {("red cube", "red sphere"): [["red cube", "red cube"], ["red cube"]]},
    "valid": {("red cube", "blue sphere"): [["red cube", "blue sphere"]] * 2},
    "unseen": {
        ("red cube", "red sphere", "blue cube"): [
            ["red cube", "red sphere", "red sphere"],
            ["red cube", "red sphere", "blue cube"],
        ]
    },
    "four_five": {("red cube", "red sphere", "blue cube", "gray cube"): [[], []]},
}


def make_record():
    metrics = {}
    for name in CONDITION_FILES:
        conditions, counted = list(SEEN[name]), list(SEEN[name].values())
        indices = [[[LABELS.index(x) for x in row[i]] for row in counted] for i in (0, 1)]
        metrics[name] = {
            "pictures": {
                "conditions": [list(labels) for labels in conditions],
                "condition": list(range(len(conditions))) * 2,
                "hits": [0] * 2 * len(conditions),
                "seen": [[]] * 2 * len(conditions),
                "counted": sum(indices, []),
            }
        }
    return Record("ours", {}, metrics, {})


def test_failures_are_sorted_by_number_label_and_pair():
    found = failures(make_record())
    wrong = {
        n: row["num_pictures"] - row["exact_scene"]["hits"] for n, row in found["by_count"].items()
    }
    assert wrong == {1: 1, 2: 2, 3: 1, 4: 2}
    assert [found["by_count"][n]["doubled"]["hits"] for n in (1, 2, 3, 4)] == [0, 1, 1, 0]
    assert found["by_count"][4]["missing"]["hits"] == 2
    # Of at most three objects: with four, training shows nothing alike.
    assert found["by_label"]["red cube"] == {"missed": 1, "asked": 8}
    assert found["by_label"]["red sphere"] == {"missed": 2, "asked": 4}
    assert found["by_label"]["gray cube"] == {"missed": 0, "asked": 0}
    shares = {key: (row["hits"], row["total"]) for key, row in found["sharing"].items()}
    assert shares == {"both": (1, 2)}, "of triples"
    assert found["confirmed"] == 4, "the evaluator sees nothing in any picture"
    assert found["pairs"][0] == ["red cube", "red sphere", 3, 4] and found["num_pairs"] == 4
    # blue cube for red cube, red cube for red sphere, red sphere for blue cube
    assert found["lost"] == {"shape": 1, "color": 1, "nothing": 1}


def test_parameters_and_operations_are_those_known_of_the_original():
    """Measured before: 113.7 M and 31.0 GFLOP, with half the channels 28.4 M and 7.8."""
    for name, parameters, operations in (
        ("original-baseline", 113.7e6, 31.0e9),
        ("original-half-channels", 28.4e6, 7.8e9),
    ):
        found = cost(get_experiment(name).config)
        assert found["parameters"] == pytest.approx(parameters, rel=2e-3)
        assert found["operations"] == pytest.approx(operations, rel=4e-3)


def test_signal_of_gray_pictures_drowns_sooner():
    pictures = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)  # black: -1 everywhere
    strong, weak = signal(pictures), signal(pictures + 112)
    assert strong["power"] == 1 and weak["power"] == pytest.approx((112 / 127.5 - 1) ** 2)
    for schedule in ("linear", "cosine"):
        assert weak["drowned"][schedule] > strong["drowned"][schedule] > 0
    assert strong["drowned"]["linear"] > strong["drowned"]["cosine"]


def test_listing_is_the_source_without_docstrings():
    text = listing(learning_rate, dataclasses.dataclass)
    assert text.startswith("# lab7/training.py, learning_rate\ndef learning_rate(")
    assert '"""' not in text and "config.warmup_steps" in text
    ast.parse(text)


def test_the_fast_generator_is_compared_over_the_same_pictures(tmp_path):
    ours = read_record("ours")
    found = compare_fast({"ours": ours, "fast": ours})
    assert found["passes"] == count_passes(ours.get("test"))
    for scores in found["differences"].values():
        assert all((gap["value"], gap["low"], gap["high"]) == (0, 0, 0) for gap in scores.values())
    assert compare_fast({"ours": ours}) is None
    other = copy.deepcopy(ours)
    other.metrics["valid"]["pictures"]["seed"][0] += 1
    with pytest.raises(ValueError, match="'ours' and 'fast' are of other .* seeds in 'valid'"):
        compare_fast({"ours": ours, "fast": other})
    for name in ("ours", "fast"):
        shutil.copytree(RESULTS_DIR / "ours", tmp_path / name)
    assert draw_seeds(tmp_path).get_figwidth() > 0
    assert f"**its fast version**, {found['passes']} passes" in accuracy_table(
        {"ours": ours, "fast": ours, "evaluator": read_record("evaluator")}
    )
