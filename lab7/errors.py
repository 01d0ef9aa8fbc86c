"""What a user can mend: its class of errors, and how a wrong name is answered."""

import contextlib
import difflib
from collections.abc import Iterable, Iterator


class UserError(ValueError):
    """Something that the user can mend: the command line shows its message alone.

    Any other error is a bug, a student's own included, and keeps its traceback.
    """


class MissingFileError(UserError, FileNotFoundError):
    """A file or folder that was named and is not there."""


@contextlib.contextmanager
def user_files() -> Iterator[None]:
    """Turn an OSError in the block, such as a full disk, into a UserError that names the file."""
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        raise UserError(f"{error.strerror or error}{where}") from error


def unknown(kind: str, name: object, choices: Iterable[str]) -> UserError:
    """Make the error for a name that is not among the choices: it has the nearest and all of them.

    Args:
        kind: What is named, for instance "sampler".
        name: What was given.
        choices: What may be given.
    """
    choices = list(choices)
    if not choices:
        return UserError(f"unknown {kind} {name!r}: there is none")
    nearest = difflib.get_close_matches(str(name), choices, 1, cutoff=0)[0]
    return UserError(
        f"unknown {kind} {name!r}: did you mean {nearest!r}? Choose one of {', '.join(choices)}"
    )
