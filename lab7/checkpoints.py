"""Training states on disk: written atomically, verified when read."""

import errno
import hashlib
import io
import os
import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import torch

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
        ValueError: If there are states but every one is damaged.
    """
    paths = _list_states(Path(folder))
    for path in reversed(paths):
        try:
            return _read(path, device)
        except (ValueError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            reason = str(error).split("\n")[0]
            warnings.warn(f"passing over the training state {path}: {reason}", stacklevel=2)
    if paths:
        raise ValueError(f"every training state in {folder} is damaged: remove them to start anew")
    return None


def _read(path: Path, device: str | torch.device) -> dict[str, Any]:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest[:16] != STATE_NAME.fullmatch(path.name)[2]:
            raise ValueError("its contents do not match the checksum in its name")
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
