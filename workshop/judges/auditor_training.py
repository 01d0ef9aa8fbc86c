"""Training of the auditor on scenes of its own, in which a label may occur more than once."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lab7.auditor import STRIDE, WEIGHTS, Audit, Auditor, AuditorNetwork, scene_ratios
from workshop.judges.augmentation import augment
from workshop.judges.judge_training import JudgeTraining
from workshop.standin.scenes import label_counts, read_scenes

THRESHOLDS = tuple(round(0.1 + 0.05 * i, 2) for i in range(15))  # of a center, to choose from


@dataclass(frozen=True)
class AuditorTraining(JudgeTraining):
    """The training of the detector; its targets are objects (N, 5, 3), see `read_scenes`.

    Mirroring and shifting are done here, as they move the objects too; zoom would.
    """

    name = "auditor"
    judge = Auditor
    weights = WEIGHTS

    small_share: float = 0.2
    mirrored_share: float = 0.0
    shift: float = 0.0
    zoom: float = 0.0
    mirrored: float = 0.5  # share of the pictures whose left and right are exchanged
    moved: int = 3  # ± whole pixels, across and down
    spread: float = 0.7  # cells, standard deviation of the Gaussian about the center of an object
    epochs: int = 30
    seed: int = 1

    def read(self, renders: str | Path) -> tuple[Tensor, Tensor]:
        """Read the scenes of `python -m lab7 render auditor`."""
        return read_scenes(renders)

    def build(self) -> nn.Module:
        return AuditorNetwork()

    def change(self, images: Tensor, objects: Tensor, generator: torch.Generator) -> tuple:
        images, objects = self.move(images, objects, generator)
        return augment(images, self, generator), objects

    def move(
        self, images: Tensor, objects: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Mirror and shift pictures at random, and their objects (N, 5, 3) with them."""
        count, size, device = len(images), images.shape[-1], images.device
        draw = {"generator": generator, "device": device}
        shift = torch.randint(-self.moved, self.moved + 1, (count, 2), **draw)
        sign = 1 - 2 * (torch.rand(count, **draw) < self.mirrored).float()
        affine = torch.eye(2, 3, device=device).repeat(count, 1, 1)  # from where a pixel is taken
        affine[:, :, 2] = -2 * shift / size
        affine[:, 0] *= sign[:, None]
        grid = F.affine_grid(affine, images.shape, align_corners=False)
        moved = F.grid_sample(images.float(), grid, "nearest", "border", align_corners=False)
        label, x, y = objects.unbind(-1)
        x = size / 2 + sign[:, None] * (x - size / 2) + shift[:, :1]
        return moved.byte(), torch.stack([label, x, y + shift[:, 1:]], dim=-1)

    def loss(self, network: nn.Module, images: Tensor, objects: Tensor) -> Tensor:
        heatmap, labels = network(images)
        return detection_loss(heatmap, labels, objects, self.spread)

    def score(self, auditor: Auditor, images: Tensor, objects: Tensor) -> dict[str, float]:
        exact = (auditor.count(images) == label_counts(objects)).all(1)
        return {"exact_scene": exact.double().mean().item()}

    def adjust(self, auditor: Auditor, images: Tensor, objects: Tensor) -> None:
        """Set the threshold with which most scenes are exact; of equal ones the middle one."""
        shares = []
        for threshold in THRESHOLDS:
            auditor.network.threshold.fill_(threshold)
            shares.append(self.score(auditor, images, objects)["exact_scene"])
        best = [t for t, found in zip(THRESHOLDS, shares, strict=True) if found == max(shares)]
        auditor.network.threshold.fill_(best[len(best) // 2])

    def examine(
        self, auditor: Auditor, images: Tensor, objects: Tensor
    ) -> tuple[dict[str, Any], Tensor]:
        """Return how the auditor does on pictures that it never saw.

        Returns:
            "test": what became of all pictures; "by_count": of those with so many objects;
            "repeated": of those that show a label more than once; "threshold", see `adjust`.
        """
        counts, wanted = auditor.count(images), label_counts(objects)
        sizes, repeated = wanted.sum(1), (wanted > 1).any(1)
        metrics = {
            "test": Audit.of(scene_ratios(counts, wanted)),
            "by_count": {
                size: Audit.of(scene_ratios(counts[sizes == size], wanted[sizes == size]))
                for size in sizes.unique().tolist()
            },
            "repeated": Audit.of(scene_ratios(counts[repeated], wanted[repeated])),
            "threshold": auditor.network.threshold.item(),
        }
        return metrics, images[:0]


def detection_loss(heatmap: Tensor, labels: Tensor, objects: Tensor, spread: float) -> Tensor:
    """Compute the loss of a batch.

    The focal loss of the heatmap (Zhou et al. 2019, eq. 1, with a Gaussian of `spread` cells about
    each center), plus the cross-entropy of the label in the cell of the center; both summed over
    the batch and divided by the number of objects.

    Args:
        heatmap: Logits of a center (B, H, W).
        labels: Logits (B, 24, H, W).
        objects: (B, 5, 3), see `read_scenes`.
        spread: Standard deviation of the Gaussian, in cells.
    """
    height, width = heatmap.shape[1:]
    label, x, y = objects.unbind(-1)
    column, row = x / STRIDE - 0.5, y / STRIDE - 0.5  # in cells, from the center of the first
    exists = label >= 0
    across = torch.arange(width, device=heatmap.device) - column[..., None]
    down = torch.arange(height, device=heatmap.device) - row[..., None]
    distance = down.square()[..., None] + across.square()[:, :, None]
    gaussian = torch.exp(-distance / (2 * spread**2)) * exists[..., None, None]
    cell = (
        exists.nonzero()[:, 0],
        row[exists].round().long().clamp(0, height - 1),
        column[exists].round().long().clamp(0, width - 1),
    )
    log_p, log_not_p = F.logsigmoid(heatmap.float()), F.logsigmoid(-heatmap.float())
    background = (1 - gaussian.amax(1)) ** 4 * log_p.exp().square() * log_not_p
    background[cell] = 0
    centers = log_not_p[cell].exp().square() * log_p[cell]
    logits = labels.permute(0, 2, 3, 1)[cell].float()
    named = F.cross_entropy(logits, label[exists].long(), reduction="sum")
    return (named - centers.sum() - background.sum()) / exists.sum().clamp(min=1)
