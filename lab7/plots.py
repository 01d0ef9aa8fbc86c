"""Figures, and tables in Markdown, from arrays and records, in one style.

Every figure is a `Chart`, which a notebook shows by itself and `save` writes with the same bytes
each time. Nothing here uses pyplot: no figure stays open, and the caller's settings of matplotlib
do not matter. Colors are those of Okabe and Ito (https://jfly.uni-koeln.de/color/), which
color-blind readers can tell apart.
"""

import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps, style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from PIL import Image

from lab7.dataset import IMAGE_SIZE, SCORED, to_uint8
from lab7.errors import unknown
from lab7.files import write_atomically
from lab7.records import Record

BLUE, ORANGE, INK, FAINT = "#0072B2", "#D55E00", "#222222", "#8C8C8C"

_PIXEL = 0.75 / 64  # inches, of a pixel of a picture in a grid
_BORDER = 2  # pixels that torchvision's `make_grid` leaves between pictures
_GAP, _LINE, _MARGIN = 6, 9, 3  # such pixels: between pictures, a line of a caption, below captions
# What learning curves may be drawn over: what the axis says, and its unit.
_PROGRESS = {"step": ("steps", 1), "images": ("pictures seen", 1), "seconds": ("hours", 3600)}

styled = style.context(["default", Path(__file__).with_name("plots.mplstyle")])  # a decorator


class Chart(Figure):
    """A matplotlib figure that notebooks show without pyplot."""

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        # Two dots a pixel of a picture; shown smaller, so sharp on any screen.
        return self._render("png", 2 / _PIXEL), {"width": round(self.get_figwidth() * 110)}

    def save(self, path: str | Path) -> None:
        """Write a `.png` or `.webp` (three dots a pixel of a picture), or a `.svg`.

        The bytes are the same each time. WebP is lossless, and a third smaller than PNG.
        """
        write_atomically(Path(path), self._render(Path(path).suffix[1:], 3 / _PIXEL))

    @styled
    def _render(self, kind: str, dpi: float) -> bytes:
        """Draw as PNG or WebP without an alpha channel, or as SVG.

        A PNG of at most 1,500 colors, which shows no photograph, gets a palette: half the size, and
        no color off by more than the eye sees.
        """
        drawn, packed = io.BytesIO(), io.BytesIO()
        if kind == "svg":
            self.savefig(drawn, format="svg", metadata={"Date": None})
            return drawn.getvalue()
        self.savefig(drawn, format="png", dpi=dpi)
        image = Image.open(drawn).convert("RGB")
        if kind == "png" and image.getcolors(1500) is not None:
            image = image.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
        image.save(packed, kind, optimize=True, lossless=True, dpi=(dpi, dpi))
        return packed.getvalue()

    def legend_below(self) -> None:
        """Add one legend for all panels, of what the last one shows."""
        handles, names = self.axes[-1].get_legend_handles_labels()
        self.legend(handles, names, loc="outside lower right", ncols=4)


@styled
def make_panels(height: float, count: int = 1, **options) -> tuple[Chart, list[Axes]]:
    """Make a chart with some axes side by side; height in inches, options of `Figure.subplots`."""
    chart = Chart(figsize=(6.6, height), layout="constrained")  # as wide as the report's text
    return chart, list(chart.subplots(1, count, squeeze=False, **options)[0])


