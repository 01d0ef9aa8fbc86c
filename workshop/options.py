"""Options that several commands share."""

from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from lab7.errors import UserError
from lab7.layouts import ROOT

GENERATOR = ROOT / "data" / "weights" / "generator"
RESULTS = ROOT / "report" / "results"

Checkpoint = Annotated[
    Path, arg(help="Saved pipeline; by default the one that comes with the project.")
]
Results = Annotated[Path, arg(help="Folder of the records.")]
Data = Annotated[
    Path | None, arg(help="The course's folder; by default $LAB7_DATA, else the embedded set.")
]
Pictures = Annotated[
    Path | None,
    arg(help="Folder of the course's PNGs if not in DATA; by default $LAB7_PICTURES, else DATA."),
]
Weights = Annotated[
    Path | None, arg(help="Weights of the evaluator; by default checkpoint.pth of DATA, else ours.")
]
Device = Annotated[str | None, arg(help="cuda, mps or cpu; by default the best there is.")]
Seed = Annotated[int, arg(help="Of the first picture; each next has one more.")]
Steps = Annotated[int | None, arg(help="Sampling steps; by default the checkpoint's own.")]
Guidance = Annotated[
    float | None,
    arg(help="Weight of classifier-free guidance, 1 for none; by default the checkpoint's own."),
]
GuidanceInterval = Annotated[
    tuple[int, int] | None,
    arg(
        metavar="LOW HIGH",
        help="Lowest and highest time step with guidance; by default the checkpoint's own.",
    ),
]
Sampler = Annotated[
    str | None,
    arg(
        help="ddpm, ddim, dpmsolver++, sde-dpmsolver++ or unipcmultistep; by default the "
        "checkpoint's own."
    ),
]


def require_seed(seed: int) -> None:
    """Raise a UserError for a seed that a generator of random numbers cannot have."""
    if not 0 <= seed < 2**63:
        raise UserError(f"seed {seed} is not within 0 … 2**63 - 1")
