"""Builds report.pdf and report.html from the records of the experiments.

The text is report.typ and its chapters. What it says about results it reads from the records, about
the rest from facts.json, see facts.py; the figures are drawn in figures.py from the same records.
The same records give the same bytes.
"""

import dataclasses
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lab7 import plots
from lab7.dataset import CONDITION_FILES, SCORED, ICLEVRDataset, named_conditions
from lab7.errors import MissingFileError, UserError, user_files
from lab7.estimates import Estimate
from lab7.experiments import EXPERIMENTS, ORIGINALS
from lab7.files import read_json, require_place, write_atomically
from lab7.layouts import DATA_DIR, ROOT, Layout, Root, find_layout
from lab7.records import (
    RESULTS_DIR,
    Record,
    count_passes,
    original_scores,
    published,
    read_record,
    read_records,
)
from lab7.sampling import DENOISING_CONDITION
from report.facts import (
    LISTINGS,
    TRIALS,
    compare_fast,
    compare_twins,
    costs,
    count_conditions,
    count_pictures,
    failures,
    listing,
    lowest_distances,
    score_triples,
    signal,
)
from report.figures import draw_figures, judge_results
from report.handin import HandIn
from report.printing import embed_font, needs_system_fonts, typeset, unpack_font

HERE = Path(__file__).resolve().parent
# And those of the judges, see `judge_records`; others are optional.
NEEDED = {"ours": "evaluate --record ours --repetitions 8", "sweep": "sweep"}
README_MARKS = ("<!-- results -->", "<!-- /results -->")