@styled
def picture_grid(
    images: Any,
    captions: Sequence[Sequence[str] | str] | None = None,
    seen: Sequence[Sequence[str]] | None = None,
    columns: int = 8,
) -> Chart:
    """Show pictures side by side, each pixel a sharp square.

    Args:
        images: (N, 3, H, W), float in [-1, 1] or uint8; tensor or array.
        captions: For each picture its labels, or one text.
        seen: For each picture the labels that a judge sees, each as often as it occurs. Labels of
            the caption that it does not see get a cross, others that it sees are added with a
            plus; both in orange.
        columns: Pictures a row.
    """
    pictures = _to_array(images)
    columns = min(columns, len(pictures))
    lines = [[c] if isinstance(c, str) else list(c) for c in captions or [()] * len(pictures)]
    if seen is not None:
        lines = [_compare(wanted, found) for wanted, found in zip(lines, seen, strict=True)]
    rows = [lines[start : start + columns] for start in range(0, len(lines), columns)]
    (tall, wide), margin = pictures.shape[1:3], _MARGIN if captions else 0
    pitch = wide + _GAP
    tops = np.cumsum([0, *(tall + _GAP + _LINE * max(map(len, row)) + margin for row in rows)])
    height, width = tops[-1] - _GAP, columns * pitch - _GAP
    sheet = np.full((height, width, 3), 255, np.uint8)
    chart = Chart(figsize=(_PIXEL * width, _PIXEL * height))
    axes = chart.add_axes((0, 0, 1, 1), frameon=False, xticks=[], yticks=[])
    options = {"size": 6 * max(1, columns / 8), "ha": "center", "va": "top"}  # wide: shown smaller
    for index, picture in enumerate(pictures):
        top, left = tops[index // columns], index % columns * pitch
        sheet[top : top + tall, left : left + wide] = picture
        for number, text in enumerate(lines[index]):
            color = ORANGE if text.startswith(("✗", "+")) else INK
            y = top + tall + 4 + number * _LINE
            axes.text(left + wide / 2, y, text, color=color, **options)
    axes.imshow(sheet, interpolation="nearest", aspect="auto", extent=(0, width, height, 0))
    return chart


def split_grid(sheet: Any, size: int = IMAGE_SIZE) -> np.ndarray:
    """Cut a sheet that torchvision's `make_grid` made back into its pictures.

    Args:
        sheet: uint8 (H, W, 3), for instance a PIL image.
        size: Side of a picture in pixels.

    Returns:
        uint8 (N, 3, size, size), row by row.
    """
    pixels = torch.as_tensor(np.array(sheet)[_BORDER:, _BORDER:, :3])
    pitch = size + _BORDER
    tiles = pixels.unfold(0, size, pitch).unfold(1, size, pitch)
    return tiles.reshape(-1, 3, size, size).numpy()


@styled
def training_curve(log: Sequence[Mapping[str, float]]) -> Chart:
    """Show the loss over the pictures seen: rows of log.jsonl with images, loss (a mean)."""
    chart, (axes,) = make_panels(2.3)
    axes.plot(_column(log, "images"), _column(log, "loss"), marker="")
    _over_pictures_seen(axes, "Training loss", ylabel="mean squared error", yscale="log")
    return chart


@styled
def loss_by_level(log: Sequence[Mapping[str, Any]]) -> Chart:
    """Show how the loss falls at each level of noise.

    Args:
        log: Rows of a training's log.jsonl with `loss_by_level`: for equal parts of the time
            steps, from little noise to much, the loss or None.
    """
    chart, (axes,) = make_panels(2.5)
    rows = [row for row in log if row.get("loss_by_level")]
    losses = np.array([row["loss_by_level"] for row in rows], dtype=float)  # None becomes NaN
    levels = losses.shape[1]
    axes.set_prop_cycle(color=colormaps["viridis"](np.linspace(0, 0.9, levels)))
    lines = axes.plot(_column(rows, "images"), losses, linewidth=1.2)
    axes.legend(lines[:: levels - 1], ["least noise", "most noise"])
    _over_pictures_seen(axes, "Loss by noise level", ylabel="mean squared error", yscale="log")
    return chart


@styled
def learning_curves(records: Mapping[str, Record], score: str = "top_k", x: str = "step") -> Chart:
    """Show the score on `valid` during trainings, with 95 % intervals; a line a run.

    Args:
        records: By name of the line, records with "milestones": rows with x, "scores" and
            "audit", see `workshop.study.experiments.train_and_score`.
        score: One of these, for instance "top_k", "exact_set" or "exact_scene".
        x: "step", "images" or "seconds", of the training.

    Raises:
        UserError: A record without milestones, or an unknown score or x.
    """
    if x not in _PROGRESS:
        raise unknown("x", x, _PROGRESS)
    quantity, unit = _PROGRESS[x]
    runs = {name: record.get("milestones") for name, record in records.items()}
    chart, (axes,) = make_panels(2.6)
    longest = max(row[x] for rows in runs.values() for row in rows) / unit
    for place, (name, rows) in enumerate(runs.items()):
        aside = 0.006 * longest * (place - (len(runs) - 1) / 2)  # so that no interval hides another
        estimates = [_pick_score(row, score) for row in rows]
        draw_estimates(axes, _column(rows, x) / unit + aside, estimates, name, "-")
    axes.set(xlabel=f"{quantity} of training", ylabel=f"{words(score)} on valid", ylim=(None, 1.01))
    axes.xaxis.set_major_formatter("{x:,.10g}")
    chart.legend(loc="outside right upper")
    return chart


@styled
def accuracy_dots(groups: Mapping[str, Any]) -> Chart:
    """Compare accuracies with their 95 % intervals: a row a name; panels `test`, `new_test`.

    Args:
        groups: By group, for instance "published" and "measured here", and within it by name and
            split, estimates (`value`, `low`, `high`). What several groups have of one name is in
            one row; a row may lack a split.
    """
    names = list(dict.fromkeys(name for rows in groups.values() for name in rows))
    height = 0.8 + (0.2 + 0.06 * len(groups)) * len(names)
    chart, panels = make_panels(height, len(SCORED), sharey=True, sharex=True)
    for axes, split in zip(panels, SCORED, strict=True):
        for group, rows in groups.items():
            found = {name: row[split] for name, row in rows.items() if split in row}
            places = [names.index(name) + _lane(groups, group, name) for name in found]
            draw_estimates(axes, places, found.values(), group, horizontal=True)
        axes.set(title=split, xlabel="accuracy", ylim=(len(names) - 0.4, -0.6))
    panels[0].set_yticks(range(len(names)), names)
    panels[0].set_xlim(right=1.01)  # of both, now that both are drawn
    chart.legend_below()
    return chart


@styled
def accuracy_by_epoch(rows: Sequence[Mapping[str, float]]) -> Chart:
    """Show accuracy on both condition files during a training: rows with `epoch` and these."""
    chart, (axes,) = make_panels(2.2)
    for split in SCORED:
        axes.plot(_column(rows, "epoch"), _column(rows, split), label=split)
    axes.set(xlabel="epoch", ylabel="accuracy", ylim=(None, 1.0))
    axes.legend(loc="lower right")
    return chart


@styled
def sweep_curves(sweep: Mapping[str, Sequence[Mapping[str, Any]]]) -> Chart:
    """Show accuracy over guidance scale and over number of steps.

    Args:
        sweep: "guidance" and "steps": rows with guidance_scale, num_inference_steps, top_k and
            exact_set, the last two estimates; in each list only one of the settings varies, and
            the other is the generator's own, which a dotted line marks.
    """
    guidance, steps = sweep["guidance"], sweep["steps"]
    scale, count = steps[0]["guidance_scale"], guidance[0]["num_inference_steps"]
    chart, (left, right) = make_panels(2.6, 2, sharey=True)
    _draw_setting(left, guidance, "guidance_scale", scale)
    _draw_setting(right, steps, "num_inference_steps", count)
    left.set(title=f"At {count} steps", xlabel="guidance scale", ylabel="score on valid")
    right.set(title=f"At guidance {scale:g}", xlabel="sampling steps", xlim=(0, None))
    chart.legend_below()
    return chart


def draw_estimates(
    axes: Axes, at: Any, estimates: Iterable, label: str, line: str = "", horizontal: bool = False
) -> None:
    """Draw estimates as dots with their intervals, in the next color; one without gets no interval.

    Args:
        axes: Where.
        at: (N,), their x, or y where horizontal.
        estimates: N dataclasses or dicts with `value`, `low` and `high`.
        label: For the legend.
        line: "-" joins the dots.
        horizontal: Whether the values are along x.
    """
    rows = [[field(estimate, key) for key in ("value", "low", "high")] for estimate in estimates]
    value, low, high = np.array(rows, dtype=float).reshape(-1, 3).T  # None becomes NaN: not drawn
    errors = np.array([value - low, high - value]).clip(min=0)
    if horizontal:
        axes.errorbar(value, at, xerr=errors, label=label, linestyle=line)
    else:
        axes.errorbar(at, value, yerr=errors, label=label, linestyle=line)


def field(item: Any, name: str) -> Any:
    """Read a field of a dataclass or of the dict that a record keeps of it."""
    return item[name] if isinstance(item, Mapping) else getattr(item, name)


def words(score: str) -> str:
    """Return the name of a score as figures show it."""
    return {"top_k": "top-k", "f1": "F1"}.get(score, score.replace("_", " "))


class Table(str):
    """A table in Markdown that notebooks show as such."""

    def _repr_markdown_(self) -> str:
        return str(self)


def table(header: Sequence[Any], rows: Sequence[Sequence[Any]]) -> Table:
    """Write a Markdown table; columns that hold mostly numbers are set to the right."""
    columns = [[str(cell) for cell in column] for column in zip(*rows, strict=True)]
    numbers = [sum(text[:1].isdigit() for text in column) for column in columns]
    marks = ["---:" if 2 * count > len(rows) else "---" for count in numbers]
    lines = (f"| {' | '.join(map(str, cells))} |" for cells in (header, marks, *rows))
    return Table("\n".join(lines))


def interval_text(estimate: Any, form: str = "{:.3f}", times: float = 1) -> str:
    """Write an estimate with its 95 % interval, for instance "0.931 (0.902–0.957)".

    Args:
        estimate: With `value`, `low` and `high`.
        form: How a number is written.
        times: Factor of all three.
    """
    numbers = [field(estimate, name) for name in ("value", "low", "high")]
    value, low, high = (n if n is None else form.format(times * n) for n in numbers)
    return value if low is None else f"{value} ({low}–{high})"


def _compare(wanted: Sequence[str], seen: Sequence[str]) -> list[str]:
    """Return the lines of a caption: labels seen or missed, then those that are too many."""
    missed, extra = Counter(wanted) - Counter(seen), Counter(seen) - Counter(wanted)
    lines = [f"✗ {label}" if label in missed else label for label in wanted]
    return lines + [f"+ {label}" for label in extra.elements()]


def _lane(groups: Mapping[str, Mapping[str, Any]], group: str, name: str) -> float:
    """Return how far a group's dot is from the middle of a row that several groups may share."""
    sharing = [other for other, rows in groups.items() if rows.get(name)]
    return 0.25 * (sharing.index(group) - (len(sharing) - 1) / 2)


def _pick_score(row: Mapping[str, Any], score: str) -> Mapping[str, float]:
    """Return one of the estimates of a milestone."""
    scores = {k: v for k, v in (row["scores"] | row["audit"]).items() if isinstance(v, Mapping)}
    if score not in scores:
        raise unknown("score", score, scores)
    return scores[score]


def _draw_setting(axes: Axes, rows: Sequence[Mapping[str, Any]], setting: str, own: float) -> None:
    """Draw both scores over a setting of a sweep, and mark the generator's own."""
    axes.axvline(own, color=INK, linewidth=1, linestyle=":", label="the generator's own")
    for score in ("top_k", "exact_set"):
        estimates = [row[score] for row in rows]
        draw_estimates(axes, _column(rows, setting), estimates, words(score), "-")


def _over_pictures_seen(axes: Axes, title: str, **options: Any) -> None:
    """Set up axes of a training; where they are logarithmic, for less than a power of ten too."""
    axes.set(title=title, xlabel="pictures seen", **options)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(lambda y, _: f"{y:g}" if f"{y:e}"[0] in "25" else "")


def _column(rows: Sequence[Mapping[str, float]], name: str) -> np.ndarray:
    return np.array([row[name] for row in rows], dtype=float)


def _to_array(images: Any) -> np.ndarray:
    """Turn pictures (N, 3, H, W) into uint8 (N, H, W, 3)."""
    images = torch.as_tensor(images).cpu().movedim(1, 3)
    return (to_uint8(images) if images.is_floating_point() else images).numpy()
