"""The folder of a training run: its checkpoints (training states), lock, description and log."""

import contextlib
import hashlib
import io
import json
import math
import os
import pickle
import re
import shutil
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from lab7.errors import UserError, user_files
from lab7.experiments import TrainConfig
from lab7.files import read_json, require_writable, write_atomically
from lab7.pipeline import SETTINGS
from lab7.records import environment

# Settings that may change when a run is resumed: they do not change its weights.
_SAVING = ("log_every", "save_every", "sample_every", "tensorboard")
FREE_FIELDS = ("compile", *_SAVING, "scheduler", *SETTINGS)
LENGTH_FIELDS = {"num_steps", "budget_seconds"}  # that may grow once a run is finished
_PLACE = ("machine", "git_commit", "packages")  # noted anew where a run goes on elsewhere
STATE_NAME = re.compile(r"step-(\d{8})-([0-9a-f]{16})\.pt")


def save_state(folder: str | Path, step: int, state: dict[str, Any], keep: int = 2) -> Path:
    """Write a training state and drop those it replaces.

    The name carries the step and the first 16 digits of the file's sha256, so that one rename
    puts both in place.

    Args:
        folder: Made if it does not exist.
        step: Optimizer steps done.
        state: Tensors and plain Python values, nested in dicts and lists.
        keep: How many of the latest states stay.

    Returns:
        The file.

    Raises:
        UserError: It cannot be written; the message says where and how large it is.
    """
    folder, buffer = Path(folder), io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getvalue()
    path = folder / f"step-{step:08d}-{hashlib.sha256(content).hexdigest()[:16]}.pt"
    try:
        write_atomically(path, content)
    except UserError as error:
        problem = f"no training state of {len(content) / 1e6:.0f} MB could be saved in {folder}"
        raise UserError(f"{problem}: {error}") from error
    _drop_old(path, keep)
    return path


@user_files()
def load_latest(folder: str | Path, device: str | torch.device = "cpu") -> dict[str, Any] | None:
    """Read the latest intact training state.

    Args:
        folder: Where `save_state` wrote.
        device: Where its tensors go.

    Returns:
        The state, or None if there has never been one. A damaged state is passed over with a
        warning, in favour of the one before.

    Raises:
        UserError: If there are states but every one is damaged.
    """
    paths = _list_states(Path(folder))
    for path in reversed(paths):
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest()[:16] != STATE_NAME.fullmatch(path.name)[2]:
            problem = "its content does not match the checksum in its name"
        else:
            try:
                return torch.load(io.BytesIO(content), map_location=device, weights_only=True)
            except pickle.UnpicklingError as error:
                problem = str(error).split("\n")[0]
        warnings.warn(f"passing over the training state {path}: {problem}", stacklevel=3)
    if paths:
        raise UserError(f"every training state in {folder} is damaged: remove them to start anew")
    return None


def _list_states(folder: Path) -> list[Path]:
    """List the states from the earliest step to the latest."""
    return sorted(path for path in folder.glob("step-*.pt") if STATE_NAME.fullmatch(path.name))


def _drop_old(newest: Path, keep: int) -> None:
    """Drop all states but the newest and those just before it; later ones were abandoned."""
    states = _list_states(newest.parent)
    earlier = [path for path in states if path.name[:13] < newest.name[:13]]
    kept = [*earlier, newest][-keep:]
    for path in states:
        if path not in kept:
            path.unlink()
    for unfinished in newest.parent.glob(".step-*"):
        unfinished.unlink()  # by a process that was killed


@contextlib.contextmanager
def in_use(folder: Path) -> Iterator[None]:
    """Lock the folder of a run against other trainings; of several processes the first does.

    Raises:
        UserError: Another training has it, or it cannot be written.
    """
    if int(os.environ.get("RANK", 0)) > 0:
        yield
        return
    require_writable(folder)
    lock = FileLock(folder / ".lock", blocking=False)
    with user_files():
        try:
            lock.acquire()
        except Timeout:
            raise UserError(
                f"{folder} is in use by another training: wait for its end, or choose another"
            ) from None
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def postponed_interrupts() -> Iterator[Callable[[], bool]]:
    """Postpone Ctrl+C, a notebook's Stop and SIGTERM until all is saved; a second one is obeyed.

    Yields:
        A function that tells whether there was one; its caller must then save and stop.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False  # only the main thread gets signals
        return
    asked = threading.Event()

    def ask(number, frame):
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@user_files()
def open_folder(
    folder: Path,
    config: TrainConfig,
    facts: dict[str, Any],
    state: dict[str, Any] | None,
    resume: bool,
) -> None:
    """Write config.json and environment.json of a run; without `resume`, empty its folder first.

    environment.json describes where the run was started and, under "resumed", each place where it
    went on with another machine, commit or packages.

    Args:
        folder: Of the run.
        config: Of this run.
        facts: What else must stay the same: its pictures, its precision.
        state: The latest in the folder, if there is one.
        resume: Whether the run may go on from it.

    Raises:
        UserError: The folder holds another run; the message shows every difference.
    """
    if not resume:
        for name in ("states", "tensorboard", "pipeline", "samples"):
            shutil.rmtree(folder / name, ignore_errors=True)
        for name in ("config.json", "environment.json", "log.jsonl", "milestones.json"):
            (folder / name).unlink(missing_ok=True)
    _require_same_run(folder, config, facts, state)
    here = environment()
    noted = read_environment(folder) or here | facts
    starts = [noted, *noted.get("resumed", [])]
    if any(starts[-1][name] != here[name] for name in _PLACE):
        noted["resumed"] = [*starts[1:], {name: here[name] for name in ("date", *_PLACE)}]
    write_atomically(folder / "config.json", config.to_json())
    write_atomically(folder / "environment.json", json.dumps(noted, indent=2) + "\n")
    _trim_log(folder / "log.jsonl", 0 if state is None else state["step"])


@user_files()
def read_environment(folder: Path) -> dict[str, Any]:
    """Return the environment in which a run was started; {} where there is no run."""
    path = folder / "environment.json"
    return read_json(path) if path.exists() else {}


def _require_same_run(
    folder: Path, config: TrainConfig, facts: dict[str, Any], state: dict[str, Any] | None
) -> None:
    """Refuse to go on with a run of other settings, pictures or precision."""
    if not (folder / "config.json").exists():
        return
    now = json.loads(config.to_json()) | facts
    # The precision counts as it was resolved: a fact, not the configuration's "auto".
    before = facts | read_json(folder / "config.json") | {"precision": facts["precision"]}
    before |= read_environment(folder)
    changed = [n for n in now if n not in FREE_FIELDS and before.get(n) != now[n]]
    if set(changed) <= LENGTH_FIELDS and state is not None:
        budget = before["budget_seconds"] or math.inf
        finished = state["step"] >= before["num_steps"] or state["seconds"] >= budget
        grows = (math.inf if now[n] is None else now[n] >= (before[n] or 0) for n in changed)
        if finished and all(grows):
            return
    if changed:
        differences = "; ".join(f"{n} = {before.get(n)}, not {now[n]}" for n in changed)
        raise UserError(f"{folder} holds a run with {differences}: take another, or do not resume")


def _trim_log(path: Path, step: int) -> None:
    """Drop the rows after the state that a run resumes from: it will write them again."""
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        write_atomically(path, "".join(line for line in lines if _step(line) <= step))


def _step(line: str) -> float:
    """Return the step of a row of the log; infinity for a row that a full disk cut short."""
    try:
        return json.loads(line)["step"]
    except json.JSONDecodeError:
        return math.inf
