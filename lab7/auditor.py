"""The auditor: a second judge of another kind, which counts objects and says where they are.

The evaluator gives each label a probability and cannot tell one red cube from two. The auditor is a
detector (Zhou et al., “Objects as Points”, 2019): it finds the middle of every object, names each,
and so sees what is too much, doubled or merged. It is for reporting only: it has no part in
training or guiding the generator, nor in choosing checkpoints, settings or seeds.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lab7.dataset import DATA_DIR, IMAGE_SIZE, to_float
from lab7.devices import choose_device
from lab7.errors import MissingFileError, UserError
from lab7.estimates import Estimate, Values, share
from lab7.labels import COLORS, LABELS, NUM_LABELS
from lab7.weight_files import save_weights

WEIGHTS = DATA_DIR / "weights" / "auditor.safetensors"
STRIDE = 2  # pixels a side of a cell of the network's answer
WIDTHS = (40, 48, 96, 144)  # channels at 64, 32, 16 and 8 pixels a side
FEATURES = 4 * WIDTHS[-1]  # numbers that `Auditor.features` describes a picture with
_RADIUS = 2  # cells in which the middle of an object must be the clearest


@dataclass(frozen=True)
class Sighting:
    """An object that was found: its label, its middle in pixels (0 … 64) and how sure it is."""

    label: str
    x: float
    y: float
    probability: float


@dataclass(frozen=True)
class Audit:
    """What became of a set of pictures: each is counted in exactly one of the six shares.

    `exact_scene`: every label is there as often as it was asked for, and nothing else. Of the
    others, `extra` and `missing` have too many or too few objects, the rest the right number: in
    `swapped` colors and shapes are those asked for, but wrongly paired; in `doubled` an object
    that was asked for stands again in the place of another; in `other` a color or a shape is wrong.
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
            **{name: share(above, below, groups) for name, (above, below) in ratios.items()},
        )


class AuditorNetwork(nn.Module):
    """A small UNet whose answer is a grid of cells, `STRIDE` pixels a side each.

    It maps pictures (B, 3, 64, 64) in [-1, 1] to the logits that the middle of an object lies in a
    cell, (B, 32, 32), and to those of the object's label, (B, 24, 32, 32).
    """

    def __init__(self):
        super().__init__()
        a, b, c, d = WIDTHS
        self.stem = nn.Conv2d(3, a, 3, padding=1)
        self.down = nn.ModuleList(
            [
                nn.Sequential(_down(a, b), _Block(b)),
                nn.Sequential(_down(b, c), _Block(c), _Block(c)),
                nn.Sequential(_down(c, d), _Block(d), _Block(d)),
            ]
        )
        self.across = nn.ModuleList([nn.Conv2d(d, c, 1), nn.Conv2d(c, b, 1)])
        self.up = nn.ModuleList([_Block(c), _Block(b)])
        self.head = nn.Sequential(nn.GroupNorm(8, b), nn.SiLU(), nn.Conv2d(b, 1 + NUM_LABELS, 1))
        nn.init.constant_(self.head[-1].bias[:1], -4.0)  # few cells hold an object
        self.register_buffer("threshold", torch.tensor(0.5))  # set after training

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        fine, middle, coarse = self._descend(images)
        for across, up, level in zip(self.across, self.up, (middle, fine), strict=True):
            coarse = up(level + across(F.interpolate(coarse, scale_factor=2)))
        answer = self.head(coarse)
        return answer[:, 0], answer[:, 1:]

    def features(self, images: Tensor) -> Tensor:
        """Return (B, 576): what the coarsest level sees, averaged over each quarter."""
        return F.adaptive_avg_pool2d(self._descend(images)[-1], 2).flatten(1)

    def _descend(self, images: Tensor) -> list[Tensor]:
        levels = [self.stem(images)]
        for down in self.down:
            levels.append(down(levels[-1]))
        return levels[1:]


