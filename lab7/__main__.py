"""The command line: python -m lab7 train | sample | evaluate | render | report | …

What a command needs is imported in it: loading PyTorch and diffusers takes seconds, in which nobody
wants to wait for --help.
"""

import dataclasses
import difflib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from lab7.errors import MissingFileError, UserError

if TYPE_CHECKING:
    from torch import Tensor

    from lab7.scoring import Verdicts

ROOT = Path(__file__).resolve().parent.parent
GENERATOR = ROOT / "data" / "weights" / "generator"
RESULTS = ROOT / "report" / "results"
MOST_FAILURES = 64  # pictures that `evaluate` shows of a set


def train(
    name: Annotated[str, tyro.conf.Positional] = "ours",
    /,
    output: Path | None = None,
    data: Path | None = None,
    minutes: float | None = None,
    budget: float | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    learning_rate: float | None = None,
    init_from: str | None = None,
    seed: int | None = None,
    compile: bool | None = None,
    tensorboard: bool = False,
    resume: bool = True,
    device: str | None = None,
) -> None:
    """Train a named configuration; stopped and started again it goes on where it was.

    Several processes share each batch under torchrun or accelerate launch, one a GPU:
    torchrun --nproc-per-node=2 -m lab7 train.

    Args:
        name: Of the configuration: ours, laptop, or one of the experiments: twin-baseline,
            twin-channels, twin-one-layer, twin-half-channels, twin-cosine, twin-cosine-x0, and the
            same five in full size, original-baseline, ….
        output: Folder of the run; by default runs/NAME.
        data: The course's folder; by default $LAB7_DATA, else the embedded set.
        minutes: Stop after so many minutes, to be resumed later.
        budget: Minutes of the whole training: the learning rate runs out with them.
        steps: Optimizer steps of the whole training; more of them extend a finished one.
        batch_size: Pictures a step, of all processes together.
        learning_rate: Highest learning rate.
        init_from: Folder of a saved pipeline whose weights to start from.
        seed: Of the first weights, the order of the pictures and the noise.
        compile: Use torch.compile, which takes about a minute to pay off; by default on a GPU only.
        tensorboard: Write TensorBoard's files into OUTPUT/tensorboard, too.
        resume: Go on from the latest state in OUTPUT; --no-resume starts anew.
        device: cuda, mps or cpu; by default the best there is.
    """
    from lab7 import training
    from lab7.dataset import ICLEVRDataset
    from lab7.devices import choose_device, estimate_seconds
    from lab7.experiments import get_experiment

    changes = {
        "compile": compile,
        "budget_seconds": None if budget is None else 60 * budget,
        "num_steps": steps,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "init_from": init_from,
        "seed": seed,
    }
    changes = {key: value for key, value in changes.items() if value is not None}
    experiment = get_experiment(name)
    config = dataclasses.replace(experiment.config, tensorboard=tensorboard, **changes)
    output, place = output or ROOT / "runs" / name, choose_device(device)
    estimate = estimate_seconds(config, place) / 60
    whole = f"{estimate / 60:.1f} hours" if estimate > 90 else f"{estimate:.0f} minutes"
    print(
        f"{name}: {experiment.description}; the whole training takes about {whole} on {place.type}"
    )
    training.train(
        config,
        ICLEVRDataset(data),
        output,
        resume=resume,
        max_seconds=None if minutes is None else 60 * minutes,
        device=device,
    )
    print(f"saved {output / 'pipeline'}")


def sample(
    labels: Annotated[str | None, tyro.conf.Positional] = None,
    /,
    conditions: str | None = None,
    out: Path = Path("samples"),
    count: int = 1,
    seed: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
    scheduler: str | None = None,
    checkpoint: Path = GENERATOR,
    evaluator: Path | None = None,
    data: Path | None = None,
    device: str | None = None,
) -> None:
    """Draw pictures: of labels given here, or of every condition in a file.

    Args:
        labels: For instance "red cube, blue cylinder".
        conditions: Condition file (JSON list of lists of labels), or test, new_test, valid,
            unseen, four_five.
        out: Folder for 0.png …, grid.png, denoising.png and samples.json.
        count: Pictures of LABELS.
        seed: Of the first picture; each next has one more.
        steps: Sampling steps; by default the checkpoint's own.
        guidance: Weight of classifier-free guidance; 1 is none.
        scheduler: Sampler: ddpm, ddim, dpmsolver++, sde-dpmsolver++ or unipcmultistep; by default
            the checkpoint's own.
        checkpoint: Saved pipeline; by default the one that comes with the project.
        evaluator: Weights of the judge; by default checkpoint.pth of DATA, else ours.
        data: The course's folder; by default $LAB7_DATA, else the embedded set.
        device: cuda, mps or cpu; by default the best there is.
    """
    from lab7.evaluator import Evaluator
    from lab7.labels import parse_condition
    from lab7.pipeline import load_pipeline
    from lab7.sampling import write_samples

    if (labels is None) == (conditions is None):
        raise UserError('give either labels, such as "red cube, blue cylinder", or --conditions')
    if count < 1:
        raise UserError(f"count {count} must be at least 1")
    wanted = _conditions(conditions, data) if conditions else [parse_condition(labels)] * count
    summary = write_samples(
        load_pipeline(checkpoint, device, scheduler),
        wanted,
        out,
        seed=seed,
        num_inference_steps=steps,
        guidance_scale=guidance,
        evaluator=Evaluator.load(evaluator, device, data),
    )
    top_k = summary["scores"]["top_k"]["value"]
    print(f"{len(wanted)} pictures in {out}; accuracy by the evaluator {top_k:.4f}")


