"""The label picker without a browser: threads, texts, pictures."""

import base64
import inspect
import io
import re
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from IPython.core.formatters import DisplayFormatter
from PIL import Image
from torch import Tensor

from lab7.diffusion import convert_scheduler
from lab7.experiments import get_experiment
from lab7.labels import COLORS, LABELS, SHAPES, encode
from lab7.model import ConditionalUNet
from lab7.picker import SCREENSHOT, LabelPicker, Request, hint, summarize, verdict_table
from lab7.pipeline import ConditionalDDPMPipeline, to_pil

CSS = Path(inspect.getfile(LabelPicker)).with_suffix(".css").read_text(encoding="utf-8")
WIDGET_MIME = "application/vnd.jupyter.widget-view+json"
SECONDS = 120  # for anything that a slow machine may take long for


class StandInEvaluator:
    """Sees what it is told to, and keeps what it was shown."""

    def __init__(self, *seen: str):
        self.probabilities = encode([seen]) * 0.9 + 0.05
        self.images: list[Tensor] = []

    def predict(self, images: Tensor) -> Tensor:
        self.images.append(images)
        return self.probabilities


@pytest.fixture
def pipeline():
    torch.manual_seed(0)
    config = get_experiment("smoke").config
    scheduler = convert_scheduler(DDPMScheduler(**config.noise), config.scheduler)
    return ConditionalDDPMPipeline(ConditionalUNet(**config.unet).eval(), scheduler, 2, 3.0)


def hold_at_step(picker, step):
    """Make the picker wait before a step; returns what to wait for, and what lets it go on."""
    reached, go_on = threading.Event(), threading.Event()
    reverse = picker.pipeline.reverse

    def slow(*args, **settings):
        for number, frame in enumerate(reverse(*args, **settings), 1):
            if number == step:
                reached.set()
                assert go_on.wait(SECONDS)
            yield frame

    picker.pipeline.reverse = slow
    return reached, go_on


def generate(picker):
    picker.generate.click()
    picker.thread.join(SECONDS)
    assert not picker.thread.is_alive()
    return picker.status.value


def shown(widget):
    """A widget and all that is in it."""
    return [widget, *(one for child in getattr(widget, "children", ()) for one in shown(child))]


def image_of(widget):
    return Image.open(io.BytesIO(widget.value)).convert("RGB")


def test_shows_the_picture_that_the_pipeline_draws(pipeline):
    evaluator = StandInEvaluator("red cube", "blue cylinder")
    picker = LabelPicker(pipeline, evaluator, labels=["Blue Cylinder", "red cube"], seed=7)
    before = picker.verdict.value
    status = generate(picker)
    expected = pipeline(
        [["red cube", "blue cylinder"]], seeds=[7], output_type="pt", progress=False
    ).images
    assert torch.allclose(evaluator.images[0], expected, atol=1e-5)
    difference = np.asarray(image_of(picker.picture), int) - np.asarray(to_pil(expected)[0], int)
    assert abs(difference).max() <= 1
    assert picker.verdict.value == verdict_table(
        ["red cube", "blue cylinder"], evaluator.probabilities[0]
    )
    assert before == verdict_table((), None)
    assert "Asked for: red cube, blue cylinder" in status and "exactly what was asked" in status
    assert "2 steps, guidance 3, seed 7: " in status
    assert picker.error is None


def test_every_step_is_shown(pipeline):
    picker = LabelPicker(pipeline, num_inference_steps=3)
    frames = []
    for widget in (picker.noisy, picker.picture):
        widget.observe(lambda change: frames.append(change.owner), "value")
    generate(picker)
    assert frames.count(picker.noisy) == 3
    assert frames.count(picker.picture) >= 3  # the finished picture may be one more
    assert image_of(picker.noisy).size == image_of(picker.picture).size == (64, 64)
    assert picker.progress.value == picker.progress.max == 3
    assert "t = " in picker.noisy_caption.value
    assert picker.picture_caption.value == "Finished picture"


def test_sliders_decide(pipeline):
    picker = LabelPicker(pipeline, labels=["gray sphere"])
    pictures = []
    for slider, value in ((picker.seed, 0), (picker.seed, 1), (picker.guidance, 8.0)):
        slider.value = value
        generate(picker)
        pictures.append(picker.picture.value)
    assert len(set(pictures)) == 3
    assert picker.request() == Request(("gray sphere",), 2, 8.0, 1)