class Auditor:
    """Holds the detector and looks at pictures with it, always in float32.

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
            UserError: It does not hold weights of this network.
        """
        path, network = WEIGHTS if path is None else Path(path), AuditorNetwork()
        if not path.is_file():
            raise MissingFileError(f"no auditor weights {path}")
        try:
            network.load_state_dict(safetensors.torch.load_file(path))
        except (safetensors.SafetensorError, RuntimeError) as error:
            first = str(error).strip().splitlines()[-1].strip()
            raise UserError(f"{path} does not hold the auditor's weights: {first}") from None
        return cls(network, device)

    def save(self, path: str | Path) -> None:
        """Write the weights, see `save_weights`."""
        save_weights(self.network, path)

    @torch.inference_mode()
    def find(self, images: Tensor, batch_size: int = 64) -> list[list[Sighting]]:
        """Return the objects in each picture (B, 3, 64, 64), float in [-1, 1] or uint8."""
        found = [[] for _ in images]
        start = 0
        for batch in images.split(batch_size) if len(images) else ():
            middles, names = self.network(self._prepare(batch))
            sure = middles.sigmoid()
            for picture, row, column in peaks(sure, self.network.threshold).nonzero().tolist():
                label = LABELS[names[picture, :, row, column].argmax()]
                x, y = STRIDE * (column + 0.5), STRIDE * (row + 0.5)
                probability = sure[picture, row, column].item()
                found[start + picture].append(Sighting(label, x, y, probability))
            start += len(batch)
        return found

    def count(self, images: Tensor) -> Tensor:
        """Return (B, 24) int64: how often each label is in each picture."""
        counts = torch.zeros(len(images), NUM_LABELS, dtype=torch.int64)
        for row, sightings in zip(counts, self.find(images), strict=True):
            for sighting in sightings:
                row[LABELS.index(sighting.label)] += 1
        return counts

    @torch.inference_mode()
    def features(self, images: Tensor, batch_size: int = 64) -> Tensor:
        """Return what the network sees in pictures (B, 3, 64, 64), (B, 576) float32."""
        parts = [self.network.features(self._prepare(x)).cpu() for x in images.split(batch_size)]
        return torch.cat(parts)

    def _prepare(self, images: Tensor) -> Tensor:
        if images.ndim != 4 or images.shape[1:] != (3, IMAGE_SIZE, IMAGE_SIZE):
            wanted = f"(B, 3, {IMAGE_SIZE}, {IMAGE_SIZE})"
            raise UserError(f"pictures must be {wanted}, not {tuple(images.shape)}")
        images = images.to(self.device)
        images = to_float(images) if images.dtype == torch.uint8 else images.float()
        return images.contiguous(memory_format=torch.channels_last)


def peaks(sure: Tensor, threshold: Tensor | float) -> Tensor:
    """Return where the probabilities (B, H, W) of a middle are highest around, as (B, H, W)."""
    highest = F.max_pool2d(sure[:, None], 2 * _RADIUS + 1, 1, _RADIUS)[:, 0]
    return (sure == highest) & (sure >= threshold)


def compute_audit(counts: Tensor, wanted: Tensor, groups: Tensor | None = None) -> Audit:
    """Return what became of pictures, with intervals, see `lab7.estimates.share`.

    Args:
        counts: (B, 24): how often each label is seen.
        wanted: (B, 24): how often each should be.
        groups: (B,) integers; pictures with the same number share a condition and are resampled
            together. None: every picture has its own.

    Raises:
        UserError: Other shapes.
    """
    return Audit.of(scene_ratios(counts, wanted), groups)


def scene_ratios(counts: Tensor, wanted: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Sort pictures by what became of them: what each adds above and below the line of an `Audit`.

    Args:
        counts: (B, 24): how often each label is seen.
        wanted: (B, 24): how often each should be.

    Returns:
        By share two tensors (B,): whether a picture is of the kind, and ones.

    Raises:
        UserError: Other shapes.
    """
    if counts.shape != wanted.shape or counts.shape[1:] != (NUM_LABELS,):
        raise UserError(
            f"counts must both be (B, {NUM_LABELS}), not {tuple(counts.shape)} and "
            f"{tuple(wanted.shape)}"
        )
    seen = counts.long().view(len(counts), -1, len(COLORS))  # by shape and color
    asked = wanted.long().view_as(seen)
    surplus = seen.sum((1, 2)) - asked.sum((1, 2))
    same_colors = (seen.sum(1) == asked.sum(1)).all(1)
    same_shapes = (seen.sum(2) == asked.sum(2)).all(1)
    exact = (seen == asked).flatten(1).all(1)
    swapped = ~exact & same_colors & same_shapes
    only_asked = ((seen == 0) | (asked > 0)).flatten(1).all(1)
    doubled = (surplus == 0) & ~exact & ~swapped & only_asked
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
    """Two convolutions around a shortcut (He et al. 2016)."""

    def __init__(self, channels: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.GroupNorm(8, channels),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.GroupNorm(8, channels),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


def _down(channels: int, wider: int) -> nn.Module:
    return nn.Conv2d(channels, wider, 4, stride=2, padding=1)
