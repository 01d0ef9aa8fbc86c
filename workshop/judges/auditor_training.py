"""Training of the auditor on scenes of its own, in which labels may stand more than once."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lab7.auditor import STRIDE, WEIGHTS, Auditor, AuditorNetwork, compute_audit
from lab7.dataset import DATA_DIR, STEPS, read_pack
from lab7.devices import choose_device
from lab7.errors import MissingFileError
from lab7.files import read_json, require_writable, write_atomically
from lab7.labels import LABELS, NUM_LABELS
from lab7.records import RESULTS_DIR, write_record
from workshop.judges.augmentation import augment
from workshop.judges.judge_training import JudgeConfig, Trainer, split

THRESHOLDS = tuple(round(0.1 + 0.05 * i, 2) for i in range(15))  # of a middle, to choose from
MOST_OBJECTS = 5


@dataclass(frozen=True)
class AuditorConfig(JudgeConfig):
    """Settings of a training, and of the changes that its pictures go through.

    Mirroring and shifting are done here, as they move the objects too; zoom would.
    """

    small_share: float = 0.2
    mirrored_share: float = 0.0
    shift: float = 0.0
    zoom: float = 0.0
    mirrored: float = 0.5  # share of the pictures whose left and right are exchanged
    moved: int = 3  # ± whole pixels, across and down
    spread: float = 0.7  # cells, standard deviation of the bump about the middle of an object
    epochs: int = 30
    seed: int = 1


def read_scenes(folder: str | Path) -> tuple[Tensor, Tensor]:
    """Read the scenes that `python -m lab7 render auditor` wrote.

    Returns:
        Pictures (N, 3, 64, 64) uint8, and their objects (N, 5, 3) float32: the index of the label
        (-1: no object), and the middle in pixels from the left and from the top.

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


def train_auditor(
    images: Tensor,
    objects: Tensor,
    config: AuditorConfig,
    output: str | Path = WEIGHTS,
    *,
    run_name: str = "auditor",
    results_root: str | Path = RESULTS_DIR,
    states: str | Path | None = None,
    device: str | torch.device | None = None,
) -> Auditor:
    """Train the detector, keep its best epoch, and write down how it does.

    Args:
        images: (N, 3, 64, 64) uint8, in the order of the scenes; the last rows are the test's,
            those before are for validation, which also decides the threshold.
        objects: (N, 5, 3), see `read_scenes`.
        config: The settings.
        output: safetensors file; it and the record are written when all is done.
        run_name: Name of the record, see `write_record`.
        results_root: Folder of the records.
        states: Folder that keeps a state after each epoch; removed at the end. None keeps none.
        device: Where to train; None takes the best there is.

    Raises:
        UserError: Arrays that do not fit each other, too few pictures to train on, or `states`
            of a training with other settings.
    """
    train, validation, test = split(images, objects, config)
    for folder in (Path(output).parent, Path(results_root) / run_name):
        require_writable(folder)
    device = choose_device(device)
    torch.manual_seed(config.seed)

    def change(images: Tensor, objects: Tensor, generator: torch.Generator) -> tuple:
        images, objects = move(images, objects, config, generator)
        return augment(images, config, generator), objects

    def loss(network: nn.Module, x: Tensor, objects: Tensor) -> Tensor:
        return detection_loss(*network(x), objects, config.spread)

    def judge(network: nn.Module) -> dict[str, float]:
        counts = Auditor(network, device).count(validation[0])
        return {
            "exact_scene": (counts == label_counts(validation[1])).all(1).double().mean().item()
        }

    trainer = Trainer(AuditorNetwork(), *train, config, change, loss, judge, device)
    network = trainer.train(states, "auditor")
    network.threshold.fill_(choose_threshold(network, *validation, device))
    Auditor(network, device).save(output)
    auditor, best = Auditor.load(output, device), trainer.best
    metrics = held_out_metrics(auditor, *test) | {
        "validation": {"exact_scene": best["exact_scene"], "num_pictures": len(validation[0])},
        "threshold": network.threshold.item(),
        "training": {
            "num_pictures": len(train[0]),
            "steps": config.epochs * trainer.steps_per_epoch,
            "seconds": trainer.log[-1]["seconds"],
            "bf16": trainer.bf16,
            "parameters": sum(weight.numel() for weight in network.parameters()),
        },
    }
    folder = write_record(
        run_name, config, metrics, results_root, seeds=[config.seed], weights=output
    )
    write_atomically(folder / "log.jsonl", "".join(json.dumps(row) + "\n" for row in trainer.log))
    if states is not None:
        shutil.rmtree(states)
    return auditor


def train_on_renders(
    renders: str | Path,
    output: str | Path | None = None,
    epochs: int | None = None,
    device: str | torch.device | None = None,
) -> Auditor:
    """Train the auditor on the scenes that `python -m lab7 render auditor` wrote."""
    config = AuditorConfig() if epochs is None else AuditorConfig(epochs=epochs)
    states = DATA_DIR.parent / "runs" / "train-auditor"
    return train_auditor(
        *read_scenes(renders), config, output or WEIGHTS, states=states, device=device
    )


