"""Pictures that are not as asked, but that a judge may call right.

What is asked for is changed, so that a render has one object too many, one twice, one missing or
two colors swapped; or a faint grain is computed for the evaluator to see labels in.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from lab7.auditor import Auditor, compute_audit
from lab7.dataset import to_float
from lab7.evaluator import Evaluator, compute_scores
from lab7.labels import COLORS, NUM_LABELS
from workshop.standin.scenes import label_counts

FOOLED_SCORES = ("top_k", "exact_set", "exact_scene")
_DECEIVED = 200


def deceive(
    evaluator: Evaluator, images: Tensor, labels: Tensor, amount: float = 16 / 255, steps: int = 40
) -> Tensor:
    """Add a faint grain to pictures that makes the evaluator see labels in them.

    Projected gradient descent (Madry et al., “Towards Deep Learning Models Resistant to Adversarial
    Attacks”, 2018, eq. 1).

    Args:
        evaluator: The judge to deceive.
        images: (B, 3, 64, 64) in [-1, 1].
        labels: (B, 24) multi-hot, that it should see.
        amount: Largest change of a pixel, of the full range.
        steps: Of the descent.

    Returns:
        (B, 3, 64, 64) in [-1, 1].
    """
    start, labels = images.to(evaluator.device), labels.to(evaluator.device)
    x, reach = start.clone(), 2 * amount
    for _ in range(steps):
        x.requires_grad_(True)
        outputs = evaluator.network(x).float()
        (gradient,) = torch.autograd.grad(F.binary_cross_entropy(outputs, labels), x)
        x = x.detach() - 2.5 * reach / steps * gradient.sign()
        x = torch.clamp(x, start - reach, start + reach).clamp(-1, 1)
    return x.cpu()


def score_fooled(
    evaluator: Evaluator, auditor: Auditor, images: Tensor, objects: Tensor
) -> dict[str, dict]:
    """Score pictures that are not as asked, of which nobody should call one right.

    Args:
        evaluator: The judge that may be fooled.
        auditor: The judge that should not.
        images: (N, 3, 64, 64) uint8.
        objects: (N, 5, 3).

    Returns:
        For pictures "as asked", of each label once, for comparison, and for those with "one too
        many", "one twice", "one missing", two labels' colors "swapped", and "deceived" ones, which
        show something else (see `deceive`): the course's "top_k" and "exact_set" of the evaluator,
        and "exact_scene" of the auditor.
    """
    counts = label_counts(objects)
    single = (counts <= 1).all(1)
    several = (single & (counts.sum(1) > 1)).nonzero()[:, 0]
    twice = (~single).nonzero()[:, 0]
    kind = objects[:, :, 0].long()
    others = several.roll(1)  # what is asked for is in another picture, which has nothing of it
    apart = ((counts[several] * counts[others]) == 0).all(1).nonzero()[:_DECEIVED, 0]
    shown, others = several[apart], others[apart]
    sets = {
        "as asked": (several, counts[several]),
        "one too many": (several, counts[several] - F.one_hot(kind[several, 0], NUM_LABELS)),
        "one twice": (twice, (counts[twice] > 0).long()),
        "one missing": (several, _one_more(counts[several])),
        "swapped": _swapped(several, kind),
    }
    found = {}
    for name, (rows, asked) in sets.items():
        found[name] = _verdicts(evaluator, auditor, to_float(images[rows]), asked)
    deceiving = deceive(evaluator, to_float(images[shown]), counts[others].float())
    found["deceived"] = _verdicts(evaluator, auditor, deceiving, counts[others])
    return found


def _one_more(counts: Tensor) -> Tensor:
    """Ask for one label more than is there: the first that is not."""
    return counts + F.one_hot((counts == 0).long().argmax(1), NUM_LABELS)


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


def _verdicts(evaluator: Evaluator, auditor: Auditor, images: Tensor, asked: Tensor) -> dict:
    scores = compute_scores(evaluator.predict(images), asked.float())
    audit = compute_audit(auditor.count(images), asked)
    return {
        "num_pictures": len(images),
        "top_k": scores.top_k,
        "exact_set": scores.exact_set,
        "exact_scene": audit.exact_scene,
    }
