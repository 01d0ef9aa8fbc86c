"""The commands for the course: handing in, one's own weights, the course's folder."""

from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from lab7.errors import UserError
from lab7.layouts import ROOT
from workshop import options
from workshop.course.options import NONE_GIVEN, Options


def handin(
    student_id: Annotated[str | None, Positional, arg(metavar="ID")] = None,
    name: Annotated[str | None, Positional, arg(metavar="NAME")] = None,
    /,
    year: str | None = None,
    check: Path | None = None,
    output: Path = ROOT / "build",
    checkpoint: options.Checkpoint = options.GENERATOR,
    results: options.Results = options.RESULTS,
    data: options.Data = None,
    seed: options.Seed = 0,
    evaluator: options.Weights = None,
    device: options.Device = None,
) -> None:
    """Make the zip that the course wants handed in, or check one against the course's list.

    It holds the source, a picture for each condition of test and new_test, and the report with
    their grids, the denoising row and the accuracies.

    Args:
        student_id: Yours, without spaces.
        name: Yours, in any script.
        year: Whose hand-out to follow: 2023-spring, 2023-summer, 2024, 2025 or 2026; by default
            the newest.
        check: Only check this zip, which may be another student's.
        output: Folder for the zip, for instance DL_LAB6_ID_NAME.zip.
    """
    from lab7.evaluator import Evaluator
    from lab7.pipeline import load_pipeline
    from workshop.course.handin import make_handin
    from workshop.course.handin_check import print_check
    from workshop.course.handouts import find_handout
    from workshop.study.evaluation import show_data

    handout = find_handout(year)
    if check is not None:
        return print_check(check, handout, data)
    if student_id is None or name is None:
        raise UserError("give ID and name, such as handin 123456 Ada_Lovelace, or --check ZIP")
    options.require_seed(seed)
    data = show_data(data)
    path, findings = make_handin(
        student_id,
        name,
        handout,
        load_pipeline(checkpoint, device),
        Evaluator.load(evaluator, device, data),
        output=output,
        checkpoint=checkpoint,
        results=results,
        data=data,
        seed=seed,
    )
    print(*findings, f"saved {path}", sep="\n")


def adopt(
    weights: Annotated[Path, Positional, arg(metavar="WEIGHTS")],
    /,
    out: Path = Path("mine"),
    key: str | None = None,
    network: Annotated[Options, arg(name="")] = NONE_GIVEN,
    steps: int = 20,
    guidance: float = 1.0,
    guidance_interval: tuple[int, int] | None = None,
    scheduler: str = "sde-dpmsolver++",
    evaluator: options.Weights = None,
    data: options.Data = None,
    device: options.Device = None,
) -> None:
    """Turn the weights of your own network into a pipeline that every command here takes.

    It reads networks of diffusers' UNet2DModel whose condition goes through one linear layer to the
    time embedding, or in as 24 more channels. It prints what it read off the shapes and what it
    assumed, draws a picture for each condition of test.json into OUT/test, and scores them: a score
    far below your own says that something assumed is wrong.

    Args:
        weights: A .pth, .pt, .ckpt, .bin or .safetensors file, be it a whole training checkpoint,
            or a folder that save_pretrained wrote.
        out: Folder of the pipeline.
        key: Where in the file the weights are, for instance ema; needed if there are several.
        network: What weights do not tell.
        steps: Sampling steps that the pipeline takes by default.
        guidance: Weight of classifier-free guidance; 1 is none. More is for networks that were
            trained without labels at times.
        guidance_interval: Lowest and highest time step with guidance; by default all.
        scheduler: Sampler: ddpm, ddim, dpmsolver++, sde-dpmsolver++ or unipcmultistep.
    """
    from workshop.course.adopt import adopt
    from workshop.study.evaluation import show_data

    guided, data = (guidance, guidance_interval), show_data(data)
    adopt(weights, out, key, network, steps, *guided, scheduler, evaluator, data, device)


def export(folder: Annotated[Path, Positional, arg(metavar="FOLDER")], /) -> None:
    """Write the stand-in in the course's layout, so that other code of this lab runs on it.

    It holds objects.json, train.json, test.json, new_test.json, iclevr/ with 18,009 PNGs of 64×64,
    checkpoint.pth as the course's evaluator.py loads it, and a README that says whose all this is.

    Args:
        folder: Folder to write: a new or an empty one. It appears once all of it is written.
    """
    from workshop.course.export import export

    export(folder)
