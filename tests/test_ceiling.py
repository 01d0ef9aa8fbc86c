"""Renders of the conditions, judged as a generator's pictures are."""

import numpy as np
import pytest
import torch
from PIL import Image

from lab7.auditor import Auditor
from lab7.dataset import ICLEVRDataset
from lab7.evaluator import Evaluator
from lab7.plots import split_grid
from lab7.records import read_record
from workshop.judges.ceiling import compress, record_ceiling, render_conditions

pytest.importorskip("mitsuba")
CONDITIONS = [("red cube",), ("blue sphere", "yellow cylinder")]


def test_renders_show_their_conditions_and_score_so(tmp_path, embedded_root):
    found = record_ceiling(
        {"test": CONDITIONS},
        Evaluator.load(),
        Auditor.load(),
        ICLEVRDataset(embedded_root),
        repetitions=2,
        workers=1,
        results_root=tmp_path,
    )
    record = read_record("ceiling", tmp_path)
    verdicts = record.get("test.pictures")
    assert verdicts["condition"] == [0, 1, 0, 1] and verdicts["seed"] is None
    assert verdicts["counted"] == [[1], [10, 23]] * 2, "the auditor sees what was asked for"
    assert record.get("test.scores.top_k.value") == found["test"]["scores"].top_k.value == 1
    assert record.get("test.repetitions") == 2 and record.environment["weights_sha256"]
    with Image.open(tmp_path / "ceiling" / "test.png") as sheet:
        assert len(split_grid(sheet)) >= len(CONDITIONS)


def test_renders_are_new_each_time_and_the_same_when_repeated():
    drawn = render_conditions("test", CONDITIONS, 2, workers=1)
    assert drawn.shape == (4, 3, 64, 64) and drawn.dtype == torch.uint8
    assert not drawn[0].equal(drawn[2]), "two renders of one condition"
    assert drawn.equal(render_conditions("test", CONDITIONS, 2, workers=1))


@pytest.mark.parametrize("count", [1, 3, 5])
def test_compressing_keeps_number_and_order(count):
    levels = [30 * (i + 1) for i in range(count)]
    pictures = [np.full((64, 64, 3), level, np.uint8) for level in levels]
    packed = compress(pictures)
    assert packed.shape == (count, 3, 64, 64)
    assert packed.float().mean((1, 2, 3)).round().tolist() == pytest.approx(levels, abs=1)
