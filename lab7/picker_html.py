"""What the label picker shows, as HTML: pictures, marks on them, and the judges' verdict."""

import base64
import io
from collections import Counter
from collections.abc import Sequence
from html import escape

import torch
from torch import Tensor

from lab7.auditor import Sighting
from lab7.dataset import IMAGE_SIZE
from lab7.evaluator import THRESHOLD
from lab7.labels import LABELS
from lab7.pipeline import to_pil

MOST_TRAINED = 3  # objects in the pictures that the generator learned from
_SIGNS = {"right": "✓", "wrong": "✗", "doubled": "2×"}
_WIDTH, _HEIGHT = 25, 5  # of a mark's text at most, in pixels of the picture


def figure(images: Tensor, caption: str, marks: str = "") -> str:
    """Write pictures (B, 3, 64, 64) in [-1, 1], side by side, and their caption."""
    file = io.BytesIO()
    to_pil(torch.cat(list(images), dim=2)[None])[0].save(file, "PNG", compress_level=1)
    source = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    # Decoded at once, so that no blank frame comes between two pictures.
    image = f'<img alt="{escape(caption)}" decoding="sync" src="{source}">'
    caption = f'<figcaption aria-hidden="true">{escape(caption)}</figcaption>'
    return f"<figure><div>{image}{marks}</div>{caption}</figure>"


def draw_marks(wanted: Sequence[str], sightings: Sequence[Sighting]) -> str:
    """Write a ring and a label for each object found, to lie on the picture.

    An object is right, wrong (nobody asked for it) or doubled (its label is found a second time).
    """
    marks, seen, texts = "", set(), []
    for found in sorted(sightings, key=lambda found: -found.probability):
        kind = "doubled" if found.label in seen else "right"
        kind = kind if found.label in wanted else "wrong"
        seen.add(found.label)
        down = 1 if found.y < 0.8 * IMAGE_SIZE else -1
        x, y = min(max(found.x, _WIDTH / 2), IMAGE_SIZE - _WIDTH / 2), found.y + 8 * down
        while any(abs(x - a) < _WIDTH and abs(y - b) < _HEIGHT for a, b in texts):
            y += down  # so that no text hides another
        texts.append((x, y))
        places = {"x": found.x, "y": found.y, "text-x": x, "text-y": y}.items()
        style = "; ".join(f"--lab7-{k}: {100 * value / IMAGE_SIZE:.1f}%" for k, value in places)
        text = f"<span>{_SIGNS[kind]} {found.label}</span>"
        marks += f'<div class="lab7-mark lab7-{kind}" style="{style}">{text}</div>'
    return f'<div aria-hidden="true">{marks}</div>'  # the verdict says the same


def is_right(wanted: Sequence[str], sightings: Sequence[Sighting]) -> bool:
    """Tell whether each object asked for is found exactly once, and no other."""
    return sorted(found.label for found in sightings) == sorted(wanted)


def verdict(wanted: Sequence[str], sightings: Sequence[Sighting], probabilities: Tensor) -> str:
    """Write a table of what the judges see: each label asked for, and others that one of them sees.

    Args:
        wanted: The labels asked for.
        sightings: The auditor's.
        probabilities: The evaluator's, (24,).
    """
    seen, rows = Counter(found.label for found in sightings), ""
    for label, p in zip(LABELS, probabilities.tolist(), strict=True):
        if label in wanted or seen[label] or p >= THRESHOLD:
            count, names = seen[label], " ".join(f"lab7-{word}" for word in label.split())
            known = {0: "<b>✗ missing</b>", 1: "✓ found"}
            text = known.get(count, f"<b>{count}× found</b>")
            if label not in wanted:
                text = "<b>✗ extra</b>" if count else "– not found"
            rows += f'<tr><th scope="row" class="{names}">{label}</th><td>{text}</td>'
            rows += f'<td class="lab7-bar" style="--lab7-p: {p:.0%}">{p:.0%}</td></tr>'
    right = is_right(wanted, sightings)
    text = "✓ Exactly what was asked for." if right else "✗ Not what was asked for."
    many = f" Training pictures show at most {MOST_TRAINED} objects." * (len(wanted) > MOST_TRAINED)
    heads = "".join(f'<th scope="col">{name}</th>' for name in ("object", "auditor", "evaluator"))
    return f"<p><b>{text}</b>{many}</p><table><tr>{heads}</tr>{rows}</table>"
