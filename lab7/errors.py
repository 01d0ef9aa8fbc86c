"""What a user can mend: its classes of errors, and how a wrong name is answered."""

import contextlib
import difflib
from collections.abc import Iterable, Iterator
from pathlib import Path

from safetensors import SafetensorError


class UserError(ValueError):
    """Something that the user can mend: the command line shows its message alone.

    Any other error is a bug, a student's own included, and keeps its traceback.
    """


class FileError(UserError, OSError):
    """A file or folder of the user's that cannot be read or written."""


class MissingFileError(FileError, FileNotFoundError):
    """A file or folder that was named and is not there."""


@contextlib.contextmanager
def user_files(path: str | Path | None = None) -> Iterator[None]:
    """Turn an OSError in the block, as of a full disk, into a FileError that names the file.

    It also serves as a decorator, `@user_files()`, of a function that only reads or writes.

    Args:
        path: What is read or written. An error may name a temporary file instead, or, of a full
            disk, none.
    """
    try:
        yield
    except UserError:
        raise
    except (OSError, SafetensorError) as error:  # the second of weights that fill a disk
        kind = MissingFileError if isinstance(error, FileNotFoundError) else FileError
        reason = getattr(error, "strerror", None) or error
        where = path or getattr(error, "filename", None)
        raise kind(f"{reason}{f': {where}' if where else ''}") from error


def did_you_mean(name: object, choices: Iterable[str]) -> str:
    """Return ": did you mean …?" with the nearest of the choices, or "" if there are none."""
    folded = {choice.casefold(): choice for choice in choices}
    close = difflib.get_close_matches(str(name).casefold(), folded, 1, cutoff=0)
    return f": did you mean {folded[close[0]]!r}?" if close else ""


def unknown(kind: str, name: object, choices: Iterable[str], allowed: str = "") -> UserError:
    """Make the error for a name that is not among the choices: it has the nearest and all of them.

    Args:
        kind: What is named, for instance "sampler".
        name: What was given.
        choices: What may be given.
        allowed: A sentence that says it, where a list of all choices would be too long.
    """
    choices = list(choices)
    if not choices:
        return UserError(f"unknown {kind} {name!r}: there is none")
    allowed = allowed or f"Choose one of {', '.join(choices)}"
    return UserError(f"unknown {kind} {name!r}{did_you_mean(name, choices)} {allowed}")
