"""The search for the cheapest way to sample: candidates drawn on valid.json, and what is chosen.

1. Each candidate draws every condition under three seeds; the three best are finalists.
2. These draw under eight seeds, beside the default until now, the best of `sweep`. The cheapest
   that is not worse than the default is chosen.

Worse is what the evaluator can tell from the other: the interval of the paired difference in top-k
or exact set is below 0. It is asked once, after all seeds: an interval that is looked at after each
seed sooner or later leaves out 0 by luck. What the auditor says is written down, and decides
nothing.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lab7.auditor import Auditor
from lab7.dataset import named_conditions
from lab7.diffusion import convert_scheduler
from lab7.errors import UserError
from lab7.estimates import Estimate, difference
from lab7.evaluator import Evaluator
from lab7.files import require_writable
from lab7.pipeline import (
    SETTINGS,
    ConditionalDDPMPipeline,
    load_pipeline,
    save_pipeline,
)
from lab7.records import RESULTS_DIR, append_log, count_passes, read_log
from lab7.scoring import Conditions, Verdicts, draw_and_judge, score_verdicts
from workshop.records import file_hash, require_name, write_record

SCORES = ("top_k", "exact_set")  # that decide, the first before the second
SCREENED, FINALISTS = 3, 3  # seeds of the screen; who is left after it, beside the default
_LOGGED = (*SETTINGS, "timesteps", "pictures")
_LISTS = ("condition", "seed", "hits", "seen", "counted")  # of verdicts, an entry for each picture


@dataclass(frozen=True)
class Candidate:
    """One way to sample.

    Attributes:
        scheduler: See `convert_scheduler`.
        num_inference_steps: Of the sampler.
        guidance_scale: Weight of guidance.
        guidance_interval: Time steps with guidance.
        timestep_shift: Above 1 there are more time steps at high noise and fewer at low (Esser et
            al. 2024, eq. 23). A pipeline has no such setting.
    """

    scheduler: str = "sde-dpmsolver++"
    num_inference_steps: int = 12
    guidance_scale: float = 3.0
    guidance_interval: tuple[int, int] = (400, 950)
    timestep_shift: float = 1.0

    def __str__(self):
        low, high = self.guidance_interval
        name = f"{self.scheduler} {self.num_inference_steps} w{self.guidance_scale:g} {low}-{high}"
        return name if self.timestep_shift == 1 else f"{name} shift {self.timestep_shift:g}"


_vary = functools.partial(dataclasses.replace, Candidate())
WHOLE = (0, 999)
FORMER = _vary(num_inference_steps=20, guidance_interval=WHOLE)  # the default before the search
YARDSTICK = _vary(scheduler="ddpm", num_inference_steps=1000, guidance_interval=WHOLE)
CANDIDATES = (
    FORMER,
    *(_vary(num_inference_steps=count) for count in (20, 18, 16)),
    *(_vary(num_inference_steps=count, guidance_interval=(600, 950)) for count in (20, 18)),
    _vary(num_inference_steps=20, guidance_interval=(700, 950)),
    *(_vary(num_inference_steps=count, timestep_shift=2.0) for count in (14, 12)),
)
Row = dict[str, Any]  # what one candidate scored
Draw = Callable[[Candidate, Conditions, int], Row]


def search_sampler(
    draw: Draw,
    conditions: Conditions,
    candidates: Sequence[Candidate],
    yardstick: Candidate | None = None,
    seeds: int = 8,
) -> dict[str, Any]:
    """Choose the cheapest candidate whose scores cannot be told from those of the default.

    Args:
        draw: `draw_candidate` with `log` and what follows bound.
        conditions: Those to choose on, so not the test's.
        candidates: What is tried; the first is the default until now.
        yardstick: Drawn once for each condition, beside the choice; None: nothing.
        seeds: Of the finals.

    Returns:
        "screen", "finals" and "yardstick": rows, see `describe`; "chosen": the candidate.
    """
    default = candidates[0]
    screen = [draw(candidate, conditions, min(SCREENED, seeds)) for candidate in candidates]
    best = sorted(screen[1:], key=lambda row: (*_scores(row), -row["passes"]))[-FINALISTS:]
    finalists = [row["candidate"] for row in sorted(best, key=lambda row: row["passes"])]
    rows = [draw(candidate, conditions, seeds) for candidate in (*finalists, default)]
    finals = [describe(row, rows[-1]) for row in rows]
    chosen = next(r["candidate"] for r, f in zip(rows, finals, strict=True) if not f["worse"])
    found = {"screen": [describe(row, screen[0]) for row in screen], "finals": finals}
    found["chosen"] = chosen
    if yardstick is not None:
        rows = [draw(candidate, conditions, 1) for candidate in (yardstick, chosen)]
        found["yardstick"] = [describe(row, rows[0]) for row in rows]
    return found


def record_search(
    name: str,
    checkpoint: Path,
    yardstick: bool,
    seeds: int,
    keep: bool,
    output: Path,
    root: Path = RESULTS_DIR,
    device: str | None = None,
) -> dict[str, Any]:
    """Search on valid.json, and write down what was found, see `search_sampler`.

    Args:
        name: Of the record.
        checkpoint: Folder of the generator.
        yardstick: Whether to draw with `YARDSTICK` too.
        seeds: Of the finals.
        keep: Whether to save the choice with the checkpoint.
        output: Folder of the log of what was drawn, one for each network.
        root: Folder of the records.
        device: Where to draw; None takes the best there is.

    Raises:
        UserError: A folder cannot be read or written.
    """
    for folder in (root / require_name(name), output, *([checkpoint] if keep else [])):
        require_writable(folder)
    weights = checkpoint / "unet"  # beside them lie the settings, which the choice changes
    pipeline = load_pipeline(checkpoint, device)
    draw = functools.partial(
        draw_candidate,
        log=output / f"{file_hash(weights)[:12]}.jsonl",
        pipeline=pipeline,
        evaluator=Evaluator.load(device=device),
        auditor=Auditor.load(device=device),
    )
    conditions, beside = named_conditions("valid"), YARDSTICK if yardstick else None
    found = search_sampler(draw, conditions, CANDIDATES, beside, seeds)
    write_record(name, {}, found, root, weights=weights)
    if keep:
        if found["chosen"].timestep_shift != 1:
            raise UserError(f"{found['chosen']} has a shift, which no pipeline can be saved with")
        save_pipeline(_pipeline(pipeline, found["chosen"]), checkpoint)
    return found


def print_search(found: dict[str, Any]) -> None:
    """Print a line for each row, and the choice."""
    for part in ("screen", "finals", "yardstick"):
        for row in found.get(part, []):
            scores = (f"{name} {row[name].value:.4f}" for name in (*SCORES, "exact_scene"))
            worse = "worse" if row["worse"] else ""
            print(f"{part:10}{row['name']:40}{row['passes']:5} passes ", *scores, worse, sep="  ")
    print(f"chosen: {found['chosen']}")


def describe(row: Row, default: Row) -> dict[str, Any]:
    """Return a row of the record.

    It has the candidate, its "passes" of the network a picture, the scores, the auditor's
    "exact_scene", how the deciding scores differ from the default's, and every picture's verdict.
    """
    found = score_verdicts(row["pictures"])
    apart = {score: _paired(row, default, score) for score in SCORES}
    return {
        "name": str(row["candidate"]),
        **asdict(row["candidate"]),
        "passes": row["passes"],
        **{score: getattr(found["scores"], score) for score in SCORES},
        "exact_scene": found["audit"].exact_scene,
        "difference": apart,
        "worse": any(gap.high < 0 for gap in apart.values()),
        "pictures": row["pictures"],
    }


def draw_candidate(
    candidate: Candidate,
    conditions: Conditions,
    repetitions: int,
    log: Path,
    pipeline: ConditionalDDPMPipeline,
    evaluator: Evaluator,
    auditor: Auditor,
) -> Row:
    """Draw and judge pictures, unless the log has them.

    Args:
        candidate: How to sample.
        conditions: N lists of labels.
        repetitions: Pictures of each.
        log: File of what was drawn; it is added to.
        pipeline: The generator.
        evaluator: The judge.
        auditor: The second judge.

    Returns:
        "candidate", its "passes" of the network a picture, and "pictures", the `Verdicts`.
    """
    found = []
    for repetition in range(repetitions):
        key = {"candidate": str(candidate), "conditions": len(conditions), "repetition": repetition}
        rows = read_log(log) if log.exists() else []
        if not any(key.items() <= row.items() for row in rows):
            metrics, _ = draw_and_judge(
                _pipeline(pipeline, candidate),
                conditions,
                evaluator,
                auditor,
                repetitions=1,
                first_seed=repetition * len(conditions),
            )
            append_log(log, key | {name: metrics[name] for name in _LOGGED})
            rows = read_log(log)
        found.append(next(row for row in rows if key.items() <= row.items()))
    drawn = [row["pictures"] for row in found]
    lists = {name: sum((one[name] for one in drawn), []) for name in _LISTS}
    pictures = Verdicts(drawn[0]["conditions"], **lists)
    return {"candidate": candidate, "passes": count_passes(found[0]), "pictures": pictures}


def _pipeline(pipeline: ConditionalDDPMPipeline, candidate: Candidate) -> ConditionalDDPMPipeline:
    """Make a pipeline that samples as the candidate says."""
    scheduler = convert_scheduler(pipeline.scheduler, candidate.scheduler)
    settings = {name: getattr(candidate, name) for name in SETTINGS}
    made = ConditionalDDPMPipeline(pipeline.unet, scheduler, **settings)
    if candidate.timestep_shift != 1:
        set_timesteps = made.scheduler.set_timesteps
        set_timesteps(candidate.num_inference_steps)
        left = np.arange(candidate.num_inference_steps, 0, -1) / candidate.num_inference_steps
        left *= candidate.timestep_shift / (1 + (candidate.timestep_shift - 1) * left)
        times = (int(made.scheduler.timesteps[0]) * left).round().astype(int).tolist()
        made.scheduler.set_timesteps = lambda *_: set_timesteps(timesteps=times)
    return made


def _paired(row: Row, default: Row, score: str) -> Estimate:
    ratios = [one["pictures"].ratios()["scores"][score] for one in (row, default)]
    return difference(*ratios, row["pictures"].condition)


def _scores(row: Row) -> tuple[float, ...]:
    ratios = row["pictures"].ratios()["scores"]
    return tuple(float(sum(ratios[score][0]) / sum(ratios[score][1])) for score in SCORES)