def evaluate(
    checkpoint: Path = GENERATOR,
    images: Path | None = None,
    conditions: str | None = None,
    repetitions: int = 4,
    steps: int | None = None,
    guidance: float | None = None,
    scheduler: str | None = None,
    evaluator: Path | None = None,
    data: Path | None = None,
    record: str | None = None,
    results: Path = RESULTS,
    failures: Path = ROOT / "build" / "failures",
    device: str | None = None,
) -> None:
    """Score a generator, or a folder of pictures.

    Args:
        checkpoint: Saved pipeline; by default the one that comes with the project.
        images: Folder of 0.png … to score instead of a generator.
        conditions: What the pictures should show: a condition file, which is scored as file-NAME,
            or test, new_test, valid, unseen, four_five; by default test and new_test.
        repetitions: Pictures of each condition.
        steps: Sampling steps; by default the checkpoint's own.
        guidance: Weight of classifier-free guidance; 1 is none.
        scheduler: Sampler: ddpm, ddim, dpmsolver++, sde-dpmsolver++ or unipcmultistep; by default
            the checkpoint's own.
        evaluator: Weights of the judge; by default checkpoint.pth of DATA, else ours.
        data: The course's folder; by default $LAB7_DATA, else the embedded set.
        record: Name under which to write the results down, by default of all condition files.
        results: Folder of the records.
        failures: Folder for figures of the pictures that failed, with what was asked and seen.
        device: cuda, mps or cpu; by default the best there is.
    """
    from lab7.auditor import Auditor
    from lab7.dataset import CONDITION_FILES, SCORED, ICLEVRDataset, load_images
    from lab7.evaluator import Evaluator
    from lab7.fidelity import RealPictures
    from lab7.files import require_writable
    from lab7.pipeline import load_pipeline
    from lab7.recording import record_generator, require_same_pictures
    from lab7.scoring import draw_and_judge, judge_pictures, score_table

    judge, auditor = Evaluator.load(evaluator, device, data), Auditor.load(device=device)
    if images is not None and conditions is None:
        raise UserError("--images needs --conditions: what the pictures should show")
    if images is not None and record is not None:
        raise UserError("--record is for a generator: leave it out with --images")
    if record is not None:
        require_writable(results / record)
        require_same_pictures(checkpoint, data)
    names = [conditions] if conditions else CONDITION_FILES if record else SCORED
    sets = {_set_name(name): _conditions(name, data) for name in names}
    real = RealPictures(auditor, ICLEVRDataset(data))
    if images is not None:
        ((name, wanted),) = sets.items()
        pictures = load_images(images, len(wanted))
        scored = {name: (judge_pictures(pictures, wanted, judge, auditor, real), pictures)}
    else:
        pipeline = load_pipeline(checkpoint, device, scheduler)
        settings = {"num_inference_steps": steps, "guidance_scale": guidance}
        scored = {
            name: draw_and_judge(pipeline, wanted, judge, auditor, real, repetitions, **settings)
            for name, wanted in sets.items()
        }
    print(score_table({name: metrics for name, (metrics, _) in scored.items()}))
    for name, (metrics, pictures) in scored.items():
        _show_failures(name, metrics["pictures"], pictures, failures)
    if record is not None:
        record_generator(record, pipeline, judge, scored, checkpoint, results, data, **settings)


def experiments(
    trials: Annotated[tuple[str, ...], tyro.conf.Positional] = (),
    /,
    plan: bool = False,
    repetitions: int = 8,
    output: Path = ROOT / "runs",
    results: Path = RESULTS,
    data: Path | None = None,
    device: str | None = None,
) -> None:
    """Train, score and record the experiments of notebook 04, one after the other.

    Started again it goes on: what has a record is left alone, what is half trained is resumed.

    Args:
        trials: Which, in this order, for instance twin-cosine, or twin-cosine@1 with another seed;
            by default all that the notebook shows.
        plan: Only show what is left and how long it will take on this machine.
        repetitions: Pictures of each condition.
        output: Folder of the runs. Of a scored one the states are removed.
        results: Folder of the records.
        data: The course's folder; by default $LAB7_DATA, else the embedded set.
        device: cuda, mps or cpu; by default the best there is.
    """
    from workshop.study.experiments import PLAN, print_plan, run_experiments

    trials = trials or PLAN
    if plan:
        print_plan(trials, output, results, device)
    else:
        run_experiments(trials, data, output, results, repetitions, device)


