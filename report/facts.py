"""What the report says beside the records: counts of the data, of failures, of operations; code."""

import ast
import dataclasses
import inspect
import textwrap
from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lab7 import dataset, diffusion, training
from lab7.auditor import Audit
from lab7.batches import Batches
from lab7.dataset import CONDITION_FILES, PICTURE_SHAPE, STEPS, to_float
from lab7.errors import UserError
from lab7.estimates import Estimate, difference, share
from lab7.experiments import EXPERIMENTS, TWINS, TrainConfig
from lab7.labels import LABELS, NUM_LABELS
from lab7.model import ConditionalUNet
from lab7.pipeline import ConditionalDDPMPipeline
from lab7.records import Record, comparable, count_passes, trainings
from lab7.sampling import DENOISING_CONDITION
from lab7.scoring import Verdicts, compare_paired, label_names

EPSILON = ("twin-baseline-epsilon", "twin-cosine-epsilon")
TRIALS = (*TWINS, *EPSILON)  # the small experiments, in the order of their table
SCHEDULES = {"linear": "original-baseline", "cosine": "ours"}  # and an experiment that has it
DROWNED = 0.01  # signal-to-noise ratio below which a picture counts as drowned
WORST_PAIRS = 8  # that are named
LISTINGS = {  # the code that the report shows, by the name of the listing
    "loader": (dataset.squeeze, dataset.ICLEVRDataset, Batches.__call__),
    "model": (ConditionalUNet.forward,),
    "training": (diffusion.diffusion_loss, training._loop),
    "sampling": (ConditionalDDPMPipeline.reverse, ConditionalDDPMPipeline.predict),
}


def count_pictures(labels: list[list[str]]) -> dict[str, Any]:
    """Count pictures by label, and the sets of labels that they show."""
    by_label = Counter(label for row in labels for label in row)
    shown = {frozenset(row) for row in labels}
    possible = {k: [frozenset(c) for c in combinations(LABELS, k)] for k in (1, 2, 3)}
    return {
        "pictures": len(labels),
        "fewest_of_a_label": min(by_label[label] for label in LABELS),
        "most_of_a_label": max(by_label[label] for label in LABELS),
        "sets": {k: len(sets) for k, sets in possible.items()},
        "sets_shown": {k: sum(s in shown for s in sets) for k, sets in possible.items()},
    }


def count_conditions(conditions: list[tuple[str, ...]]) -> dict[str, Any]:
    """Count conditions and objects of a condition file."""
    return {"conditions": len(conditions), "objects": sum(map(len, conditions))}


def signal(images: Tensor) -> dict[str, Any]:
    """Say how much of pictures (N, 3, 64, 64) uint8 the noise schedules leave.

    Returns:
        "power": the mean square of the pictures in [-1, 1]; "drowned": for each schedule the share
        of time steps at which the signal's power is below a hundredth of the noise's.
    """
    power = sum(to_float(batch).square().sum().item() for batch in images.split(2000))
    power /= images.numel()
    drowned = {}
    for name, experiment in SCHEDULES.items():
        alphas = DDPMScheduler(**EXPERIMENTS[experiment].config.noise).alphas_cumprod
        drowned[name] = (alphas * power / (1 - alphas) < DROWNED).double().mean().item()
    return {"power": power, "drowned": drowned}


def cost(config: TrainConfig) -> dict[str, float]:
    """Count the parameters of a network, and the operations of one pass for one picture.

    A multiplication and an addition are two operations; normalisations and the like are not
    counted.
    """
    with torch.device("meta"):  # shapes alone: nothing is computed
        unet = ConditionalUNet(**config.unet).eval()
        inputs = torch.zeros(1, *PICTURE_SHAPE), torch.zeros(1).long(), torch.zeros(1, NUM_LABELS)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        unet(*inputs)
    parameters = sum(parameter.numel() for parameter in unet.parameters())
    return {"parameters": parameters, "operations": counter.get_total_flops()}


