"""Figures, and tables in Markdown, from arrays and records, in one style.

Every figure is a `Chart`, which a notebook shows by itself and `save` writes with the same bytes
each time. Nothing here uses pyplot: no figure stays open, and the caller's settings of matplotlib
do not matter. Colors are those of Okabe and Ito (https://jfly.uni-koeln.de/color/), which
color-blind readers can tell apart; where an object's own color is shown, its name stands beside it.
"""

import functools
import io
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.path import Path as Outline
from matplotlib.ticker import EngFormatter, FuncFormatter
from PIL import Image

from lab7.dataset import IMAGE_SIZE, to_uint8
from lab7.evaluator import THRESHOLD
from lab7.files import write_atomically
from lab7.labels import COLORS, LABELS, SHAPES

BLUE, ORANGE, GREEN, INK, FAINT = "#0072B2", "#D55E00", "#009E73", "#222222", "#8C8C8C"
OBJECT_COLORS = dict(
    gray="#575757", red="#AD2323", blue="#2A4BD7", green="#1D6914",
    brown="#814A19", purple="#8126C0", cyan="#29D0D0", yellow="#FFEE33",
)  # fmt: skip
WIDTH = 6.6  # inches, of every chart: the width of the report's text

_STYLE = {
    "font.size": 8.5,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.8,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "legend.frameon": False,
    "text.color": INK,
    "svg.hashsalt": "lab7",
    "mathtext.fontset": "dejavusans",
}
_TILE = 0.75  # inches, side of a picture in a grid
# Whole dots at the resolutions of `Chart`: between pictures, a line of a caption, below captions.
_GAP, _LINE, _SPACE = 18 / 256, 27 / 256, 9 / 256
_DRAWING_COLORS = 1500  # most that a figure without photographs has
_CYLINDER = Outline([(-0.32, -0.5), (0.32, -0.5), (0.32, 0.5), (-0.32, 0.5), (-0.32, -0.5)])
_MARKERS = {"cube": "s", "sphere": "o", "cylinder": _CYLINDER}


class Chart(Figure):
    """A matplotlib figure that notebooks show without pyplot."""

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        # 128 dots for a picture's side, twice its pixels; shown smaller, so sharp on any screen.
        dpi = 2 * IMAGE_SIZE / _TILE
        return self._render("png", dpi), {"width": round(self.get_figwidth() * 110)}

    def save(self, path: str | Path) -> None:
        """Write a `.png` or `.webp` (three dots a pixel of a picture), or a `.svg`.

        The bytes are the same each time. WebP is without loss, and a third smaller than PNG.
        """
        path = Path(path)
        write_atomically(path, self._render(path.suffix[1:], 3 * IMAGE_SIZE / _TILE))

    def _render(self, kind: str, dpi: float) -> bytes:
        buffer, drawn = io.BytesIO(), "svg" if kind == "svg" else "png"
        metadata = {"Date": None} if kind == "svg" else {"Software": None}
        with style.context(["default", _STYLE]):
            self.savefig(buffer, format=drawn, dpi=dpi, metadata=metadata)
        return buffer.getvalue() if kind == "svg" else _pack(buffer, kind, dpi)


def _pack(file: io.BytesIO, kind: str, dpi: float) -> bytes:
    """Return a PNG without its alpha channel, or the same as WebP.

    A PNG of few colors, which shows no photograph, gets a palette: half the size, and no color off
    by more than the eye sees.
    """
    packed, image = io.BytesIO(), Image.open(file).convert("RGB")
    if kind == "webp":
        image.save(packed, "WEBP", lossless=True)
        return packed.getvalue()
    if image.getcolors(_DRAWING_COLORS) is not None:
        image = image.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    image.save(packed, "PNG", optimize=True, dpi=(dpi, dpi))
    return packed.getvalue()


def styled(function: Callable[..., Chart]) -> Callable[..., Chart]:
    """Draw with the style of the project, whatever the caller's matplotlib is set to."""

    @functools.wraps(function)
    def draw(*args, **kwargs):
        with style.context(["default", _STYLE]):
            return function(*args, **kwargs)

    return draw


