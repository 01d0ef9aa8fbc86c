"""Files of weights, whatever they are wrapped in, and what files are that hold none."""

import contextlib
import pickle
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from lab7.errors import UserError, user_files
from lab7.files import existing_file

_DEPTH = 4  # dictionaries within dictionaries that are looked through
_ARCHIVES = (b"Rar!", b"7z\xbc\xaf", b"\x1f\x8b", b"BZh", b"\xfd7zXZ")


def read_weights(path: str | Path, wanted: Mapping[str, Tensor], network: str) -> dict[str, Tensor]:
    """Read the weights of a network.

    They may lie in dictionaries (`model`, `state_dict`, …) beside other things, and their names may
    have a beginning in common (`module.`, `resnet18.`, …).

    Args:
        path: File of safetensors or of PyTorch.
        wanted: The network's own `state_dict()`.
        network: What it is, for messages.

    Returns:
        Weights of the names and shapes of `wanted`.

    Raises:
        MissingFileError: There is no such file.
        UserError: See `read_checkpoint`, or the weights are not those of this network.
    """
    candidates = [_plain(found, wanted) for found in _dictionaries(read_checkpoint(path), _DEPTH)]
    weights = max(candidates, key=lambda found: len(found.keys() & wanted), default={})
    surplus = sorted(weights.keys() - wanted)
    for name, tensor in wanted.items():
        if name not in weights:
            raise UserError(f"{path} does not fit {network}: it lacks {name}")
        if weights[name].shape != tensor.shape:
            shapes = f"{tuple(weights[name].shape)}, must be {tuple(tensor.shape)}"
            raise UserError(f"{path} does not fit {network}: {name} is {shapes}")
    if surplus:
        raise UserError(f"{path} does not fit {network}: it has {surplus[0]} too")
    return weights


def read_checkpoint(path: str | Path) -> Any:
    """Return what a file of safetensors or of PyTorch holds; no code in it is run.

    Raises:
        MissingFileError: There is no such file.
        UserError: It may not be read, holds more than weights, or is something else: an empty file,
            a Git LFS pointer, a web page, an archive.
    """
    path = existing_file(path)
    with user_files(), open(path, "rb") as file:
        start = file.read(16)
    try:
        if start[8:9] == b"{":  # a header of JSON behind its length
            return safetensors.torch.load_file(path)
        with warnings.catch_warnings(action="ignore"):  # about a file that is refused anyway
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken file makes PyTorch raise almost anything
        raise UserError(f"{path} {explain_file(path) or _refuse(error)}") from None


def explain_file(path: Path) -> str:
    """Say what a file is that is not what it should be, and what to do; "" if that is not known."""
    with user_files(), open(path, "rb") as file:
        start = file.read(100)
    if not start:
        return "is empty: copy or download it again"
    if start.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer to the file: fetch that with `git lfs pull`, or download it"
    if start.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"<") and b"\0" not in start:
        return "is a web page, saved in place of the file: download the file itself"
    if start.startswith(_ARCHIVES):
        return "is an archive: unpack it, and name the file in it"
    names, broken = [], (zipfile.BadZipFile, ValueError, NotImplementedError)
    with contextlib.suppress(*broken), zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    if names and not any(name.endswith("data.pkl") for name in names):
        more = f" and {len(names) - 1} more" if names[1:] else ""
        return f"is a zip of {names[0]}{more}: unpack it, and name the file in it"
    return ""


def _refuse(error: Exception) -> str:
    if isinstance(error, pickle.UnpicklingError) or "TorchScript" in str(error):
        return (
            "is refused: it is no checkpoint, or holds more than weights, which could run code; "
            "save the weights alone, by torch.save(network.state_dict(), path)"
        )
    return "is no checkpoint that can be read, perhaps cut off: copy or download it again"


def _dictionaries(value: Any, depth: int) -> Iterator[dict[str, Tensor]]:
    """Yield the tensors of a dictionary, then those of the dictionaries in it."""
    if isinstance(value, dict) and depth:
        yield {str(name): x for name, x in value.items() if isinstance(x, Tensor)}
        for inner in value.values():
            yield from _dictionaries(inner, depth - 1)


def _plain(found: dict[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take off the beginning that the names of weights have in common."""
    # What stands before a name that ends no other of the network's names stands before all.
    mark = next(a for a in wanted if not any(b.endswith(f".{a}") for b in wanted))
    whole = next((name for name in found if f".{name}".endswith(f".{mark}")), mark)
    prefix = whole.removesuffix(mark)
    return {n.removeprefix(prefix): x for n, x in found.items() if n.startswith(prefix)}
