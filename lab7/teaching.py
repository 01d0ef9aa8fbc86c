"""What the notebooks ask and show: checks of exercises, and pictures to move through."""

import base64
import hashlib
import io
from collections.abc import Sequence
from typing import Any

import torch
from IPython.display import HTML
from PIL import Image
from torch import Tensor

from lab7.dataset import to_uint8

_STYLE = """<style>
.lab7-scrubber {position: relative; display: flex; width: 512px; max-width: 100%;
  padding-top: 276px}
.lab7-scrubber label {flex: 1; cursor: pointer; text-align: center; font-size: 10px}
.lab7-scrubber input {display: block; margin: auto}
.lab7-scrubber img {position: absolute; top: 0; left: 0; width: 256px; visibility: hidden;
  image-rendering: pixelated}
.lab7-scrubber input:checked + img {visibility: visible}
</style>"""


def check(answer: Any, right: Any, hint: str) -> None:
    """Say whether the answer to an exercise is right; an exercise left as `...` is no error.

    Args:
        answer: A number or tensor, or `...` where nothing was filled in.
        right: What it should be, to within one in a thousand.
        hint: What helps whoever is wrong.
    """
    if answer is ...:
        print("not answered yet")
        return
    given, wanted = (torch.as_tensor(value, dtype=torch.float64) for value in (answer, right))
    same = given.shape == wanted.shape and torch.allclose(given, wanted, rtol=1e-3, atol=1e-6)
    print("right" if same else f"not yet: {hint}")


def scrubber(pictures: Tensor, captions: Sequence[str]) -> HTML:
    """Show one of several pictures, chosen by a click or the arrow keys; it needs no kernel.

    It is HTML and CSS alone, as viewers strip scripts. Where they strip the style too, the pictures
    stand in a row.

    Args:
        pictures: (N, 3, H, W), float in [-1, 1].
        captions: One short text for each.
    """
    files = []
    for picture in to_uint8(pictures):
        buffer = io.BytesIO()
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(buffer, "PNG")
        files.append(base64.b64encode(buffer.getvalue()).decode())
    group = "lab7-" + hashlib.sha256("".join(files).encode()).hexdigest()[:8]  # one for each call
    frames = [
        f'<label><input type="radio" name="{group}"{" checked" * (number == 0)}>'
        f'<img alt="{caption}" src="data:image/png;base64,{file}">{caption}</label>'
        for number, (file, caption) in enumerate(zip(files, captions, strict=True))
    ]
    return HTML(f'{_STYLE}<div class="lab7-scrubber">{"".join(frames)}</div>')
