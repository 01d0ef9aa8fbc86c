"""The figures of the report, drawn from the records."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from diffusers import DDPMScheduler
from PIL import Image

from lab7 import plots
from lab7.dataset import SCORED, STEPS, ICLEVRDataset, named_conditions
from lab7.estimates import Estimate
from lab7.experiments import EXPERIMENTS, ORIGINALS
from lab7.labels import COLORS, LABELS, SHAPES
from lab7.layouts import Layout
from lab7.records import RESULTS_DIR, Record, original_scores, published, read_log
from lab7.scoring import label_names
from lab7.training import SAMPLED
from report.facts import SCHEDULES, TRIALS, audit_by_count, failures, pool
from report.handin import HandIn
from workshop.judges import plots as judge_plots

SCENES_SHOWN, EXAMPLES, FRAMES_A_ROW, SEEDS_SHOWN = 8, 8, 5, 24
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
    if "ceiling" in records:
        charts["beside.webp"] = draw_beside(records, results, data)
    if "fast" in records:
        charts["seeds.webp"] = draw_seeds(results)
    charts |= {
        "denoising.webp": draw_denoising(results / "ours" / "denoising.png", ours),
        "training.svg": plots.training_curve(read_log(results / "ours" / "log.jsonl")),
        "by_objects.svg": draw_by_objects(records),
        "missed.svg": draw_missed(failures(ours)),
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
        "label_recall.svg": label_heatmap(evaluator.get("recall_per_label")),
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


def draw_seeds(results: Path) -> plots.Chart:
    """Show pictures of one condition under many seeds: of the full generator above the fast."""
    sheets = [plots.split_grid(read_picture(results / x / "seeds.png")) for x in ("ours", "fast")]
    return plots.picture_grid(np.concatenate([sheet[:SEEDS_SHOWN] for sheet in sheets]))


def counted_labels(record: Record, name: str) -> list[list[str]]:
    """Return the labels of the objects that the auditor finds in each picture of a set."""
    return label_names(record.get(f"{name}.pictures.counted"))


def draw_denoising(row: Path, ours: Record) -> plots.Chart:
    """Show the states of the reverse process that a denoising row holds, with their time steps."""
    frames, times = plots.split_grid(read_picture(row)), [*ours.get("test.timesteps"), 0]
    shown = np.linspace(0, len(times) - 1, len(frames)).round().astype(int)
    return plots.picture_grid(frames, [f"t = {times[i]}" for i in shown], columns=FRAMES_A_ROW)


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
    captions = [
        [name.removeprefix("twin-")] * (i == 0) + list(SAMPLED[i]) * (name == [*twins][-1])
        for name in twins
        for i in range(count)
    ]
    return {
        "twins.svg": plots.learning_curves(twins),
        "twin_samples.webp": plots.picture_grid(np.concatenate(last), captions, columns=count),
    }


def draw_accuracy(records: dict[str, Record]) -> plots.Chart:
    """Compare what was measured here with what others report, and both with their ceilings."""
    names = {"ours": "this model", "ceiling": "renders of the same conditions"}
    names |= {name: name.replace("-", ": ", 1) for name in ORIGINALS}
    measured = {
        label: {split: records[name].get(f"{split}.scores.top_k") for split in SCORED}
        for name, label in names.items()
        if name in records
    }
    figures = {names[name]: row for name, row in original_scores().items()}
    peers, ceilings = published()["peers"], {}
    for key, label in {"best_unguided": "peers: best", "best_guided": "peers: guided"}.items():
        figures[label] = {split: Estimate(peers[key][split], None, None) for split in SCORED}
    if "evaluator" in records:
        found = records["evaluator"].get("test.top_k")
        measured["renders of 1–5 objects"] = dict.fromkeys(SCORED, found)
        ceilings[plots.BLUE] = found["value"]
    ceilings[plots.ORANGE] = peers["evaluator_on_real"]["top_k"]
    real = Estimate(ceilings[plots.ORANGE], None, None)
    figures["real pictures"] = dict.fromkeys(SCORED, real)
    course = records["ours"].get("course")
    own = " (rendered stand-in, own evaluator)" if not all(course.values()) else ""
    here, there = f"here{own}", "published (the course's data and evaluator)"
    chart = plots.accuracy_dots({here: measured, there: figures})
    for axes in chart.axes:
        for color, value in ceilings.items():
            axes.axvline(value, color=color, linewidth=1, linestyle=":", zorder=0)
    return chart


@plots.styled
def draw_schedules() -> plots.Chart:
    """Show how the noise schedules of the experiments take the picture away.

    The left panel has the share of the picture's variance that is left at t, alphas_cumprod; the
    right one the signal-to-noise ratio.
    """
    chart, (left, right) = plots.make_panels(2.3, 2)
    for label, name in SCHEDULES.items():
        alphas = DDPMScheduler(**EXPERIMENTS[name].config.noise).alphas_cumprod.double().numpy()
        left.plot(alphas, marker="", label=label)
        right.plot(alphas / (1 - alphas), marker="")
    left.set(title=r"Signal level, $\bar\alpha_t$", xlabel="t")
    right.set(title=r"Signal to noise, $\bar\alpha_t/(1-\bar\alpha_t)$", xlabel="t", yscale="log")
    left.legend()
    return chart


@plots.styled
def label_heatmap(values: Mapping[str, float | None], form: str = "{:.3f}") -> plots.Chart:
    """Show one value for each of the 24 labels: a row a shape, a column a color.

    Args:
        values: By label, for instance its recall or how many pictures have it; None is left out.
        form: How a value is written.
    """
    fields = np.array([values[label] for label in LABELS], dtype=float).reshape(len(SHAPES), -1)
    chart, (axes,) = plots.make_panels(1.45)
    low, high = np.nanmin(fields), np.nanmax(fields)
    most = 2 * high - low  # so that all shades are light, below black text
    axes.imshow(fields, aspect="auto", cmap="Blues", vmin=low, vmax=most)
    axes.set_xticks(range(len(COLORS)), COLORS)
    axes.set_yticks(range(len(SHAPES)), SHAPES)
    axes.tick_params(length=0)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.xaxis.tick_top()
    for (row, column), value in np.ndenumerate(fields):
        text = "–" if np.isnan(value) else form.format(value)
        axes.text(column, row, text, ha="center", va="center")
    return chart


@plots.styled
def draw_by_objects(records: dict[str, Record]) -> plots.Chart:
    """Show the share of exact scenes by the number of objects asked for, drawn and rendered."""
    names = {"drawn by this model": "ours", "renders": "ceiling"}
    names = {label: name for label, name in names.items() if name in records}
    chart, (axes,) = plots.make_panels(2.2)
    for place, (label, name) in enumerate(names.items()):
        audits = audit_by_count(pool(records[name]))
        aside = 0.1 * (place - (len(names) - 1) / 2)
        at = [count + aside for count in audits]
        plots.draw_estimates(axes, at, [row["exact_scene"] for row in audits.values()], label)
    axes.set(xlabel="objects asked for", ylabel="exact scene", ylim=(0, 1.03))
    axes.set_xticks(list(audits))
    chart.legend_below()
    return chart


def draw_missed(failures: Mapping[str, Any]) -> plots.Chart:
    """Show how often each label is missed, in per cent; one that was not asked for is left out."""
    shares = {
        label: 100 * row["missed"] / row["asked"] if row["asked"] else None
        for label, row in failures["by_label"].items()
    }
    return label_heatmap(shares, "{:.1f}")


def draw_beside(records: dict[str, Record], results: Path, data: Layout) -> plots.Chart:
    """Show renders of the first conditions of `new_test` above drawn pictures of the same."""
    conditions, rows = named_conditions("new_test", data)[:EXAMPLES], ("ceiling", "ours")
    sheets = [plots.split_grid(read_picture(results / x / "new_test.png")) for x in rows]
    counted = [counted_labels(records[name], "new_test")[: len(conditions)] for name in rows]
    pictures = np.concatenate([sheet[: len(conditions)] for sheet in sheets])
    return plots.picture_grid(
        pictures, [*conditions] * len(rows), sum(counted, []), columns=len(conditions)
    )


def judge_results(name: str, results: Path) -> Path:
    """Return where a judge's record is: whoever did not train it has none of their own."""
    return results if (results / name).exists() else RESULTS_DIR


def read_picture(file: Path) -> np.ndarray:
    """Read a picture, uint8 (H, W, 3)."""
    with Image.open(file) as picture:
        return np.array(picture.convert("RGB"))
