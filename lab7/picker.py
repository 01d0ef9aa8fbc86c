"""LabelPicker: choose objects, watch their picture form, see what the evaluator finds in it."""

import base64
import io
import os
import threading
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from html import escape
from pathlib import Path

import ipywidgets as widgets
import torch
from torch import Tensor

from lab7.dataset import IMAGE_SIZE
from lab7.evaluator import THRESHOLD, Evaluator
from lab7.labels import COLORS, LABELS, SHAPES, encode, parse_labels
from lab7.pipeline import ConditionalDDPMPipeline, to_pil

STATIC = "LAB7_STATIC"  # environment variable: 1 shows a picture of the picker, not the widget
# Shown instead; tests/test_picker_browser.py makes it anew.
SCREENSHOT = Path(__file__).resolve().parent.parent / "notebooks" / "picker.png"
MOST_TRAINED = 3  # objects in the pictures that the generator learned from
_CSS = Path(__file__).with_name("picker.css").read_text(encoding="utf-8")
_BLANK = torch.full((3, IMAGE_SIZE, IMAGE_SIZE), 0.9)


@dataclass(frozen=True)
class Request:
    """What to draw, as the controls were set when it was asked for."""

    labels: tuple[str, ...]
    num_inference_steps: int
    guidance_scale: float
    seed: int

    def __str__(self) -> str:
        steps = "1 step" if self.num_inference_steps == 1 else f"{self.num_inference_steps} steps"
        return f"{steps}, guidance {self.guidance_scale:g}, seed {self.seed}"


