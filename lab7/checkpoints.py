"""The folder of a training run: states written atomically and verified when read, its log, its
lock, what it is of, and stopping at a good moment."""

import contextlib
import errno
import hashlib
import io
import json
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

from lab7.errors import UserError
from lab7.experiments import TrainConfig
from lab7.files import require_writable, write_atomically
from lab7.records import environment

# What may differ between a run and its resumption: none of it changes the course of training.
FREE_FIELDS = (
    "precision",  # compared as it was resolved, see `Run.open`
    "compile",
    "log_every",
    "save_every",
    "sample_every",
    "tensorboard",
    "scheduler",
    "num_inference_steps",
    "guidance_scale",
)
LENGTH_FIELDS = ("num_steps", "budget_seconds")  # that may grow once a run is finished
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
        OSError: It cannot be written; for a full disk the message says what to free.
    """
    folder, buffer = Path(folder), io.BytesIO()
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, buffer)
    content = buffer.getbuffer()
    path = folder / f"step-{step:08d}-{hashlib.sha256(content).hexdigest()[:16]}.pt"
    unfinished = folder / f"unfinished-{os.getpid()}"
    try:
        with open(unfinished, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        problem = (
            f"no space left for a training state: free at least {len(content) / 1e6:.0f} MB; "
            "the states before are kept"
        )
        raise OSError(errno.ENOSPC, problem, str(folder)) from None
    finally:
        unfinished.unlink(missing_ok=True)
    _drop_old(folder, path, keep)
    return path


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
        try:
            return _read(path, device)
        except (ValueError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            reason = str(error).split("\n")[0]
            warnings.warn(f"passing over the training state {path}: {reason}", stacklevel=2)
    if paths:
        raise UserError(f"every training state in {folder} is damaged: remove them to start anew")
    return None


def _read(path: Path, device: str | torch.device) -> dict[str, Any]:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest[:16] != STATE_NAME.fullmatch(path.name)[2]:
            raise UserError("its contents do not match the checksum in its name")
        file.seek(0)
        return torch.load(file, map_location=device, weights_only=True)


def _list_states(folder: Path) -> list[Path]:
    """List the states from the earliest step to the latest."""
    return sorted(path for path in folder.glob("step-*.pt") if STATE_NAME.fullmatch(path.name))


def _drop_old(folder: Path, newest: Path, keep: int) -> None:
    states = _list_states(folder)
    # States at or beyond this step are from a course of training that was not taken further.
    step = newest.name[:13]
    abandoned = [path for path in states if path.name[:13] >= step and path != newest]
    earlier = [path for path in states if path.name[:13] < step]
    for path in abandoned + earlier[: max(0, len(earlier) + 1 - keep)]:
        path.unlink()


@contextlib.contextmanager
def in_use(folder: Path) -> Iterator[None]:
    """Keep other processes from training into a folder meanwhile.

    Raises:
        UserError: Another process does already.
        OSError: The folder cannot be written.
    """
    require_writable(folder)
    lock = FileLock(folder / ".lock", blocking=False)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(
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


def open_folder(
    folder: Path,
    config: TrainConfig,
    facts: dict[str, Any],
    state: dict[str, Any] | None,
    resume: bool,
) -> None:
    """Note in the folder of a run what the run is; without `resume`, empty it first.

    environment.json says where the run was started and, under "resumed", where it went on with
    another machine, commit or packages.

    Args:
        folder: Of the run.
        config: Of this run.
        facts: What else may not change while a run lasts: its pictures, its precision.
        state: The latest in the folder, if there is one.
        resume: Whether the run may go on from it.

    Raises:
        UserError: The folder holds another run; the message shows every difference.
    """
    if not resume:
        for name in ("states", "tensorboard", "pipeline", "samples"):
            shutil.rmtree(folder / name, ignore_errors=True)
        for name in ("config.json", "environment.json", "log.jsonl"):
            (folder / name).unlink(missing_ok=True)
    _check_same_run(folder, config, facts, state)
    for unfinished in folder.glob("states/unfinished-*"):
        unfinished.unlink()  # by a process that was killed
    here, noted = environment(), read_environment(folder)
    if noted:
        starts = [noted, *noted.get("resumed", [])]
        now = {name: here[name] for name in ("date", "machine", "git_commit", "packages")}
        if any(starts[-1][name] != now[name] for name in now if name != "date"):
            noted["resumed"] = [*starts[1:], now]
    write_atomically(folder / "config.json", config.to_json())
    noted = noted or here | facts
    write_atomically(folder / "environment.json", json.dumps(noted, indent=2) + "\n")
    _trim_log(folder / "log.jsonl", 0 if state is None else state["step"])


def read_environment(folder: Path) -> dict[str, Any]:
    """Return where and with what a run was started; {} where none was."""
    path = folder / "environment.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _check_same_run(
    folder: Path, config: TrainConfig, facts: dict[str, Any], state: dict[str, Any] | None
) -> None:
    path = folder / "config.json"
    if not path.exists():
        return
    before, now = json.loads(path.read_text(encoding="utf-8")), json.loads(config.to_json())
    changed = [n for n in now if n not in FREE_FIELDS and before.get(n) != now[n]]
    if set(changed) <= set(LENGTH_FIELDS) and _finished(state, before):
        changed = []
    noted = read_environment(folder)
    changed += [name for name in facts if name in noted and noted[name] != facts[name]]
    before, now = before | noted, now | facts
    if changed:
        differences = "; ".join(f"{n} = {before.get(n)}, not {now[n]}" for n in changed)
        raise UserError(
            f"{folder} holds a run with {differences}: choose another folder, or do not resume"
        )


def _trim_log(path: Path, step: int) -> None:
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
