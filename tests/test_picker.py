"""The label picker without a browser: threads, controls, files."""

import base64
import inspect
import io
import json
import re
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from IPython.core.formatters import DisplayFormatter
from PIL import Image, PngImagePlugin
from torch import Tensor

from lab7 import picker as module
from lab7.auditor import Sighting
from lab7.diffusion import convert_scheduler, scheduler_name
from lab7.errors import UserError
from lab7.experiments import get_experiment
from lab7.labels import COLORS, LABELS, encode
from lab7.model import ConditionalUNet
from lab7.picker import AT_ONCE, SCREENSHOT, LabelPicker
from lab7.pipeline import ConditionalDDPMPipeline, load_pipeline, save_pipeline, to_pil

CSS = Path(inspect.getfile(LabelPicker)).with_suffix(".css").read_text(encoding="utf-8")
WIDGET_MIME = "application/vnd.jupyter.widget-view+json"
SECONDS = 120  # for anything that a slow machine may take long for
CHOSEN = ("red cube", "blue cylinder")  # at first


class StandInEvaluator:
    """Sees what it is told to, and keeps what it was shown."""

    def __init__(self, *seen: str):
        self.probabilities = encode([seen]) * 0.9 + 0.05
        self.images: list[Tensor] = []

    def predict(self, images: Tensor) -> Tensor:
        self.images.append(images)
        return self.probabilities


class StandInAuditor:
    """Finds what it is told to in every picture."""

    def __init__(self, *found: str):
        self.found = [Sighting(label, 30.0, 10.0 + 9 * n, 0.9) for n, label in enumerate(found)]

    def find(self, images: Tensor) -> list[list[Sighting]]:
        return [self.found for _ in images]


def make_pipeline(seed=0, steps=2, guidance=3.0):
    torch.manual_seed(seed)
    config = get_experiment("smoke").config
    scheduler = convert_scheduler(DDPMScheduler(**config.noise), config.scheduler)
    unet = ConditionalUNet(**config.unet).eval()
    return ConditionalDDPMPipeline(unet, scheduler, steps, guidance)


@pytest.fixture
def pipeline():
    return make_pipeline()


@pytest.fixture
def judges():
    return {"evaluator": StandInEvaluator(*CHOSEN), "auditor": StandInAuditor(*CHOSEN)}


@pytest.fixture
def make_picker(pipeline, judges):
    """Makes pickers with stand-in judges, and closes them."""
    pickers = []

    def make(pipeline=pipeline, **options):
        pickers.append(LabelPicker(pipeline, **judges | options))
        return pickers[-1]

    yield make
    for picker in pickers:
        picker.close()


def wait_until(condition):
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def draw(picker, action=None):
    """Do something, wait for the finished picture, and return its recipe."""
    picker._finished = None
    (action or picker.redraw)()
    wait_until(lambda: picker._finished is not None)
    return picker._finished[1]


def shown(picker):
    """The picture that is shown, as an array; with the noisy state beside it, the first."""
    source = re.search(r"base64,([^\"]+)", picker._picture.value)[1]
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(source))), int)


def hold_at_step(picker, step, generator=True):
    """Make a generator wait before a step; returns what to wait for, and what lets it go on."""
    reached, go_on = threading.Event(), threading.Event()
    reverse = picker.generators[generator].reverse

    def slow(*args, **options):
        for number, frame in enumerate(reverse(*args, **options), 1):
            if number == step:
                reached.set()
                assert go_on.wait(SECONDS)
            yield frame

    picker.generators[generator].reverse = slow
    return reached, go_on


def change(control, value):
    return lambda: setattr(control, "value", value)


