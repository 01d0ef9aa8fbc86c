"""LabelPicker: click objects, and see their picture and what the judges find in it."""

import base64
import hashlib
import json
import math
import os
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from html import escape
from numbers import Real
from pathlib import Path
from typing import Any

import ipywidgets as widgets
from PIL import Image, PngImagePlugin
from torch import Tensor

from lab7.auditor import Auditor
from lab7.diffusion import convert_scheduler, scheduler_name
from lab7.errors import UserError
from lab7.evaluator import Evaluator
from lab7.files import existing_file, user_path, write_atomically
from lab7.labels import LABELS, encode, parse_labels
from lab7.layouts import ROOT
from lab7.picker_html import draw_marks, figure, is_right, verdict
from lab7.pipeline import FAST_DIR, SETTINGS, ConditionalDDPMPipeline, load_pipeline, to_pil

STATIC = "LAB7_STATIC"  # environment variable: 1 shows a picture of the picker, not the widget
# Shown instead; tests/test_picker_browser.py makes it anew.
SCREENSHOT = ROOT / "notebooks" / "picker.png"
AT_ONCE = 4  # steps; a picture of more is shown as it forms
ROW = 8  # seeds side by side
FIELDS = ("labels", "seed", "sampler", "weights_sha256", *SETTINGS)  # the texts in a saved PNG
_CSS = Path(__file__).with_name("picker.css").read_text(encoding="utf-8")


