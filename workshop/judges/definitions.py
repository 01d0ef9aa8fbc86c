"""Why does my number differ? The same pictures, scored in the ways that one finds in hand-ins."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor
from torchvision.transforms.v2.functional import normalize

from lab7.evaluator import THRESHOLD, Evaluator, top_k_accuracy, top_k_hits

Score = Callable[[Tensor, Tensor], float]  # of probabilities and labels, (B, 24) each
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and standard deviation
HALF = ((0.5,) * 3, (0.5,) * 3)  # the course's, which takes [0, 1] to [-1, 1]


def mean_of_pictures(probabilities: Tensor, labels: Tensor) -> float:
    """Average the share of right labels over pictures, so that a picture of one label weighs most.

    Args:
        probabilities: (B, 24), as in all these scores.
        labels: (B, 24) multi-hot.
    """
    return (top_k_hits(probabilities, labels) / labels.sum(1)).mean().item()


def mean_of_batches(probabilities: Tensor, labels: Tensor, batch_size: int = 8) -> float:
    """Average the course's score over batches: their numbers of labels differ."""
    batches = zip(probabilities.split(batch_size), labels.split(batch_size), strict=True)
    scores = [top_k_accuracy(some, wanted) for some, wanted in batches]
    return sum(scores) / len(scores)


def same_k(probabilities: Tensor, labels: Tensor, k: int = 3) -> float:
    """Take the k highest outputs of every picture, however many labels it has."""
    hits = labels.gather(1, probabilities.topk(k, dim=1).indices)
    return (hits.sum() / labels.sum()).item()


def f1(probabilities: Tensor, labels: Tensor, threshold: float = THRESHOLD) -> float:
    """Compute F1 over all labels of all pictures; a label is seen from a probability on."""
    seen = (probabilities >= threshold).float()
    return (2 * (seen * labels).sum() / (seen.sum() + labels.sum())).item()


def predict_in_training_mode(evaluator: Evaluator, images: Tensor) -> Tensor:
    """Predict as without `network.eval()`: batch normalisation takes the pictures' statistics.

    The evaluator is left as it is; the call that one forgets changes its running averages, too.
    """
    network = copy.deepcopy(evaluator.network).train()
    with torch.no_grad():
        return network(images.to(evaluator.device)).cpu()


def score_in_every_way(evaluator: Evaluator, images: Tensor, labels: Tensor) -> dict[str, float]:
    """Score pictures by the course's definition, first, and by others.

    Args:
        evaluator: The judge.
        images: (B, 3, 64, 64) in [-1, 1].
        labels: (B, 24) multi-hot float, at least one in each picture.

    Returns:
        By what is done, the number that comes out, 0 … 1.
    """
    outputs, unit = evaluator.predict(images), (images + 1) / 2
    scores: dict[str, Score] = {
        "pooled over all labels (the course)": top_k_accuracy,
        "mean of pictures": mean_of_pictures,
        "mean of batches of 8": mean_of_batches,
        "3 highest outputs of every picture": same_k,
        "F1, threshold 0.5": f1,
        "F1, threshold 0.3": lambda outputs, labels: f1(outputs, labels, 0.3),
    }
    other_outputs = {
        "pictures in [0, 1]": evaluator.predict(unit),
        "ImageNet's mean and deviation": evaluator.predict(normalize(unit, *IMAGENET)),
        "normalised twice": evaluator.predict(normalize(images, *HALF)),
        "training mode left on": predict_in_training_mode(evaluator, images),
    }
    found = {name: score(outputs, labels) for name, score in scores.items()}
    return found | {name: top_k_accuracy(some, labels) for name, some in other_outputs.items()}
