"""Checks of exercises, and pictures to move through."""

import io
import re

import pytest
import torch
from matplotlib.colors import to_hex
from PIL import Image

from lab7 import plots
from lab7.teaching import check, drawing, scrubber


@pytest.mark.parametrize(
    "answer, said",
    [
        (..., "not answered yet"),
        (0.5, "right"),
        (torch.tensor(0.5), "right"),
        ([0.5], "right"),
        (0.51, "not yet: h"),
        (float("nan"), "not yet: h"),
        *((wrong, "not yet: the answer is one number") for wrong in (None, "a", {1}, 1j, [...])),
        *((wrong, "not yet: the answer is one number") for wrong in ([1, 2], [[1], [1, 2]])),
    ],
)
def test_check(answer, said, capsys):
    check(answer, 0.5, "h")
    assert capsys.readouterr().out.startswith(said)


def test_check_of_a_tensor(capsys):
    for answer in ([1, 2, 3], torch.zeros(3), torch.zeros(1, 3)):
        check(answer, torch.tensor([1.0, 2.0, 3.0]), "one for each")
    right, wrong, shape = capsys.readouterr().out.splitlines()
    assert (right, wrong) == ("right", "not yet: one for each")
    assert shape == "not yet: the answer is a tensor of shape (3,)"


def test_drawing_has_boxes_and_arrows():
    boxes = {"a": (0, 0, "first"), "b": (1, 0, "second"), "c": (2, -1, "third")}
    chart = drawing(boxes, [("a", "b", 0), ("b", "c", 0.3)], 1.5)
    (axes,) = chart.axes
    assert {text.get_text() for text in axes.texts} >= {"first", "second", "third"}
    arrows = [text.arrow_patch for text in axes.texts if getattr(text, "arrow_patch", None)]
    assert [to_hex(arrow.get_edgecolor()).upper() for arrow in arrows] == [plots.INK, plots.ORANGE]
    assert chart._repr_png_()[0].startswith(b"\x89PNG")


def test_scrubber_shows_one_of_all_and_needs_no_script():
    pictures = torch.linspace(-1, 1, 3).view(3, 1, 1, 1).expand(3, 3, 64, 64)
    one, other = (scrubber(p, ["a", "b", "c"])._repr_html_() for p in (pictures, -pictures))
    assert one.count("<img") == 3 and one.count(" checked") == 1 and "<script" not in one
    groups = [set(re.findall('name="(.*?)"', html)) for html in (one, other)]
    assert [len(group) for group in groups] == [1, 1] and groups[0] != groups[1]


@pytest.mark.parametrize("count, shown", [(3, 3), (20, 8)])
def test_scrubber_has_a_strip_for_viewers_without_html(count, shown):
    made = scrubber(torch.zeros(count, 3, 64, 64), [f"t = {number}" for number in range(count)])
    captions = [text.get_text() for text in made.strip.axes[0].texts]
    assert len(captions) == shown and captions[0] == "t = 0" and captions[-1] == f"t = {count - 1}"
    drawn, _ = made._repr_png_()
    assert Image.open(io.BytesIO(drawn)).format == "PNG"