def test_guidance_is_for_the_time_steps_of_the_pipeline(pipeline):
    pipeline = ConditionalDDPMPipeline(
        pipeline.unet, pipeline.scheduler, 3, 3.0, guidance_interval=(0, 500)
    )
    picker, rows = LabelPicker(pipeline), []
    pipeline.unet.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    generate(picker)
    assert rows == [1, 1, 2]


def test_more_than_the_sliders_usually_offer(pipeline):
    picker = LabelPicker(pipeline, seed=123_456, num_inference_steps=400, guidance_scale=12.0)
    assert picker.request() == Request(("red cube", "blue cylinder"), 400, 12.0, 123_456)


def test_stop_keeps_the_picture_and_gives_no_verdict(pipeline):
    evaluator = StandInEvaluator()
    picker = LabelPicker(pipeline, evaluator, num_inference_steps=50)
    reached, go_on = hold_at_step(picker, 3)
    assert picker.stop.disabled
    picker.generate.click()
    assert reached.wait(SECONDS) and not picker.stop.disabled
    picker.stop.click()
    assert picker.stop.disabled
    go_on.set()
    picker.thread.join(SECONDS)
    assert "Stopped after step 3 of 50" in picker.status.value
    assert not evaluator.images
    assert not picker.generate.disabled and picker.stop.disabled


def test_one_drawing_at_a_time_and_changes_wait_for_the_next(pipeline):
    evaluator = StandInEvaluator("red cube")
    picker = LabelPicker(pipeline, evaluator, labels=["red cube"])
    reached, go_on = hold_at_step(picker, 2)
    picker.generate.click()
    assert reached.wait(SECONDS) and picker.generate.disabled
    first = picker.thread
    picker.toggles["cyan cube"].value = True
    picker.steps.value = 9
    assert picker.generate.disabled
    picker._start()  # what a click does that was on its way
    assert picker.thread is first
    go_on.set()
    first.join(SECONDS)
    assert "Asked for: red cube<br>" in picker.status.value and "2 steps" in picker.status.value
    assert len(evaluator.images) == 1
    assert picker.request().labels == ("red cube", "cyan cube")


def test_a_stop_does_not_outlive_its_drawing(pipeline):
    picker = LabelPicker(pipeline)
    picker._request_stop()
    assert "2 steps, guidance 3, seed 0: " in generate(picker)


def test_an_error_is_shown_in_one_line_and_the_picker_goes_on(pipeline):
    evaluator = StandInEvaluator()
    picker = LabelPicker(pipeline, evaluator)

    def fail(images):
        raise RuntimeError("out of <memory>\nand a long tail")

    evaluator.predict, works = fail, evaluator.predict
    status = generate(picker)
    assert 'role="alert"' in status
    assert "Could not draw this picture. RuntimeError: out of &lt;memory&gt;</div>" in status
    assert isinstance(picker.error, RuntimeError)
    assert not picker.generate.disabled and picker.stop.disabled
    evaluator.predict = works
    assert "nothing" in generate(picker)
    assert picker.error is None


def test_the_notebook_may_use_the_pipeline_meanwhile(pipeline):
    picker = LabelPicker(pipeline, num_inference_steps=4)
    generate(picker)
    undisturbed = picker.picture.value
    reached, go_on = hold_at_step(picker, 2)
    picker.generate.click()
    assert reached.wait(SECONDS)
    pipeline([["gray cube"]], num_inference_steps=7, progress=False)
    go_on.set()
    picker.thread.join(SECONDS)
    assert picker.picture.value == undisturbed


def test_nothing_chosen_nothing_drawn(pipeline):
    picker = LabelPicker(pipeline)
    picker.clear.click()
    assert picker.request().labels == ()
    assert picker.generate.disabled and picker.clear.disabled
    assert picker.hint.value == "Choose at least one object."
    picker._start()
    assert picker.thread is None
    picker.toggles["red cube"].value = True
    assert not picker.generate.disabled


@pytest.mark.parametrize(
    ("labels", "match"),
    [(["red cubes"], "did you mean 'red cube'"), (["red cube"] * 2, "twice"), ("red cube", "list")],
)
def test_wrong_labels(pipeline, labels, match):
    with pytest.raises(ValueError, match=match):
        LabelPicker(pipeline, labels=labels)


