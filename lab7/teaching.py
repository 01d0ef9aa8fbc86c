"""What the notebooks ask and show: checks of exercises, drawings, pictures to move through."""

import base64
import hashlib
import io
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from lab7 import plots
from lab7.dataset import to_uint8

_STYLE = """<style>
.lab7-scrubber {position: relative; display: flex; flex-wrap: wrap; padding-top: 270px}
.lab7-scrubber label {width: 44px; cursor: pointer; text-align: center; font-size: 10px;
  white-space: nowrap}
.lab7-scrubber input {display: block; margin: auto}
.lab7-scrubber img {position: absolute; top: 0; left: 0; height: 256px; max-width: none;
  visibility: hidden; image-rendering: pixelated}
.lab7-scrubber input:checked + img {visibility: visible}
</style>"""


class Scrubber:
    """Pictures to move through, as HTML; for viewers without HTML a strip of some, as PNG."""

    def __init__(self, html: str, strip: plots.Chart):
        self.html, self.strip = html, strip

    def _repr_html_(self) -> str:
        return self.html

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        return self.strip._repr_png_()


def check(answer: Any, right: Any, hint: str) -> None:
    """Say whether the answer to an exercise is right; no answer, not even `...`, is an error.

    Args:
        answer: A number or tensor, or `...` where nothing was filled in.
        right: What it should be, to within one in a thousand.
        hint: What helps whoever is wrong.
    """
    if answer is ...:
        print("not answered yet")
        return
    wanted = torch.as_tensor(right, dtype=torch.float64)
    try:
        given = torch.as_tensor(answer, dtype=torch.float64).cpu()
    except (TypeError, ValueError, RuntimeError):  # a text, None, lists of unlike lengths, ...
        given = torch.empty(0)
    if given.numel() == wanted.numel() == 1:
        given = given.reshape(wanted.shape)
    if given.shape != wanted.shape:
        form = f"a tensor of shape {tuple(wanted.shape)}" if wanted.dim() else "one number"
        print(f"not yet: the answer is {form}")
    elif torch.allclose(given, wanted, rtol=1e-3, atol=1e-6):
        print("right")
    else:
        print(f"not yet: {hint}")


def drawing(
    boxes: Mapping[str, tuple[float, float, str]],
    arrows: Sequence[tuple[str, str, float]],
    height: float,
) -> plots.Chart:
    """Draw boxes of text with arrows between them.

    Args:
        boxes: By name x, y and text.
        arrows: From which box to which, and how far bent: 0 straight and black, else in orange.
        height: In inches.
    """
    chart, (axes,) = plots.make_panels(height)
    frame = {"boxstyle": "round", "fc": "w", "ec": plots.BLUE}
    drawn = {
        name: axes.text(x, y, text, ha="center", va="center", size=6.5, bbox=frame)
        for name, (x, y, text) in boxes.items()
    }
    for start, end, bend in arrows:
        look = {"arrowstyle": "-|>", "connectionstyle": f"arc3,rad={-bend}", "shrinkA": 1}
        look |= {"shrinkB": 1, "color": plots.ORANGE if bend else plots.INK}
        ends = {"patchA": drawn[start].get_bbox_patch(), "patchB": drawn[end].get_bbox_patch()}
        axes.annotate("", boxes[end][:2], boxes[start][:2], arrowprops=look | ends)
    xs, ys, _ = zip(*boxes.values(), strict=True)
    axes.set(xlim=(min(xs) - 0.5, max(xs) + 0.5), ylim=(min(ys) - 0.4, max(ys) + 0.6))
    axes.axis("off")
    return chart


def scrubber(pictures: Tensor, captions: Sequence[str]) -> Scrubber:
    """Show one of several pictures, chosen by a click or the arrow keys; it needs no kernel.

    It has no script, as viewers strip those. Where they strip the style too, the pictures stand in
    a row; where they strip all HTML, up to eight of them stand in a strip.

    Args:
        pictures: (N, 3, H, W), float in [-1, 1].
        captions: One short text for each.
    """
    files = [base64.b64encode(_to_png(picture)).decode() for picture in pictures]
    group = "lab7-" + hashlib.sha256("".join(files).encode()).hexdigest()[:8]  # one for each call
    frames = [
        f'<label><input type="radio" name="{group}"{" checked" * (number == 0)}>'
        f'<img alt="{caption}" src="data:image/png;base64,{file}">{caption}</label>'
        for number, (file, caption) in enumerate(zip(files, captions, strict=True))
    ]
    html = f'{_STYLE}<div class="lab7-scrubber">{"".join(frames)}</div>'
    some = torch.linspace(0, len(files) - 1, min(8, len(files))).round().long()
    return Scrubber(html, plots.picture_grid(pictures[some], [captions[i] for i in some]))


def _to_png(picture: Tensor) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(to_uint8(picture).permute(1, 2, 0).numpy()).save(buffer, "PNG")
    return buffer.getvalue()
