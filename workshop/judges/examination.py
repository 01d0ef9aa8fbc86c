"""How far the two judges can be trusted, measured on renders that neither of them saw.

How often a probability of the evaluator is right (calibration), which objects a judge misses and
where, what they are taken for, and what blur, brightness and noise do. Pictures that fool the
course's score are in `workshop.judges.fooling`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchvision.transforms.v2.functional import gaussian_blur

from lab7.auditor import Auditor, Sighting
from lab7.dataset import ICLEVRDataset, to_float
from lab7.errors import unknown
from lab7.estimates import Estimate, mean, share
from lab7.evaluator import THRESHOLD, Evaluator
from lab7.files import require_writable
from lab7.labels import LABELS
from lab7.records import RESULTS_DIR
from workshop.judges.auditor_training import AuditorTraining
from workshop.judges.fidelity import Fidelity, RealPictures
from workshop.judges.fooling import score_fooled, score_images
from workshop.records import write_record
from workshop.standin.scenes import label_counts, read_scenes

UNCERTAIN = (0.05, 0.95)  # probabilities whose calibration counts: most others are simply right
CHANGES = {
    "blur": (0.0, 0.5, 1.0, 1.5, 2.0),  # pixels, standard deviation of a Gaussian
    "brightness": (-0.3, -0.2, -0.1, 0.0, 0.1, 0.2, 0.3),  # of the full range, added
    "noise": (0.0, 0.025, 0.05, 0.1, 0.15),  # of the full range, standard deviation
}
NEIGHBORS = (10, 12, 16, 24)  # pixels to the nearest other object, edges of the groups
_BINS = 9  # of the calibration
_REACH = 5.0  # pixels that a detected center may be from the true one
_CHANGED = 600  # pictures for each change, at most


def examine_renders(
    evaluator: Evaluator,
    auditor: Auditor,
    renders: str | Path,
    dataset: ICLEVRDataset,
    run_name: str = "judges",
    results_root: str | Path = RESULTS_DIR,
) -> dict[str, Any]:
    """Measure both judges on the auditor's held-out scenes, see `examine`, and write a record.

    The evaluator's calibration is measured on all of the auditor's scenes: it has seen none.

    Args:
        evaluator: The course's or this project's.
        auditor: The other judge.
        renders: Folder that `python -m lab7 render auditor` wrote.
        dataset: The generator's training pictures.
        run_name: Name of the record, see `write_record`.
        results_root: Folder of the records.
    """
    require_writable(Path(results_root) / run_name)
    scenes = read_scenes(renders)
    held_out = AuditorTraining().split(*scenes)[-1]
    found = examine(evaluator, auditor, *held_out, dataset)
    found["calibration"] = calibrate(evaluator, *scenes)
    write_record(run_name, {}, found, results_root, weights=evaluator.path)
    return found


def examine(
    evaluator: Evaluator,
    auditor: Auditor,
    images: Tensor,
    objects: Tensor,
    dataset: ICLEVRDataset,
) -> dict[str, Any]:
    """Measure both judges.

    Args:
        evaluator: The course's or this project's.
        auditor: The other judge.
        images: (N, 3, 64, 64) uint8, seen by neither.
        objects: (N, 5, 3), what they show, see `workshop.standin.scenes.read_scenes`.
        dataset: The generator's training pictures.

    Returns:
        From all pictures "fooled", see `score_fooled`. From those with each label at most once (the
        evaluator was trained on no others): "recall", see `object_recall`; "confusion", see
        `confusions`; "changes", see `score_changes`; "fidelity", see `fidelity_controls`.
    """
    fooled = score_fooled(evaluator, auditor, images, objects)
    images, objects = without_repeats(images, objects)
    counts = label_counts(objects)
    probabilities = evaluator.predict(images)
    named = match(auditor.find(images), objects)
    few = slice(min(len(images), _CHANGED))
    return {
        "num_pictures": len(images),
        "recall": object_recall(probabilities, named, objects),
        "confusion": {"evaluator": {"taken": confusions(probabilities, counts)}},
        "changes": score_changes(evaluator, auditor, images[few], counts[few]),
        "fooled": fooled,
        "fidelity": fidelity_controls(RealPictures(auditor, dataset), dataset, images, counts),
    }


def without_repeats(images: Tensor, objects: Tensor) -> tuple[Tensor, Tensor]:
    """Leave out pictures (N, 3, 64, 64) whose objects (N, 5, 3) have a label more than once."""
    single = (label_counts(objects) <= 1).all(1)
    return images[single], objects[single]


def calibrate(evaluator: Evaluator, images: Tensor, objects: Tensor) -> dict[str, Any]:
    """Return the `calibration` on the pictures (N, 3, 64, 64) with each label at most once."""
    images, objects = without_repeats(images, objects)
    labels = label_counts(objects).float()
    return {"num_pictures": len(images)} | calibration(evaluator.predict(images), labels)


def calibration(probabilities: Tensor, labels: Tensor) -> dict[str, Any]:
    """Compare uncertain probabilities with how often the label is there (Guo et al. 2017, eq. 3).

    Args:
        probabilities: (B, 24).
        labels: (B, 24) multi-hot.

    Returns:
        "error": the expected calibration error over the probabilities within `UNCERTAIN`, None
        without any; "num_outputs": how many these are; "bins": for each of nine, its "mean"
        probability and the "there" share of the labels that are there.
    """
    low, high = UNCERTAIN
    rows, columns = ((probabilities >= low) & (probabilities <= high)).nonzero().T
    outputs, there = probabilities[rows, columns].double(), labels[rows, columns].double()
    edges = torch.linspace(low, high, _BINS + 1, dtype=torch.float64)[1:-1]
    bin_of = torch.bucketize(outputs, edges)
    bins, gap = [], 0.0
    for number in bin_of.unique().tolist():
        inside = bin_of == number
        mean, estimate = outputs[inside].mean().item(), _share(there[inside], rows[inside])
        bins.append({"mean": mean, "there": estimate})
        gap += inside.sum().item() * abs(mean - estimate.value)
    error = gap / len(outputs) if len(outputs) else None
    return {"error": error, "num_outputs": len(outputs), "bins": bins}


def match(sightings: Sequence[Sequence[Sighting]], objects: Tensor) -> Tensor:
    """Return which label the auditor gives to each object: (N, 5) indices, -1 for none.

    Detections and objects (N, 5, 3) are matched so that the sum of their distances is minimal;
    pairs more than five pixels apart do not count.
    """
    named = torch.full(objects.shape[:2], -1)
    for row, found, there in zip(named, sightings, objects, strict=True):
        places = torch.tensor([(sighting.x, sighting.y) for sighting in found], dtype=there.dtype)
        real = (there[:, 0] >= 0).nonzero()[:, 0]
        distances = torch.cdist(there[real, 1:], places.view(-1, 2))
        for one, other in zip(*linear_sum_assignment(distances.clamp(max=_REACH)), strict=True):
            if distances[one, other] < _REACH:
                row[real[one]] = LABELS.index(found[other].label)
    return named


def object_recall(probabilities: Tensor, named: Tensor, objects: Tensor) -> dict[str, dict]:
    """Return the share of objects that each judge sees, by what may matter.

    Args:
        probabilities: (N, 24), the evaluator's.
        named: (N, 5), the auditor's, see `match`.
        objects: (N, 5, 3), in a picture each label at most once.

    Returns:
        By "count" of objects in the picture, by pixels to the nearest "neighbor" ("none" for an
        only object), and by "height", five equal parts of the objects from far and small to near
        and large, named by their mean pixel from the top: estimates by judge.
    """
    kind = objects[:, :, 0].long()
    there = kind >= 0
    rows, columns = there.nonzero().T
    label, height = kind[rows, columns], objects[rows, columns, 2]
    hits = {
        "evaluator": (probabilities[rows, label] >= THRESHOLD).double(),
        "auditor": (named[rows, columns] == label).double(),
    }

    def part(inside: Tensor) -> dict:
        return {judge: _share(hit[inside], rows[inside]) for judge, hit in hits.items()}

    count = there.sum(1)[rows]
    gap = _neighbor_distances(objects)[rows, columns]
    group = torch.bucketize(gap, torch.tensor(NEIGHBORS, dtype=gap.dtype))
    names = [f"{a}–{b}" for a, b in zip(NEIGHBORS, NEIGHBORS[1:], strict=False)]
    names = [f"<{NEIGHBORS[0]}", *names, f">{NEIGHBORS[-1]}"]
    fifth = torch.bucketize(height, height.quantile(torch.tensor([0.2, 0.4, 0.6, 0.8])))
    return {
        "count": {str(n): part(count == n) for n in count.unique().tolist()},
        "neighbor": {names[i]: part((group == i) & gap.isfinite()) for i in group.unique().tolist()}
        | {"none": part(gap.isinf())},
        "height": {f"{height[fifth == i].mean():.0f}": part(fifth == i) for i in range(5)},
    }


def confusions(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Count which labels the evaluator takes for which.

    It names no places, so it takes a label for another where it misses the one and sees the other
    without reason.

    Args:
        probabilities: (N, 24).
        labels: (N, 24) multi-hot.

    Returns:
        (24, 24) counts, a row for each true label and a column for what it is taken for.
    """
    missed = (labels > THRESHOLD) & (probabilities < THRESHOLD)
    invented = (labels <= THRESHOLD) & (probabilities >= THRESHOLD)
    return (missed.double().T @ invented.double()).long()


