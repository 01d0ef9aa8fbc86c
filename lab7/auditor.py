"""The auditor: a second judge of another kind, a detector that counts objects and locates them.

The evaluator gives each label a probability and cannot tell one red cube from two. The auditor
finds the center of every object and classifies it (Zhou et al., “Objects as Points”, 2019), so it
sees an object too many, one that occurs twice, or two that have merged. It is for reporting only:
it has no part in training or guiding the generator, nor in choosing checkpoints, settings or seeds.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lab7.dataset import picture_batches
from lab7.devices import choose_device
from lab7.errors import UserError
from lab7.estimates import Estimate, Values, share
from lab7.labels import COLORS, LABELS, NUM_LABELS
from lab7.layouts import DATA_DIR
from lab7.weight_files import read_weights

WEIGHTS = DATA_DIR / "weights" / "auditor.safetensors"
STRIDE = 2  # pixels a side of a cell of the heatmap
WIDTHS = (40, 48, 96, 144)  # channels at 64, 32, 16 and 8 pixels a side
_RADIUS = 2  # cells around a peak of the heatmap in which nothing is higher


@dataclass(frozen=True)
class Sighting:
    """A detected object: its label, its center in pixels (0 … 64), and the center's probability."""

    label: str
    x: float
    y: float
    probability: float


@dataclass(frozen=True)
class Audit:
    """Shares of right pictures and of each kind of mistake: a picture counts in exactly one.

    `exact_scene`: every label occurs as often as it was asked for, and no other. Of the other
    pictures, `extra` and `missing` have too many or too few objects, the rest the right number: in
    `swapped` colors and shapes are those asked for, but wrongly paired; in `doubled` a requested
    object occurs again in the place of another; in `other` a color or a shape is wrong.
    """

    num_pictures: int
    num_conditions: int
    exact_scene: Estimate
    extra: Estimate
    missing: Estimate
    swapped: Estimate
    doubled: Estimate
    other: Estimate

    @classmethod
    def of(cls, ratios: dict[str, tuple[Values, Values]], groups: Values | None = None) -> "Audit":
        """Return the shares of pictures, with their intervals, from their `scene_ratios`."""
        count = len(ratios["exact_scene"][0])
        return cls(
            num_pictures=count,
            num_conditions=count if groups is None else len(np.unique(groups)),
            **{name: share(*pair, groups) for name, pair in ratios.items()},
        )


class AuditorNetwork(nn.Module):
    """A small UNet that maps pictures (B, 3, 64, 64) in [-1, 1] to a grid of logits.

    They are those of the heatmap, (B, 32, 32): whether the center of an object lies in a cell of
    `STRIDE` pixels a side; and those of that object's label, (B, 24, 32, 32).
    """

    def __init__(self):
        super().__init__()
        a, b, c, d = WIDTHS
        self.stem = nn.Conv2d(3, a, 3, padding=1)
        levels = ((a, b, 1), (b, c, 2), (c, d, 2))  # channels in and out, and blocks
        self.down = nn.ModuleList(
            nn.Sequential(_down(x, y), *[_Block(y) for _ in range(n)]) for x, y, n in levels
        )
        self.across = nn.ModuleList([nn.Conv2d(d, c, 1), nn.Conv2d(c, b, 1)])
        self.up = nn.ModuleList([_Block(c), _Block(b)])
        self.head = nn.Sequential(nn.GroupNorm(8, b), nn.SiLU(), nn.Conv2d(b, 1 + NUM_LABELS, 1))
        nn.init.constant_(self.head[-1].bias[:1], -4.0)  # few cells hold an object
        self.register_buffer("threshold", torch.tensor(0.5))  # set after training

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        fine, medium, x = self._descend(images)
        for across, up, level in zip(self.across, self.up, (medium, fine), strict=True):
            x = up(level + across(F.interpolate(x, scale_factor=2)))
        logits = self.head(x)
        return logits[:, 0], logits[:, 1:]

    def features(self, images: Tensor) -> Tensor:
        """Return (B, 576): the coarsest level's channels, averaged over each quarter."""
        return F.adaptive_avg_pool2d(self._descend(images)[-1], 2).flatten(1)

    def _descend(self, images: Tensor) -> list[Tensor]:
        levels = [self.stem(images)]
        for down in self.down:
            levels.append(down(levels[-1]))
        return levels[1:]


