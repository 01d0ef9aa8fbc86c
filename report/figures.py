"""The figures of the report, drawn from the records."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from diffusers import DDPMScheduler
from PIL import Image

from lab7 import plots
from lab7.dataset import SCORED, STEPS, ICLEVRDataset, named_conditions
from lab7.estimates import Estimate
from lab7.experiments import EXPERIMENTS, ORIGINALS, TWINS
from lab7.layouts import Layout
from lab7.records import RESULTS_DIR, Record, original_scores, published, read_log
from lab7.scoring import label_names
from lab7.training import SAMPLED
from report.handin import HandIn, draw_denoising
from workshop.judges import plots as judge_plots

EPSILON = ("twin-baseline-epsilon", "twin-cosine-epsilon")
TRIALS = (*TWINS, *EPSILON)  # the small experiments, in the order of their table
SCENES_SHOWN, EXAMPLES = 8, 8
Condition = Sequence[str]


def draw_figures(
    records: dict[str, Record], results: Path, data: Layout, folder: Path, handin: HandIn | None
) -> None:
    """Draw every figure of the report into a folder."""
    folder.mkdir()
    ours, sweep = records["ours"], records["sweep"]
    charts = {"scenes.webp": draw_scenes(data)}
    for name in SCORED:
        conditions = named_conditions(name, data)
        sheet = results / "ours" / f"{name}.png"
        charts[f"{name}.webp"] = draw_grid(sheet, conditions, counted_labels(ours, name))
    if "evaluator" in records:
        charts |= draw_evaluator(records["evaluator"], judge_results("evaluator", results))
    if "judges" in records:
        judges = records["judges"]
        charts |= {
            "reliability.svg": judge_plots.reliability(judges.get("calibration")),
            "recall.svg": judge_plots.recall_by(judges.get("recall")),
            "changes.svg": judge_plots.changed_pictures(judges.get("changes")),
            "fooled.svg": judge_plots.fooled_judges(judges.get("fooled")),
        }
    frames = plots.split_grid(read_picture(results / "ours" / "denoising.png"))
    charts |= {
        "denoising.webp": draw_denoising(frames),
        "training.svg": plots.training_curve(read_log(results / "ours" / "log.jsonl")),
        "sweep.svg": plots.sweep_curves({key: sweep.get(key) for key in ("guidance", "steps")}),
        "accuracy.svg": draw_accuracy(records),
        **draw_twins(records, results),
        "original_by_epoch.svg": plots.accuracy_by_epoch(
            published()["original"]["cosine_by_epoch"]
        ),
        "schedules.svg": draw_schedules(),
    }
    charts |= handin.charts() if handin else {}
    for name, chart in charts.items():
        chart.save(folder / name)


def draw_evaluator(evaluator: Record, results: Path) -> dict[str, plots.Chart]:
    """Show how right this project's evaluator is, and its worst mistakes."""
    mistakes = evaluator.get("mistakes")
    labels, seen = ([mistake[key] for mistake in mistakes] for key in ("labels", "seen"))
    return {
        "mistakes.webp": draw_grid(results / "evaluator" / "mistakes.png", labels, seen),
        "label_recall.svg": plots.label_heatmap(evaluator.get("recall_per_label")),
        "by_count.svg": judge_plots.scores_by_count(evaluator.get("by_count")),
    }


def draw_scenes(data: Layout) -> plots.Chart:
    """Show the first scenes of the set, a column each, objects added from top to bottom."""
    dataset = ICLEVRDataset(data)
    scenes = min(SCENES_SHOWN, len(dataset) // STEPS)
    rows = [STEPS * scene + step for step in range(STEPS) for scene in range(scenes)]
    captions = [dataset.labels[row][-1] for row in rows]
    return plots.picture_grid(dataset.images[rows], captions, columns=scenes)


def draw_grid(
    sheet: Path, conditions: Sequence[Condition], seen: Sequence[Condition]
) -> plots.Chart:
    """Show the pictures of a sheet with their labels and what the evaluator sees in them."""
    pictures = plots.split_grid(read_picture(sheet))
    shown = slice(min(len(pictures), len(conditions)))
    return plots.picture_grid(pictures[shown], conditions[shown], seen[shown])


def counted_labels(record: Record, name: str) -> list[list[str]]:
    """Return the labels of the objects that the auditor finds in each picture of a set."""
    return label_names(record.get(f"{name}.pictures.counted"))


def draw_examples(records: dict[str, Record], results: Path) -> plots.Chart:
    """Show the first pictures drawn for `new_test`, with what the auditor finds in them."""
    ours, conditions = records["ours"], named_conditions("new_test")[:EXAMPLES]
    sheet = results / "ours" / "new_test.png"
    return draw_grid(sheet, conditions, counted_labels(ours, "new_test")[:EXAMPLES])


def draw_twins(records: dict[str, Record], results: Path) -> dict[str, plots.Chart]:
    """Show how the twins learn, and a row of pictures of each; nothing if none has a record."""
    twins = {name: records[name] for name in TRIALS if name in records}
    if not twins:
        return {}
    strips = {name: read_picture(results / name / "samples.png") for name in twins}
    count = len(SAMPLED)
    last = [plots.split_grid(strip)[-count:] for strip in strips.values()]
    captions = [name.removeprefix("twin-") * (i == 0) for name in twins for i in range(count)]
    return {
        "twins.svg": plots.learning_curves(twins),
        "twin_samples.webp": plots.picture_grid(np.concatenate(last), captions, columns=count),
    }


def draw_accuracy(records: dict[str, Record]) -> plots.Chart:
    """Compare what was measured here with what others report."""
    names = {"ours": "this model"} | {name: name.replace("-", ": ", 1) for name in ORIGINALS}
    measured = {
        label: {split: records[name].get(f"{split}.scores.top_k") for split in SCORED}
        for name, label in names.items()
        if name in records
    }
    figures = {names[name]: row for name, row in original_scores().items()}
    peers = {"best_unguided": "peers: best", "best_guided": "peers: evaluator guides"}
    for key, label in peers.items():
        row = published()["peers"][key]
        figures[label] = {split: Estimate(row[split], None, None) for split in SCORED}
    return plots.accuracy_dots({"measured here": measured, "published": figures})


def draw_schedules() -> plots.Chart:
    """Compare the noise schedules of the experiments."""
    noise = {"linear": "original-baseline", "cosine": "ours"}
    return plots.noise_schedules(
        {
            label: DDPMScheduler(**EXPERIMENTS[name].config.noise).alphas_cumprod
            for label, name in noise.items()
        }
    )


def judge_results(name: str, results: Path) -> Path:
    """Return where a judge's record is: whoever did not train it has none of their own."""
    return results if (results / name).exists() else RESULTS_DIR


def read_picture(file: Path) -> np.ndarray:
    """Read a picture, uint8 (H, W, 3)."""
    with Image.open(file) as picture:
        return np.array(picture.convert("RGB"))