class LabelPicker(widgets.VBox):
    """Draws pictures of the objects that are clicked, and has the evaluator judge them.

    Drawing runs in a thread of its own, so that the notebook stays usable and Stop works. With the
    environment variable `LAB7_STATIC=1` a notebook gets a picture of a picker instead, for readers
    without a kernel.

    Args:
        pipeline: Draws the pictures; its own scheduler is left alone.
        evaluator: Judges them; None: no verdict.
        labels: Objects chosen at first.
        seed: At first; this and the two below can be changed with sliders.
        num_inference_steps: The pipeline's own by default.
        guidance_scale: The pipeline's own by default.

    Attributes:
        error: What the last drawing failed with, or None.

    Raises:
        UserError: A label is unknown or given twice.
    """

    def __init__(
        self,
        pipeline: ConditionalDDPMPipeline,
        evaluator: Evaluator | None = None,
        labels: Sequence[str] = ("red cube", "blue cylinder"),
        seed: int = 0,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
    ):
        # A scheduler counts its own steps: one that the notebook uses meanwhile would not do.
        settings = pipeline.settings(num_inference_steps, guidance_scale)
        scheduler = deepcopy(pipeline.scheduler)
        self.pipeline = ConditionalDDPMPipeline(pipeline.unet, scheduler, **settings)
        self.evaluator = evaluator
        self.error: Exception | None = None
        self.thread: threading.Thread | None = None
        self._running = False
        self._guard = threading.RLock()  # of _running and the buttons that depend on it
        self._stopping = threading.Event()
        self._build_controls(parse_labels(labels), seed)
        self._build_results()
        super().__init__([widgets.HTML(f"<style>{_CSS}</style>"), *self._rows()])
        self.add_class("lab7-picker")
        self._refresh()

    def request(self) -> Request:
        """Return what the controls ask for now."""
        labels = tuple(label for label, toggle in self.toggles.items() if toggle.value)
        return Request(labels, self.steps.value, self.guidance.value, self.seed.value)

    def close(self) -> None:
        """Stop drawing and remove the widget."""
        self._stopping.set()
        super().close()

    def _build_controls(self, labels: tuple[str, ...], seed: int) -> None:
        num_inference_steps, guidance_scale, *_ = self.pipeline.settings().values()
        self.toggles = {label: _toggle(label, label in labels) for label in LABELS}
        for toggle in self.toggles.values():
            toggle.observe(self._refresh, "value")
        longest = self.pipeline.scheduler.config.num_train_timesteps
        self.steps = widgets.IntSlider(
            num_inference_steps, 1, min(longest, max(50, num_inference_steps)),
            description="Steps", tooltip="Steps from noise to picture: more take longer",
        )  # fmt: skip
        self.guidance = widgets.FloatSlider(
            guidance_scale, min=0, max=max(10, guidance_scale), step=0.5, readout_format=".1f",
            description="Guidance", tooltip="How hard to insist on the objects; 1 is no guidance",
        )  # fmt: skip
        self.seed = widgets.IntSlider(
            seed, 0, max(999, seed),
            description="Seed", tooltip="Another seed, another picture of the same objects",
        )  # fmt: skip
        self.generate = _button("Generate", self._start, "Draw a picture of the objects", "primary")
        self.stop = _button("Stop", self._request_stop, "Stop, and keep the picture as it is")
        self.clear = _button("Clear", self._clear, "Choose none of the objects")

    def _build_results(self) -> None:
        self.hint, self.status = _html("lab7-hint"), _html("lab7-status")
        self.progress = widgets.IntProgress(0, 0, 1).add_class("lab7-progress")
        # Captions and status line describe the images: ipywidgets 8.1 fails to show one that has a
        # tooltip, and knows no alternative text.
        self.noisy = widgets.Image(value=_png(_BLANK)).add_class("lab7-noisy")
        self.picture = widgets.Image(value=_png(_BLANK)).add_class("lab7-picture")
        self.noisy_caption = _html("lab7-caption", "Noisy x<sub>t</sub>")
        self.picture_caption = _html("lab7-caption", "Predicted x<sub>0</sub>")
        self.verdict = _html("lab7-verdict", verdict_table((), None))

    def _rows(self) -> list[widgets.Widget]:
        panels = [[self.noisy, self.noisy_caption], [self.picture, self.picture_caption]]
        panels += [] if self.evaluator is None else [[self.verdict]]
        boxes = [widgets.VBox(panel).add_class("lab7-panel") for panel in panels]
        buttons = [self.generate, self.stop, self.clear, self.hint]
        return [
            widgets.GridBox(list(self.toggles.values())).add_class("lab7-objects"),
            widgets.HBox([self.steps, self.guidance, self.seed]).add_class("lab7-sliders"),
            widgets.HBox(buttons).add_class("lab7-buttons"),
            self.progress,
            widgets.HBox(boxes).add_class("lab7-panels"),
            self.status,
        ]

    def _refresh(self, _=None) -> None:
        """Make buttons, tooltips and hint fit what is chosen and whether a drawing runs."""
        with self._guard:
            labels = self.request().labels
            self.generate.disabled = self._running or not labels
            self.stop.disabled = not self._running
            self.clear.disabled = not labels
            self.hint.value = escape(hint(labels))
            for label, toggle in self.toggles.items():
                toggle.tooltip = f"{label}: {'chosen' if toggle.value else 'not chosen'}"

    def _clear(self, _=None) -> None:
        for toggle in self.toggles.values():
            toggle.value = False

    def _start(self, _=None) -> None:
        with self._guard:
            request = self.request()
            if self._running or not request.labels:
                return
            self._running, self.error = True, None
            self._stopping.clear()
            self._refresh()
        self.thread = threading.Thread(target=self._work, args=(request,), daemon=True)
        self.thread.start()

    def _request_stop(self, _=None) -> None:
        self._stopping.set()
        self.stop.disabled = True

    def _work(self, request: Request) -> None:
        """Draw in the thread; whatever goes wrong is shown, as nobody else would."""
        try:
            self._draw(request)
        except Exception as error:
            self.error = error
            reason = f"{type(error).__name__}: {error}".strip().split("\n")[0]
            self._say([f"Could not draw this picture. {reason}"], "error")
        finally:
            with self._guard:
                self._running = False
                self._refresh()

    def _draw(self, request: Request) -> None:
        asked, steps = f"Asked for: {', '.join(request.labels)}", request.num_inference_steps
        self._say([asked, f"Drawing … ({request})"])
        self.verdict.value = verdict_table(request.labels, None)
        self.progress.value, self.progress.max = 0, steps
        self.picture_caption.value = "Predicted x<sub>0</sub>"
        start, cond = time.perf_counter(), encode([request.labels])
        settings = self.pipeline.settings(steps, request.guidance_scale)
        reverse = self.pipeline.reverse(cond, [request.seed], **settings)
        for step, (t, xt, x0, xt_next) in enumerate(reverse, 1):  # noqa: B007
            self.progress.value = step
            self.noisy.value, self.picture.value = _png(xt[0]), _png(x0[0])
            self.noisy_caption.value = f"Noisy x<sub>t</sub>, t = {t}"
            if self._stopping.is_set():
                done = f"Stopped after step {step} of {steps}, so there is no verdict."
                return self._say([asked, done])
        seconds, picture = time.perf_counter() - start, xt_next.clamp(-1, 1)
        self.picture.value, self.picture_caption.value = _png(picture[0]), "Finished picture"
        probabilities = None if self.evaluator is None else self.evaluator.predict(picture)[0]
        self.verdict.value = verdict_table(request.labels, probabilities)
        lines = summarize(request.labels, probabilities)
        self._say([*lines, f"{request}: {seconds:.1f} s"], "done")

    def _say(self, lines: list[str], kind: str = "busy") -> None:
        role = "alert" if kind == "error" else "status"
        text = "<br>".join(map(escape, lines))
        self.status.value = f'<div role="{role}" class="lab7-{kind}">{text}</div>'

    def _repr_mimebundle_(self, **options):
        if os.environ.get(STATIC) != "1":
            return super()._repr_mimebundle_(**options)
        image = base64.b64encode(SCREENSHOT.read_bytes()).decode()
        text = "The label picker, as it looks in a notebook with a kernel."
        return {"image/png": image, "text/plain": text}, {"image/png": {"width": 860}}


