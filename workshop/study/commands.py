"""The commands that train, draw with, score and compare generators.

What a command needs is imported in it: loading PyTorch and diffusers takes seconds, in which nobody
wants to wait for --help.
"""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from lab7.errors import UserError
from lab7.layouts import ROOT
from workshop import options


def train(
    name: Annotated[str, Positional, arg(metavar="NAME")] = "ours",
    /,
    output: Path | None = None,
    data: options.Data = None,
    pictures: options.Pictures = None,
    rescan: bool = False,
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
    device: options.Device = None,
) -> None:
    """Train a named configuration; stopped and started again it goes on where it was.

    Several processes share each batch under torchrun or accelerate launch, one a GPU:
    torchrun --nproc-per-node=2 -m lab7 train.

    Args:
        name: Of the configuration: ours, laptop, or one of the experiments: twin-baseline,
            twin-channels, twin-one-layer, twin-half-channels, twin-cosine, and the
            same five in full size, original-baseline, ….
        output: Folder of the run; by default runs/NAME.
        rescan: Read all pictures anew; otherwise those in the cache are taken as long as their
            folder looks the same.
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
    """
    from lab7 import training
    from lab7.dataset import ICLEVRDataset
    from lab7.devices import choose_device, estimate_seconds
    from lab7.experiments import get_experiment

    experiment, output = get_experiment(name), output or ROOT / "runs" / name
    config = _change(
        experiment.config,
        tensorboard=tensorboard,
        compile=compile,
        budget_seconds=_seconds(budget),
        num_steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        init_from=init_from,
        seed=seed,
    )
    place = choose_device(device)
    _announce(f"{name}: {experiment.description}", estimate_seconds(config, place), place.type)
    dataset, seconds = ICLEVRDataset(data, pictures=pictures, rescan=rescan), _seconds(minutes)
    training.train(config, dataset, output, resume=resume, max_seconds=seconds, device=place)
    print(f"saved {output / 'pipeline'}")


def sample(
    labels: Annotated[tuple[str, ...], Positional, arg(metavar="LABELS")] = (),
    /,
    conditions: str | None = None,
    out: Path = Path("samples"),
    count: int = 1,
    denoising: str | None = None,
    seed: options.Seed = 0,
    steps: options.Steps = None,
    guidance: options.Guidance = None,
    guidance_interval: options.GuidanceInterval = None,
    scheduler: options.Sampler = None,
    checkpoint: options.Checkpoint = options.GENERATOR,
    evaluator: options.Weights = None,
    data: options.Data = None,
    device: options.Device = None,
) -> None:
    """Draw pictures: of labels given here, or of every condition in a file.

    Args:
        labels: For instance red cube, blue cylinder, with quotes around it or without.
        conditions: Condition file (JSON list of lists of labels), or test, new_test, valid,
            unseen, four_five.
        out: Folder for 0.png …, grid.png, denoising.png and samples.json.
        count: Pictures of LABELS.
        denoising: Labels of the row from noise to picture; by default those of 0.png.
    """
    from lab7.evaluator import Evaluator
    from lab7.labels import parse_condition
    from lab7.pipeline import load_pipeline
    from lab7.sampling import write_samples
    from workshop.study.evaluation import find_conditions, show_data

    if bool(labels) == (conditions is not None):
        raise UserError('give either labels, such as "red cube, blue cylinder", or --conditions')
    if count < 1:
        raise UserError(f"count {count} must be at least 1")
    options.require_seed(seed)
    data = show_data(data)
    text = " ".join(labels)
    wanted = [parse_condition(text)] * count if labels else find_conditions(conditions, data)
    pipeline = load_pipeline(checkpoint, device, scheduler)
    settings = pipeline.settings(steps, guidance, guidance_interval)
    judge = Evaluator.load(evaluator, device, data)
    row = None if denoising is None else parse_condition(denoising)
    summary = write_samples(pipeline, wanted, out, seed, judge, denoising=row, **settings)
    top_k = summary["scores"]["top_k"]["value"]
    print(f"{len(wanted)} pictures in {out}; accuracy by the evaluator {top_k:.4f}")


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
    seeds: int = 0,
    failures: Path = ROOT / "build" / "failures",
    device: options.Device = None,
) -> None:
    """Score a generator, or a folder of pictures.

    Args:
        images: Folder of 0.png …, or folder or zip of a hand-in, to score instead of a generator.
        conditions: What the pictures should show: a condition file, which is scored as file-NAME,
            or test, new_test, valid, unseen, four_five; by default test and new_test.
        repetitions: Pictures of each condition.
        record: Name under which to write the results down, by default of all condition files.
        seeds: Pictures of one condition to draw for the record, to show how much they vary.
        failures: Folder for figures of the pictures that failed, with what was asked and seen.
    """
    from lab7.pipeline import load_pipeline
    from workshop.study import evaluation
    from workshop.study.recording import record_generator

    data = evaluation.show_data(data, pictures)
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
        record_generator(
            record,
            pipeline,
            judges.evaluator,
            scored,
            checkpoint,
            results,
            data,
            num_seeds=seeds,
            **settings,
        )


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


def distill(
    checkpoint: options.Checkpoint = options.GENERATOR,
    output: Path = ROOT / "runs" / "fast",
    work: Path = ROOT / "runs" / "distill",
    files: int = 45,
    steps: int | None = None,
    data: options.Data = None,
    device: options.Device = None,
) -> None:
    """Train a student of CHECKPOINT to draw in four passes.

    About an hour on two cores. Started again it does not draw anew what the teacher has drawn.

    Args:
        output: Folder to save it in.
        work: Folder that keeps what the teacher draws, 25 MB a file.
        files: How many files of 128 pictures the teacher draws.
        steps: Optimizer steps.
    """
    from workshop.study import distill as distillation

    config = _change(distillation.CONFIG, num_steps=steps)
    distillation.distill(checkpoint, output, work, files, config, data, device)
    print(f"saved {output}")


def targets(
    record: str = "targets",
    output: Path = ROOT / "runs" / "targets",
    results: options.Results = options.RESULTS,
    data: options.Data = None,
    device: options.Device = None,
) -> None:
    """Train small networks that predict x0, v or epsilon, and record how far each gets on valid.

    Less than an hour on two cores; started again it goes on where it was.

    Args:
        record: Name of the record.
        output: Folder of the runs.
    """
    from workshop.study.targets import record_targets

    record_targets(record, output, results, data, device)


def _announce(what: str, seconds: float, place: str) -> None:
    whole = f"{seconds / 3600:.1f} hours" if seconds > 5400 else f"{seconds / 60:.0f} minutes"
    print(f"{what}; about {whole} of training on {place}")


def _seconds(minutes: float | None) -> float | None:
    return None if minutes is None else 60 * minutes


def _change(config: Any, **changes: Any) -> Any:
    """Return a configuration with what was given on the command line."""
    return dataclasses.replace(config, **{k: v for k, v in changes.items() if v is not None})
