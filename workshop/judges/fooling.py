"""Pictures that are not as asked, but that a judge may call right.

What is asked for is changed, so that a render has one object too many, one twice, one missing or
two colors swapped; or a render of something else becomes an adversarial image.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from lab7.auditor import Auditor, scene_ratios
from lab7.dataset import to_float
from lab7.estimates import Estimate, share
from lab7.evaluator import THRESHOLD, Evaluator, label_ratios, top_k_hits
from lab7.labels import COLORS, NUM_LABELS
from workshop.standin.scenes import label_counts

FOOLED_SCORES = ("top_k", "exact_set", "exact_scene")
_ADVERSARIAL = 200  # images that show something else, at most


def make_adversarial(
    evaluator: Evaluator, images: Tensor, labels: Tensor, amount: float = 16 / 255, steps: int = 40
) -> Tensor:
    """Make adversarial images: add a faint perturbation that makes the evaluator see labels.

    Projected gradient descent (Madry et al., “Towards Deep Learning Models Resistant to Adversarial
    Attacks”, 2018, eq. 1).

    Args:
        evaluator: The judge to fool.
        images: (B, 3, 64, 64) in [-1, 1].
        labels: (B, 24) multi-hot, that it should see.
        amount: Largest change of a pixel, of the full range.
        steps: Of the descent.

    Returns:
        (B, 3, 64, 64) in [-1, 1].
    """
    x, reach = images, 2 * amount
    for _ in range(steps):
        step = log_probability_gradient(evaluator, x, labels).sign()
        x = x + 2.5 * reach / steps * step
        x = torch.clamp(x, images - reach, images + reach).clamp(-1, 1)
    return x


def log_probability_gradient(evaluator: Evaluator, images: Tensor, labels: Tensor) -> Tensor:
    """Return the gradient of the evaluator's log p(labels | images) with respect to the images.

    Args:
        evaluator: Gives each of the 24 labels a probability of its own.
        images: (B, 3, 64, 64) in [-1, 1].
        labels: (B, 24) multi-hot: those that are there; the others are not.

    Returns:
        (B, 3, 64, 64), on the device of the images.
    """
    with torch.enable_grad():
        x = images.detach().to(evaluator.device).requires_grad_(True)
        outputs, labels = evaluator.network(x).float(), labels.to(evaluator.device)
        log_probability = -F.binary_cross_entropy(outputs, labels, reduction="sum")
        return torch.autograd.grad(log_probability, x)[0].to(images.device)


def score_fooled(
    evaluator: Evaluator, auditor: Auditor, images: Tensor, objects: Tensor
) -> dict[str, dict]:
    """Score pictures that are not as asked, of which nobody should call one right.

    Args:
        evaluator: The judge that may be fooled.
        auditor: The judge that should not.
        images: (N, 3, 64, 64) uint8.
        objects: (N, 5, 3), see `workshop.standin.scenes.read_scenes`.

    Returns:
        For pictures "as asked", with each label exactly once, for comparison, and for those with
        "one too many", "one twice", "one missing", two labels' colors "swapped", and for
        adversarial images of something else, as "deceived" (see `make_adversarial`): the course's
        "top_k" and the "exact_set" of the evaluator, and the "exact_scene" of the auditor.
    """
    counts, kind = label_counts(objects), objects[:, :, 0].long()
    single = (counts <= 1).all(1)
    several = (single & (counts.sum(1) > 1)).nonzero()[:, 0]
    twice = (~single).nonzero()[:, 0]
    sets = {
        "as asked": (several, counts[several]),
        "one too many": (several, counts[several] - F.one_hot(kind[several, 0], NUM_LABELS)),
        "one twice": (twice, (counts[twice] > 0).long()),
        "one missing": (several, _one_more(counts[several])),
        "swapped": _swapped(several, kind),
    }
    made = {name: (to_float(images[rows]), asked) for name, (rows, asked) in sets.items()}
    others = several.roll(1)  # what is asked for is in another picture, which has nothing of it
    apart = ((counts[several] * counts[others]) == 0).all(1).nonzero()[:_ADVERSARIAL, 0]
    start, asked = to_float(images[several[apart]]), counts[others[apart]]
    made["deceived"] = make_adversarial(evaluator, start, asked.float()), asked
    return {
        name: {"num_pictures": len(shown)} | score_images(evaluator, auditor, shown, asked)
        for name, (shown, asked) in made.items()
    }


def score_images(
    evaluator: Evaluator,
    auditor: Auditor,
    images: Tensor,
    asked: Tensor,
    scores: Sequence[str] = FOOLED_SCORES,
) -> dict[str, Estimate]:
    """Return some scores of pictures (B, 3, 64, 64) that should show labels so often (B, 24)."""
    probabilities, labels = evaluator.predict(images), asked > 0
    hits = top_k_hits(probabilities, labels)
    ratios = label_ratios(hits, probabilities >= THRESHOLD, labels)
    ratios |= scene_ratios(auditor.count(images), asked)
    return {name: share(*ratios[name]) for name in scores}


def _one_more(counts: Tensor) -> Tensor:
    """Ask for one label more than is there: a random absent one, from a fixed seed."""
    absent, generator = (counts == 0).double(), torch.Generator().manual_seed(0)
    chosen = torch.multinomial(absent, 1, generator=generator)[:, 0]
    return counts + F.one_hot(chosen, NUM_LABELS)


def _swapped(rows: Tensor, kind: Tensor) -> tuple[Tensor, Tensor]:
    """Exchange the colors of the first two objects, where that gives labels that are not there."""
    kind = kind[rows]
    first, second = kind[:, 0], kind[:, 1]
    one = first // len(COLORS) * len(COLORS) + second % len(COLORS)
    other = second // len(COLORS) * len(COLORS) + first % len(COLORS)
    new = torch.stack([one, other], dim=1)
    apart = (new[:, :, None] != kind[:, None, :]).flatten(1).all(1)
    kind = torch.cat([new, kind[:, 2:]], dim=1)[apart]
    return rows[apart], F.one_hot(kind + 1, NUM_LABELS + 1).sum(1)[:, 1:]
