"""The folder of a training run: who uses it, which run it holds, its log; and stopping in time."""

import contextlib
import json
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lab7.experiments import TrainConfig
from lab7.files import require_writable, write_atomically
from lab7.results import environment

# What may differ between a run and its resumption: none of it changes the course of training.
FREE_FIELDS = (
    *("precision", "compile", "log_every", "save_every", "sample_every", "tensorboard"),
    *("scheduler", "num_inference_steps", "guidance_scale"),
)
LENGTH_FIELDS = ("num_steps", "budget_seconds")  # that may grow once a run is finished


@contextlib.contextmanager
def in_use(folder: Path) -> Iterator[None]:
    """Keep other processes from training into a folder meanwhile.

    Raises:
        ValueError: Another process does already.
        OSError: The folder cannot be written.
    """
    require_writable(folder)
    lock = FileLock(folder / ".lock", blocking=False)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(
            f"{folder} is in use by another training: wait for its end, or choose another folder"
        ) from None
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def postponed_interrupts() -> Iterator[Callable[[], bool]]:
    """Let Ctrl+C, a notebook's Stop and SIGTERM wait for a good moment; a second one does not.

    Yields:
        A function that tells whether there was one; whoever asks must then stop.
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


def prepare_folder(folder: Path, config: TrainConfig, resume: bool, course: bool) -> None:
    """Note in the folder of a run what the run is; without `resume`, empty it first."""
    if not resume:
        for name in ("states", "tensorboard", "pipeline", "samples"):
            shutil.rmtree(folder / name, ignore_errors=True)
        for name in ("config.json", "environment.json", "log.jsonl"):
            (folder / name).unlink(missing_ok=True)
    for unfinished in folder.glob("states/unfinished-*"):
        unfinished.unlink()  # by a process that was killed
    write_atomically(folder / "config.json", config.to_json())
    where = environment() | {"course_pictures": course}
    write_atomically(folder / "environment.json", json.dumps(where, indent=2) + "\n")


def check_same_run(folder: Path, config: TrainConfig, state: dict[str, Any] | None) -> None:
    """Make sure that a folder holds no other run than this, or a finished one that is to go on.

    Args:
        folder: Of the run.
        config: Of this run.
        state: The latest in the folder, if there is one.

    Raises:
        ValueError: It does; the message shows every difference.
    """
    path = folder / "config.json"
    if not path.exists():
        return
    before, now = json.loads(path.read_text(encoding="utf-8")), json.loads(config.to_json())
    changed = [n for n in now if n not in FREE_FIELDS and before.get(n) != now[n]]
    if set(changed) <= set(LENGTH_FIELDS) and _finished(state, before):
        return
    if changed:
        differences = "; ".join(f"{n} = {before.get(n)}, not {now[n]}" for n in changed)
        raise ValueError(
            f"{folder} holds a run with {differences}: choose another folder, or do not resume"
        )


def trim_log(path: Path, step: int) -> None:
    """Drop the rows beyond the state that a run goes on from: it will write them again."""
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        write_atomically(path, "".join(line for line in lines if _step(line) <= step))


def _step(line: str) -> float:
    """Return the step of a row of the log; a row that a full disk cut short is beyond all."""
    try:
        return json.loads(line)["step"]
    except json.JSONDecodeError:
        return float("inf")


def _finished(state: dict[str, Any] | None, config: dict[str, Any]) -> bool:
    """Tell whether a state is at the end of its run's steps or time."""
    if state is None:
        return False
    budget = config.get("budget_seconds")
    return state["step"] >= config["num_steps"] or (budget and state["seconds"] >= budget)