def test_shows_the_picture_that_the_pipeline_draws(pipeline, judges, make_picker):
    picker = make_picker(labels=["Blue Cylinder", "red cube"], seed=7)
    recipe = draw(picker)
    assert (recipe["labels"], recipe["seed"]) == (list(CHOSEN), 7)
    expected = pipeline([CHOSEN], seeds=[7], output_type="pt", progress=False).images
    assert torch.allclose(judges["evaluator"].images[0], expected, atol=1e-5)
    assert abs(shown(picker) - np.asarray(to_pil(expected)[0], int)).max() <= 1
    assert "✓ Exactly what was asked for." in picker._verdict.value
    assert picker._picture.value.count("lab7-right") == 2


def test_every_control_draws_anew(make_picker):
    picker = make_picker()
    pictures = [draw(picker) and picker._picture.value]
    for control, value in {
        picker.toggles["gray sphere"]: True,
        picker.toggles["red cube"]: False,
        picker.seed: 1,
        picker.steps: 3,
        picker.guidance: 8.0,
    }.items():
        recipe = draw(picker, change(control, value))
        pictures.append(picker._picture.value)
    assert len(set(pictures)) == 6
    assert recipe["labels"] == ["gray sphere", "blue cylinder"]
    assert [recipe[x] for x in ("seed", "num_inference_steps", "guidance_scale")] == [1, 3, 8.0]


def test_a_newer_wish_overtakes_and_nothing_queues(make_picker, judges):
    picker = make_picker(num_inference_steps=9)
    reached, go_on = hold_at_step(picker, 2)
    picker.redraw()
    assert reached.wait(SECONDS)
    for seed in range(1, 30):
        picker.seed.value = seed
    threads = threading.active_count()
    go_on.set()
    wait_until(lambda: picker._finished)
    assert picker._finished[1]["seed"] == 29
    assert len(judges["evaluator"].images) == 1  # of thirty wishes
    assert threading.active_count() == threads


def test_a_drawing_that_is_overtaken_stops_at_its_next_step(make_picker):
    picker = make_picker(num_inference_steps=50)
    steps = []
    picker._picture.observe(lambda change: steps.append(change.new), "value")
    reached, go_on = hold_at_step(picker, 3)
    picker.redraw()
    assert reached.wait(SECONDS)
    picker.buttons["Clear"].click()
    go_on.set()
    wait_until(lambda: "Choose at least one" in picker._verdict.value)
    assert len(steps) == 4  # three of the drawing, then none
    assert picker._picture.value == "" and picker._finished is None


def test_stop_keeps_the_picture_and_gives_no_verdict(make_picker, judges):
    picker = make_picker(num_inference_steps=50)
    stop = picker.buttons["Stop"]
    reached, go_on = hold_at_step(picker, 3)
    assert stop.disabled
    picker.redraw()
    assert reached.wait(SECONDS) and not stop.disabled
    stop.click()
    go_on.set()
    wait_until(lambda: "Stopped, so there is no verdict." in picker._verdict.value)
    wait_until(lambda: stop.disabled)
    assert "step 3 of 50" in picker._picture.value and not judges["evaluator"].images
    draw(picker, picker.buttons["Draw again"].click)
    assert "Exactly" in picker._verdict.value and stop.disabled


@pytest.mark.parametrize("steps", [AT_ONCE, AT_ONCE + 1])
def test_few_steps_are_shown_at_once_and_more_as_the_picture_forms(make_picker, steps):
    picker = make_picker(num_inference_steps=steps)
    captions = []
    find = re.compile("<figcaption[^>]*>([^<]*)<").findall
    picker._picture.observe(lambda change: captions.append(find(change.new)), "value")
    draw(picker)
    forming, (plain, marked) = captions[:-2], captions[-2:]
    assert plain == marked and plain[0].startswith("red cube, blue cylinder: seed 0, ")
    if steps == AT_ONCE:
        assert forming == []
    else:
        assert [one[0] for one in forming] == [f"Predicted x₀, step {n} of 5" for n in range(1, 6)]
        assert all(noisy.startswith("Noisy xₜ, t = ") for _, noisy in forming)


