"""Reading JSON, and writing files so that they are whole or not there."""

import difflib
import errno
import io
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lab7.errors import MissingFileError, UserError, user_files


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises:
        MissingFileError: No such file; the message names the nearest one in the folder.
        UserError: The file is not JSON.
    """
    path = Path(path)
    if not path.exists():
        names = [file.name for file in path.parent.glob("*.json")]
        nearest = difflib.get_close_matches(path.name, names, n=1)
        hint = f": did you mean {path.parent / nearest[0]}?" if nearest else ""
        raise MissingFileError(f"no file {path}{hint}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not a JSON file: {error}") from None


def write_atomically(
    path: Path, content: str | bytes | Callable[[io.BufferedWriter], None]
) -> None:
    """Write a file under a temporary name in the same folder, then rename it.

    Args:
        path: The file to make or replace; folders that it needs are made.
        content: A text, bytes, or a function that gets the open binary file. If it fails, nothing
            is left behind.

    Raises:
        UserError: No permission, no space, or a file where a folder is needed.
    """
    with user_files():
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
        try:
            with open(descriptor, "wb") as file:
                if callable(content):
                    content(file)
                else:
                    file.write(content.encode() if isinstance(content, str) else content)
            os.chmod(name, 0o644)  # mkstemp lets nobody but the owner read
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise


def require_no_file(folder: Path) -> None:
    """Find out whether a folder to write to is, or lies in, what is a file.

    Raises:
        UserError: It does; the message names the file.
    """
    for place in (folder, *folder.parents):
        if place.exists() and not place.is_dir():
            raise UserError(f"{place} is a file, not a folder: choose another output")


def require_writable(folder: Path) -> None:
    """Make a folder that long work will write to, and find out now whether it may.

    Raises:
        UserError: No permission, a read-only place, or a file where a folder is needed.
    """
    require_no_file(folder)
    with user_files():
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))


def user_path(path: str | Path) -> Path:
    """Return the path that a user typed, perhaps with `~` or in quotes."""
    return Path(os.path.expanduser(str(path).strip("\"'“” ")))


def existing_folder(path: str | Path) -> Path:
    """Return the folder that a user named, see `user_path`.

    Raises:
        MissingFileError: There is none.
        UserError: It is a file, or may not be read.
    """
    folder = user_path(path)
    with user_files():
        if not folder.exists():
            raise MissingFileError(f"no folder {folder}")
        if not folder.is_dir():
            raise UserError(f"{folder} is a file, not a folder: name its folder; unpack archives")
        os.scandir(folder).close()  # which says so if it may not be read
    return folder