def sweep(
    checkpoint: Path = GENERATOR,
    guidance: tuple[float, ...] = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0),
    steps: tuple[int, ...] = (5, 10, 15, 20, 25, 50),
    schedulers: tuple[str, ...] = ("sde-dpmsolver++", "dpmsolver++", "ddpm", "ddim"),
    repetitions: int = 2,
    keep: bool = False,
    record: str = "sweep",
    evaluator: Path | None = None,
    data: Path | None = None,
    results: Path = RESULTS,
    device: str | None = None,
) -> None:
    """Score guidance scales, step counts and samplers on valid.json, and write the results down.

    No setting is chosen on the test conditions.

    Args:
        checkpoint: Saved pipeline; by default the one that comes with the project.
        guidance: Guidance scales, at the checkpoint's own number of steps.
        steps: Numbers of steps, at the best guidance.
        schedulers: Samplers, see `sample`; at the best guidance and the checkpoint's own steps.
        repetitions: Pictures of each condition and setting.
        keep: Save the best guidance with the checkpoint, which then draws with it by default.
        record: Name of the record.
        evaluator: Weights of the judge; by default checkpoint.pth of DATA, else ours.
        data: The course's folder; by default $LAB7_DATA, else the embedded set.
        results: Folder of the records.
        device: cuda, mps or cpu; by default the best there is.
    """
    from lab7.evaluator import Evaluator
    from lab7.pipeline import load_pipeline
    from lab7.recording import record_sweep

    pipeline, judge = load_pipeline(checkpoint, device), Evaluator.load(evaluator, device, data)
    metrics = record_sweep(
        record,
        pipeline,
        judge,
        _conditions("valid", data),
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


def render(
    what: Annotated[Literal["train", "evaluator", "auditor"], tyro.conf.Positional] = "train",
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
    device: str | None = None,
) -> None:
    """Train the evaluator on the embedded pictures and on those of `render evaluator`.

    Args:
        renders: Folder that `render evaluator` wrote.
        output: Weights to write; by default those that come with the project.
        epochs: Passes over the pictures.
        device: cuda, mps or cpu; by default the best there is.
    """
    from workshop.judges.evaluator_training import EvaluatorTraining
    from workshop.judges.judge_training import train_on_renders

    train_on_renders(EvaluatorTraining, renders, output, epochs, device)


def train_auditor(
    renders: Path = ROOT / "runs" / "auditor",
    output: Path | None = None,
    epochs: int | None = None,
    device: str | None = None,
) -> None:
    """Train the auditor on the pictures of `render auditor`.

    Args:
        renders: Folder that `render auditor` wrote.
        output: Weights to write; by default those that come with the project.
        epochs: Passes over the pictures.
        device: cuda, mps or cpu; by default the best there is.
    """
    from workshop.judges.auditor_training import AuditorTraining
    from workshop.judges.judge_training import train_on_renders

    train_on_renders(AuditorTraining, renders, output, epochs, device)


def examine(
    renders: Path = ROOT / "runs" / "auditor",
    evaluator: Path | None = None,
    data: Path | None = None,
    record: str = "judges",
    results: Path = RESULTS,
    device: str | None = None,
) -> None:
    """Measure how far evaluator and auditor can be trusted, on renders that neither has seen.

    Args:
        renders: Folder that `render auditor` wrote; its last pictures are used.
        evaluator: Weights of the judge; by default checkpoint.pth of DATA, else ours.
        data: The course's folder; by default $LAB7_DATA, else the embedded set.
        record: Name of the record.
        results: Folder of the records.
        device: cuda, mps or cpu; by default the best there is.
    """
    from lab7.auditor import Auditor
    from lab7.dataset import ICLEVRDataset
    from lab7.evaluator import Evaluator
    from workshop.judges.examination import examine_renders
    from workshop.judges.fooling import FOOLED_SCORES

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
        f"calibration error {error} over the {calibration['num_outputs']:,} probabilities of 0.05 "
        f"to 0.95 in {calibration['num_pictures']:,} pictures"
    )
    for name, row in found["fooled"].items():
        figures = (f"{key.replace('_', ' ')} {row[key].value:.4f}" for key in FOOLED_SCORES)
        print(f"{name:12s}  {row['num_pictures']:5d} pictures  {'  '.join(figures)}")


