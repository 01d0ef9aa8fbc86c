"""What the label picker shows, without widgets: figures, marks, verdicts."""

import base64
import io
import re

import numpy as np
import torch
from PIL import Image

from lab7.auditor import Sighting
from lab7.labels import encode
from lab7.picker_html import draw_marks, figure, is_right, verdict
from lab7.pipeline import to_pil

BOTH = ["red cube", "cyan sphere"]


def see(*labels, x=30.0, y=30.0):
    """Sightings, the first ones the more probable, side by side unless told otherwise."""
    return [Sighting(label, x, y + 9 * n, 0.9 - n / 100) for n, label in enumerate(labels)]


def kinds(html):
    """By mark its kind and its text."""
    return re.findall(r'lab7-mark lab7-(\w+)" style="[^"]*"><span>([^<]*)</span>', html)


def rows(html):
    """By row of a verdict its label and what the judges say."""
    cells = (re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in html.split("<tr>")[2:])
    return {label: (auditor, evaluator) for label, auditor, evaluator in cells}


def test_a_figure_holds_its_pictures_pixel_by_pixel_and_says_what_they_are():
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    html = figure(images, "a < b")
    image = Image.open(io.BytesIO(base64.b64decode(re.search(r"base64,([^\"]+)", html)[1])))
    assert image.format == "PNG"
    expected = np.concatenate([np.asarray(one) for one in to_pil(images)], axis=1)
    assert np.array_equal(np.asarray(image), expected)
    assert 'alt="a &lt; b"' in html and ">a &lt; b</figcaption>" in html


def test_marks_are_right_doubled_or_wrong():
    found = see("red cube", "red cube", "gray cube", "gray cube")
    assert kinds(draw_marks(BOTH, found)) == [
        ("right", "✓ red cube"),
        ("doubled", "2× red cube"),
        ("wrong", "✗ gray cube"),
        ("wrong", "✗ gray cube"),
    ]
    assert kinds(draw_marks(BOTH, [])) == []


def test_the_more_probable_of_two_is_the_right_one():
    first, second = see("red cube", "red cube")
    html = draw_marks(BOTH, [second, first])
    assert f"--lab7-y: {100 * first.y / 64:.1f}%" in html.split("lab7-right")[1].split(">")[0]


def test_texts_of_marks_lie_within_the_picture_and_do_not_hide_one_another():
    crowd = see(*["blue cylinder"] * 4, x=1.0, y=28.0) + see(*["red cube"] * 2, x=63.0, y=50.0)
    html = draw_marks(BOTH, crowd)
    places = re.findall(r"text-x: ([\d.]+)%; --lab7-text-y: ([\d.]+)%", html)
    places = [(float(x), float(y)) for x, y in places]
    assert len(places) == 6
    assert all(15 <= x <= 85 and 0 <= y <= 100 for x, y in places)
    for n, (x, y) in enumerate(places):
        assert all(abs(x - a) > 30 or abs(y - b) > 7 for a, b in places[:n])


def test_a_row_for_each_label_that_is_asked_for_or_seen_by_a_judge():
    probabilities = encode([["red cube", "gray sphere"]])[0] * 0.9 + 0.02
    html = verdict(
        [*BOTH, "blue cube"], see("red cube", "blue cube", "blue cube", "green cube"), probabilities
    )
    assert rows(html) == {
        "red cube": ("✓ found", "92%"),
        "blue cube": ("<b>2× found</b>", "2%"),
        "green cube": ("<b>✗ extra</b>", "2%"),
        "gray sphere": ("– not found", "92%"),
        "cyan sphere": ("<b>✗ missing</b>", "2%"),
    }
    assert "✗ Not what was asked for." in html


def test_the_verdict_is_the_auditors():
    nothing = torch.zeros(24)
    assert "✓ Exactly what was asked for." in verdict(BOTH, see(*BOTH), nothing)
    assert "✗ Not" in verdict(BOTH, see("red cube"), encode([BOTH])[0])


def test_right_is_each_exactly_once_and_no_other():
    assert is_right(BOTH, see(*reversed(BOTH)))
    for others in ((), ("red cube",), (*BOTH, "red cube"), (*BOTH, "gray cube")):
        assert not is_right(BOTH, see(*others))


def test_more_objects_than_training_shows_are_said():
    few, many = BOTH, ["red cube", "blue cube", "gray cube", "cyan cube"]
    assert "at most 3" not in verdict(few, [], torch.zeros(24))
    assert "at most 3 objects" in verdict(many, [], torch.zeros(24))
