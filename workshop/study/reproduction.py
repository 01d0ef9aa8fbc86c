"""The original report's experiments, run one after the other within a time."""

import dataclasses
import math
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from lab7.auditor import Auditor
from lab7.dataset import SCORED, ICLEVRDataset, named_conditions
from lab7.evaluator import Evaluator
from lab7.experiments import EXPERIMENTS, get_experiment
from lab7.fidelity import RealPictures
from lab7.pipeline import load_pipeline
from lab7.recording import record_generator
from lab7.records import RESULTS_DIR, read_log
from lab7.scoring import draw_and_judge, score_table
from lab7.training import train

ORIGINALS = tuple(name for name in EXPERIMENTS if name.startswith("original-"))


def reproduce_experiments(
    names: Sequence[str],
    dataset: ICLEVRDataset,
    data: str | Path | None = None,
    output: Path = Path("runs"),
    results: Path = RESULTS_DIR,
    *,
    seconds: float | None = None,
    reserve: float = 180.0,
    epochs: float | None = None,
    repetitions: int = 4,
    device: str | None = None,
) -> list[str]:
    """Train each experiment, draw `test` and `new_test` with it, and write its record.

    Args:
        names: Experiments, in this order. One that has a record is left alone.
        dataset: The pictures to train on.
        data: Their folder, see `resolve_root`; its conditions and evaluator are used.
        output: Folder of the runs; a half trained one is resumed, of a scored one only the saved
            pipeline and the log stay.
        results: Folder of the records.
        seconds: Time for all of it; None sets no limit.
        reserve: Seconds of it that are kept for drawing and scoring.
        epochs: Passes over the pictures; None takes each experiment's own number of steps.
        repetitions: Pictures of each condition.
        device: Where to train and draw; None takes the best there is.

    Returns:
        The names of those that have a record now.

    Raises:
        ValueError: An unknown experiment, or no time left beside the reserve.
    """
    started, limit = time.perf_counter(), math.inf if seconds is None else seconds
    configs = {name: get_experiment(name).config for name in names}
    if limit <= reserve:
        raise ValueError(f"of {seconds:g} seconds {reserve:g} are kept for scoring: none is left")
    recorded = []
    for name, config in configs.items():
        if (results / name / "metrics.json").exists():
            print(f"{name} has a record")
            recorded.append(name)
            continue
        if epochs is not None:
            steps = max(1, round(epochs * len(dataset) / config.batch_size))
            config = dataclasses.replace(config, num_steps=steps)
        left = limit - reserve - (time.perf_counter() - started)
        if left <= 0:
            break
        run = output / name
        train(config, dataset, run, max_seconds=left, device=device)
        step = read_log(run / "log.jsonl")[-1]["step"]
        if step < config.num_steps:
            print(f"{name}: {step:,} of {config.num_steps:,} steps; start again to go on")
            break
        _score(name, run, dataset, data, results, repetitions, device)
        shutil.rmtree(run / "states")
        recorded.append(name)
    return recorded


def _score(
    name: str,
    run: Path,
    dataset: ICLEVRDataset,
    data: str | Path | None,
    results: Path,
    repetitions: int,
    device: str | None,
) -> None:
    """Draw the two scored files with a trained network, and write its record."""
    evaluator, auditor = Evaluator.load(device=device, root=data), Auditor.load(device=device)
    pipeline = load_pipeline(run / "pipeline", device)
    real = RealPictures(auditor, dataset)
    scored = {
        part: draw_and_judge(
            pipeline, named_conditions(part, data), evaluator, auditor, real, repetitions
        )
        for part in SCORED
    }
    print(score_table({part: metrics for part, (metrics, _) in scored.items()}))
    record_generator(name, pipeline, evaluator, scored, run / "pipeline", results, data)
