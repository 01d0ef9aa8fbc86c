"""The command line: python -m lab7 train | sample | evaluate | render | report | …

What a command needs is imported in it: loading PyTorch and diffusers takes seconds, in which nobody
wants to wait for --help.
"""

import dataclasses
import os
import sys
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg
from tyro.extras import SubcommandApp

from lab7 import options
from lab7.errors import UserError


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

    experiment, output = get_experiment(name), output or options.ROOT / "runs" / name
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
    from lab7.dataset import find_conditions
    from lab7.evaluator import Evaluator
    from lab7.labels import parse_condition
    from lab7.pipeline import load_pipeline
    from lab7.sampling import write_samples

    if bool(labels) == (conditions is not None):
        raise UserError('give either labels, such as "red cube, blue cylinder", or --conditions')
    if count < 1:
        raise UserError(f"count {count} must be at least 1")
    options.require_seed(seed)
    text = " ".join(labels)
    wanted = [parse_condition(text)] * count if labels else find_conditions(conditions, data)
    pipeline = load_pipeline(checkpoint, device, scheduler)
    settings = pipeline.settings(steps, guidance, guidance_interval)
    judge = Evaluator.load(evaluator, device, data)
    row = None if denoising is None else parse_condition(denoising)
    summary = write_samples(pipeline, wanted, out, seed, judge, denoising=row, **settings)
    top_k = summary["scores"]["top_k"]["value"]
    print(f"{len(wanted)} pictures in {out}; accuracy by the evaluator {top_k:.4f}")


def main() -> None:
    """Run a command; what the user can mend is one line on standard error and exit code 2."""
    from workshop.commands import COMMANDS

    app = SubcommandApp()
    for command in (train, sample, *COMMANDS):
        app.command(command, name=command.__name__.replace("_", "-"))
    try:
        try:
            app.cli(prog="python -m lab7", description="Conditional DDPM on i-CLEVR.")
        finally:
            sys.stdout.flush()  # what fails in it shall fail here
    except BrokenPipeError:  # as of `| head`, which has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except UserError as error:
        print("error:", *str(error).splitlines(), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _announce(what: str, seconds: float, place: str) -> None:
    whole = f"{seconds / 3600:.1f} hours" if seconds > 5400 else f"{seconds / 60:.0f} minutes"
    print(f"{what}; about {whole} of training on {place}")


def _seconds(minutes: float | None) -> float | None:
    return None if minutes is None else 60 * minutes


def _change(config: Any, **changes: Any) -> Any:
    """Return a configuration with what was given on the command line."""
    return dataclasses.replace(config, **{k: v for k, v in changes.items() if v is not None})


if __name__ == "__main__":
    main()