def label_counts(objects: Tensor) -> Tensor:
    """Return (N, 24) int64: how often each label is among the objects (N, 5, 3)."""
    labels = objects[:, :, 0].long()
    return F.one_hot(labels + 1, NUM_LABELS + 1).sum(1)[:, 1:]


def move(
    images: Tensor, objects: Tensor, config: AuditorConfig, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Mirror and shift pictures at random, and their objects (N, 5, 3) with them."""
    count, size, device = len(images), images.shape[-1], images.device
    draw = {"generator": generator, "device": device}
    at = torch.arange(size, device=device)
    shift = torch.randint(-config.moved, config.moved + 1, (count, 2), **draw)
    mirrored = torch.rand(count, **draw) < config.mirrored
    columns = (at - shift[:, :1]).clamp(0, size - 1)
    rows = (at - shift[:, 1:]).clamp(0, size - 1)
    columns = torch.where(mirrored[:, None], size - 1 - columns, columns)
    each = torch.arange(count, device=device)[:, None, None]
    moved = images.permute(0, 2, 3, 1)[each, rows[:, :, None], columns[:, None, :]]
    objects = objects.clone()
    across = torch.where(mirrored[:, None], size - objects[:, :, 1], objects[:, :, 1])
    objects[:, :, 1] = across + shift[:, :1]
    objects[:, :, 2] += shift[:, 1:]
    return moved.permute(0, 3, 1, 2), objects


def detection_loss(middles: Tensor, names: Tensor, objects: Tensor, spread: float) -> Tensor:
    """Compute the loss of a batch of answers.

    The focal loss of middles (Zhou et al. 2019, eq. 1, with a bump of `spread` cells about each),
    plus the cross-entropy of the label in the cell that holds the middle; a mean over objects.

    Args:
        middles: Logits (B, H, W).
        names: Logits (B, 24, H, W).
        objects: (B, 5, 3), see `read_scenes`.
        spread: Standard deviation of the bump, in cells.
    """
    height, width = middles.shape[1:]
    label, x, y = objects.unbind(-1)
    x, y = x / STRIDE - 0.5, y / STRIDE - 0.5  # in cells, from the middle of the first
    across = torch.arange(width, device=x.device) - x[:, :, None]
    down = torch.arange(height, device=x.device) - y[:, :, None]
    squares = down.square()[..., None] + across.square()[:, :, None]
    there = label >= 0
    bump = (torch.exp(-squares / (2 * spread**2)) * there[..., None, None]).amax(1)
    picture = there.nonzero()[:, 0]
    column = x[there].round().long().clamp(0, width - 1)
    row = y[there].round().long().clamp(0, height - 1)
    middles = middles.float()
    sure, unsure = F.logsigmoid(middles), F.logsigmoid(-middles)  # log p, log (1 - p)
    rest = (1 - bump) ** 4 * sure.exp().square() * unsure
    rest[picture, row, column] = 0
    hits = unsure[picture, row, column].exp().square() * sure[picture, row, column]
    labels = label[there].long()
    named = F.cross_entropy(names[picture, :, row, column].float(), labels, reduction="sum")
    return (named - hits.sum() - rest.sum()) / max(1, len(picture))


@torch.inference_mode()
def choose_threshold(
    network: AuditorNetwork, images: Tensor, objects: Tensor, device: torch.device
) -> float:
    """Return the threshold with which most pictures are counted right; of equals the middle one."""
    right, wanted = [], label_counts(objects)
    for threshold in THRESHOLDS:
        network.threshold.fill_(threshold)
        counts = Auditor(network, device).count(images)
        right.append((counts == wanted).all(1).sum().item())
    best = [t for t, count in zip(THRESHOLDS, right, strict=True) if count == max(right)]
    return best[len(best) // 2]


def held_out_metrics(auditor: Auditor, images: Tensor, objects: Tensor) -> dict:
    """Return how an auditor does on pictures (N, 3, 64, 64) uint8 that it never saw.

    Returns:
        "test": what became of all pictures; "by_count": of those with so many objects; "repeated":
        of those that show a label more than once; "distance": quantiles of how far, in pixels,
        a found middle is from the nearest true one.
    """
    counts, wanted = auditor.count(images), label_counts(objects)
    sizes, repeated = wanted.sum(1), (wanted > 1).any(1)

    def part(rows: Tensor) -> dict:
        return compute_audit(counts[rows], wanted[rows])

    return {
        "test": compute_audit(counts, wanted),
        "by_count": {size: part(sizes == size) for size in sizes.unique().tolist()},
        "repeated": part(repeated),
        "distance": _distances(auditor, images, objects),
    }


def _distances(auditor: Auditor, images: Tensor, objects: Tensor) -> dict[str, float]:
    """Return quantiles of the distance from found middles to the nearest true ones, in pixels."""
    gaps = []
    for sightings, there in zip(auditor.find(images), objects, strict=True):
        true = there[there[:, 0] >= 0, 1:]
        for sighting in sightings:
            offset = true - torch.tensor([sighting.x, sighting.y])
            gaps.append(offset.norm(dim=1).min().item())
    return {str(q): float(np.quantile(gaps, q)) for q in (0.5, 0.95, 0.99)} if gaps else {}