def costs(records: dict[str, Record]) -> dict[str, dict[str, float]]:
    """Return the `cost` of the experiments that the report names."""
    names = [name for name in EXPERIMENTS if name in records or name.startswith("original")]
    return {name: cost(EXPERIMENTS[name].config) for name in names}


def pool(record: Record) -> Verdicts:
    """Join what was said of the pictures of all sets of a record."""
    conditions, parts = [], {"condition": [], "hits": [], "seen": [], "counted": []}
    for name in CONDITION_FILES:
        found = record.get(f"{name}.pictures")
        parts["condition"] += [len(conditions) + number for number in found["condition"]]
        conditions += found["conditions"]
        for part in ("hits", "seen", "counted"):
            parts[part] += found[part]
    return Verdicts(conditions=conditions, seed=None, **parts)


def audit_by_count(verdicts: Verdicts) -> dict[int, dict[str, Any]]:
    """Audit pictures by how many objects they should show."""
    ratios, groups = verdicts.ratios()["audit"], verdicts.condition
    asked = torch.tensor([len(verdicts.conditions[number]) for number in groups])
    found = {}
    for count in asked.unique().tolist():
        rows = (asked == count).nonzero()[:, 0]
        part = {name: [torch.as_tensor(x)[rows] for x in pair] for name, pair in ratios.items()}
        audit = Audit.of(part, torch.tensor(groups)[rows].tolist())
        found[count] = dataclasses.asdict(audit)
    return found


def failures(record: Record) -> dict[str, Any]:
    """Sort by number of objects, label and pair which pictures the auditor finds wrong.

    Returns:
        "by_count", see `audit_by_count`. Of conditions with no more objects than training shows:
        "confirmed", how many of the wrong pictures the evaluator finds wrong too; "by_label", how
        often a label was asked for and missed; "sharing", the share of wrong pictures of triples
        whose objects have nothing, a shape, a color or both in common; "pairs", those whose
        pictures are wrong most often; "lost", what objects were drawn in the place of.
    """
    verdicts = pool(record)
    asked, missed, shown = Counter(), Counter(), Counter()
    wrong_pairs, lost = Counter(), Counter()
    alike: dict[str, list[tuple[int, int]]] = {}
    confirmed = 0
    counted, seen = label_names(verdicts.counted), label_names(verdicts.seen)
    for number, found, labels in zip(verdicts.condition, counted, seen, strict=True):
        wanted = verdicts.conditions[number]
        if len(wanted) > STEPS:
            continue
        missing, surplus = Counter(wanted) - Counter(found), Counter(found) - Counter(wanted)
        wrong, pairs = bool(missing or surplus), list(combinations(sorted(wanted), 2))
        asked.update(wanted)
        missed.update(missing.keys())
        shown.update(pairs)
        wrong_pairs.update(pairs * wrong)
        confirmed += wrong and set(labels) != set(wanted)
        if len(wanted) == STEPS:
            alike.setdefault(_shared(wanted), []).append((wrong, number))
        if missing.total() == surplus.total() == 1:
            lost[_shared([*missing, *surplus])] += 1
    worst = sorted(shown, key=lambda pair: (-wrong_pairs[pair] / shown[pair], pair))
    return {
        "by_count": audit_by_count(verdicts),
        "confirmed": confirmed,
        "by_label": {x: {"missed": missed[x], "asked": asked[x]} for x in LABELS},
        "sharing": {key: dataclasses.asdict(_share(rows)) for key, rows in alike.items()},
        "num_pairs": len(shown),
        "num_wrong_pairs": len(wrong_pairs),
        "pairs": [[*x, wrong_pairs[x], shown[x]] for x in worst[:WORST_PAIRS] if wrong_pairs[x]],
        "lost": dict(lost),
    }


