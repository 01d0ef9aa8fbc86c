"""The embedded data set: which labels occur in which scene, and the condition files.

The lists have the course's format and statistics but are draws of our own from a fixed seed:
train.json has 6,003 scenes of three objects, one picture for each object added, and leaves out 136
of the 2,024 triples altogether.
"""

import hashlib
import inspect
import itertools
import json
import multiprocessing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from lab7.dataset import NUM_UNSEEN, STEPS
from lab7.errors import MissingFileError, UserError, user_files
from lab7.files import read_json, require_place, require_writable, write_atomically
from lab7.labels import LABELS, NUM_LABELS
from workshop.standin import rendering
from workshop.standin.packing import read_pack, write_pack

SEED = 2024
NUM_SCENES = 6003
NUM_EVALUATOR_SCENES = 9000
NUM_AUDITOR_SCENES = 6000
MOST_OBJECTS = 5
CHUNK = 24  # scenes rendered between two savings

Condition = tuple[str, ...]


@dataclass(frozen=True)
class ScenePlan:
    """What one scene shows: labels in the order they are added, and which counts are pictured."""

    name: str
    labels: Condition
    counts: tuple[int, int, int] = (1, 2, 3)


def draw_conditions(seed: int = SEED) -> dict[str, list[Condition]]:
    """Draw the condition files: test, new_test, valid, unseen and four_five.

    test has 6 singles, 12 pairs and 14 triples; new_test 12 pairs and 20 triples, most of them with
    a color or a shape in common; valid 128 conditions that are in none of the others; unseen the
    136 triples that no training picture shows; four_five 16 conditions of 4 and 16 of 5 objects.
    """
    rng = np.random.default_rng([seed, 0])
    singles, pairs, triples = (_shuffled(itertools.combinations(LABELS, k), rng) for k in (1, 2, 3))
    unseen, triples = triples[:NUM_UNSEEN], triples[NUM_UNSEEN:]
    test = singles[:6] + pairs[:12] + triples[:14]
    singles, pairs, triples = singles[6:], pairs[12:], triples[14:]
    alike_pairs = [p for p in pairs if _shared(p)][:11]
    alike_triples = [t for t in triples if _shared(t) >= 2][:17]
    others = [p for p in pairs if not _shared(p)][:1] + [t for t in triples if not _shared(t)][:3]
    new_test = alike_pairs + others[:1] + alike_triples + others[1:]
    pairs = [p for p in pairs if p not in new_test]
    triples = [t for t in triples if t not in new_test]
    valid = singles[:12] + pairs[:48] + triples[:68]
    larger = [tuple(rng.permutation(LABELS)[:k].tolist()) for k in [4] * 16 + [5] * 16]
    return {
        "test": _shuffled_labels(test, rng),
        "new_test": _shuffled_labels(new_test, rng),
        "valid": _shuffled_labels(valid, rng),
        "unseen": _shuffled_labels(unseen, rng),
        "four_five": larger,
    }


def _shuffled(items, rng) -> list:
    items = list(items)
    return [items[i] for i in rng.permutation(len(items))]


def _shuffled_labels(conditions, rng) -> list[Condition]:
    return [tuple(_shuffled(condition, rng)) for condition in conditions]


def _shared(condition: Condition) -> int:
    """How many pairs of objects have the color or the shape in common."""
    words = [label.split() for label in condition]
    return sum(a[0] == b[0] or a[1] == b[1] for a, b in itertools.combinations(words, 2))


def draw_train(seed: int = SEED) -> list[ScenePlan]:
    """Draw the 6,003 training scenes: every triple that is not unseen at least once."""
    rng = np.random.default_rng([seed, 1])
    unseen = {frozenset(c) for c in draw_conditions(seed)["unseen"]}
    triples = [t for t in itertools.combinations(LABELS, 3) if frozenset(t) not in unseen]
    extra = rng.integers(len(triples), size=NUM_SCENES - len(triples))
    scenes = _shuffled_labels(_shuffled(triples + [triples[i] for i in extra], rng), rng)
    return [ScenePlan(f"CLEVR_train_{i:06d}", labels) for i, labels in enumerate(scenes)]


def draw_evaluator(num_scenes: int = NUM_EVALUATOR_SCENES, seed: int = SEED) -> list[ScenePlan]:
    """Draw scenes of five objects for the evaluator: pictures of 1, 2 or 3, of 4 and of 5."""
    rng = np.random.default_rng([seed, 2])
    return [
        ScenePlan(
            f"CLEVR_evaluator_{i:06d}",
            tuple(rng.permutation(LABELS)[:5].tolist()),
            (1 + i % 3, 4, 5),
        )
        for i in range(num_scenes)
    ]