def test_without_an_evaluator_there_is_no_verdict(pipeline):
    picker = LabelPicker(pipeline)
    status = generate(picker)
    assert "Asked for: red cube, blue cylinder" in status and "evaluator" not in status
    assert picker.verdict not in shown(picker)
    assert picker.picture in shown(picker)


def test_toggles_say_what_they_are(pipeline):
    picker = LabelPicker(pipeline)
    assert list(picker.toggles) == list(LABELS)
    for label, toggle in picker.toggles.items():
        assert "lab7-" + label.replace(" ", "-") in toggle._dom_classes
        assert toggle.description == label
    assert picker.toggles["red cube"].tooltip == "red cube: chosen"
    picker.toggles["red cube"].value = False
    assert picker.toggles["red cube"].tooltip == "red cube: not chosen"


def test_labels_can_be_read_on_their_colors():
    def luminance(color):
        srgb = np.array([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
        return linear @ (0.2126, 0.7152, 0.0722)

    rule = r"\.lab7-(\w+) { --lab7-object: (#\w{6}); --lab7-on-object: (#\w{6}); }"
    rules = {name: pair for name, *pair in re.findall(rule, CSS)}
    assert tuple(rules) == COLORS
    for color, pair in rules.items():
        dark, light = sorted(map(luminance, pair))
        assert (light + 0.05) / (dark + 0.05) >= 4.5, color  # WCAG 2, level AA


def test_hint_is_kind_about_many_objects():
    assert hint(LABELS[:1]) == "1 object chosen."
    assert hint(LABELS[:3]) == "3 objects chosen."
    assert hint(LABELS[:5]).startswith("5 objects chosen. Training pictures show at most 3")


def test_summary_names_what_is_missing_and_what_is_extra():
    seen = encode([["red cube", "gray sphere"]])[0] * 0.75
    asked, verdict = summarize(["red cube", "cyan cube"], seen)
    assert asked == "Asked for: red cube, cyan cube"
    assert verdict.endswith(
        "sees: red cube (75%), gray sphere (75%) – missing: cyan cube; extra: gray sphere"
    )
    assert summarize(["red cube"], torch.zeros(24))[1].endswith("nothing – missing: red cube")
    assert summarize(["red cube"], None) == ["Asked for: red cube"]


def test_verdict_has_a_field_for_each_label():
    probabilities = torch.linspace(0, 0.92, 24)
    table = verdict_table(["red cube", "gray sphere"], probabilities)
    fields = re.findall(r'<td class="([^"]+)" style="--lab7-height: (\d+%)"><span>(\d+%)<', table)
    assert [kinds.split()[0] for kinds, *_ in fields] == [
        f"lab7-{label.split()[0]}" for label in LABELS
    ]
    wanted = [f"{p:.0%}" for p in probabilities.tolist()]
    assert [height for _, height, _ in fields] == [text for *_, text in fields] == wanted
    asked = [label for label, field in zip(LABELS, fields, strict=True) if "asked" in field[0]]
    assert asked == ["red cube", "gray sphere"]
    seen = ["lab7-seen" in kinds for kinds, *_ in fields]
    assert seen == (probabilities >= 0.5).tolist()
    assert re.findall(r'"row">(\w+)<', table) == list(SHAPES)
    assert re.findall(r'"col">(\w+)<', table) == list(COLORS)


def test_there_is_no_verdict_before_a_picture():
    table = verdict_table(["red cube"], None)
    assert table.count("lab7-asked") == 1 and "%" not in table and "lab7-seen" not in table


def test_a_live_notebook_gets_the_widget(pipeline, monkeypatch):
    monkeypatch.delenv("LAB7_STATIC", raising=False)
    data, _ = DisplayFormatter().format(LabelPicker(pipeline))
    assert WIDGET_MIME in data and "image/png" not in data


def test_a_reader_without_a_kernel_gets_the_screenshot(pipeline, monkeypatch):
    monkeypatch.setenv("LAB7_STATIC", "1")
    data, metadata = DisplayFormatter().format(LabelPicker(pipeline))
    assert set(data) == {"image/png", "text/plain"}
    assert base64.b64decode(data["image/png"]) == SCREENSHOT.read_bytes()
    image = Image.open(SCREENSHOT)
    assert image.format == "PNG" and image.width >= 1.5 * metadata["image/png"]["width"]


def test_the_screenshot_is_small():
    assert SCREENSHOT.stat().st_size <= 150_000
