"""What to predict, and at which contrast: short trainings that differ in nothing else."""

import dataclasses
from pathlib import Path
from typing import Any

from lab7.auditor import Auditor
from lab7.dataset import ICLEVRDataset, data_hash
from lab7.evaluator import Evaluator
from lab7.experiments import TrainConfig, get_experiment
from lab7.files import require_writable
from lab7.records import RESULTS_DIR
from workshop.records import require_name, write_record
from workshop.study.experiments import train_and_score

_OURS = get_experiment("ours").config
# Three narrow levels, trained briefly and without guidance; what is not named is as in `ours`.
BASE = dataclasses.replace(
    _OURS,
    unet=_OURS.unet | {
        "block_out_channels": [32, 64, 96], "attention_head_dim": 48, "norm_num_groups": 8,
    },
    num_steps=1000, batch_size=64, warmup_steps=50, label_dropout=0.0, ema_decay=0.995,
    log_every=25, save_every=250, sample_every=None, guidance_scale=1.0, guidance_interval=None,
)  # fmt: skip
# Times 8, pictures have about the standard deviation of the noise; v, up to its sign, is then what
# EDM's preconditioning makes a network predict (Karras et al. 2022, table 1).
TRIALS = [
    {"prediction_type": target, "scaling_factor": scale, "patch_size": patch}
    for patch, scale in ((4, 1.0), (4, 8.0), (2, 1.0))
    for target in ("sample", "v_prediction", "epsilon")
]


def target_config(trial: dict[str, Any]) -> TrainConfig:
    """Return the configuration of one of `TRIALS`."""
    network = {name: trial[name] for name in ("scaling_factor", "patch_size")}
    noise = {"prediction_type": trial["prediction_type"]}
    return dataclasses.replace(BASE, unet=BASE.unet | network, noise=BASE.noise | noise)


def record_targets(
    name: str = "targets",
    output: Path = Path("runs") / "targets",
    results: Path = RESULTS_DIR,
    data: Path | None = None,
    device: str | None = None,
) -> list[dict[str, Any]]:
    """Run all trials and write them down.

    Args:
        name: Of the record.
        output: Folder of the runs; what is there is not run again.
        results: Folder of the records.
        data: Folder of the pictures, see `find_layout`.
        device: See `choose_device`.

    Returns:
        The trials, each with its "milestones", see `train_and_score`.

    Raises:
        UserError: A folder cannot be written, or a run has changed since it was started.
    """
    require_writable(results / require_name(name))
    dataset = ICLEVRDataset(data)
    judges = Evaluator.load(device=device, root=data), Auditor.load(device=device)
    rows = []
    for trial in TRIALS:
        run = output / "{prediction_type}-times-{scaling_factor:g}-patch-{patch_size}".format(
            **trial
        )
        milestones = train_and_score(target_config(trial), dataset, run, *judges, data, device)
        rows.append(trial | {"milestones": milestones})
    found = {"trials": rows, "data_sha256": data_hash(dataset.images, dataset.conditions)}
    write_record(name, BASE, found, results)
    return rows