class LabelPicker(widgets.VBox):
    """Draws pictures of the objects that are clicked, and has both judges look at them.

    Each change of a control draws anew, in a thread, and what was being drawn is stopped at its
    next step. What the auditor finds is marked on the picture; point at the picture to see it
    without. With the environment variable `LAB7_STATIC=1` a notebook gets a picture of a picker
    instead, for readers without a kernel.

    Args:
        pipeline: The full generator; its own scheduler is left alone. None: the one that comes
            with the repository.
        evaluator: None: see `Evaluator.load`.
        labels: Objects chosen at first.
        seed: At first; this and the two below can be changed with sliders.
        num_inference_steps: Of the full generator; None: its own.
        guidance_scale: Of the full generator; None: its own.
        fast: Draws unless the full generator is asked for. None: the one that comes with the
            repository if `pipeline` is None too and it is there, else the full one.
        auditor: None: see `Auditor.load`.
        full: Whether the full generator draws at first.

    Raises:
        UserError: A label is unknown or given twice, or a setting is out of range.
    """

    def __init__(
        self,
        pipeline: ConditionalDDPMPipeline | None = None,
        evaluator: Evaluator | None = None,
        labels: Sequence[str] = ("red cube", "blue cylinder"),
        seed: int = 0,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        fast: ConditionalDDPMPipeline | None = None,
        auditor: Auditor | None = None,
        full: bool = False,
    ):
        self._asked: queue.SimpleQueue[Iterator[None] | None] = queue.SimpleQueue()
        missing = pipeline is None and fast is None and not FAST_DIR.is_dir()
        pipeline, fast = _load(pipeline, fast)
        # A scheduler counts its own steps: one that the notebook uses meanwhile would not do.
        own = _copy(pipeline, **pipeline.settings(num_inference_steps, guidance_scale))
        self.generators = {True: own, False: _copy(fast) if fast else own}  # by `full.value`
        self.evaluator, self.auditor = evaluator or Evaluator.load(), auditor or Auditor.load()
        self._finished: tuple | None = None  # generator, recipe and picture: what can be saved
        self._picture, self._verdict, self._row, self._note = (widgets.HTML() for _ in range(4))
        self._note.value = "data/weights/fast is missing: the full generator draws." * missing
        self._build_controls(parse_labels(labels), seed, full or fast is None)
        super().__init__([widgets.HTML(f"<style>{_CSS}</style>"), *self._rows(fast is not None)])
        self.add_class("lab7-picker")
        threading.Thread(target=self._work, daemon=True).start()

    @classmethod
    def from_png(
        cls,
        path: str | Path,
        pipeline: ConditionalDDPMPipeline | None = None,
        fast: ConditionalDDPMPipeline | None = None,
        **judges: Any,
    ) -> "LabelPicker":
        """Open a picture that `save` wrote: the picker is set as it was, and draws it again.

        Args:
            path: The file.
            pipeline: See the picker; this or the fast one drew the picture.
            fast: See the picker.
            judges: `evaluator` and `auditor` of the picker.

        Raises:
            MissingFileError: There is no such file.
            UserError: It is damaged, was saved by something else, or drawn with other weights.
        """
        recipe = _read_png(path)
        pipeline, fast = _load(pipeline, fast)
        parts = {"fast": fast, "pipeline": pipeline}
        for name, generator in parts.items():
            if generator and _hash(generator) == recipe["weights_sha256"]:
                settings = {setting: recipe[setting] for setting in SETTINGS}
                parts[name] = _copy(generator, str(recipe["sampler"]), **settings)
                start = {"labels": recipe["labels"], "seed": recipe["seed"], **judges}
                return cls(**parts, **start, full=name == "pipeline")
        raise UserError(f"{path} was drawn with other weights: give the pipeline that has them")

    def redraw(self, count: int = 1) -> None:
        """Draw what the controls ask for; with a count, the next seeds in a row below it."""
        self._asked.put(self._draw(count))

    def save(self, path: str | Path | None = None) -> Path:
        """Write the picture as PNG; its text fields hold all that it takes to draw it again.

        Args:
            path: None: named after what it shows, in the current folder.

        Raises:
            UserError: There is no finished picture, or it cannot be written there.
        """
        if self._finished is None:
            raise UserError("there is no finished picture to save")
        generator, recipe, picture = self._finished
        texts = PngImagePlugin.PngInfo()
        for name, value in (recipe | {"weights_sha256": _hash(generator)}).items():
            texts.add_text(name, json.dumps(value))
        name = "-".join(recipe["labels"]).replace(" ", "-")[:100]
        name += "-seed-{seed}-{num_inference_steps}-{guidance_scale:g}.png".format(**recipe)
        path = user_path(name if path is None else path)
        image = to_pil(picture)[0]
        write_atomically(path, lambda file: image.save(file, "PNG", pnginfo=texts))
        return path

    def close(self) -> None:
        """Stop drawing and remove the widget."""
        self._asked.put(None)
        super().close()

    def _build_controls(self, labels: tuple[str, ...], seed: int, full: bool) -> None:
        self.toggles = {label: _toggle(label, label in labels) for label in LABELS}
        self.steps = widgets.IntSlider(min=1, max=50, description="Steps")
        self.guidance = widgets.FloatSlider(max=10, step=0.5, description="Guidance")
        self.guidance.readout_format = ".1f"
        self.seed = widgets.IntSlider(max=999, description="Seed")
        self.full = widgets.Checkbox(full, description="Full generator, step by step", indent=False)
        self._use(full)
        _set(self.seed, seed)
        self.full.observe(lambda change: self._use(change.new), "value")
        for control in (*self.toggles.values(), self.steps, self.guidance, self.seed, self.full):
            control.observe(self._change, "value")
        self._choices = widgets.ToggleButtons()
        self._choices.observe(self._choose, "value")

    def _rows(self, switch: bool) -> list[widgets.Widget]:
        actions = {
            "Draw again": lambda _: self.redraw(),
            "Eight seeds": lambda _: self.redraw(ROW),
            "Save PNG": self._save,
            "Clear": self._clear,
            "Stop": lambda _: self._asked.put(self._halt()),
        }
        self.buttons = {name: widgets.Button(description=name) for name in actions}
        for name, action in actions.items():
            self.buttons[name].on_click(action)
        self.buttons["Stop"].disabled = True
        rows = {
            "objects": widgets.GridBox(list(self.toggles.values())),
            "sliders": widgets.HBox([self.steps, self.guidance, self.seed]),
            "buttons": widgets.HBox([*self.buttons.values(), *[self.full] * switch, self._note]),
            "panels": widgets.HBox([self._picture, self._verdict]),
            "row": widgets.VBox([self._row, self._choices]),
        }
        return [row.add_class(f"lab7-{name}") for name, row in rows.items()]

    def _use(self, full: bool) -> None:
        generator = self.generators[full]
        settings, known = generator.settings(), generator.known_timesteps
        _set(self.steps, settings["num_inference_steps"])
        _set(self.guidance, settings["guidance_scale"])
        # Guidance is built into a distilled network.
        self.steps.max = len(known) if known else max(50, self.steps.value)
        self.guidance.disabled = known is not None

    def _change(self, change: Any) -> None:
        if change.owner is self.seed and change.new in dict(self._choices.options).values():
            self._choices.value = change.new
        else:  # the row shows something else
            self._row.value, self._choices.options = "", ()
        self.redraw()

    def _choose(self, change: Any) -> None:
        if change.new is not None:
            _set(self.seed, change.new)

    def _clear(self, _: Any) -> None:
        for toggle in self.toggles.values():
            toggle.value = False

    def _save(self, _: Any) -> None:
        try:
            _say(self._note, escape(f"Saved as {self.save()}"))
        except UserError as error:
            _say(self._note, escape(str(error)), "alert")

    def _work(self) -> None:
        """Draw what was asked for last, and stop at the next step when something newer is."""
        while (drawing := self._asked.get()) is not None:
            try:
                for _ in drawing:
                    if not self._asked.empty():
                        break
            except Exception as error:  # nobody else would show it
                reason = f"{type(error).__name__}: {error}".split("\n")[0]
                _say(self._verdict, escape(f"Could not draw this picture. {reason}"), "alert")
            self.buttons["Stop"].disabled |= self._asked.empty()

    def _draw(self, count: int) -> Iterator[None]:
        """Draw, show and judge, a step at a time."""
        yield  # overtaken before it began
        self._finished, started = None, time.perf_counter()
        labels = [label for label, toggle in self.toggles.items() if toggle.value]
        if not labels:
            self._picture.value = ""
            return _say(self._verdict, "Choose at least one object.")
        generator = self.generators[self.full.value]
        settings = generator.settings(self.steps.value, self.guidance.value)
        recipe = {"labels": labels, "seed": self.seed.value}
        recipe |= {"sampler": scheduler_name(generator.scheduler), **settings}
        steps, seeds = settings["num_inference_steps"], [self.seed.value + n for n in range(count)]
        if count > 1:
            self._choices.options = [(f"seed {seed}", seed) for seed in seeds]
        if steps > AT_ONCE:
            self.buttons["Stop"].disabled = False
            _say(self._verdict, "Drawing …")
        reverse = generator.reverse(encode([labels] * count), seeds, **settings)
        for step, (t, xt, x0, images) in enumerate(reverse, 1):  # noqa: B007
            if steps > AT_ONCE:
                predicted = figure(x0[:1], f"Predicted x₀, step {step} of {steps}")
                self._picture.value = predicted + figure(xt[:1], f"Noisy xₜ, t = {t}")
                self._row.value = figure(x0, "") if count > 1 else self._row.value
            yield
        images, seconds = images.clamp(-1, 1).cpu(), time.perf_counter() - started
        caption = f"{', '.join(labels)}: seed {seeds[0]}, {seconds:.1f} s"
        self._picture.value = figure(images[:1], caption)
        self._row.value = figure(images, "") if count > 1 else self._row.value
        yield
        self._judge(labels, images, seeds, caption)
        self._finished = generator, recipe, images[:1]

    def _judge(self, labels: list[str], images: Tensor, seeds: list[int], caption: str) -> None:
        found, probabilities = self.auditor.find(images), self.evaluator.predict(images[:1])[0]
        self._picture.value = figure(images[:1], caption, draw_marks(labels, found[0]))
        _say(self._verdict, verdict(labels, found[0], probabilities))
        if len(seeds) > 1:
            signs = ["✓" if is_right(labels, one) else "✗" for one in found]
            names = [f"{sign} seed {seed}" for sign, seed in zip(signs, seeds, strict=True)]
            self._choices.options = zip(names, seeds, strict=True)

    def _halt(self) -> Iterator[None]:
        if self._finished is None:
            _say(self._verdict, "Stopped, so there is no verdict.")
        yield

    def _repr_mimebundle_(self, **options):
        data = {"text/plain": "The label picker, as it looks in a notebook with a kernel."}
        if os.environ.get(STATIC) != "1":
            data |= super()._repr_mimebundle_(**options)
            self.redraw()
        data["image/png"] = base64.b64encode(SCREENSHOT.read_bytes()).decode()
        return data, {"image/png": {"width": 860}}