def make_panels(height: float, count: int = 1, **options) -> tuple[Chart, list[Axes]]:
    chart = Chart(figsize=(WIDTH, height), layout="constrained")
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
        images: (N, 3, 64, 64), float in [-1, 1] or uint8; tensor or array.
        captions: For each picture its labels, or one text.
        seen: For each picture the labels that a judge sees, an object that stands twice twice.
            Labels of the caption that it does not see get a cross, others that it sees are added
            with a plus; both in orange.
        columns: Pictures a row.
    """
    pictures = _to_array(images)
    columns = min(columns, len(pictures))
    lines = [[text] if isinstance(text, str) else list(text) for text in captions or ()]
    if seen is not None:
        lines = [_judged(*pair) for pair in zip(lines, seen, strict=True)]
    starts = range(0, len(pictures), columns)
    most = [max(map(len, lines[start : start + columns]), default=0) for start in starts]
    tops = np.cumsum([0, *(_TILE + _GAP + _LINE * count + _SPACE * bool(lines) for count in most)])
    width, height = columns * (_TILE + _GAP) - _GAP, tops[-1] - _GAP * (not lines)
    chart = Chart(figsize=(width, height))
    for index, picture in enumerate(pictures):
        row, column = divmod(index, columns)
        left, top = column * (_TILE + _GAP), height - tops[row]
        box = (left / width, (top - _TILE) / height, _TILE / width, _TILE / height)
        axes = chart.add_axes(box, frameon=False, xticks=[], yticks=[])
        axes.imshow(picture, interpolation="nearest", aspect="auto")
        for number, text in enumerate(lines[index] if lines else ()):
            chart.text(
                (left + _TILE / 2) / width,
                (top - _TILE - 0.05 - number * _LINE) / height,
                text,
                color=ORANGE if text.startswith(("✗", "+")) else INK,
                size=6 * max(1, columns / 8),  # wide grids are shown smaller
                ha="center",
                va="top",
            )
    return chart


def denoising_row(images: Any, captions: Sequence[str] | None = None) -> Chart:
    """Show the states (N, 3, 64, 64) of a reverse process from noise to picture, in one row."""
    return picture_grid(images, captions, columns=len(images))


def split_grid(sheet: Any, padding: int = 2) -> np.ndarray:
    """Cut a sheet that torchvision's `make_grid` made back into its pictures.

    Args:
        sheet: uint8 (H, W, 3), for instance a PIL image.
        padding: Pixels between the pictures.

    Returns:
        uint8 (N, 3, 64, 64), row by row.
    """
    pitch, sheet = IMAGE_SIZE + padding, np.array(sheet)[padding:, padding:, :3]
    rows, columns = sheet.shape[0] // pitch, sheet.shape[1] // pitch
    tiles = sheet[: rows * pitch, : columns * pitch].reshape(rows, pitch, columns, pitch, 3)
    tiles = tiles[:, :IMAGE_SIZE, :, :IMAGE_SIZE].transpose(0, 2, 4, 1, 3)
    return tiles.reshape(-1, 3, IMAGE_SIZE, IMAGE_SIZE)


@styled
def training_curve(log: Sequence[Mapping[str, float]]) -> Chart:
    """Show loss and learning rate over the pictures seen.

    Args:
        log: Rows of a training's log.jsonl: images, loss (a mean over some steps), lr.
    """
    chart, (left, right) = make_panels(2.3, 2, width_ratios=(2, 1))
    images, loss = _column(log, "images"), _column(log, "loss")
    window = max(1, len(log) // 25)
    left.plot(images, loss, color=BLUE, alpha=0.35, linewidth=0.9, label="as logged")
    if window > 1:
        mean = np.convolve(loss, np.ones(window) / window, "valid")
        middle = images[window // 2 : window // 2 + len(mean)]
        left.plot(middle, mean, color=BLUE, label=f"mean of {window} rows")
        left.legend()
    left.set(title="Training loss", ylabel="mean squared error", yscale="log")
    left.yaxis.set_major_formatter("{x:g}")
    left.yaxis.set_minor_formatter(FuncFormatter(_some_minor_numbers))
    right.plot(images, _column(log, "lr"), color=ORANGE)
    right.set(title="Learning rate", ylim=(0, None))
    right.yaxis.set_major_formatter("{x:g}")
    for axes in (left, right):
        axes.set_xlabel("pictures seen")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    return chart


@styled
def loss_by_level(log: Sequence[Mapping[str, Any]]) -> Chart:
    """Show how the loss falls at each level of noise.

    Args:
        log: Rows of a training's log.jsonl with `loss_by_level`: for equal parts of the time
            steps, from little noise to much, the loss or None.
    """
    chart, (left, right) = make_panels(2.5, 2, width_ratios=(3, 2), sharey=True)
    rows = [row for row in log if row.get("loss_by_level")]
    losses = np.ma.masked_invalid(np.array([row["loss_by_level"] for row in rows], dtype=float))
    count, window = losses.shape[1], max(1, len(rows) // 25)
    shades = mpl.colormaps["viridis"](np.linspace(0, 0.9, count))
    starts = range(0, len(rows), window)
    means = np.ma.stack([losses[start : start + window].mean(axis=0) for start in starts])
    images = [_column(rows[start : start + window], "images").mean() for start in starts]
    for level in range(count):
        left.plot(images, means[:, level], color=shades[level], linewidth=1.2)
    left.set(title="Loss by level of noise", ylabel="mean squared error", yscale="log")
    left.set_xlabel("pictures seen")
    left.xaxis.set_major_formatter(EngFormatter(sep=""))
    right.plot(range(count), means[-1], color=FAINT, linewidth=1, zorder=1)
    right.scatter(range(count), means[-1], color=shades, zorder=2)
    right.set(title="At the end", xlabel="tenth of the time steps, 0: least noise")
    left.yaxis.set_major_formatter("{x:g}")
    return chart


@styled
def accuracy_dots(
    rows: Mapping[str, Mapping[str, Any]],
    published: Mapping[str, Mapping[str, Any]] | None = None,
    splits: Sequence[str] = ("test", "new_test"),
) -> Chart:
    """Compare accuracies, one row a generator and one panel a condition file.

    Args:
        rows: By name and split, estimates (`value`, `low`, `high`) measured here.
        published: By name and split, estimates of what others report.
        splits: The panels.
    """
    published = published or {}
    names = [name for name in rows if name not in published] + list(published)
    chart, panels = make_panels(0.75 + 0.26 * len(names), len(splits), sharey=True, sharex=True)
    heights = {name: -index for index, name in enumerate(names)}
    for axes, split in zip(panels, splits, strict=True):
        for source, label, color, marker in (
            (published, "published", ORANGE, "D"),
            (rows, "measured here", BLUE, "o"),
        ):
            found = {name: row[split] for name, row in source.items() if split in row}
            if found:
                places = [heights[name] for name in found]
                interval_dots(axes, list(found.values()), places, label, color, marker)
        axes.set(title=split, xlabel="accuracy")
    panels[0].set_xlim(right=1.004)
    panels[0].set_ylim(0.6 - len(names), 0.6)
    panels[0].set_yticks(list(heights.values()), names)
    chart.legend(*panels[0].get_legend_handles_labels(), loc="outside lower right", ncols=2)
    return chart


@styled
def accuracy_by_epoch(
    rows: Sequence[Mapping[str, float]], splits: Sequence[str] = ("test", "new_test")
) -> Chart:
    """Show accuracy during a training: rows with `epoch` and an accuracy for each split."""
    chart, (axes,) = make_panels(2.2)
    for split, color, marker in zip(splits, (BLUE, ORANGE), "os", strict=True):
        axes.plot(
            _column(rows, "epoch"), _column(rows, split), f"-{marker}", color=color, label=split
        )
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
    chart, panels = make_panels(2.6, 2, sharey=True)
    settings = {"guidance": "guidance_scale", "steps": "num_inference_steps"}
    for axes, (name, setting), other in zip(
        panels, settings.items(), ("steps", "guidance"), strict=True
    ):
        rows = sweep[name]
        own = sweep[other][0][setting]
        axes.axvline(own, color=INK, linewidth=1, linestyle=":", label="the generator's own")
        for score, color, marker in (("top_k", BLUE, "o"), ("exact_set", ORANGE, "s")):
            value, low, high = bounds([row[score] for row in rows])
            x = _column(rows, setting)
            axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
            axes.plot(x, value, f"-{marker}", color=color, label=words(score))
    guidance, steps = panels
    guidance.set(title=f"At {sweep['guidance'][0]['num_inference_steps']} steps")
    guidance.set(xlabel="guidance scale", ylabel="score on valid")
    steps.set(title=f"At guidance {sweep['steps'][0]['guidance_scale']:g}", xscale="log")
    steps.set_xticks(_column(sweep["steps"], "num_inference_steps"), minor=False)
    steps.set_xticks([], minor=True)
    steps.xaxis.set_major_formatter("{x:g}")
    steps.set_xlabel("sampling steps")
    chart.legend(*steps.get_legend_handles_labels(), loc="outside lower right", ncols=3)
    return chart


@styled
def label_heatmap(values: Mapping[str, float | None], form: str = "{:.3f}") -> Chart:
    """Show one value for each of the 24 labels: a row a shape, a column a color.

    Args:
        values: By label, for instance its recall or how many pictures have it; None is left out.
        form: How a value is written.
    """
    table = np.array([values[label] for label in LABELS], dtype=float)
    table = table.reshape(len(SHAPES), len(COLORS))
    chart, (axes,) = make_panels(1.55)
    shades = mpl.colormaps["Blues"]
    norm = mpl.colors.Normalize(np.nanmin(table) - 1e-9, np.nanmax(table) + 1e-9)
    axes.imshow(shades(0.05 + 0.6 * norm(table)), aspect="auto")
    for (row, column), value in np.ndenumerate(table):
        color = OBJECT_COLORS[COLORS[column]]
        marker = _MARKERS[SHAPES[row]]
        axes.plot(column - 0.32, row, marker=marker, color=color, mec="white", mew=0.6, ms=8)
        text = "–" if np.isnan(value) else form.format(value)
        axes.text(column + 0.12, row, text, ha="center", va="center")
    axes.set_xticks(range(len(COLORS)), COLORS)
    axes.set_yticks(range(len(SHAPES)), SHAPES)
    axes.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    return chart


@styled
def verdict_bars(probabilities: Any, condition: Sequence[str]) -> Chart:
    """Show what the evaluator sees in one picture; see `draw_verdict`."""
    chart = Chart(figsize=(WIDTH, 2.4), layout="constrained")
    draw_verdict(chart, condition, probabilities)
    return chart


def draw_verdict(
    figure: Figure | SubFigure, condition: Sequence[str], probabilities: Any | None
) -> None:
    """Draw the evaluator's probabilities as bars: a row a shape, a column a color.

    Args:
        figure: Empty.
        condition: What was asked for: these bars are outlined.
        probabilities: (24,), in the order of LABELS, or None before there is a verdict.
    """
    figure.suptitle("Evaluator's verdict (outlined: asked for)", fontsize=8, color=INK)
    values = np.zeros(len(LABELS)) if probabilities is None else np.asarray(probabilities)
    rows = figure.subplots(len(SHAPES), 1, sharex=True, sharey=True)
    for axes, shape, part in zip(rows, SHAPES, values.reshape(len(SHAPES), -1), strict=True):
        _draw_bars(axes, part, probabilities is not None)
        asked = [x for x, color in enumerate(COLORS) if f"{color} {shape}" in condition]
        axes.bar(asked, 1, width=0.8, fill=False, edgecolor=INK, linewidth=1.3, zorder=3)
        axes.set_ylabel(shape, fontsize=7.5)
    rows[-1].set_xticks(range(len(COLORS)), COLORS, fontsize=6.5)


@styled
def noise_schedules(schedules: Mapping[str, Any]) -> Chart:
    """Show how noise schedules take the picture away.

    Args:
        schedules: By name, alphas_cumprod (T,). The left panel shows it, the share of the
            picture's variance that is left at t; the right one the signal-to-noise ratio.
    """
    chart, (left, right) = make_panels(2.3, 2)
    for (name, alphas), color, line in zip(
        schedules.items(), (BLUE, ORANGE, GREEN), ("-", "--", "-."), strict=False
    ):
        alphas = np.asarray(alphas, dtype=float)
        left.plot(alphas, line, color=color, label=name)
        right.plot(alphas / (1 - alphas), line, color=color, label=name)
    left.set(title=r"Signal left, $\bar\alpha_t$", xlabel="t")
    right.set(title=r"Signal to noise, $\bar\alpha_t/(1-\bar\alpha_t)$", xlabel="t", yscale="log")
    left.legend()
    return chart


@styled
def cooccurrence(counts: Any) -> Chart:
    """Show how many pictures have both of two labels: (24, 24) counts, in the order of LABELS."""
    counts = np.asarray(counts).astype(float)
    np.fill_diagonal(counts, np.nan)
    return label_matrix(counts, "pictures", cmap="Blues", vmin=0)


@styled
def label_similarity(values: Any) -> Chart:
    """Show how alike two labels are: (24, 24) values in [-1, 1], in the order of LABELS."""
    return label_matrix(np.asarray(values), "similarity", cmap="RdBu", vmin=-1, vmax=1)


def table(header: Sequence[Any], rows: Sequence[Sequence[Any]]) -> str:
    """Write a Markdown table; columns that hold mostly numbers are set to the right."""
    columns = [[str(cell) for cell in column] for column in zip(*rows, strict=True)]
    numbers = [sum(text[:1].isdigit() for text in column) for column in columns]
    marks = ["---:" if 2 * count > len(rows) else "---" for count in numbers]
    lines = [" | ".join(map(str, cells)) for cells in (header, marks, *rows)]
    return "\n".join(f"| {line} |" for line in lines)


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


def label_matrix(values: np.ndarray, name: str, **colors: Any) -> Chart:
    """Show a value for each pair of labels."""
    chart = Chart(figsize=(WIDTH, 5.6), layout="constrained")
    axes = chart.subplots()
    image = axes.imshow(values, **colors)
    axes.set_xticks(range(len(LABELS)), LABELS, rotation=90)
    axes.set_yticks(range(len(LABELS)), LABELS)
    axes.tick_params(length=0)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    chart.colorbar(image, label=name, shrink=0.6).outline.set_visible(False)
    return chart


def _judged(wanted: Sequence[str], seen: Sequence[str]) -> list[str]:
    left, lines = Counter(seen), []
    for label in wanted:
        lines.append(label if left[label] else f"✗ {label}")
        left[label] -= 1
    return lines + [f"+ {label}" for label in left.elements()]


def interval_dots(
    axes: Axes, estimates: Sequence[Any], places: Sequence[float], label: str,
    color: str = BLUE, marker: str = "o", horizontal: bool = True,
) -> None:  # fmt: skip
    """Draw estimates as dots with their intervals; one without an interval gets none."""
    value, low, high = bounds(estimates)
    errors = np.array([value - low, high - value]).clip(min=0)
    x, y, side = (value, places, "xerr") if horizontal else (places, value, "yerr")
    axes.errorbar(
        x, y, fmt=marker, color=color, label=label, elinewidth=1.4, capsize=2.5, **{side: errors}
    )


def bounds(estimates: Sequence[Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    values = [field(estimate, "value") for estimate in estimates]
    parts = [values]
    for name in ("low", "high"):
        bounds = [field(estimate, name) for estimate in estimates]
        parts.append([v if b is None else b for v, b in zip(values, bounds, strict=True)])
    return tuple(np.array(part, dtype=float) for part in parts)


def field(item: Any, name: str) -> Any:
    """Read a field of a dataclass or of the dict that a record keeps of it."""
    return item[name] if isinstance(item, Mapping) else getattr(item, name)


def _draw_bars(axes: Axes, values: Sequence[float], numbers: bool) -> None:
    places = range(len(values))
    axes.bar(places, 1, width=0.8, color="#eff0f2", zorder=0)
    axes.bar(places, values, width=0.8, color=OBJECT_COLORS.values(), zorder=1)
    axes.axhline(THRESHOLD, color="#9aa0a8", linewidth=0.7, linestyle=(0, (2, 2)), zorder=2)
    for x, value in enumerate(values if numbers else ()):
        color = INK if value >= THRESHOLD else FAINT
        axes.text(x, 1.05, f"{value:.0%}", fontsize=6, ha="center", va="bottom", color=color)
    axes.set(ylim=(0, 1.25), yticks=[], xlim=(-0.5, len(values) - 0.5))
    axes.tick_params(length=0)
    axes.grid(False)
    axes.spines[:].set_visible(False)


def _column(rows: Sequence[Mapping[str, float]], name: str) -> np.ndarray:
    return np.array([row[name] for row in rows], dtype=float)


def _to_array(images: Any) -> np.ndarray:
    """Turn pictures (N, 3, H, W) into uint8 (N, H, W, 3)."""
    images = torch.as_tensor(images).cpu()
    images = to_uint8(images) if images.is_floating_point() else images
    return images.permute(0, 2, 3, 1).numpy()


def words(score: str) -> str:
    return {"top_k": "top-k", "exact_set": "exact set"}.get(score, score)


def _some_minor_numbers(value: float, _) -> str:
    """Write 2 and 5 times a power of ten: a log axis often spans less than one power."""
    return f"{value:g}" if f"{value:e}"[0] in "25" else ""
