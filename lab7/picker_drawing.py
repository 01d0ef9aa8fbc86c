"""How the label picker looks: its style sheet, and a drawing of it for readers without a kernel."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import FancyBboxPatch
from PIL import Image
from torch import Tensor

from lab7.labels import COLORS, LABELS, SHAPES
from lab7.pipeline import to_pil
from lab7.plots import INK, OBJECT_COLORS, draw_verdict

LIGHT = "#ffffff"
PICTURE_WIDTH = 256  # pixels
_DPI = 150  # of drawings that are laid out at 100: sharper on dense screens, half the bytes of 200


@dataclass(frozen=True)
class Frame:
    """A moment of sampling: step 1 … n, time t, xt and picture (3, 64, 64) in [-1, 1].

    The picture is the x0 predicted from xt, in the last frame the finished one.
    """

    step: int
    t: int
    xt: Tensor
    picture: Tensor


def draw_picker(
    labels: Sequence[str],
    noisy: Frame,
    picture: Tensor,
    probabilities: Tensor | None,
    text: str,
) -> Figure:
    """Draw the picker as it looks with a picture finished.

    Args:
        labels: What was asked for.
        noisy: A moment on the way.
        picture: The finished picture (3, 64, 64) in [-1, 1].
        probabilities: The evaluator's (24,), or None without one.
        text: Up to three lines, for the bottom.
    """
    figure = Figure((8.6, 5.2), layout="constrained")
    top, middle, bottom = figure.subfigures(3, 1, height_ratios=(1.7, 2.9, 0.6))
    _draw_objects(top.add_axes((0.005, 0, 0.99, 1)), labels)
    bottom.text(0.01, 0.5, text, fontsize=8, color=INK, va="center", linespacing=1.5)
    panels = middle.subfigures(1, 3, width_ratios=(1, 1, 1.3))
    resampling = Image.Resampling.NEAREST
    _draw_picture(panels[0], enlarge(noisy.xt, resampling), f"Noisy $x_t$, t = {noisy.t}")
    _draw_picture(panels[1], enlarge(picture), "Finished picture")
    if probabilities is not None:
        draw_verdict(panels[2], labels, probabilities)
    return figure


def enlarge(
    picture: Tensor, resampling: Image.Resampling = Image.Resampling.LANCZOS
) -> Image.Image:
    """Turn a picture (3, 64, 64) into one to look at; values beyond [-1, 1] are cut."""
    return to_pil(picture.clamp(-1, 1)[None])[0].resize((PICTURE_WIDTH,) * 2, resampling)


def image_png(image: Image.Image) -> bytes:
    """Write a picture as PNG."""
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return file.getvalue()


def figure_png(figure: Figure) -> bytes:
    """Write a drawing as PNG."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=_DPI, facecolor=LIGHT)
    return file.getvalue()


def ink(color: str) -> str:
    """Return the text color that reads best on an object's color."""
    return INK if color in ("cyan", "yellow") else LIGHT


def _draw_picture(figure: SubFigure, image: Image.Image, caption: str) -> None:
    axes = figure.subplots()
    axes.imshow(image)
    axes.set_axis_off()
    axes.set_title(caption, fontsize=8, color=INK)


def _draw_objects(axes: Axes, labels: Sequence[str]) -> None:
    axes.set(xlim=(0, len(COLORS)), ylim=(len(SHAPES), 0))
    axes.set_axis_off()
    for index, label in enumerate(LABELS):
        y, x = divmod(index, len(COLORS))
        color, shape = label.split()
        box = {"boxstyle": "round,pad=0,rounding_size=0.08", "mutation_aspect": 0.5}
        face = {"fc": OBJECT_COLORS[color], "lw": 0}
        axes.add_patch(FancyBboxPatch((x + 0.07, y + 0.12), 0.86, 0.76, **face, **box))
        text = {"fontsize": 7, "ha": "center", "va": "center"}
        axes.text(x + 0.5, y + 0.5, f"{color}\n{shape}", color=ink(color), **text)
        if label in labels:
            ring = {"fc": "none", "ec": INK, "lw": 2}
            axes.add_patch(FancyBboxPatch((x + 0.03, y + 0.05), 0.94, 0.9, **ring, **box))
            badge = {"boxstyle": "circle,pad=0.2", "fc": INK, "ec": LIGHT}
            axes.text(x + 0.94, y + 0.16, "✓", color=LIGHT, bbox=badge, **text)


def _mask(shapes: str) -> str:
    """Return a CSS mask made of SVG shapes, whose opacity is that of the mask."""
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 24 24">{shapes}</svg>'
    return f"url('data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}')"


_ICONS = {
    "cube": '<path d="M12 2 21 7 12 12 3 7Z"/><path d="M3 8.2 11.4 13V22.6L3 17.8Z" opacity=".75"/>'
    '<path d="M21 8.2 12.6 13V22.6L21 17.8Z" opacity=".5"/>',
    "sphere": '<radialGradient id="a" cx=".36" cy=".32" r=".75"><stop/>'
    '<stop offset="1" stop-opacity=".45"/></radialGradient><circle cx="12" cy="12" r="9.5" '
    'fill="url(#a)"/>',
    "cylinder": '<ellipse cx="12" cy="5.2" rx="8" ry="3.2"/><path d="M4 7.6c2 3 14 3 16 0V19'
    'c-2 4-14 4-16 0Z" opacity=".65"/>',
}
CSS = Path(__file__).with_name("picker.css").read_text(encoding="utf-8")
CSS += "".join(
    f".lab7-objects .lab7-{color}, .lab7-objects .lab7-{color}.mod-active "
    f"{{ background: {OBJECT_COLORS[color]}; color: {ink(color)}; }}\n"
    for color in COLORS
)
CSS += "".join(
    f".lab7-objects .lab7-{shape}::before "
    f"{{ -webkit-mask: {_mask(icon)} center / contain no-repeat; "
    f"mask: {_mask(icon)} center / contain no-repeat; }}\n"
    for shape, icon in _ICONS.items()
)