def _load(pipeline, fast):
    """Return the full and the fast generator, by default those of the repository."""
    if pipeline is None and fast is None and FAST_DIR.is_dir():
        fast = load_pipeline(FAST_DIR)
    return (load_pipeline() if pipeline is None else pipeline), fast


def _copy(pipeline, sampler: str | None = None, **settings):
    """Return a pipeline with the same network and a scheduler of its own."""
    scheduler = convert_scheduler(pipeline.scheduler, sampler or scheduler_name(pipeline.scheduler))
    return ConditionalDDPMPipeline(pipeline.unet, scheduler, **settings or pipeline.settings())


def _hash(pipeline) -> str:
    """Return the SHA-256 of a network's weights, wherever and however they were loaded."""
    digest = hashlib.sha256()
    for name, tensor in pipeline.unet.state_dict().items():
        digest.update(name.encode() + tensor.float().cpu().numpy().tobytes())
    return digest.hexdigest()


def _read_png(path: str | Path) -> dict[str, Any]:
    """Return what the text fields of a picture hold that `LabelPicker.save` wrote."""
    path = existing_file(path)
    try:
        with Image.open(path) as image:
            image.load()
            return {name: json.loads(image.info[name]) for name in FIELDS}
    except KeyError as error:
        raise UserError(f"{path} has no field {error}: no LabelPicker saved it") from None
    except Exception:  # a broken file makes Pillow raise almost anything
        raise UserError(f"{path} is damaged, or no picture: copy it again") from None


def _set(slider: widgets.Widget, value: Real) -> None:
    """Set a slider; upwards it may leave its usual range."""
    if not (isinstance(value, Real) and slider.min <= value < math.inf):
        allowed = f"{slider.min:g} … {slider.max:g}"
        raise UserError(f"{slider.description.lower()} {value!r} is not within {allowed}")
    slider.max = max(slider.max, value)
    slider.value = value


def _toggle(label: str, chosen: bool) -> widgets.ToggleButton:
    color, shape = label.split()
    toggle = widgets.ToggleButton(chosen, description=label)
    for name in (f"lab7-{color}-{shape}", f"lab7-{color}", f"lab7-{shape}"):
        toggle.add_class(name)
    chosen = (toggle, "value"), (toggle, "tooltip")
    widgets.dlink(*chosen, lambda on: f"{label}: {'' if on else 'not '}chosen")
    return toggle


def _say(widget: widgets.HTML, html: str, role: str = "status") -> None:
    """Show something that screen readers read out."""
    widget.value = f'<div role="{role}" aria-live="polite">{html}</div>'