def hint(labels: Sequence[str]) -> str:
    """Return what to tell somebody who has chosen these labels."""
    if not labels:
        return "Choose at least one object."
    chosen = "1 object chosen." if len(labels) == 1 else f"{len(labels)} objects chosen."
    if len(labels) <= MOST_TRAINED:
        return chosen
    return f"{chosen} Training pictures show at most {MOST_TRAINED}, so some may be missing."


def summarize(labels: Sequence[str], probabilities: Tensor | None) -> list[str]:
    """Put into lines what was asked for and what the evaluator sees.

    Args:
        labels: What was asked for.
        probabilities: The evaluator's (24,), or None without one.
    """
    asked = f"Asked for: {', '.join(labels)}"
    if probabilities is None:
        return [asked]
    seen = {x: p for x, p in zip(LABELS, probabilities.tolist(), strict=True) if p >= THRESHOLD}
    found = ", ".join(f"{label} ({p:.0%})" for label, p in seen.items()) or "nothing"
    faults = {
        "missing": [label for label in labels if label not in seen],
        "extra": [label for label in seen if label not in labels],
    }
    judgement = "; ".join(f"{name}: {', '.join(x)}" for name, x in faults.items() if x)
    return [asked, f"The evaluator sees: {found} – {judgement or 'exactly what was asked for'}"]


def verdict_table(labels: Sequence[str], probabilities: Tensor | None) -> str:
    """Write the evaluator's probabilities as an HTML table of bars: a row a shape.

    Args:
        labels: What was asked for: these bars are outlined.
        probabilities: (24,), or None before there is a verdict.
    """
    values = [None] * len(LABELS) if probabilities is None else probabilities.tolist()
    bars = [_bar(label, label in labels, p) for label, p in zip(LABELS, values, strict=True)]
    heads = "".join(f'<th scope="col">{color}</th>' for color in COLORS)
    table = f"<caption>Evaluator's verdict (outlined: asked for)</caption><tr><td></td>{heads}</tr>"
    for row, shape in enumerate(SHAPES):
        first = row * len(COLORS)
        cells = "".join(bars[first : first + len(COLORS)])
        table += f'<tr><th scope="row">{shape}</th>{cells}</tr>'
    return f"<table>{table}</table>"


def _bar(label: str, asked: bool, probability: float | None) -> str:
    """Write one field of the verdict: its number above a bar in the object's color."""
    text = "" if probability is None else f"{probability:.0%}"
    outline = "lab7-asked" if asked else ""
    weight = "lab7-seen" if text and probability >= THRESHOLD else ""
    kinds = f"lab7-{label.split()[0]} {outline} {weight}"
    return f'<td class="{kinds}" style="--lab7-height: {text or 0}"><span>{text}</span></td>'


def _toggle(label: str, chosen: bool) -> widgets.ToggleButton:
    color, shape = label.split()
    toggle = widgets.ToggleButton(chosen, description=label)
    for name in (f"lab7-{color}-{shape}", f"lab7-{color}", f"lab7-{shape}"):
        toggle.add_class(name)
    return toggle


def _button(name: str, action: Callable, tooltip: str, style: str = "") -> widgets.Button:
    button = widgets.Button(description=name, tooltip=tooltip, button_style=style)
    button.on_click(action)
    return button.add_class(f"lab7-{name.lower()}")


def _html(name: str, text: str = "") -> widgets.HTML:
    return widgets.HTML(text).add_class(name)


def _png(picture: Tensor) -> bytes:
    """Write a picture (3, 64, 64) in [-1, 1] as PNG; the browser enlarges it."""
    file = io.BytesIO()
    to_pil(picture[None])[0].save(file, "PNG", compress_level=1)
    return file.getvalue()
