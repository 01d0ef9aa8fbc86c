"""What takes long to compute and is kept for the next time."""

import contextlib
import getpass
import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import platformdirs

from lab7.errors import UserError
from lab7.files import write_atomically


def cache_folder() -> Path:
    """Return where it is kept: `LAB7_CACHE`, else the user's cache.

    Where that cannot be written, as in a read-only home, it is a folder among the temporary ones.
    """
    if os.environ.get("LAB7_CACHE"):
        return Path(os.environ["LAB7_CACHE"]).expanduser()
    cache = Path(platformdirs.user_cache_dir("lab7", appauthor=False))
    there = next(place for place in (cache, *cache.parents) if os.path.exists(place))
    temporary = Path(tempfile.gettempdir()) / f"lab7-{getpass.getuser()}"
    return cache if os.access(there, os.W_OK) else temporary


def cached(name: str, compute: Callable[[], np.ndarray], renew: bool = False) -> np.ndarray:
    """Return an array from the cache, or compute it and keep it.

    Where the cache cannot be written, a warning says so.

    Args:
        name: Of its file, without ending; other arrays need other names.
        compute: Makes the array.
        renew: Whether to compute it even if it is there.

    Returns:
        The array, perhaps mapped from the cache: changes stay in this process.
    """
    path = cache_folder() / f"{name}.npy"
    if not renew:
        with contextlib.suppress(OSError, ValueError, EOFError):  # not there, cut off or no array
            return np.load(path, mmap_mode="c")
    array = compute()
    try:
        write_atomically(path, lambda file: np.save(file, array))
    except UserError as error:
        warnings.warn(
            f"it is kept in memory and computed again next time, as there is no cache: {error}; "
            "set LAB7_CACHE to a folder that can be written",
            stacklevel=4,
        )
    return array
