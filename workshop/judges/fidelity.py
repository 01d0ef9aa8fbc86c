"""What records say of pictures beside their scores: do the judges agree, and are they copies?

Labels cannot tell whether a generator draws one picture a label, pictures of another kind, or
copies of those it was trained on. Distances between `Auditor.features` can.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from lab7.auditor import Auditor
from lab7.cache import cached
from lab7.dataset import ICLEVRDataset, data_hash
from lab7.estimates import Estimate, mean, share
from lab7.labels import encode
from lab7.scoring import Verdicts, count_labels

_REAL_PICTURES = 2000  # that a set is compared with
_Z = 1.959964  # 97.5 % quantile of the normal distribution


@dataclass(frozen=True)
class Agreement:
    """How often evaluator and auditor say the same of pictures.

    `same_labels`: both see the same labels, whatever their number. The four others sort all
    pictures by who finds exactly what was asked for: the evaluator its labels and no other, the
    auditor each exactly once.
    """

    same_labels: Estimate
    both_right: Estimate
    evaluator_alone: Estimate
    auditor_alone: Estimate
    both_wrong: Estimate

    @classmethod
    def of(cls, verdicts: Verdicts) -> "Agreement":
        """Compare what the judges say of each picture; intervals are over conditions."""
        parts, groups = verdicts.ratios(), verdicts.condition
        seen, counts = count_labels(verdicts.seen) > 0, count_labels(verdicts.counted)
        right, exact = parts["scores"]["exact_set"][0], parts["audit"]["exact_scene"][0]
        pairs = {
            "same_labels": (seen == (counts > 0)).all(1),
            "both_right": right & exact,
            "evaluator_alone": right & ~exact,
            "auditor_alone": exact & ~right,
            "both_wrong": ~right & ~exact,
        }
        ones = torch.ones(len(groups))
        return cls(**{name: share(pair, ones, groups) for name, pair in pairs.items()})


@dataclass(frozen=True)
class Fidelity:
    """How near pictures are to those of the training.

    `kernel_distance` compares them, as a set, with training pictures of as many objects; None
    where training has none, or for fewer than three conditions. `nearest_distance` is the mean
    distance of a picture to the nearest training picture: much lower than among training pictures
    themselves means copies.
    """

    kernel_distance: Estimate | None
    nearest_distance: Estimate


def describe(found: dict[str, Any], images: Tensor, real: "RealPictures | None") -> dict[str, Any]:
    """Add to the scores of pictures what else a record says of them.

    Args:
        found: What `lab7.scoring.judge_pictures` returned, of both judges.
        images: The pictures (B, 3, 64, 64).
        real: The training pictures; None leaves the distances out.

    Returns:
        `found` with the "agreement" and, with `real`, the "fidelity"; its "pictures" get the
        distance of each to the `nearest` training picture.
    """
    verdicts = found["pictures"]
    more = {"agreement": Agreement.of(verdicts)}
    if real is not None:
        groups = torch.tensor(verdicts.condition)
        labels = encode(verdicts.conditions)[groups]
        kernel, nearest = real.compare(images, labels, groups)
        more["fidelity"] = Fidelity(kernel, mean(nearest, groups))
        more["pictures"] = replace(verdicts, nearest=nearest)
    return found | more


class RealPictures:
    """What the auditor sees in the training pictures; computed once and kept in the cache.

    Args:
        auditor: Whose features are used.
        dataset: The training pictures.
    """

    def __init__(self, auditor: Auditor, dataset: ICLEVRDataset):
        self.auditor = auditor
        self.sizes = dataset.conditions.sum(1).long()
        self.features = _cached_features(auditor, dataset.images)

    def compare(
        self, images: Tensor, labels: Tensor, groups: Tensor | None = None
    ) -> tuple[Estimate | None, list[float]]:
        """Return the kernel distance of pictures, and how far each is from the nearest of these.

        Args:
            images: (B, 3, 64, 64).
            labels: (B, 24) multi-hot, what they should show.
            groups: (B,), see `kernel_distance`.

        Returns:
            The first is None where `Fidelity` says so; the others are rounded to four digits.
        """
        features = self.auditor.features(images)
        alike = self.features[self._of_sizes(labels.sum(1).long())]
        nearest = nearest_distances(features, self.features)
        distances = [round(distance, 4) for distance in nearest.tolist()]
        return kernel_distance(features, alike, groups), distances

    def _of_sizes(self, sizes: Tensor) -> Tensor:
        """Draw rows whose numbers of objects are distributed as `sizes`, always the same."""
        generator = torch.Generator().manual_seed(0)
        rows = []
        for size, count in zip(*sizes.unique(return_counts=True), strict=True):
            there = (self.sizes == size).nonzero()[:, 0]
            wanted = round(_REAL_PICTURES * int(count) / len(sizes))
            if len(there) == 0:
                return there
            rows.append(there[torch.randperm(len(there), generator=generator)[:wanted]])
        return torch.cat(rows)


def kernel_distance(x: Tensor, y: Tensor, groups: Tensor | None = None) -> Estimate | None:
    """Estimate the kernel distance (KID) of two sets of pictures from their features.

    The squared maximum mean discrepancy with the kernel (a·b/d + 1)³, without bias, so that it is 0
    on average, and may be below, for two sets of the same kind (Bińkowski et al., “Demystifying MMD
    GANs”, 2018, eq. 4). Pictures of one condition are more alike than independent ones, so pairs of
    them do not count. The interval is the jackknife's over groups of x; y counts as given.

    Args:
        x: (N, d), of the pictures that are judged.
        y: (M, d), of real pictures.
        groups: (N,) integers; pictures with the same number share a condition. None: every picture
            has its own.

    Returns:
        The distance; None for fewer than three groups, or fewer than two pictures in y.
    """
    groups = torch.arange(len(x)) if groups is None else groups
    _, rows, sizes = groups.unique(return_inverse=True, return_counts=True)
    count = len(sizes)
    if count < 3 or len(y) < 2:
        return None
    x, y, n = x.double(), y.double(), len(x)
    within_y = _kernel(y, y).fill_diagonal_(0).sum() / (len(y) * (len(y) - 1))
    others = _kernel(x, x).masked_fill(rows == rows[:, None], 0).sum(1)
    pairs, across = rows.bincount(others), rows.bincount(_kernel(x, y).mean(1))  # by group
    whole = pairs.sum() / (n**2 - sizes.square().sum()) - 2 * across.sum() / n
    left = n - sizes  # pictures without a group, as is all that follows
    within = (pairs.sum() - 2 * pairs) / (left**2 - sizes.square().sum() + sizes**2)
    parts = within - 2 * (across.sum() - across) / left
    error = ((count - 1) / count * (parts - parts.mean()).square().sum()).sqrt()
    value, margin = float(whole + within_y), _Z * float(error)
    return Estimate(value, value - margin, value + margin)


def nearest_distances(x: Tensor, y: Tensor) -> Tensor:
    """Return how far each of x (N, d) is from the nearest of y (M, d), as (N,).

    Args:
        x: Features of the pictures that are judged.
        y: Features of the pictures that may have been copied.
    """
    exact = "donot_use_mm_for_euclid_dist"  # with matrix products, copies would not be at 0
    batches = [torch.cdist(batch, y, compute_mode=exact) for batch in x.split(512)]
    return torch.cat([distances.min(1).values for distances in batches])


def _cached_features(auditor: Auditor, images: Tensor) -> Tensor:
    """Return the features of pictures (N, 3, 64, 64) uint8, from the cache where it has them."""
    weights = torch.cat([x.flatten().cpu() for x in auditor.network.state_dict().values()])
    batches = tqdm(images.split(512), "looking at the training pictures", disable=None, leave=False)
    name = f"features-{data_hash(images, weights)[:32]}"
    found = cached(name, lambda: torch.cat([auditor.features(x) for x in batches]).numpy())
    return torch.from_numpy(found)


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.T / a.shape[1] + 1) ** 3
