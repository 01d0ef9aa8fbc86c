"""Builds report.pdf and report.html from the records of the experiments.

The text is report.typ. What it says about results it reads from the records, about the data from
facts.json, which is counted here; the figures are drawn here from the same records. The same
records give the same bytes.
"""

import dataclasses
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import typst
from diffusers import DDPMScheduler
from PIL import Image

from lab7 import plots
from lab7.dataset import (
    CONDITION_FILES,
    DATA_DIR,
    SCORED,
    STEPS,
    ICLEVRDataset,
    is_course,
    named_conditions,
    resolve_root,
)
from lab7.errors import UserError, user_files
from lab7.estimates import Estimate
from lab7.experiments import EXPERIMENTS
from lab7.files import read_json, require_place, write_atomically
from lab7.labels import LABELS
from lab7.records import (
    RESULTS_DIR,
    Record,
    original_scores,
    published,
    read_log,
    read_record,
    read_records,
)
from lab7.scoring import label_names
from workshop.judges import plots as judge_plots

HERE = Path(__file__).resolve().parent
NEEDED = ("ours", "sweep")  # and those of the judges, see `judge_records`; others are optional
ORIGINAL = tuple(name for name in EXPERIMENTS if name.startswith("original-"))
SCENES_SHOWN = 8
Condition = Sequence[str]
README_MARKS = ("<!-- results -->", "<!-- /results -->")


@user_files()
def build(
    output: str | Path,
    results: str | Path = RESULTS_DIR,
    data: str | Path | None = None,
    author: str = "",
) -> list[Path]:
    """Draw the figures and typeset the report.

    Args:
        output: Folder for report.pdf, report.html and figures/.
        results: Folder of the records.
        data: Folder of the data set that the records are of. None takes the embedded set, or what
            `LAB7_DATA` names for records of the course's pictures.
        author: Stands below the title.

    Returns:
        The files written; nothing is written unless all of it could be made.

    Raises:
        UserError: A record or one of its keys is missing, the data are not those of the records,
            or `output` is a file; the message names it.
        MissingFileError: A picture, a log or a file of the data set is missing.
        FileError: `output` cannot be written.
    """
    output, results = Path(output), Path(results)
    require_place(output)
    records = read_records(results) | {name: read_record(name, results) for name in NEEDED}
    course = records["ours"].get("course")
    records |= judge_records(results, course["evaluator"])
    data = find_data(data, course["pictures"])
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        draw_figures(records, results, data, work / "figures")
        gather(records, results, data, work, author)
        for kind in ("html", "pdf"):
            (work / f"report.{kind}").write_bytes(typeset(work, kind))
        made = [*sorted((work / "figures").iterdir()), work / "report.html", work / "report.pdf"]
        paths = [output / path.relative_to(work) for path in made]
        for source, path in zip(made, paths, strict=True):
            write_atomically(path, source.read_bytes())
    return paths


def judge_records(results: Path, course: bool) -> dict[str, Record]:
    """Read the records of the judges.

    Args:
        results: Folder of the records.
        course: Whether the course's evaluator judged, of which there is no record but the one that
            `examine` writes.
    """
    names = ["auditor", "judges"] if course else ["auditor", "judges", "evaluator"]
    if course and not (results / "judges").exists():
        names.remove("judges")
    return {name: read_record(name, judge_results(name, results)) for name in names}


def judge_results(name: str, results: Path) -> Path:
    """Return where a judge's record is: whoever did not train it has none of their own."""
    return results if (results / name).exists() else RESULTS_DIR


def find_data(data: str | Path | None, course: bool) -> Path:
    """Return the data folder of records of the course's pictures, or of the embedded set's."""
    root = resolve_root(data) if course or data is not None else DATA_DIR
    if is_course(root) != course:
        wanted = "the course's: name its folder with --data or LAB7_DATA" if course else "embedded"
        raise UserError(f"{root} does not hold the pictures of the records, which are {wanted}")
    return root


def draw_figures(records: dict[str, Record], results: Path, data: Path, folder: Path) -> None:
    """Draw every figure of the report into a folder."""
    folder.mkdir()
    ours, sweep = records["ours"], records["sweep"]
    charts = {"scenes.webp": draw_scenes(data)}
    for name in SCORED:
        conditions = named_conditions(name, data)
        sheet = results / "ours" / f"{name}.png"
        charts[f"{name}.webp"] = draw_grid(sheet, conditions, seen_labels(ours, name))
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
    captions = ["noise", *[""] * (len(frames) - 2), "picture"]
    charts |= {
        "denoising.webp": plots.denoising_row(frames, captions),
        "training.svg": plots.training_curve(read_log(results / "ours" / "log.jsonl")),
        "sweep.svg": plots.sweep_curves({key: sweep.get(key) for key in ("guidance", "steps")}),
        "accuracy.svg": draw_accuracy(records),
        "original_by_epoch.svg": plots.accuracy_by_epoch(
            published()["original"]["cosine_by_epoch"]
        ),
        "schedules.svg": draw_schedules(),
    }
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


def draw_scenes(data: Path) -> plots.Chart:
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


