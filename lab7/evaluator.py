"""The classifier that judges pictures, and the scores that are made from its verdicts.

The network is the course's: a ResNet-18 that gives each of the 24 labels a probability. Scores are
defined here and nowhere else. A score comes with a 95 % interval over conditions: how far it would
move if other conditions of the same kind had been drawn.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torchvision.models import resnet18

from lab7.dataset import picture_batches
from lab7.devices import choose_device
from lab7.errors import UserError
from lab7.estimates import Estimate, Values, share
from lab7.files import user_path
from lab7.labels import NUM_LABELS
from lab7.layouts import DATA_DIR, Root, find_layout, only
from lab7.weight_files import read_weights

WEIGHTS = DATA_DIR / "weights" / "evaluator.safetensors"
THRESHOLD = 0.5  # a label counts as seen from this probability on


@dataclass(frozen=True)
class Scores:
    """How well a set of pictures shows what it should.

    `top_k` is the course's score. The others count a label as seen where its probability is at
    least `THRESHOLD`: `exact_set` is the share of pictures in which the labels seen are exactly
    those asked for; precision, recall and F1 are micro-averaged, over all labels of all pictures.
    """

    num_pictures: int
    num_conditions: int
    num_labels: int
    top_k: Estimate
    exact_set: Estimate
    precision: Estimate
    recall: Estimate
    f1: Estimate

    @classmethod
    def of(cls, ratios: dict[str, tuple[Values, Values]], groups: Values | None = None) -> "Scores":
        """Return the scores of pictures, with their intervals, from their `label_ratios`."""
        sizes = ratios["top_k"][1]
        return cls(
            num_pictures=len(sizes),
            num_conditions=len(sizes) if groups is None else len(np.unique(groups)),
            num_labels=int(sizes.sum()),
            **{name: share(*pair, groups) for name, pair in ratios.items()},
        )


def build_network() -> nn.Module:
    """Return the course's network, untrained: ResNet-18 with 24 sigmoid outputs.

    It maps (B, 3, 64, 64) pictures in [-1, 1] to (B, 24) probabilities (He et al., “Deep Residual
    Learning for Image Recognition”, 2016).
    """
    network = resnet18(weights=None)
    network.fc = nn.Sequential(nn.Linear(network.fc.in_features, NUM_LABELS), nn.Sigmoid())
    return network


class Evaluator:
    """Holds the classifier and scores pictures with it, always in float32.

    Args:
        network: Maps (B, 3, 64, 64) to (B, 24) probabilities.
        device: Where it runs; None takes the best there is.

    Attributes:
        path: File that its weights were loaded from, if any.
    """

    path: Path | None = None

    def __init__(self, network: nn.Module, device: str | torch.device | None = None):
        self.device = choose_device(device)
        self.network = network.eval().requires_grad_(False).to(self.device, torch.float32)

    @classmethod
    def load(
        cls,
        path: str | Path | None = None,
        device: str | torch.device | None = None,
        root: Root = None,
    ) -> "Evaluator":
        """Load trained weights.

        Args:
            path: Weights of safetensors or of PyTorch, wrapped as `read_weights` says. None takes
                the course's `checkpoint.pth` where the data folder has one, else the weights that
                come with the project.
            device: See `Evaluator`.
            root: Data folder, see `find_layout`.

        Raises:
            MissingFileError: There is no such file.
            UserError: It does not hold weights of this network, see `read_weights`.
        """
        network = build_network()
        path = default_weights(root) if path is None else user_path(path)
        network.load_state_dict(read_weights(path, network.state_dict(), "the course's ResNet-18"))
        evaluator = cls(network, device)
        evaluator.path = path
        return evaluator

    @torch.inference_mode()
    def predict(self, images: torch.Tensor, batch_size: int = 256) -> torch.Tensor:
        """Return how probable each label is in each picture.

        Args:
            images: (B, 3, 64, 64), float in [-1, 1] or uint8.
            batch_size: Pictures at a time; it does not change the result beyond float rounding.

        Returns:
            (B, 24) float32 in [0, 1], on the CPU.

        Raises:
            UserError: Pictures of another shape.
        """
        parts = [torch.empty(0, NUM_LABELS)]
        for batch in picture_batches(images, batch_size, self.device):
            parts.append(self.network(batch).cpu())
        return torch.cat(parts)

    def eval(self, images: torch.Tensor, labels: torch.Tensor) -> float:
        """Return the course's score of pictures (B, 3, 64, 64) for labels (B, 24) multi-hot.

        See `top_k_accuracy`.
        """
        return top_k_accuracy(self.predict(images), labels)


def top_k_accuracy(probabilities: torch.Tensor, labels: torch.Tensor) -> float:
    """Return the course's score.

    Of a picture with k labels, the k highest outputs are compared with them. The score is the
    number of hits over the number of labels, both summed over the pictures.

    Args:
        probabilities: (B, 24).
        labels: (B, 24) multi-hot.

    Raises:
        UserError: Other shapes, or no label at all.
    """
    return int(top_k_hits(probabilities, labels).sum()) / int((labels > 0.5).sum())


def top_k_hits(probabilities: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return how many of its k labels are among each picture's k highest outputs, (B,).

    Args:
        probabilities: (B, 24).
        labels: (B, 24) multi-hot.

    Raises:
        UserError: Other shapes, or no label at all.
    """
    if probabilities.shape != labels.shape or labels.shape[1:] != (NUM_LABELS,):
        raise UserError(
            f"outputs and labels must both be (B, {NUM_LABELS}), not "
            f"{tuple(probabilities.shape)} and {tuple(labels.shape)}"
        )
    probabilities, wanted = probabilities.detach().cpu(), labels.cpu() > 0.5
    if not wanted.any():
        raise UserError("there is nothing to score: no picture has a label")
    ranks = probabilities.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return ((ranks < wanted.sum(1, keepdim=True)) & wanted).sum(1)


def label_ratios(
    hits: torch.Tensor, seen: torch.Tensor, labels: torch.Tensor
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return the numerators and denominators of the `Scores`, one for each picture.

    Args:
        hits: (B,), see `top_k_hits`.
        seen: (B, 24) bool, the labels whose probability is at least `THRESHOLD`.
        labels: (B, 24) multi-hot, those asked for.

    Returns:
        By score two tensors (B,).
    """
    wanted = labels > 0.5
    right, num_seen, num_wanted = (seen & wanted).sum(1), seen.sum(1), wanted.sum(1)
    return {
        "top_k": (hits, num_wanted),
        "exact_set": ((seen == wanted).all(1), torch.ones(len(labels))),
        "precision": (right, num_seen),
        "recall": (right, num_wanted),
        "f1": (2 * right, num_seen + num_wanted),
    }


def default_weights(root: Root = None) -> Path:
    """Return the weights that `Evaluator.load()` takes for a data folder, see `find_layout`."""
    return only(find_layout(root).evaluators, "evaluators", "--evaluator") or WEIGHTS
