"""LabelPicker: choose objects, watch their picture form, see what the evaluator finds in it."""

import base64
import os
import threading
import time
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from html import escape

import ipywidgets as widgets
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from lab7.evaluator import THRESHOLD, Evaluator
from lab7.labels import LABELS, encode, parse_labels
from lab7.picker_drawing import (
    CSS,
    PICTURE_WIDTH,
    Frame,
    draw_picker,
    enlarge,
    figure_png,
    image_png,
)
from lab7.pipeline import ConditionalDDPMPipeline
from lab7.plots import draw_verdict

STATIC = "LAB7_STATIC"  # environment variable: 1 shows a picture of the picker, not the widget
MOST_TRAINED = 3  # objects in the pictures that the generator learned from


@dataclass(frozen=True)
class Request:
    """What to draw, as the controls stood when it was asked for."""

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
    environment variable `LAB7_STATIC=1` a notebook gets a picture of the picker with the first
    condition drawn, for readers without a kernel.

    Args:
        pipeline: Draws the pictures; its own scheduler is left alone.
        evaluator: Judges them; None: no verdict.
        labels: Objects chosen at first.
        seed: At first; as the two below it can be changed with a slider.
        num_inference_steps: The pipeline's own by default.
        guidance_scale: The pipeline's own by default.

    Attributes:
        error: What the last drawing failed with, or None.

    Raises:
        ValueError: If a label is unknown or given twice.
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
        config = pipeline.config
        steps = config.num_inference_steps if num_inference_steps is None else num_inference_steps
        guidance = config.guidance_scale if guidance_scale is None else guidance_scale
        # A scheduler counts its own steps: one that the notebook uses meanwhile would not do.
        self.pipeline = ConditionalDDPMPipeline(pipeline.unet, deepcopy(pipeline.scheduler))
        self.evaluator = evaluator
        self.error: Exception | None = None
        self.thread: threading.Thread | None = None
        self._running = False
        self._guard = threading.RLock()  # of _running and the buttons that depend on it
        self._stopping = threading.Event()
        self._build_controls(parse_labels(labels), steps, guidance, seed)
        self._build_results()
        super().__init__([widgets.HTML(f"<style>{CSS}</style>"), *self._rows()])
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

    def _build_controls(
        self, labels: tuple[str, ...], steps: int, guidance: float, seed: int
    ) -> None:
        self.toggles = {label: _toggle(label, label in labels) for label in LABELS}
        for toggle in self.toggles.values():
            toggle.observe(self._refresh, "value")
        longest = self.pipeline.scheduler.config.num_train_timesteps
        self.steps = widgets.IntSlider(
            steps, 1, min(longest, max(50, steps)), description="Steps",
            tooltip="Steps from noise to picture: more take longer",
        )  # fmt: skip
        self.guidance = widgets.FloatSlider(
            guidance, min=0, max=max(10, guidance), step=0.5, description="Guidance",
            readout_format=".1f", tooltip="How hard to insist on the objects; 1 is no guidance",
        )  # fmt: skip
        self.seed = widgets.IntSlider(
            seed, 0, max(999, seed), description="Seed",
            tooltip="Another seed, another picture of the same objects",
        )  # fmt: skip
        self.generate = _button("Generate", "primary", "Draw a picture of the objects chosen")
        self.stop = _button("Stop", "", "Stop drawing and keep the picture as it is")
        self.clear = _button("Clear", "", "Choose none of the objects")
        self.generate.on_click(self._start)
        self.stop.on_click(self._request_stop)
        self.clear.on_click(self._clear)

    def _build_results(self) -> None:
        self.hint, self.status = _line("lab7-hint"), _line("lab7-status")
        self.progress = widgets.IntProgress(0, 0, 1).add_class("lab7-progress")
        blank = image_png(Image.new("RGB", (PICTURE_WIDTH, PICTURE_WIDTH), "#f1f2f4"))
        # Captions and status line describe the images: ipywidgets 8.1 fails to show one that has a
        # tooltip, and knows no alternative text.
        self.noisy = widgets.Image(value=blank).add_class("lab7-noisy")
        self.picture = widgets.Image(value=blank).add_class("lab7-picture")
        self.noisy_caption, self.picture_caption = _line("lab7-caption"), _line("lab7-caption")
        self.verdict = widgets.Image().add_class("lab7-verdict")
        self.noisy_caption.value = "Noisy x<sub>t</sub>"
        self.picture_caption.value = "Predicted x<sub>0</sub>"
        self._show_verdict((), None)

    def _rows(self) -> list[widgets.Widget]:
        panels = [
            widgets.VBox([self.noisy, self.noisy_caption]).add_class("lab7-panel"),
            widgets.VBox([self.picture, self.picture_caption]).add_class("lab7-panel"),
        ]
        if self.evaluator is not None:
            panels.append(widgets.VBox([self.verdict]).add_class("lab7-panel"))
        buttons = [self.generate, self.stop, self.clear, self.hint]
        return [
            widgets.GridBox(list(self.toggles.values())).add_class("lab7-objects"),
            widgets.HBox([self.steps, self.guidance, self.seed]).add_class("lab7-sliders"),
            widgets.HBox(buttons).add_class("lab7-buttons"),
            self.progress,
            widgets.HBox(panels).add_class("lab7-panels"),
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
        asked = f"Asked for: {', '.join(request.labels)}"
        self._say([asked, f"Drawing … ({request})"])
        self._show_verdict(request.labels, None)
        self.progress.value, self.progress.max = 0, request.num_inference_steps
        start = time.perf_counter()
        for frame in self._frames(request):
            self._show(frame)
            if self._stopping.is_set():
                done = f"Stopped after step {frame.step} of {request.num_inference_steps}"
                return self._say([asked, f"{done}, so there is no verdict."])
        seconds = time.perf_counter() - start
        self.picture_caption.value = "Finished picture"
        lines = self._judge(request, frame.picture)
        self._say([*lines, f"{request}: {seconds:.1f} s"], "done")

    def _frames(self, request: Request) -> Iterator[Frame]:
        cond = encode([request.labels])
        steps, guidance = request.num_inference_steps, request.guidance_scale
        reverse = self.pipeline.reverse(cond, [request.seed], steps, guidance)
        for step, (t, xt, x0, xt_next) in enumerate(reverse, 1):  # noqa: B007
            yield Frame(step, t, xt[0], x0[0])
        yield Frame(step, t, xt[0], xt_next[0].clamp(-1, 1))

    def _show(self, frame: Frame) -> None:
        self.progress.value = frame.step
        self.noisy.value = image_png(enlarge(frame.xt, Image.Resampling.NEAREST))
        self.picture.value = image_png(enlarge(frame.picture))
        self.noisy_caption.value = f"Noisy x<sub>t</sub>, t = {frame.t}"
        self.picture_caption.value = "Predicted x<sub>0</sub>"

    def _judge(self, request: Request, picture: Tensor) -> list[str]:
        if self.evaluator is None:
            return summarize(request.labels, None)
        probabilities = self.evaluator.predict(picture[None])[0]
        self._show_verdict(request.labels, probabilities)
        return summarize(request.labels, probabilities)

    def _show_verdict(self, labels: tuple[str, ...], probabilities: Tensor | None) -> None:
        if self.evaluator is not None:
            figure = Figure((3.0, 2.5), layout="constrained")
            draw_verdict(figure, labels, probabilities)
            self.verdict.value = figure_png(figure)

    def _say(self, lines: list[str], kind: str = "") -> None:
        role = "alert" if kind == "error" else "status"
        text = "<br>".join(map(escape, lines))
        self.status.value = f'<div role="{role}" class="lab7-{kind or "busy"}">{text}</div>'

    def _repr_mimebundle_(self, **options):
        if os.environ.get(STATIC) != "1":
            return super()._repr_mimebundle_(**options)
        request = self.request()
        *frames, last = self._frames(request)
        probabilities = self.evaluator and self.evaluator.predict(last.picture[None])[0]
        text = "\n".join([*summarize(request.labels, probabilities), str(request)])
        on_the_way = frames[3 * len(frames) // 4]
        figure = draw_picker(request.labels, on_the_way, last.picture, probabilities, text)
        image = base64.b64encode(figure_png(figure)).decode()
        return {"image/png": image, "text/plain": text}, {"image/png": {"width": 860}}


def hint(labels: Sequence[str]) -> str:
    """Return what to tell somebody who has chosen these labels."""
    if not labels:
        return "Choose at least one object."
    if len(labels) > MOST_TRAINED:
        return (
            f"{len(labels)} objects chosen. Training pictures show at most {MOST_TRAINED}, "
            "so some may be missing."
        )
    return "1 object chosen." if len(labels) == 1 else f"{len(labels)} objects chosen."


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
    missing = [label for label in labels if label not in seen]
    extra = [label for label in seen if label not in labels]
    found = ", ".join(f"{label} ({p:.0%})" for label, p in seen.items()) or "nothing"
    faults = {"missing": missing, "extra": extra}
    judgement = "; ".join(f"{name}: {', '.join(x)}" for name, x in faults.items() if x)
    judgement = judgement or "exactly what was asked for"
    return [asked, f"The evaluator sees: {found} – {judgement}"]


def _toggle(label: str, chosen: bool) -> widgets.ToggleButton:
    color, shape = label.split()
    toggle = widgets.ToggleButton(chosen, description=label)
    for name in (f"lab7-{color}-{shape}", f"lab7-{color}", f"lab7-{shape}"):
        toggle.add_class(name)
    return toggle


def _button(name: str, style: str, tooltip: str) -> widgets.Button:
    button = widgets.Button(description=name, button_style=style, tooltip=tooltip)
    return button.add_class(f"lab7-{name.lower()}")


def _line(name: str) -> widgets.HTML:
    return widgets.HTML().add_class(name)