def draw_auditor(num_scenes: int = NUM_AUDITOR_SCENES, seed: int = SEED) -> list[ScenePlan]:
    """Draw scenes of five objects for the auditor; in half of them a label occurs repeatedly."""
    rng = np.random.default_rng([seed, 3])
    plans = []
    for i in range(num_scenes):
        labels = rng.permutation(LABELS)[: 5 if i % 2 else rng.integers(2, 4)]
        labels = np.concatenate([labels, rng.choice(labels, 5 - len(labels))])
        counts = (1 + i // 2 % 3, 4, 5)
        plans.append(
            ScenePlan(f"CLEVR_auditor_{i:06d}", tuple(rng.permutation(labels).tolist()), counts)
        )
    return plans


def render_scene(plan: ScenePlan, seed: int = SEED) -> tuple[np.ndarray, np.ndarray]:
    """Render one planned scene; the same for the same name and seed.

    Returns:
        Its pictures, uint8 (3, 64, 64, 3), and where its objects' centers are, (n, 2) pixels.
    """
    number = int.from_bytes(hashlib.sha256(f"{seed} {plan.name}".encode()).digest()[:8], "big")
    scene = rendering.sample_scene(plan.labels, np.random.default_rng(number))
    steps = [rendering.render(scene.first(k), (number + k) % 2**31) for k in plan.counts]
    return np.stack(steps), rendering.project(scene)


def render_set(
    plans: list[ScenePlan], output: Path, work: Path, workers: int | None = None
) -> None:
    """Render planned scenes into `output`/pictures.zip, and what they show into a file beside it.

    That is train.json, as the course has it; or scenes.json with labels, counts and centers of all
    objects where a label occurs more than once in a scene, which train.json cannot tell.

    Args:
        plans: The scenes.
        output: Folder of the finished set.
        work: Folder that keeps what is rendered so far; started again with the same scenes and the
            same renderer, the work goes on there.
        workers: Processes; None takes one for each processor.

    Raises:
        UserError: No scenes, or less than one worker.
        FileError: `output` or `work` cannot be written.
    """
    if not plans:
        raise UserError("no scenes to render: give at least one")
    if workers is not None and workers < 1:
        raise UserError(f"workers {workers} must be at least 1")
    output, work = Path(output), Path(work)
    require_place(output)
    require_writable(work)
    chunks = [plans[start : start + CHUNK] for start in range(0, len(plans), CHUNK)]
    jobs = [(chunk, work / f"{_fingerprint(chunk)}.npz") for chunk in chunks]
    todo = [job for job in jobs if not job[1].exists()]
    done = sum(len(job[0]) for job in jobs) - sum(len(job[0]) for job in todo)
    with (
        tqdm(total=len(plans), initial=done, desc="rendering", unit="scene") as bar,
        multiprocessing.get_context("spawn").Pool(workers) as pool,
    ):
        for count in pool.imap_unordered(_render_chunk, todo):
            bar.update(count)
    write_pack(output / "pictures.zip", _finished(jobs))
    if any(len(set(plan.labels)) < len(plan.labels) for plan in plans):
        write_json(output / "scenes.json", _scenes(jobs))
        return
    labels = {
        f"{plan.name}_{step}.png": list(plan.labels[:count])
        for plan in plans
        for step, count in enumerate(plan.counts)
    }
    write_json(output / "train.json", labels)
    write_json(output / "objects.json", {label: i for i, label in enumerate(LABELS)})


@user_files()
def read_scenes(folder: str | Path) -> tuple[Tensor, Tensor]:
    """Read the scenes that `render_set` described in scenes.json.

    Returns:
        Pictures (N, 3, 64, 64) uint8, and their objects (N, 5, 3) float32: the index of the label
        (-1: no object), and the center in pixels from the left and from the top.

    Raises:
        MissingFileError: The folder holds no such scenes.
    """
    if not (Path(folder) / "scenes.json").is_file():
        raise MissingFileError(f"no scenes in {folder}: `python -m lab7 render auditor` makes them")
    scenes = read_json(Path(folder) / "scenes.json")
    names, pictures = read_pack(Path(folder) / "pictures.zip")
    objects = np.full((len(names), STEPS, MOST_OBJECTS, 3), -1, np.float32)
    for row, name in zip(objects, names, strict=True):
        labels = [LABELS.index(label) for label in scenes[name]["labels"]]
        every = np.column_stack([labels, scenes[name]["centres"]])
        for picture, count in zip(row, scenes[name]["counts"], strict=True):
            picture[:count] = every[:count]
    images = torch.from_numpy(pictures.transpose(0, 1, 4, 2, 3).copy())
    return images.flatten(0, 1), torch.from_numpy(objects).flatten(0, 1)


def label_counts(objects: Tensor) -> Tensor:
    """Return (N, 24) int64: how often each label is among the objects (N, 5, 3)."""
    labels = objects[:, :, 0].long()
    return F.one_hot(labels + 1, NUM_LABELS + 1).sum(1)[:, 1:]


def write_json(path: Path, content) -> None:
    """Write JSON, one entry a line, under a temporary name first."""
    if isinstance(content, dict):
        lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in content.items()]
        text = "{\n" + ",\n".join(lines) + "\n}\n"
    else:
        text = "[\n" + ",\n".join(json.dumps(value) for value in content) + "\n]\n"
    write_atomically(path, text)


def _fingerprint(plans: list[ScenePlan]) -> str:
    """A name that changes with the scenes and with the renderer."""
    return hashlib.sha256((repr(plans) + inspect.getsource(rendering)).encode()).hexdigest()[:16]


def _render_chunk(job: tuple[list[ScenePlan], Path]) -> int:
    plans, path = job
    pictures, centers = map(np.stack, zip(*map(render_scene, plans), strict=True))
    write_atomically(path, lambda file: np.savez(file, pictures=pictures, centers=centers))
    return len(plans)


def _finished(jobs) -> Iterator[tuple[str, np.ndarray]]:
    for plans, path in jobs:
        with np.load(path) as chunk:
            yield from zip([plan.name for plan in plans], chunk["pictures"], strict=True)


def _scenes(jobs) -> dict[str, dict]:
    scenes = {}
    for plans, path in jobs:
        with np.load(path) as chunk:
            for plan, centers in zip(plans, chunk["centers"].round(2).tolist(), strict=True):
                scenes[plan.name] = {
                    "labels": plan.labels,
                    "counts": plan.counts,
                    "centres": centers,
                }
    return scenes