def change(images: Tensor, kind: str, amount: float) -> Tensor:
    """Blur, brighten or add noise to pictures (B, 3, 64, 64) in [-1, 1]; see `CHANGES`.

    Raises:
        UserError: An unknown kind of change.
    """
    if kind not in CHANGES:
        raise unknown("change", kind, CHANGES)
    if amount == 0:
        return images
    if kind == "blur":
        return gaussian_blur(images, [13, 13], [amount, amount])
    if kind == "brightness":
        return (images + 2 * amount).clamp(-1, 1)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return (images + 2 * amount * noise).clamp(-1, 1)


def score_changes(
    evaluator: Evaluator, auditor: Auditor, images: Tensor, counts: Tensor
) -> dict[str, list[dict]]:
    """Score both judges on changed pictures: for each kind of change a row for each amount."""
    x, scores = to_float(images), ("exact_set", "exact_scene")

    def row(kind: str, amount: float) -> dict[str, Any]:
        changed = change(x, kind, amount)
        found = score_images(evaluator, auditor, changed, counts, scores)
        return {"amount": amount} | found

    return {kind: [row(kind, amount) for amount in CHANGES[kind]] for kind in CHANGES}


def fidelity_controls(
    real: RealPictures, dataset: ICLEVRDataset, images: Tensor, counts: Tensor
) -> dict[str, Fidelity]:
    """Measure the distances of sets for which it is known what the result should be.

    Args:
        real: The training pictures, as the auditor sees them.
        dataset: The same.
        images: (N, 3, 64, 64) uint8, further renders; of no more objects than training are used.
        counts: (N, 24), how often they show each label.

    Returns:
        For "real" pictures that are not of the training, the same "blurred" by one pixel, a "few"
        of them repeated, for "copied" training pictures, and for the same "retouched": blurred by
        half a pixel and brighter by a hundredth.
    """
    rows = (counts.sum(1) <= int(real.sizes.max())).nonzero()[:, 0]
    fresh, labels = images[rows], counts[rows].float()
    few = torch.arange(len(rows)) % 10
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randperm(len(dataset), generator=generator)[: len(rows)]
    copies, copied = dataset.images[chosen], dataset.conditions[chosen]
    retouched = change(change(to_float(copies), "blur", 0.5), "brightness", 0.01)
    sets = {
        "real": (fresh, labels),
        "blurred": (change(to_float(fresh), "blur", 1.0), labels),
        "few": (fresh[few], labels[few]),
        "copied": (copies, copied),
        "retouched": (retouched, copied),
    }
    found = {}
    for name, (pictures, asked) in sets.items():
        kernel, nearest = real.compare(pictures, asked)
        found[name] = Fidelity(kernel, mean(nearest))
    return found


def _share(hits: Tensor, pictures: Tensor) -> Estimate:
    return share(hits, torch.ones(len(hits)), pictures)


def _neighbor_distances(objects: Tensor) -> Tensor:
    """Return how many pixels each object's center is from the nearest other, (N, 5)."""
    there = objects[:, :, 0] >= 0
    distances = torch.cdist(objects[:, :, 1:], objects[:, :, 1:])
    pair = there[:, :, None] & there[:, None, :] & ~torch.eye(objects.shape[1], dtype=torch.bool)
    return distances.masked_fill(~pair, torch.inf).amin(2)
