"""Reading JSON, and writing files so that they are whole or not there."""

import errno
import io
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lab7.errors import FileError, MissingFileError, UserError, did_you_mean, user_files

_SHOWN = 30  # characters of a broken line, before and after the place


def read_json(path: str | Path) -> Any:
    """Read a JSON file in any encoding of Unicode, with or without a byte order mark.

    Raises:
        MissingFileError: No such file, see `existing_file`.
        FileError: It cannot be read.
        UserError: The file is not JSON; the message has the line and what stands there.
    """
    path = existing_file(path)
    with user_files(path):
        content = path.read_bytes()
    try:
        return json.loads(content)
    except json.JSONDecodeError as error:
        line, column = error.doc.split("\n")[error.lineno - 1], error.colno
        found = line[max(0, column - _SHOWN) : column + _SHOWN].strip()
        where = f"in {found!r}" if found else "at the end of the file"
        raise UserError(
            f"{path}, line {error.lineno} is not JSON: {error.msg.removesuffix(' at')} {where}"
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not JSON: byte {error.start} is no {error.encoding}; save it as UTF-8"
        ) from None
    except RecursionError:
        raise UserError(f"{path} is not JSON that can be read: its lists are too deep") from None


def write_atomically(
    path: Path, content: str | bytes | Callable[[io.BufferedWriter], None]
) -> None:
    """Write a file under a temporary name in the same folder, then rename it.

    Args:
        path: The file to make or replace; folders that it needs are made.
        content: A text, bytes, or a function that gets the open binary file. If it fails, nothing
            is left behind.

    Raises:
        FileError: No permission, no space, or a file where a folder is needed or the other way
            round.
    """
    with user_files(path):
        require_replaceable(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
        try:
            with open(descriptor, "wb") as file:
                if callable(content):
                    content(file)
                else:
                    file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())  # a name never stands for less than the whole file
            os.chmod(name, 0o644)  # mkstemp lets nobody but the owner read
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise


def require_replaceable(path: Path) -> None:
    """Find out whether a file could be written: its name is free, or taken by a file.

    Raises:
        FileError: The name is that of a folder or a device, or see `require_place`.
    """
    require_place(path.parent)
    if path.exists() and not path.is_file():
        raise FileError(f"{path} is {kind_of(path)}, not a file: choose another output")


def require_place(folder: Path) -> None:
    """Find out whether a folder that may not be there yet could be written to.

    Raises:
        FileError: No permission, a read-only place, or a file where a folder is needed.
    """
    with user_files():
        there = next(place for place in (folder, *folder.parents) if place.exists())
        if not there.is_dir():
            raise FileError(f"{there} is a file, not a folder: choose another output")
        if not os.access(there, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(there))


def require_writable(folder: Path) -> None:
    """Make a folder that long work will write to, and find out now whether it may.

    Raises:
        FileError: See `require_place`.
    """
    require_place(folder)
    with user_files():
        folder.mkdir(parents=True, exist_ok=True)


def kind_of(path: Path) -> str:
    """Say what a path that is there is, other than a file."""
    return "a folder" if path.is_dir() else "a device"


def user_path(path: str | Path) -> Path:
    """Return the path that a user typed, perhaps with `~` or in quotes."""
    return Path(os.path.expanduser(str(path).strip("\"'“” ")))


def existing_file(path: str | Path) -> Path:
    """Return the file that a user named, see `user_path`.

    Raises:
        MissingFileError: There is none; the message names the nearest in the folder.
        FileError: It is a folder or a device.
    """
    file = user_path(path)
    with user_files(file):
        if not file.exists():
            others = [str(other) for other in file.parent.glob(f"*{file.suffix}")]
            raise MissingFileError(f"no file {file}{did_you_mean(file, others)}")
        if not file.is_file():
            raise FileError(f"{file} is {kind_of(file)}, not a file")
    return file


def existing_folder(path: str | Path) -> Path:
    """Return the folder that a user named, see `user_path`.

    Raises:
        MissingFileError: There is none.
        UserError: It is a file, or may not be read.
    """
    folder = user_path(path)
    with user_files():
        if not folder.exists():
            others = [str(other) for other in folder.parent.glob("*/")]
            raise MissingFileError(f"no folder {folder}{did_you_mean(folder, others)}")
        if not folder.is_dir():
            raise UserError(f"{folder} is a file, not a folder: name its folder; unpack archives")
        os.scandir(folder).close()  # which says so if it may not be read
    return folder