def report(
    output: Path = ROOT / "build" / "report", results: Path = RESULTS, data: Path | None = None
) -> None:
    """Build the report, as PDF and HTML, from the records.

    Args:
        output: Folder for report.pdf, report.html and their figures. With the project's own
            folder, report, the README's table is renewed too.
        results: Folder of the records.
        data: Folder of the pictures that the records are of; by default the embedded set, or
            $LAB7_DATA for records of the course's pictures.
    """
    from lab7.records import read_records
    from report.build import build, write_readme

    for path in build(output, results, data):
        print(f"saved {path}")
    if output.resolve() == ROOT / "report":
        write_readme(read_records(results), ROOT / "README.md")


def handin(
    student_id: Annotated[str, tyro.conf.Positional],
    name: Annotated[str, tyro.conf.Positional],
    /,
    output: Path = ROOT / "build",
    checkpoint: Path = GENERATOR,
    results: Path = RESULTS,
    data: Path | None = None,
    seed: int = 0,
    evaluator: Path | None = None,
    device: str | None = None,
) -> None:
    """Make the zip that the course wants handed in, and check it against the course's list.

    It holds the report, the source, and a picture for each condition of test and new_test with
    grids, the denoising row and the accuracies.

    Args:
        student_id: Yours, without spaces.
        name: Yours, without spaces.
        output: Folder for LAB7_ID_NAME.zip.
        checkpoint: Saved pipeline that draws the pictures.
        results: Folder of its records, which the report is built from.
        data: The course's folder; by default $LAB7_DATA, else the embedded set.
        seed: Of the first picture; each next has one more.
        evaluator: Weights of the judge; by default checkpoint.pth of DATA, else ours.
        device: cuda, mps or cpu; by default the best there is.
    """
    from lab7.evaluator import Evaluator
    from lab7.pipeline import load_pipeline
    from workshop.course.handin import make_handin

    path, lines = make_handin(
        student_id,
        name,
        load_pipeline(checkpoint, device),
        Evaluator.load(evaluator, device, data),
        output=output,
        checkpoint=checkpoint,
        results=results,
        data=data,
        seed=seed,
    )
    print(*lines, f"saved {path}", sep="\n")


def _conditions(name: str, data: Path | None) -> list[tuple[str, ...]]:
    """Read a condition file, or one of the data folder's by its name."""
    from lab7.dataset import CONDITION_FILES, named_conditions
    from lab7.labels import load_conditions

    if name in CONDITION_FILES:
        return named_conditions(name, data)
    if not Path(name).exists() and not Path(name).suffix:
        close = difflib.get_close_matches(name, CONDITION_FILES, 1, cutoff=0)[0]
        raise MissingFileError(
            f"no condition file {name!r}: did you mean {close!r}? "
            f"Give a file, or one of {', '.join(CONDITION_FILES)}"
        )
    return load_conditions(name)


def _set_name(conditions: str) -> str:
    """Name a set in tables and records, so that none of a file reads as the data folder's."""
    from lab7.dataset import CONDITION_FILES

    if conditions in CONDITION_FILES:
        return conditions
    return f"file-{Path(conditions).stem}".replace(".", "-")  # a dot would part a record's key


def _show_failures(name: str, verdicts: "Verdicts", pictures: "Tensor", folder: Path) -> None:
    """Write a figure of the pictures that do not show exactly what was asked for."""
    from lab7 import plots
    from lab7.scoring import label_names

    exact, _ = verdicts.ratios()["audit"]["exact_scene"]
    rows = [row for row, right in enumerate(exact) if not right]
    figure = folder / f"{name}.png"
    if not rows:
        figure.unlink(missing_ok=True)  # of an earlier call
        return
    shown = rows[:MOST_FAILURES]
    wanted = [verdicts.conditions[verdicts.condition[row]] for row in shown]
    counted = label_names(verdicts.counted[row] for row in shown)
    chart = plots.picture_grid(pictures[shown], wanted, counted)
    chart.save(figure)
    print(f"{len(rows)} pictures of {name} failed, {len(shown)} are in {figure}")


def main() -> None:
    """Run a command; what the user can mend is one line on standard error and exit code 2."""
    commands = [
        train,
        sample,
        evaluate,
        experiments,
        render,
        report,
        handin,
        sweep,
        train_evaluator,
        train_auditor,
        examine,
    ]
    app = tyro.extras.SubcommandApp()
    for command in commands:
        app.command(command, name=command.__name__.replace("_", "-"))
    try:
        app.cli(prog="python -m lab7", description="Conditional DDPM on i-CLEVR.")
    except OSError as error:
        message = f"{error.strerror}: {error.filename}" if error.filename else str(error)
        sys.exit(_fail(message))
    except ValueError as error:
        sys.exit(_fail(str(error)))
    except KeyboardInterrupt:
        sys.exit(130)


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
