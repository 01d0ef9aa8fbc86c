"""The commands of the command line: those of the pictures and judges here, the others by subject.

What a command needs is imported in it, as in `workshop.study.commands`.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional

from lab7.errors import UserError
from lab7.files import user_path
from lab7.layouts import ROOT
from workshop import options
from workshop.course.commands import adopt, export, handin
from workshop.study.commands import (
    distill,
    evaluate,
    experiments,
    sample,
    search,
    sweep,
    targets,
    train,
)


def render(
    what: Annotated[Literal["train", "evaluator", "auditor"], Positional] = "train",
    /,
    output: Path | None = None,
    scenes: int | None = None,
    work: Path = ROOT / "runs" / "render",
    workers: int | None = None,
) -> None:
    """Render pictures with Mitsuba 3; stopped and started again it goes on where it was.

    Args:
        what: train: the embedded 6,003 scenes and the condition files; evaluator, auditor: scenes
            of up to five objects for training and testing the judge of that name.
        output: Folder of the finished set; by default data/, runs/evaluator or runs/auditor.
        scenes: How many scenes, from the first on, into an OUTPUT of your own; by default all.
        work: Folder that keeps what is rendered so far.
        workers: Processes; by default one for each processor.
    """
    from workshop.standin import scenes as standin

    plans = getattr(standin, f"draw_{what}")()
    if scenes is not None:
        if not 1 <= scenes <= len(plans):
            raise UserError(f"scenes {scenes} is not within 1 … {len(plans)}")
        if output is None:
            raise UserError("a part of the scenes would replace the whole set: give an --output")
    output = output or ROOT / ("data" if what == "train" else f"runs/{what}")
    standin.render_set(plans[:scenes], output, work, workers)
    if what == "train":
        for name, drawn in standin.draw_conditions().items():
            standin.write_json(output / f"{name}.json", drawn)
    print(f"saved {output / 'pictures.zip'}")


def train_evaluator(
    renders: Path = ROOT / "runs" / "evaluator",
    output: Path | None = None,
    epochs: int | None = None,
    device: options.Device = None,
) -> None:
    """Train the evaluator on the embedded pictures and on those of `render evaluator`.

    Args:
        renders: Folder that `render evaluator` wrote.
        output: Weights to write; by default those that come with the project.
        epochs: Passes over the pictures.
    """
    from workshop.judges.evaluator_training import EvaluatorTraining
    from workshop.judges.judge_training import train_on_renders

    train_on_renders(EvaluatorTraining, renders, output, epochs, device)


def train_auditor(
    renders: Path = ROOT / "runs" / "auditor",
    output: Path | None = None,
    epochs: int | None = None,
    device: options.Device = None,
) -> None:
    """Train the auditor on the pictures of `render auditor`.

    Args:
        renders: Folder that `render auditor` wrote.
        output: Weights to write; by default those that come with the project.
        epochs: Passes over the pictures.
    """
    from workshop.judges.auditor_training import AuditorTraining
    from workshop.judges.judge_training import train_on_renders

    train_on_renders(AuditorTraining, renders, output, epochs, device)


def examine(
    renders: Path = ROOT / "runs" / "auditor",
    evaluator: options.Weights = None,
    data: options.Data = None,
    record: str = "judges",
    results: options.Results = options.RESULTS,
    device: options.Device = None,
) -> None:
    """Measure how far evaluator and auditor can be trusted, on renders that neither has seen.

    Args:
        renders: Folder that `render auditor` wrote; its last pictures are used.
        record: Name of the record.
    """
    from lab7.auditor import Auditor
    from lab7.dataset import ICLEVRDataset
    from lab7.evaluator import Evaluator
    from workshop.judges.examination import examine_renders
    from workshop.judges.fooling import FOOLED_SCORES
    from workshop.records import require_name

    require_name(record)  # before anything is computed
    found = examine_renders(
        Evaluator.load(evaluator, device, data),
        Auditor.load(device=device),
        renders,
        ICLEVRDataset(data),
        record,
        results,
    )
    calibration = found["calibration"]
    error = "–" if calibration["error"] is None else f"{calibration['error']:.4f}"
    print(
        f"calibration error {error} over {calibration['num_outputs']:,} uncertain probabilities of "
        f"{calibration['num_pictures']:,} pictures"
    )
    for name, row in found["fooled"].items():
        figures = (f"{key.replace('_', ' ')} {row[key].value:.4f}" for key in FOOLED_SCORES)
        print(f"{name:12s}  {row['num_pictures']:5d} pictures  {'  '.join(figures)}")


def ceiling(
    repetitions: int = 8,
    evaluator: options.Weights = None,
    data: options.Data = None,
    record: str = "ceiling",
    results: options.Results = options.RESULTS,
    workers: int | None = None,
    device: options.Device = None,
) -> None:
    """Render the conditions of all sets, and score the renders as a generator's pictures are.

    What they score is the most that can be asked of a generator.

    Args:
        repetitions: Renders of each condition.
        record: Name of the record.
        workers: Processes that render; by default one for each processor.
    """
    from lab7.auditor import Auditor
    from lab7.dataset import CONDITION_FILES, ICLEVRDataset, named_conditions
    from lab7.evaluator import Evaluator
    from workshop.judges.ceiling import record_ceiling
    from workshop.records import require_name
    from workshop.study.evaluation import score_table

    require_name(record)  # before anything is rendered
    found = record_ceiling(
        {name: named_conditions(name, data) for name in CONDITION_FILES},
        Evaluator.load(evaluator, device, data),
        Auditor.load(device=device),
        ICLEVRDataset(data),
        repetitions,
        workers,
        record,
        results,
    )
    print(score_table(found))


def report(
    output: Path = ROOT / "build" / "report",
    results: options.Results = options.RESULTS,
    data: Path | None = None,
) -> None:
    """Build the report, as PDF and HTML, from the records.

    Args:
        output: Folder for report.pdf, report.html and their figures. With the project's own
            folder, report, the README's table and picture are renewed too.
        data: Folder of the pictures that the records are of; by default the embedded set, or
            $LAB7_DATA for records of the course's pictures.
    """
    from lab7.records import read_records
    from report.build import build, write_readme
    from report.figures import draw_examples

    for path in build(output, results, data):
        print(f"saved {path}")
    if output.resolve() == ROOT / "report":
        records = read_records(results)
        write_readme(records, ROOT / "README.md")
        draw_examples(records, results).save(ROOT / "docs" / "pictures.png")


def _with_user_paths(command: Callable[..., None]) -> Callable[..., None]:
    """Let a command take paths as people type them, see `user_path`."""

    @functools.wraps(command)
    def run(*args: Any, **options: Any) -> None:
        given = [user_path(x) if isinstance(x, Path) else x for x in (*args, *options.values())]
        command(*given[: len(args)], **dict(zip(options, given[len(args) :], strict=True)))

    return run


_ALL = (
    train,
    sample,
    evaluate,
    experiments,
    render,
    report,
    handin,
    adopt,
    export,
    search,
    distill,
    targets,
    sweep,
    train_evaluator,
    train_auditor,
    examine,
    ceiling,
)
COMMANDS = tuple(map(_with_user_paths, _ALL))
