"""The experiments of notebook 04: trained, scored on the way and at the end, and recorded.

What has a record is skipped; what was interrupted is resumed.
"""

import dataclasses
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lab7.auditor import Auditor
from lab7.dataset import CONDITION_FILES, ICLEVRDataset, named_conditions
from lab7.devices import choose_device, estimate_seconds
from lab7.errors import UserError, user_files
from lab7.evaluator import Evaluator
from lab7.experiments import TWINS, TrainConfig, get_experiment
from lab7.files import read_json, write_atomically
from lab7.pipeline import load_pipeline
from lab7.records import RESULTS_DIR, read_log
from lab7.scoring import draw_and_judge
from lab7.training import train
from workshop.judges.fidelity import RealPictures
from workshop.study.evaluation import Judges, score_generator
from workshop.study.recording import record_generator

PLAN = (  # in the order in which they are run; "@1" is a second training, with the seed 1
    *TWINS,
    "twin-baseline-epsilon",
    "twin-cosine-epsilon",
    "laptop",
    "twin-baseline@1",
    "twin-cosine@1",
)
SHARES = (1 / 8, 1 / 4, 1 / 2, 1)  # of the steps, after which a run is scored on valid


def trial_config(trial: str) -> TrainConfig:
    """Return the configuration of an experiment, or of its training with another seed, NAME@SEED.

    Raises:
        UserError: There is no such experiment, or the seed is no whole number.
    """
    name, _, seed = trial.partition("@")
    config = get_experiment(name).config
    if not seed:
        return config
    if not seed.isdigit():
        raise UserError(f"the seed of {trial!r} is no whole number: {name}@1, for instance")
    return dataclasses.replace(config, seed=int(seed))


def record_name(trial: str) -> str:
    """Return the name of a trial's record and run: "twin-cosine@1" is in twin-cosine-seed1."""
    return trial.replace("@", "-seed")


def run_experiments(
    trials: Sequence[str] = PLAN,
    data: Path | None = None,
    output: Path = Path("runs"),
    results: Path = RESULTS_DIR,
    repetitions: int = 8,
    device: str | None = None,
) -> None:
    """Train, score and record each trial that has no record yet.

    Args:
        trials: Names of experiments, or NAME@SEED, in this order.
        data: Folder of the pictures, see `find_layout`; its conditions and evaluator are used.
        output: Folder of the runs.
        results: Folder of the records.
        repetitions: Pictures of each condition at the end of a run.
        device: Where to train and draw; None takes the best there is.

    Raises:
        UserError: An unknown experiment, or a run that has changed since it was started.
    """
    missing = {trial: trial_config(trial) for trial in trials if not _recorded(trial, results)}
    print_plan(trials, output, results, device)
    if not missing:
        return
    dataset = ICLEVRDataset(data)
    evaluator, auditor = Evaluator.load(device=device, root=data), Auditor.load(device=device)
    judges = Judges(evaluator, auditor, RealPictures(auditor, dataset))
    sets = {name: named_conditions(name, data) for name in CONDITION_FILES}
    for trial, config in missing.items():
        run = output / record_name(trial)
        milestones = train_and_score(config, dataset, run, evaluator, auditor, data, device)
        pipeline = load_pipeline(run / "pipeline", device)
        scored = score_generator(pipeline, sets, judges, repetitions)
        record_generator(
            record_name(trial),
            pipeline,
            evaluator,
            scored,
            run / "pipeline",
            results,
            data,
            extra={"milestones": milestones},
        )
        shutil.rmtree(run / "states", ignore_errors=True)
        print(f"{trial} has a record")


def train_and_score(
    config: TrainConfig,
    dataset: ICLEVRDataset,
    run: Path,
    evaluator: Evaluator,
    auditor: Auditor,
    data: Path | None = None,
    device: str | None = None,
) -> list[dict[str, Any]]:
    """Train, and on the way draw `valid` once each at an eighth, a quarter, a half and all steps.

    Returns:
        For each of these steps what `draw_and_judge` found, with "step", "images", "seconds" of
        the training and "loss".
    """
    found = _read_milestones(run)
    for step in milestone_steps(config):
        if any(row["step"] == step for row in found):
            continue
        if _last_step(run) < step:
            train(
                config,
                dataset,
                run,
                callback=lambda row, stop=step: row["step"] >= stop,
                device=device,
            )
        row = read_log(run / "log.jsonl")[-1]
        pipeline = load_pipeline(run / "pipeline", device)
        metrics, _ = draw_and_judge(
            pipeline, named_conditions("valid", data), evaluator, auditor, repetitions=1
        )
        kept = {key: row[key] for key in ("step", "images", "seconds", "loss")}
        parts = {part: dataclasses.asdict(metrics[part]) for part in ("scores", "audit")}
        found.append(kept | parts)
        write_atomically(run / "milestones.json", json.dumps(found, indent=1) + "\n")
        print(f"{run.name}: step {step:,}, valid top-k {metrics['scores'].top_k.value:.3f}")
    return found


def milestone_steps(config: TrainConfig) -> list[int]:
    """Return the steps at which a run is scored: rows of its log."""
    every = config.log_every
    steps = [max(1, round(config.num_steps * share / every)) * every for share in SHARES]
    return sorted({min(step, config.num_steps) for step in steps})


def print_plan(
    trials: Sequence[str], output: Path, results: Path, device: str | None = None
) -> None:
    """Say which trials have a record, and how long the others will train on this machine."""
    left = 0.0
    for trial in trials:
        if _recorded(trial, results):
            print(f"{trial:24s} has a record")
            continue
        config, step = trial_config(trial), _last_step(output / record_name(trial))
        seconds = estimate_seconds(config, choose_device(device)) * (1 - step / config.num_steps)
        left += seconds
        print(
            f"{trial:24s} {step:,} of {config.num_steps:,} steps, {seconds / 3600:.1f} hours left"
        )
    if left:
        until = time.strftime("%d %b %H:%M", time.localtime(time.time() + left))
        print(f"{left / 3600:.1f} hours of training left on this machine, until about {until}")


@user_files()
def _recorded(trial: str, results: Path) -> bool:
    return (results / record_name(trial) / "metrics.json").exists()


@user_files()
def _last_step(run: Path) -> int:
    return read_log(run / "log.jsonl")[-1]["step"] if (run / "log.jsonl").exists() else 0


def _read_milestones(run: Path) -> list[dict[str, Any]]:
    path = run / "milestones.json"
    return read_json(path) if path.exists() else []
