"""The commands of the workshop, which the command line of lab7 takes in.

What a command needs is imported in it, as in `lab7.__main__`.
"""

from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from lab7 import options
from lab7.errors import UserError
from lab7.options import ROOT
from workshop.course.commands import adopt, export, handin


def evaluate(
    checkpoint: options.Checkpoint = options.GENERATOR,
    images: Path | None = None,
    conditions: str | None = None,
    repetitions: int = 4,
    steps: options.Steps = None,
    guidance: options.Guidance = None,
    guidance_interval: options.GuidanceInterval = None,
    scheduler: options.Sampler = None,
    evaluator: options.Weights = None,
    data: options.Data = None,
    pictures: options.Pictures = None,
    record: str | None = None,
    results: options.Results = options.RESULTS,
    failures: Path = options.ROOT / "build" / "failures",
    device: options.Device = None,
) -> None:
    """Score a generator, or a folder of pictures.

    Args:
        images: Folder of 0.png …, or folder or zip of a hand-in, to score instead of a generator.
        conditions: What the pictures should show: a condition file, which is scored as file-NAME,
            or test, new_test, valid, unseen, four_five; by default test and new_test.
        repetitions: Pictures of each condition.
        record: Name under which to write the results down, by default of all condition files.
        failures: Folder for figures of the pictures that failed, with what was asked and seen.
    """
    from lab7.layouts import find_layout
    from lab7.pipeline import load_pipeline
    from workshop.study import evaluation
    from workshop.study.recording import record_generator

    data = find_layout(data, pictures)
    evaluation.check_places(images, record, failures, results, checkpoint, data)
    sets = evaluation.read_sets(conditions, data, record)
    if images is not None:  # before what takes long
        handed_in = evaluation.read_pictures(images, sets)
    else:
        pipeline = load_pipeline(checkpoint, device, scheduler)
        settings = pipeline.settings(steps, guidance, guidance_interval)
    judges = evaluation.load_judges(evaluator, data, device)
    if images is not None:
        scored = evaluation.score_pictures(handed_in, sets, judges)
    else:
        scored = evaluation.score_generator(pipeline, sets, judges, repetitions, **settings)
    evaluation.show_scores(scored, failures)
    if record is not None:
        judge = judges.evaluator
        record_generator(record, pipeline, judge, scored, checkpoint, results, data, **settings)


def experiments(
    trials: Annotated[tuple[str, ...], Positional, arg(metavar="TRIALS")] = (),
    /,
    plan: bool = False,
    repetitions: int = 8,
    output: Path = ROOT / "runs",
    results: options.Results = options.RESULTS,
    data: options.Data = None,
    device: options.Device = None,
) -> None:
    """Train, score and record the experiments of notebook 04, one after the other.

    Started again it goes on: what has a record is left alone, what is half trained is resumed.

    Args:
        trials: Which, in this order, for instance twin-cosine, or twin-cosine@1 with another seed;
            by default all that the notebook shows.
        plan: Only show what is left and how long it will take on this machine.
        repetitions: Pictures of each condition.
        output: Folder of the runs. Of a scored one the states are removed.
    """
    from workshop.study.experiments import PLAN, print_plan, run_experiments

    trials = trials or PLAN
    if plan:
        print_plan(trials, output, results, device)
    else:
        run_experiments(trials, data, output, results, repetitions, device)


def sweep(
    checkpoint: options.Checkpoint = options.GENERATOR,
    guidance: tuple[float, ...] = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0),
    steps: tuple[int, ...] = (5, 10, 15, 20, 25, 50),
    schedulers: tuple[str, ...] = ("sde-dpmsolver++", "dpmsolver++", "ddpm", "ddim"),
    repetitions: int = 2,
    keep: bool = False,
    record: str = "sweep",
    evaluator: options.Weights = None,
    data: options.Data = None,
    results: options.Results = options.RESULTS,
    device: options.Device = None,
) -> None:
    """Score guidance scales, step counts and samplers on valid.json, and write the results down.

    No setting is chosen on the test conditions.

    Args:
        guidance: Guidance scales, at the checkpoint's own number of steps.
        steps: Numbers of steps, at the best guidance.
        schedulers: Samplers, see `sample`; at the best guidance and the checkpoint's own steps.
        repetitions: Pictures of each condition and setting.
        keep: Save the best guidance with the checkpoint, which then draws with it by default.
        record: Name of the record.
    """
    from lab7.dataset import named_conditions
    from lab7.evaluator import Evaluator
    from lab7.pipeline import load_pipeline
    from workshop.records import require_name
    from workshop.study.recording import record_sweep

    require_name(record)  # before anything is drawn
    metrics = record_sweep(
        record,
        load_pipeline(checkpoint, device),
        Evaluator.load(evaluator, device, data),
        named_conditions("valid", data),
        guidance,
        steps,
        schedulers,
        repetitions,
        checkpoint,
        results,
        keep,
        data,
    )
    for row in metrics["guidance"] + metrics["steps"] + metrics["schedulers"]:
        print(
            f"{row['scheduler']:15s}  guidance {row['guidance_scale']:4.1f}  "
            f"{row['num_inference_steps']:3d} steps  "
            f"top-k {row['top_k'].value:.4f}  exact set {row['exact_set'].value:.4f}"
        )
    print(f"best guidance {metrics['best_guidance']:g}{', saved' if keep else ''}")


def search(
    checkpoint: options.Checkpoint = options.GENERATOR,
    yardstick: bool = True,
    seeds: int = 8,
    keep: bool = False,
    record: str = "search-sampler",
    output: Path = ROOT / "runs" / "search",
    results: options.Results = options.RESULTS,
    device: options.Device = None,
) -> None:
    """Choose the cheapest sampler, steps and guidance on valid.json, and write down what was tried.

    Stopped and started again it goes on where it was. What is tried, and the rule of the choice,
    are in workshop/study/search.py. Hours on two cores.

    Args:
        yardstick: Draw with DDPM's 1000 steps too, which takes longest.
        seeds: Pictures of each condition in the finals.
        keep: Save the choice with the checkpoint, which then draws with it by default.
        record: Name of the record.
        output: Folder that keeps what was drawn so far.
    """
    from workshop.study.search import print_search, record_search

    print_search(record_search(record, checkpoint, yardstick, seeds, keep, output, results, device))


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


COMMANDS = (
    evaluate,
    experiments,
    render,
    report,
    handin,
    adopt,
    export,
    search,
    sweep,
    train_evaluator,
    train_auditor,
    examine,
    ceiling,
)
