"""What `python -m lab7 evaluate` does: sets of conditions, judges, scores, figures of failures."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from lab7 import plots
from lab7.auditor import Auditor
from lab7.dataset import CONDITION_FILES, SCORED, ICLEVRDataset, named_conditions
from lab7.errors import UserError
from lab7.estimates import Estimate
from lab7.evaluator import Evaluator
from lab7.files import require_writable
from lab7.labels import load_conditions
from lab7.layouts import Layout, Root, find_layout
from lab7.pipeline import ConditionalDDPMPipeline
from lab7.scoring import Verdicts, draw_and_judge, judge_pictures, label_names
from workshop.course.handed_in import read_handed_in
from workshop.judges.fidelity import RealPictures, describe
from workshop.records import require_name
from workshop.study.recording import require_same_pictures

PARTS = ("scores", "audit", "agreement", "fidelity")  # of what records say of pictures
MOST_FAILURES = 64  # pictures that are shown of a set

Sets = dict[str, list[tuple[str, ...]]]  # conditions, by the name of their set
Scored = dict[str, tuple[dict[str, Any], Tensor]]  # metrics and pictures, by the name of the set


class Judges(NamedTuple):
    """Who scores pictures; `real` are the training pictures to compare them with, if there are."""

    evaluator: Evaluator
    auditor: Auditor
    real: RealPictures | None


def check_places(
    images: Path | None,
    record: str | None,
    failures: Path,
    results: Path,
    checkpoint: Path,
    data: Layout,
) -> None:
    """Find out before anything is drawn whether the results can be written.

    Raises:
        UserError: They cannot, or are not what a record may be of.
    """
    if images is not None and record is not None:
        raise UserError("--record is for a generator: leave it out with --images")
    require_writable(failures)
    if record is not None:
        if data.pictures is None:
            raise UserError("--record needs the training pictures: name theirs by --pictures")
        require_writable(results / require_name(record))
        require_same_pictures(checkpoint, data)


def read_sets(conditions: str | None, data: Layout, record: str | None) -> Sets:
    """Read the sets of conditions to score, by the names that they have in tables and records.

    Args:
        conditions: A file, whose set is named file-NAME, so that none reads as one of the data
            folder's; or one of `CONDITION_FILES`. None takes those that the course scores, and for
            a record all.
        data: Where these are.
        record: Name of the record, if there shall be one.
    """
    if conditions is None:
        names = SCORED if record is None else CONDITION_FILES
        return {name: find_conditions(name, data) for name in names}
    name = conditions
    if name not in CONDITION_FILES:
        name = f"file-{Path(conditions).stem}".replace(".", "-")  # a dot would part a record's key
    return {name: find_conditions(conditions, data)}


def show_data(data: Root, pictures: Path | None = None) -> Layout:
    """Find the data folder; where it is the course's, say what was found."""
    layout = find_layout(data, pictures)
    if layout.course:
        print(layout.summary)
    return layout


def find_conditions(name: str, root: Root) -> list[tuple[str, ...]]:
    """Return the conditions of a file, or those that go by a name, see `named_conditions`."""
    named = name.removesuffix(".json") in CONDITION_FILES or Path(name).stem == name
    if name in CONDITION_FILES or (named and not Path(name).exists()):
        return named_conditions(name.removesuffix(".json"), root)
    return load_conditions(name)


def read_pictures(images: Path, sets: Sets) -> dict[str, Tensor]:
    """Read the pictures handed in for each set, and say what is odd about them."""
    read = read_handed_in(images, {name: len(wanted) for name, wanted in sets.items()})
    for name, (_, notes) in read.items():
        for note in notes:
            print(f"{name}: {note}")
    return {name: pictures for name, (pictures, _) in read.items()}


def load_judges(weights: Path | None, data: Layout, device: str | None) -> Judges:
    """Load the judges, and say so if there are no training pictures."""
    evaluator, auditor = Evaluator.load(weights, device, data), Auditor.load(device=device)
    if data.pictures is None:
        print("distances to the training pictures are left out, as there are none")
        return Judges(evaluator, auditor, None)
    return Judges(evaluator, auditor, RealPictures(auditor, ICLEVRDataset(data)))


def score_pictures(pictures: dict[str, Tensor], sets: Sets, judges: Judges) -> Scored:
    """Have pictures judged, set by set."""
    scored = {}
    for name, wanted in sets.items():
        found = judge_pictures(pictures[name], wanted, judges.evaluator, judges.auditor)
        scored[name] = describe(found, pictures[name], judges.real), pictures[name]
    return scored


def score_generator(
    pipeline: ConditionalDDPMPipeline,
    sets: Sets,
    judges: Judges,
    repetitions: int,
    **settings: Any,
) -> Scored:
    """Draw pictures and have them judged, set by set; `settings` see `draw_and_judge`."""
    evaluator, auditor, real = judges
    scored = {}
    for name, wanted in sets.items():
        found, images = draw_and_judge(
            pipeline, wanted, evaluator, auditor, repetitions, **settings
        )
        scored[name] = describe(found, images, real), images
    return scored


def show_scores(scored: Scored, failures: Path) -> None:
    """Print the scores of all sets, and save figures of the pictures that failed."""
    print(score_table({name: metrics for name, (metrics, _) in scored.items()}))
    for name, (metrics, pictures) in scored.items():
        save_failures(name, metrics["pictures"], pictures, failures)


def score_table(sets: Mapping[str, Mapping[str, Any]]) -> str:
    """Write scores as a table of plain text, a column for each set of conditions.

    Args:
        sets: By name, what `judge_pictures` returned; of all the same parts.
    """
    found = list(sets.values())
    rows = {"": list(sets)}
    for part in (part for part in PARTS if part in found[0]):
        for name in vars(found[0][part]):
            words = plots.words(name.removeprefix("num_"))
            rows[words] = [_cell(getattr(metrics[part], name)) for metrics in found]
    lines = [[f"{words:16}", *(f"{cell:30}" for cell in cells)] for words, cells in rows.items()]
    return "\n".join("  ".join(line).rstrip() for line in lines)


def save_failures(name: str, verdicts: Verdicts, pictures: Tensor, folder: Path) -> None:
    """Save a figure of the pictures that do not show exactly the objects asked for."""
    exact, _ = verdicts.ratios()["audit"]["exact_scene"]
    failed = [row for row, right in enumerate(exact) if not right]
    figure = folder / f"{name}.png"
    if not failed:
        figure.unlink(missing_ok=True)  # of an earlier call
        return
    shown = failed[:MOST_FAILURES]
    wanted = [verdicts.conditions[verdicts.condition[row]] for row in shown]
    counted = label_names(verdicts.counted[row] for row in shown)
    plots.picture_grid(pictures[shown], wanted, counted).save(figure)
    print(f"{len(failed)} pictures of {name} failed, {len(shown)} are in {figure}")


def _cell(found: Estimate | int | None) -> str:
    if not isinstance(found, Estimate):
        return "–" if found is None else str(found)
    if found.hits is None:
        return f"{found.value:.5f} [{found.low:.5f}, {found.high:.5f}]"
    return f"{found.value:.4f} [{found.low:.3f}, {found.high:.3f}] {found.hits}/{found.total}"