class Auditor:
    """Holds the detector and runs it on pictures, always in float32.

    Args:
        network: The detector.
        device: Where it runs; None takes the best there is.
    """

    def __init__(self, network: AuditorNetwork, device: str | torch.device | None = None):
        self.device = choose_device(device)
        network = network.eval().requires_grad_(False).to(self.device, torch.float32)
        self.network = network.to(memory_format=torch.channels_last)

    @classmethod
    def load(
        cls, path: str | Path | None = None, device: str | torch.device | None = None
    ) -> "Auditor":
        """Load trained weights, by default those that come with the project.

        Raises:
            MissingFileError: There is no such file.
            UserError: It does not hold weights of this network, see `read_weights`.
        """
        path, network = path or WEIGHTS, AuditorNetwork()
        network.load_state_dict(read_weights(path, network.state_dict(), "the auditor"))
        return cls(network, device)

    @torch.inference_mode()
    def find(self, images: Tensor, batch_size: int = 64) -> list[list[Sighting]]:
        """Return the objects in each picture (B, 3, 64, 64), float in [-1, 1] or uint8."""
        found = []
        for batch in picture_batches(images, batch_size, self.device):
            heatmap, labels = self.network(batch)
            probabilities, sightings = heatmap.sigmoid(), [[] for _ in batch]
            cells = peaks(probabilities, self.network.threshold).nonzero().tolist()
            for picture, row, column in cells:
                label = LABELS[labels[picture, :, row, column].argmax()]
                probability = probabilities[picture, row, column].item()
                x, y = STRIDE * (column + 0.5), STRIDE * (row + 0.5)
                sightings[picture].append(Sighting(label, x, y, probability))
            found += sightings
        return found

    def count(self, images: Tensor) -> Tensor:
        """Return (B, 24) int64: how often each label occurs in each picture."""
        counts = torch.zeros(len(images), NUM_LABELS, dtype=torch.int64)
        for row, sightings in zip(counts, self.find(images), strict=True):
            for sighting in sightings:
                row[LABELS.index(sighting.label)] += 1
        return counts

    @torch.inference_mode()
    def features(self, images: Tensor, batch_size: int = 64) -> Tensor:
        """Return the network's features of pictures (B, 3, 64, 64), as (B, 576) float32."""
        batches = picture_batches(images, batch_size, self.device)
        return torch.cat([self.network.features(batch).cpu() for batch in batches])


def peaks(probabilities: Tensor, threshold: Tensor | float) -> Tensor:
    """Return (B, H, W) bool: where a heatmap (B, H, W) has a maximum of at least the threshold."""
    highest = F.max_pool2d(probabilities[:, None], 2 * _RADIUS + 1, 1, _RADIUS)[:, 0]
    return (probabilities == highest) & (probabilities >= threshold)


def scene_ratios(counts: Tensor, wanted: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the numerators and denominators of an `Audit`, one for each picture.

    Args:
        counts: (B, 24): how often each label occurs.
        wanted: (B, 24): how often each should.

    Returns:
        By share two tensors (B,): whether a picture counts in it, and ones.

    Raises:
        UserError: Other shapes.
    """
    if counts.shape != wanted.shape or counts.shape[1:] != (NUM_LABELS,):
        shapes = f"{tuple(counts.shape)} and {tuple(wanted.shape)}"
        raise UserError(f"counts must both be (B, {NUM_LABELS}), not {shapes}")
    counts, wanted = counts.long(), wanted.long()
    surplus = counts.sum(1) - wanted.sum(1)
    exact = (counts == wanted).all(1)
    only_wanted = ((counts == 0) | (wanted > 0)).all(1)
    by_shape, wanted_by_shape = (x.view(len(x), -1, len(COLORS)) for x in (counts, wanted))
    same_colors = (by_shape.sum(1) == wanted_by_shape.sum(1)).all(1)
    same_shapes = (by_shape.sum(2) == wanted_by_shape.sum(2)).all(1)
    swapped = ~exact & same_colors & same_shapes
    doubled = (surplus == 0) & ~exact & ~swapped & only_wanted
    kinds = {
        "exact_scene": exact,
        "extra": surplus > 0,
        "missing": surplus < 0,
        "swapped": swapped,
        "doubled": doubled,
        "other": (surplus == 0) & ~exact & ~swapped & ~doubled,
    }
    return {name: (kind, torch.ones(len(counts))) for name, kind in kinds.items()}


class _Block(nn.Module):
    """A residual block of two convolutions (He et al. 2016)."""

    def __init__(self, channels: int):
        super().__init__()
        self.body = nn.Sequential(*_layers(channels), *_layers(channels))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


def _layers(channels: int) -> tuple[nn.Module, ...]:
    return nn.GroupNorm(8, channels), nn.SiLU(), nn.Conv2d(channels, channels, 3, padding=1)


def _down(channels: int, wider: int) -> nn.Module:
    return nn.Conv2d(channels, wider, 4, stride=2, padding=1)