def score_triples(record: Record, name: str) -> dict[str, Any] | None:
    """Score the pictures of a set's conditions of three objects.

    Returns:
        "exact_set"; "both", the share of these conditions in which two objects share a shape and
        two a color. None if the set has no such condition.
    """
    verdicts = Verdicts(**record.get(f"{name}.pictures"))
    triples = {i for i, labels in enumerate(verdicts.conditions) if len(labels) == STEPS}
    if not triples:
        return None
    exact, _ = verdicts.ratios()["scores"]["exact_set"]
    pairs = zip(exact.tolist(), verdicts.condition, strict=True)
    found = _share([(right, number) for right, number in pairs if number in triples])
    both = sum(_shared(verdicts.conditions[number]) == "both" for number in triples)
    return {"exact_set": dataclasses.asdict(found), "both": both / len(triples)}


def compare_fast(records: dict[str, Record]) -> dict[str, Any] | None:
    """Compare the fast generator with the full one, over the same conditions and seeds.

    Returns:
        "passes" of the fast one; "condition", that of its many seeds; "differences", by set and
        score, fast minus full. None if there is no record of it.

    Raises:
        UserError: Their conditions or seeds differ.
    """
    if "fast" not in records:
        return None
    found = {}
    for name in CONDITION_FILES:
        full, fast = (
            Verdicts(**records[which].get(f"{name}.pictures")) for which in ("ours", "fast")
        )
        if (full.conditions, full.condition, full.seed) != (
            fast.conditions,
            fast.condition,
            fast.seed,
        ):
            raise UserError(f"'ours' and 'fast' are of other conditions or seeds in {name!r}")
        before, after = full.ratios()["scores"], fast.ratios()["scores"]
        found[name] = {
            key: dataclasses.asdict(difference(after[key], before[key], full.condition))
            for key in ("top_k", "exact_set")
        }
    passes = count_passes(records["fast"].get("test"))
    seen = ", ".join(DENOISING_CONDITION)  # of seeds.png
    return {"passes": passes, "condition": seen, "differences": found}


def lowest_distances(record: Record) -> dict[str, float] | None:
    """Return the smallest and the 5 % quantile of the pictures' nearest distances, if known."""
    near = [
        x for name in CONDITION_FILES for x in record.get(f"{name}.pictures").get("nearest") or ()
    ]
    return {"smallest": min(near), "twentieth": float(np.quantile(near, 0.05))} if near else None


def listing(*parts: Any) -> str:
    """Return the source of functions and classes, as it is now but for their docstrings."""
    return "\n\n".join(
        f"# {part.__module__.replace('.', '/')}.py, {part.__qualname__}\n"
        + _without_docstrings(inspect.getsource(part))
        for part in parts
    )


def compare_twins(records: dict[str, Record]) -> list[dict[str, Any]]:
    """Compare each twin with the baseline, and each target with the other, over `new_test`."""
    runs = {name: row for name, row in records.items() if name.split("-seed")[0] in TRIALS}
    twins, _ = comparable(runs, "new_test")
    pairs = [(name, TWINS[0]) for name in TWINS[1:]]
    pairs += [(name.removesuffix("-epsilon"), name) for name in EPSILON]
    pairs = [pair for pair in pairs if all(name in twins for name in pair)]
    found = []
    for a, b in pairs:
        compared = compare_paired(trainings(twins, a), trainings(twins, b), "new_test")
        found.append({"a": a, "b": b, **dataclasses.asdict(compared)})
    return found


def _shared(labels: Sequence[str]) -> str:
    """Say what some of the labels have in common: "nothing", "shape", "color" or "both"."""
    words = [label.split() for label in labels]
    colors, shapes = (len(set(part)) < len(labels) for part in zip(*words, strict=True))
    return {(0, 0): "nothing", (0, 1): "shape", (1, 0): "color", (1, 1): "both"}[colors, shapes]


def _share(rows: Sequence[tuple[int, int]]) -> Estimate:
    hits, groups = zip(*rows, strict=True)
    return share(hits, [1] * len(hits), groups)


def _without_docstrings(source: str) -> str:
    source = textwrap.dedent(source)
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node):
            text = node.body[0]
            lines[text.lineno - 1 : text.end_lineno] = [None] * (text.end_lineno - text.lineno + 1)
    kept = "\n".join(line for line in lines if line is not None)
    return kept.replace(":\n\n", ":\n")