@user_files()
def build(
    output: str | Path,
    results: str | Path = RESULTS_DIR,
    data: str | Path | None = None,
    handin: HandIn | None = None,
) -> list[Path]:
    """Draw the figures and typeset the report.

    Args:
        output: Folder for report.pdf, report.html and figures/.
        results: Folder of the records.
        data: Folder of the data set that the records are of. None takes the embedded set, or what
            `LAB7_DATA` names for records of the course's pictures.
        handin: What a student hands in: its grids and denoising row take the place of those of
            the records.

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
    records = read_records(results) | needed_records(results)
    course = records["ours"].get("course")
    records |= judge_records(results, course["evaluator"])
    data = find_data(data, course["pictures"])
    system_fonts = handin is not None and needs_system_fonts(handin.student)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        draw_figures(records, results, data, work / "figures", handin)
        gather(records, results, data, work, handin)
        for kind in ("html", "pdf"):
            (work / f"report.{kind}").write_bytes(typeset(work, kind, system_fonts))
        made = [*sorted((work / "figures").iterdir()), work / "report.html", work / "report.pdf"]
        paths = [output / path.relative_to(work) for path in made]
        for source, path in zip(made, paths, strict=True):
            write_atomically(path, source.read_bytes())
    return paths


def needed_records(results: Path) -> dict[str, Record]:
    """Read the records that every report needs.

    Raises:
        UserError: One is missing, and how it is made; or the generator was not trained here, so
            that there is no training to tell of.
    """
    found = {}
    for name, command in NEEDED.items():
        try:
            found[name] = read_record(name, results)
        except UserError as error:
            step = f"make it by python -m lab7 {command} --checkpoint … --results {results}"
            raise UserError(f"{error}; {step}") from error
    if not (results / "ours" / "log.jsonl").is_file():
        raise MissingFileError(
            f"no log {results / 'ours' / 'log.jsonl'}: the report tells of a training by this "
            "project, and 'ours' is of a model that was trained elsewhere; its pictures are drawn "
            "by python -m lab7 sample --conditions test, for a report of your own"
        )
    return found


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


def find_data(data: Root, course: bool) -> Layout:
    """Return the data folder of records of the course's pictures, or of the embedded set's."""
    layout = find_layout(data if course or data is not None else DATA_DIR)
    if layout.course != course:
        wanted = "the course's: name its folder with --data or LAB7_DATA" if course else "embedded"
        found = layout.labels
        raise UserError(f"{found} does not hold the pictures of the records, which are {wanted}")
    return layout


def write_readme(records: dict[str, Record], readme: Path) -> None:
    """Put the table of accuracies between the marks of a README."""
    begin, end = README_MARKS
    before, rest = readme.read_text(encoding="utf-8").split(begin)
    _, after = rest.split(end)
    text = f"{before}{begin}\n{accuracy_table(records)}\n{end}{after}"
    write_atomically(readme, text)


def accuracy_table(records: dict[str, Record]) -> str:
    """Write the accuracies of this model and of others as Markdown, with how they came about."""
    ours, others = records["ours"], published()["peers"]
    own = not all(ours.get("course").values())
    splits = (*SCORED, "unseen")
    best = max(original_scores().values(), key=lambda row: sum(row[x].value for x in SCORED))
    peer = {split: Estimate(others["best_unguided"][split], None, None) for split in SCORED}
    rows = {
        f"**this model**{', on the stand-in' if own else ''}": _top_k(ours, splits),
        **_fast_row(records, splits),
        "original report, best of its experiments": best,
        "best public repository without the evaluator's help": peer,
    }
    if "ceiling" in records:
        rows["ceiling of the stand-in: renders of the same conditions"] = _top_k(
            records["ceiling"], splits
        )
    if own and "evaluator" in records:
        found = records["evaluator"].get("test.top_k")
        rows["ceiling of our evaluator: renders of one to five objects"] = dict.fromkeys(
            SCORED, found
        )
    ceiling = f"{others['evaluator_on_real']['top_k']:.3f}"
    header = ["top-k accuracy", "`test`", "`new_test`", "`unseen`: triples never trained on"]
    table = [
        [name, *(plots.interval_text(row[x]) if x in row else "–" for x in splits)]
        for name, row in rows.items()
    ]
    table.append(
        ["ceiling of the course: real pictures, one figure for all", ceiling, ceiling, "–"]
    )
    return f"{plots.table(header, table)}\n\n{_accuracy_note(ours, own)}"


def _fast_row(records: dict[str, Record], splits: Sequence[str]) -> dict[str, dict]:
    """Return the row of the fast generator, if it has a record."""
    if "fast" not in records:
        return {}
    full, fast = (count_passes(records[name].get("test")) for name in ("ours", "fast"))
    return {
        f"**its fast version**, {fast} passes of the network a picture, not {full}": _top_k(
            records["fast"], splits
        )
    }


def _top_k(record: Record, splits: Sequence[str]) -> dict[str, dict]:
    return {split: record.get(f"{split}.scores.top_k") for split in splits}


def _accuracy_note(ours: Record, own: bool) -> str:
    """Say what the figures of the table are of."""
    minutes = ours.get("training.seconds") / 60
    spent = f"{minutes:.0f} minutes" if minutes < 90 else f"{minutes / 60:.1f} hours"
    exact = [ours.get(f"{name}.audit.exact_scene.value") for name in SCORED]
    ground = (
        "The rows of this model and of the stand-in are of **rendered pictures, condition files of "
        "our own and our own evaluator**; the others are as published, of the course's pictures, "
        "conditions and evaluator, one draw, with the interval of as many independent objects. "
        "They can be set beside each other, not subtracted. "
    )
    million = ours.get("training.parameters") / 1e6
    return (
        f"{ground if own else ''}This model has {million:.1f} million parameters and was trained "
        f"for {spent} on {ours.get('training.machine')}. Its pictures, "
        f"{ours.get('test.repetitions')} of each condition, none chosen, took "
        f"{ours.get('test.num_inference_steps')} steps each; in brackets 95 % intervals. Counted "
        f"by the independent auditor, {exact[0]:.1%} and {exact[1]:.1%} of the pictures for `test` "
        "and `new_test` show exactly the objects asked for, each once, and nothing else."
    )


def gather(
    records: dict[str, Record],
    results: Path,
    data: Layout,
    work: Path,
    handin: HandIn | None = None,
) -> None:
    """Put all that report.typ reads into one folder."""
    unpack_font(work / "fonts")
    for name in ("report.typ", "references.yml"):
        shutil.copy(HERE / name, work)
    shutil.copytree(HERE / "chapters", work / "chapters")
    abstract = (HERE / "chapters" / "front.typ").read_text(encoding="utf-8")
    embed_font(abstract + (handin.student if handin else ""), work / "fonts")
    shutil.copy(ROOT / "CITATION.cff", work / "citation.yml")
    for name in records:
        (work / "results" / name).mkdir(parents=True)
        source = judge_results(name, results) / name
        for file in ("config.json", "metrics.json"):
            shutil.copy(source / file, work / "results" / name)
    (work / "code").mkdir()
    for name, parts in LISTINGS.items():
        (work / "code" / f"{name}.py").write_text(listing(*parts), encoding="utf-8")
    facts = gather_facts(records, data, handin)
    (work / "facts.json").write_text(json.dumps(facts), encoding="utf-8")


def gather_facts(records: dict[str, Record], data: Layout, handin: HandIn | None) -> dict[str, Any]:
    """Return what report.typ reads beside the records: what is computed from them and the data."""
    return {
        "handin": handin.facts() if handin else None,
        "denoised": ", ".join(handin.denoised if handin else DENOISING_CONDITION),
        "records": list(records),
        "published": published(),
        "original": {
            name: {split: dataclasses.asdict(estimate) for split, estimate in row.items()}
            for name, row in original_scores().items()
        },
        "training_set": count_pictures(list(read_json(data.labels / "train.json").values())),
        "sets": {name: count_conditions(named_conditions(name, data)) for name in CONDITION_FILES},
        "signal": signal(ICLEVRDataset(data).images),
        "failures": failures(records["ours"]),
        "triples": {name: score_triples(records["ours"], name) for name in ("valid", "unseen")},
        "nearest": {
            name: lowest_distances(records[name]) for name in ("ours", "ceiling") if name in records
        },
        "costs": costs(records),
        "passes": count_passes(records["ours"].get("test")),
        "fast": compare_fast(records),
        "trials": TRIALS,
        "twins": [
            dataclasses.asdict(EXPERIMENTS[name])
            | {"name": name, "precision": records[name].get("training").get("precision")}
            for name in TRIALS
            if name in records
        ],
        "comparisons": compare_twins(records),
        "experiments": {name: dataclasses.asdict(EXPERIMENTS[name]) for name in ORIGINALS},
    }