def test_no_label_draws_nothing_and_says_so(make_picker):
    picker = make_picker(labels=())
    picker.redraw()
    wait_until(lambda: "Choose at least one object." in picker._verdict.value)
    assert picker._finished is None
    assert draw(picker, change(picker.toggles["red cube"], True))["labels"] == ["red cube"]


def test_six_labels_are_drawn_and_what_to_expect_is_said(make_picker):
    picker = make_picker(labels=LABELS[:6])
    assert draw(picker)["labels"] == list(LABELS[:6])
    assert "Training pictures show at most 3 objects." in picker._verdict.value


def test_an_error_is_shown_in_one_line_and_the_picker_goes_on(make_picker, judges):
    picker = make_picker()

    def fail(images):
        raise RuntimeError("out of <memory>\nand a long tail")

    judges["auditor"].find, works = fail, judges["auditor"].find
    picker.redraw()
    wait_until(lambda: 'role="alert"' in picker._verdict.value)
    assert "picture. RuntimeError: out of &lt;memory&gt;</div>" in picker._verdict.value
    judges["auditor"].find = works
    draw(picker)
    assert 'role="status"' in picker._verdict.value


def test_the_notebook_may_use_the_pipeline_meanwhile(pipeline, make_picker):
    picker = make_picker(num_inference_steps=4)
    draw(picker)
    undisturbed = shown(picker)
    reached, go_on = hold_at_step(picker, 2)
    picker._finished = None
    picker.redraw()
    assert reached.wait(SECONDS)
    pipeline([["gray cube"]], num_inference_steps=7, progress=False)
    go_on.set()
    wait_until(lambda: picker._finished)
    assert np.array_equal(shown(picker), undisturbed)


def test_two_pickers_do_not_disturb_one_another(make_picker):
    one, other = make_picker(num_inference_steps=3), make_picker(seed=5)
    draw(other)
    alone = shown(other)
    reached, go_on = hold_at_step(one, 2)
    one.redraw()
    assert reached.wait(SECONDS)
    draw(other)
    assert np.array_equal(shown(other), alone)
    go_on.set()
    wait_until(lambda: one._finished)
    assert one._finished[1]["seed"] == 0 and other.seed.value == 5


def test_closing_ends_the_thread(make_picker):
    before = threading.active_count()
    pickers = [make_picker(num_inference_steps=400) for _ in range(3)]
    for picker in pickers:
        picker.redraw()
        picker.close()
    wait_until(lambda: threading.active_count() == before)


def test_an_idle_picker_costs_nothing(make_picker):
    picker = make_picker()
    draw(picker)
    time.sleep(0.3)  # until PyTorch's own threads are at rest
    start = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - start < 0.05


# The fast and the full generator.


@pytest.fixture
def fast():
    return make_pipeline(seed=1, steps=1, guidance=1.0)


def switches(picker):
    return [
        one for row in picker.children for one in getattr(row, "children", ()) if one is picker.full
    ]


def test_the_fast_generator_draws_until_the_full_one_is_asked_for(pipeline, fast, make_picker):
    picker = make_picker(fast=fast, num_inference_steps=6)
    assert draw(picker)["num_inference_steps"] == 1
    expected = fast([CHOSEN], [0], output_type="pt", progress=False).images
    assert abs(shown(picker) - np.asarray(to_pil(expected)[0], int)).max() <= 1
    assert switches(picker)
    recipe = draw(picker, change(picker.full, True))
    assert (recipe["num_inference_steps"], recipe["guidance_scale"]) == (6, 3.0)
    expected = pipeline([CHOSEN], [0], 6, output_type="pt", progress=False).images
    assert abs(shown(picker) - np.asarray(to_pil(expected)[0], int)).max() <= 1
    assert draw(picker, change(picker.full, False))["guidance_scale"] == 1.0