def seen_labels(record: Record, name: str) -> list[list[str]]:
    """Return the labels that the evaluator sees in each picture of a set."""
    if "seen" in record.get(name):  # records of before every picture's verdict was kept
        return record.get(f"{name}.seen")
    return label_names(record.get(f"{name}.pictures.seen"))


def draw_accuracy(records: dict[str, Record]) -> plots.Chart:
    """Compare what was measured here with what others report."""
    names = {"ours": "this model"} | {name: name.replace("-", ": ", 1) for name in ORIGINAL}
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
    return plots.accuracy_dots(measured, figures)


def draw_schedules() -> plots.Chart:
    """Compare the noise schedules of the experiments."""
    noise = {"linear": "original-baseline", "cosine": "ours"}
    return plots.noise_schedules(
        {
            label: DDPMScheduler(**EXPERIMENTS[name].config.noise).alphas_cumprod
            for label, name in noise.items()
        }
    )


def write_readme(records: dict[str, Record], readme: Path) -> None:
    """Put the table of accuracies between the marks of a README."""
    begin, end = README_MARKS
    before, rest = readme.read_text(encoding="utf-8").split(begin)
    _, after = rest.split(end)
    text = f"{before}{begin}\n{accuracy_table(records)}\n{end}{after}"
    write_atomically(readme, text)


def accuracy_table(records: dict[str, Record]) -> str:
    """Write the accuracies of this model and of others as Markdown, with how they came about."""
    ours, other = records["ours"], published()["peers"]["best_unguided"]
    peer = {split: Estimate(other[split], None, None) for split in SCORED}
    best = max(original_scores().values(), key=lambda row: sum(row[x].value for x in SCORED))
    splits = (*SCORED, "unseen")
    rows = [
        ["**this model**", *(plots.interval_text(ours.get(f"{x}.scores.top_k")) for x in splits)]
    ]
    for name, row in {
        "original report, best of its experiments": best,
        "best public repository without the evaluator's help": peer,
    }.items():
        rows.append([name, *(plots.interval_text(row[x]) if x in row else "–" for x in splits)])
    header = ["accuracy", "`test`", "`new_test`", "`unseen`: triples never trained on"]
    minutes = ours.get("training.seconds") / 60
    spent = f"{minutes:.0f} minutes" if minutes < 90 else f"{minutes / 60:.1f} hours"
    exact = [ours.get(f"{name}.audit.exact_scene.value") for name in SCORED]
    note = (
        f"This model has {ours.get('training.parameters') / 1e6:.1f} million parameters and was "
        f"trained for {spent} on {ours.get('training.machine')}. Its pictures, "
        f"{ours.get('test.repetitions')} of each condition, none chosen, took "
        f"{ours.get('test.num_inference_steps')} steps each; in brackets 95 % intervals. The other "
        "rows are as published: another evaluator, the course's conditions, one draw, with the "
        "interval of as many independent objects. Counted by "
        "the independent auditor, "
        f"{exact[0]:.1%} and {exact[1]:.1%} of the pictures for `test` and `new_test` show exactly "
        "the objects asked for, each once, and nothing else."
    )
    return plots.table(header, rows) + f"\n\n{note}"


def gather(
    records: dict[str, Record], results: Path, data: Path, work: Path, author: str = ""
) -> None:
    """Put all that report.typ reads into one folder."""
    for name in ("report.typ", "references.yml"):
        shutil.copy(HERE / name, work)
    for name in records:
        (work / "results" / name).mkdir(parents=True)
        source = judge_results(name, results) / name
        for file in ("config.json", "metrics.json"):
            shutil.copy(source / file, work / "results" / name)
    facts = {
        "author": author,
        "records": list(records),
        "published": published(),
        "original": {
            name: {split: dataclasses.asdict(estimate) for split, estimate in row.items()}
            for name, row in original_scores().items()
        },
        "training_set": count_pictures(list(read_json(data / "train.json").values())),
        "sets": {name: count_conditions(named_conditions(name, data)) for name in CONDITION_FILES},
        "experiments": {name: dataclasses.asdict(EXPERIMENTS[name]) for name in ORIGINAL},
    }
    (work / "facts.json").write_text(json.dumps(facts), encoding="utf-8")


def count_pictures(labels: list[list[str]]) -> dict:
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


def count_conditions(conditions: list[tuple[str, ...]]) -> dict:
    """Count conditions and objects of a condition file."""
    by_count = Counter(map(len, conditions))
    return {
        "conditions": len(conditions),
        "objects": sum(map(len, conditions)),
        "by_count": {count: by_count[count] for count in sorted(by_count)},
    }


def read_picture(file: Path) -> np.ndarray:
    """Read a picture, uint8 (H, W, 3)."""
    with Image.open(file) as picture:
        return np.array(picture.convert("RGB"))


def typeset(work: Path, kind: str) -> bytes:
    """Compile report.typ to "pdf" or "html"."""
    try:
        return typst.compile(
            work / "report.typ", root=work, format=kind, ignore_system_fonts=True, timestamp=0
        )
    except typst.TypstError as error:
        raise UserError(f"the report cannot be built: {error.message}") from None