def test_the_sliders_keep_to_what_a_distilled_generator_can(make_picker):
    distilled = make_pipeline(seed=1, steps=2, guidance=1.0)
    distilled.unet.register_to_config(timesteps=[900, 500])
    distilled.register_modules(scheduler=DDPMScheduler(**get_experiment("smoke").config.noise))
    picker = make_picker(fast=distilled, num_inference_steps=6)
    assert (picker.steps.value, picker.steps.max, picker.guidance.disabled) == (2, 2, True)
    assert draw(picker)["num_inference_steps"] == 2
    assert draw(picker, change(picker.full, True))["guidance_scale"] == 3.0
    assert (picker.steps.value, picker.steps.max, picker.guidance.disabled) == (6, 50, False)
    assert draw(picker, change(picker.full, False))["guidance_scale"] == 1.0
    assert (picker.steps.value, picker.steps.max, picker.guidance.disabled) == (2, 2, True)


def test_one_generator_needs_no_switch(make_picker):
    picker = make_picker()
    assert picker.full.value and not switches(picker) and picker._note.value == ""


@pytest.fixture
def repository(tmp_path, pipeline, fast, judges, monkeypatch):
    """A repository's folders of weights with tiny generators, and the stand-ins as judges."""
    folders = tmp_path / "generator", tmp_path / "fast"
    for one, folder in zip((pipeline, fast), folders, strict=True):
        save_pipeline(one, folder, half=False)
    monkeypatch.setattr(module, "load_pipeline", lambda path=folders[0]: load_pipeline(path, "cpu"))
    monkeypatch.setattr(module, "FAST_DIR", folders[1])
    return folders


def test_the_generators_of_the_repository_are_the_default(repository, make_picker):
    picker = make_picker(None)
    assert draw(picker)["num_inference_steps"] == 1 and switches(picker)
    assert picker._note.value == ""


def test_without_fast_weights_the_full_ones_serve_and_that_is_said_once(
    repository, make_picker, monkeypatch, tmp_path
):
    monkeypatch.setattr(module, "FAST_DIR", tmp_path / "nowhere")
    picker = make_picker(None)
    assert draw(picker)["num_inference_steps"] == 2 and not switches(picker)
    said = [one for one in _texts(picker) if "data/weights/fast is missing" in one]
    assert len(said) == 1


def test_a_pipeline_of_ones_own_draws_alone(repository, pipeline, make_picker):
    picker = make_picker(pipeline)
    assert picker.generators[False] is picker.generators[True]


def _texts(widget):
    children = getattr(widget, "children", ())
    return [getattr(widget, "value", "")] * isinstance(getattr(widget, "value", ""), str) + [
        text for child in children for text in _texts(child)
    ]


# Eight seeds in a row.


def test_one_of_eight_seeds_becomes_the_picture(pipeline, make_picker):
    picker = make_picker(seed=3)
    draw(picker, picker.buttons["Eight seeds"].click)
    names = [f"✓ seed {seed}" for seed in range(3, 11)]
    wait_until(lambda: picker._choices.options)
    assert [name for name, _ in picker._choices.options] == names
    sheet = np.asarray(_image(picker._row.value), int)
    assert sheet.shape == (64, 8 * 64, 3)
    assert abs(sheet[:, :64] - shown(picker)).max() <= 1
    recipe = draw(picker, change(picker._choices, 5))
    assert recipe["seed"] == picker.seed.value == 5
    assert abs(sheet[:, 128:192] - shown(picker)).max() <= 1
    assert len(picker._choices.options) == 8  # to try another one


def test_the_row_marks_what_the_auditor_finds_wrong(make_picker):
    picker = make_picker(auditor=StandInAuditor("red cube"))
    draw(picker, picker.buttons["Eight seeds"].click)
    wait_until(lambda: picker._choices.options)
    assert {name[0] for name, _ in picker._choices.options} == {"✗"}


def test_a_row_of_other_objects_goes_away(make_picker):
    picker = make_picker(seed=999)
    draw(picker, picker.buttons["Eight seeds"].click)
    wait_until(lambda: picker._choices.options)
    draw(picker, change(picker._choices, 1006))  # beyond the slider's usual end
    assert picker.seed.value == 1006
    draw(picker, change(picker.toggles["gray cube"], True))
    assert picker._choices.options == () and picker._row.value == ""


def _image(html):
    return Image.open(io.BytesIO(base64.b64decode(re.search(r"base64,([^\"]+)", html)[1])))


# Files.


def test_a_saved_picture_opens_as_it_was(pipeline, fast, judges, make_picker, tmp_path):
    ddim = ConditionalDDPMPipeline(fast.unet, convert_scheduler(fast.scheduler, "ddim"), 3, 2.0)
    for full, sampler in ((True, pipeline), (False, ddim)):
        picker = make_picker(pipeline, fast=ddim, full=full, labels=["gray cube"], seed=1234)
        draw(picker, change(picker.guidance, 6.5))
        path = picker.save(tmp_path / f"{full}.png")
        saved = Image.open(path)
        assert saved.text["seed"] == "1234" and json.loads(saved.text["labels"]) == ["gray cube"]
        assert json.loads(saved.text["sampler"]) == scheduler_name(sampler.scheduler)
        assert saved.text["guidance_scale"] == "6.5"
        assert np.array_equal(np.asarray(saved, int), shown(picker))
        opened = LabelPicker.from_png(path, pipeline, fast, **judges)
        assert draw(opened) == picker._finished[1]
        assert opened.full.value is full and opened.guidance.value == 6.5
        assert np.array_equal(shown(opened), np.asarray(saved, int))
        opened.close()


def test_a_picture_opens_with_the_repositorys_generators(repository, judges, make_picker, tmp_path):
    picker = make_picker(None)
    draw(picker)
    opened = LabelPicker.from_png(picker.save(tmp_path / "a.png"), **judges)
    assert draw(opened) == picker._finished[1]
    opened.close()


def test_the_button_saves_into_the_current_folder(make_picker, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    picker = make_picker()
    picker.buttons["Save PNG"].click()
    assert "there is no finished picture to save" in picker._note.value
    assert 'role="alert"' in picker._note.value
    draw(picker)
    picker.buttons["Save PNG"].click()
    name = "red-cube-blue-cylinder-seed-0-2-3.png"
    assert f"Saved as {name}" in picker._note.value
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_all_labels_make_a_name_that_a_file_may_have(make_picker, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    picker = make_picker(labels=LABELS)
    draw(picker)
    assert len(picker.save().name) < 200


def test_a_place_that_cannot_be_written_is_said_in_one_line(make_picker, tmp_path):
    picker = make_picker()
    draw(picker)
    with pytest.raises(UserError, match="a folder"):
        picker.save(tmp_path)


@pytest.fixture
def saved(make_picker, tmp_path):
    picker = make_picker()
    draw(picker)
    return picker.save(tmp_path / "saved.png")


def resave(path, **texts):
    """Write a saved picture again, with some of its texts changed or, where None, left out."""
    with Image.open(path) as image:
        image.load()
    info = PngImagePlugin.PngInfo()
    for name, text in (image.text | texts).items():
        if text is not None:
            info.add_text(name, text)
    image.save(path, pnginfo=info)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({"labels": None}, "saved.png has no field 'labels': no LabelPicker saved it"),
        ({"weights_sha256": '"0123456789"'}, "saved.png was drawn with other weights"),
        ({"weights_sha256": "12"}, "saved.png was drawn with other weights"),
        ({"seed": "zero"}, "saved.png is damaged"),
        ({"seed": "-1"}, "seed -1 is not within 0 … 999"),
        ({"seed": '"1"'}, "seed '1' is not within 0 … 999"),
        ({"num_inference_steps": "0"}, "steps 0 is not within 1 … 50"),
        ({"guidance_scale": "NaN"}, "guidance nan is not within 0 … 10"),
        ({"labels": '["red cubes"]'}, "did you mean 'red cube'"),
        ({"labels": "3"}, "a condition is a list of labels"),
        ({"sampler": '"ddimm"'}, "did you mean 'ddim'"),
    ],
)
def test_a_wrong_field_is_one_clear_line(saved, pipeline, judges, texts, message):
    resave(saved, **texts)
    with pytest.raises(UserError, match=message) as error:
        LabelPicker.from_png(saved, pipeline, **judges)
    assert "\n" not in str(error.value)


def test_a_damaged_picture_is_one_clear_line(saved, pipeline, judges, tmp_path):
    whole = saved.read_bytes()
    damages = (b"", whole[:40], whole[:-30], b"GIF89a", whole[:3000] + b"x" + whole[3001:])
    for damaged in damages:
        saved.write_bytes(damaged)
        with pytest.raises(UserError, match="saved.png is damaged"):
            LabelPicker.from_png(saved, pipeline, **judges)
    with pytest.raises(FileNotFoundError, match="no file .*other.png: did you mean .*saved.png"):
        LabelPicker.from_png(tmp_path / "other.png", pipeline, **judges)


def test_any_other_picture_is_one_clear_line(pipeline, judges, tmp_path):
    for name in ("a.png", "b.jpg"):
        Image.new("RGB", (64, 64)).save(tmp_path / name)
        with pytest.raises(UserError, match=f"{name} has no field 'labels'"):
            LabelPicker.from_png(tmp_path / name, pipeline, **judges)


# What it is made of.


@pytest.mark.parametrize(
    ("labels", "match"),
    [(["red cubes"], "did you mean 'red cube'"), (["red cube"] * 2, "twice"), ("red cube", "list")],
)
def test_wrong_labels(make_picker, labels, match):
    with pytest.raises(UserError, match=match):
        make_picker(labels=labels)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"seed": -1}, "seed -1 is not within 0 … 999"),
        ({"num_inference_steps": 0}, "steps 0 is not within 1 … 50"),
        ({"guidance_scale": float("inf")}, "guidance inf is not within 0 … 10"),
    ],
)
def test_wrong_settings(make_picker, options, match):
    with pytest.raises(UserError, match=match):
        make_picker(**options)


def test_more_than_the_sliders_usually_offer(fast, make_picker):
    settings = {"seed": 123_456, "num_inference_steps": 400, "guidance_scale": 12.0}
    picker = make_picker(fast=fast, **settings)
    assert picker.seed.value == 123_456
    picker.full.value = True
    assert (picker.steps.value, picker.guidance.value) == (400, 12.0)


def test_toggles_say_what_they_are(make_picker):
    picker = make_picker()
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


def test_a_live_notebook_gets_the_widget_and_it_draws(make_picker, monkeypatch):
    monkeypatch.delenv("LAB7_STATIC", raising=False)
    picker = make_picker()
    data, _ = DisplayFormatter().format(picker)
    assert WIDGET_MIME in data
    wait_until(lambda: picker._finished)


def test_a_reader_without_a_kernel_gets_the_screenshot(make_picker, monkeypatch):
    monkeypatch.setenv("LAB7_STATIC", "1")
    picker = make_picker()
    data, metadata = DisplayFormatter().format(picker)
    assert set(data) == {"image/png", "text/plain"}
    assert base64.b64decode(data["image/png"]) == SCREENSHOT.read_bytes()
    image = Image.open(SCREENSHOT)
    assert image.format == "PNG" and image.width >= 1.5 * metadata["image/png"]["width"]
    assert picker._asked.empty() and picker._finished is None  # nothing is drawn for nobody


def test_the_screenshot_is_small():
    # In bytes; lossless, as a palette spoils the pictures in it.
    assert SCREENSHOT.stat().st_size <= 400_000
