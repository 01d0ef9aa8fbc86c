"""The weights of a UNet2DModel in a student's file, whatever is wrapped around them."""

import argparse
import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lab7.errors import UserError
from lab7.labels import NUM_LABELS
from lab7.weight_files import read_checkpoint

Weights = dict[str, Tensor]

KNOWN = (
    "diffusers' UNet2DModel, with the condition through one linear layer to the time embedding or "
    f"as {NUM_LABELS} more input channels"
)
OTHERS = "pictures of any other network are scored by evaluate --images"
# Every such network has them.
FIRST, TIME, LAST = "conv_in.weight", "time_embedding.linear_1.weight", "conv_out.weight"
# The modules of UNet2DModel that have weights, its class embedding aside.
MODULES = ("conv_in", "time_embedding", "down_blocks", "mid_block", "up_blocks")
MODULES += ("conv_norm_out", "conv_out")
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
OLD_NAME = re.compile(rf"(?<=\.)({'|'.join(OLD_NAMES)})(?=\.)")
SCHEDULE = re.compile(r"(betas|beta_t|alpha[^.]*)$")  # buffers of a student's own DDPM
# What scripts save beside weights, in a pickle: losses, states of generators, arguments. To make
# these runs no code of the file. NumPy's two functions have moved.
_NUMPY = {"scalar": np.float64(0).__reduce__()[0], "_reconstruct": np.empty(0).__reduce__()[0]}
_PLAIN_VALUES = [
    *(argparse.Namespace, np.ndarray, np.dtype),
    *{type(np.dtype(code)) for code in "?bBhHiIlLqQefd"},
    *((f, f"numpy.{core}.multiarray.{n}") for n, f in _NUMPY.items() for core in ("core", "_core")),
]


def find_network(path: Path, key: str | None = None) -> tuple[str, Weights, list[float]]:
    """Find the one network in a file.

    Args:
        path: The file: state dicts, nested in dicts and lists; those of optimizers are left alone.
        key: Where the network is, needed if there are several and not just one of them an EMA.

    Returns:
        Where it is; its weights by the names they have in `ConditionalUNet`, the layer that takes
        the condition among them; and the betas that are saved with it, if there are.

    Raises:
        MissingFileError: There is no such file.
        UserError: It cannot be read, could run code, or holds no network, several, or one that has
            weights of an unknown kind.
    """
    with torch.serialization.safe_globals(_PLAIN_VALUES):
        places = dict(_tensors(read_checkpoint(path)))
    _name_averages(places)
    tensors = {place + name: x for place, found in places.items() for name, x in found.items()}
    home = {place + name: place for place, found in places.items() for name in found}
    prefixes = [name.removesuffix(FIRST) for name in tensors if name.endswith(FIRST)]
    prefixes = [start for start in prefixes if {start + TIME, start + LAST} <= tensors.keys()]
    if not prefixes:
        found = next(iter(tensors), "what it holds")
        if found.split(".")[-1].isdigit():
            raise UserError(f"{path} holds weights without names: save network.state_dict()")
        raise UserError(f"{path}: {found} has no place in {KNOWN}; {OTHERS}")
    chosen = _choose(prefixes, path, key)
    inside = chosen[: _end_of(key, chosen)]  # what a key leaves aside is not looked at
    homes = {home[prefix + FIRST] for prefix in prefixes}
    weights, rest, apart = {}, {}, {}
    for name, tensor in tensors.items():
        inner = name.removeprefix(chosen)
        if name.startswith(chosen) and inner.split(".")[0] in MODULES:
            weights[OLD_NAME.sub(lambda old: OLD_NAMES[old[0]], inner)] = tensor
        elif home[name] not in homes:  # it may be the condition's layer, saved on its own
            apart[name] = tensor
        elif name.startswith(inside) and _kinship(name, chosen) == max(
            _kinship(name, prefix) for prefix in prefixes
        ):
            rest[name] = tensor
    betas, layer, size = _take_schedule(rest), {}, len(weights[TIME])
    if not has_channels(weights):
        apart = sorted(apart.items(), key=lambda x: _is_average(x[0]) != _is_average(chosen))
        layer = _take_condition(rest, size) or _take_condition(dict(apart), size)
    if rest:
        name, tensor = next(iter(rest.items()))
        shape, inner, aside = tuple(tensor.shape), chosen.rstrip("."), ""
        if inner and not key:
            with contextlib.suppress(UserError):
                find_network(path, inner)
                aside = f"; --key {inner} leaves it aside"
        raise UserError(f"{path}: {name} {shape} has no place in {KNOWN}{aside}; {OTHERS}")
    if not layer and not has_channels(weights):
        raise UserError(
            f"{path} has no layer that takes {NUM_LABELS} labels: wanted is {KNOWN}; save a layer "
            "of your own with it: torch.save({'unet': …, 'layer': layer.state_dict()}, path)"
        )
    return f"{path} {chosen}".rstrip(" ."), weights | layer, betas


def has_channels(weights: Weights) -> bool:
    """Return whether a network takes the condition as more input channels."""
    return weights[FIRST].shape[1] == len(weights[LAST]) + NUM_LABELS


def _tensors(content: Any, place: str = "") -> Iterator[tuple[str, Weights]]:
    """Yield each place in a checkpoint with the tensors there by name; no optimizer's."""
    if isinstance(content, list | tuple):
        content = {str(index): value for index, value in enumerate(content)}
    if not isinstance(content, dict) or "param_groups" in content:
        return
    yield place, {str(name): value for name, value in content.items() if _is_weight(value)}
    for name, value in content.items():
        yield from _tensors(value, f"{place}{name}.")


def _is_weight(value: Any) -> bool:
    """Return whether a value is a tensor of real numbers: no scalar, not meta, not sparse."""
    return (
        isinstance(value, Tensor)
        and value.is_floating_point()
        and value.ndim > 0
        and (value.device.type, value.layout) == ("cpu", torch.strided)
    )


def _name_averages(places: dict[str, Weights]) -> None:
    """Name the weights of diffusers' EMAModel, a list, as those of the network it averages."""
    for place, found in places.items():
        for named in places.values() if "0" in found else ():
            shapes = [[tensor.shape for tensor in group.values()] for group in (found, named)]
            if shapes[0] == shapes[1]:
                places[place] = dict(zip(named, found.values(), strict=True))


def _choose(prefixes: list[str], path: Path, key: str | None) -> str:
    """Choose one of several networks: what the key names, else the one that is an EMA."""
    named = [name for name in prefixes if key is None or _end_of(key, name)]
    averaged = [prefix for prefix in named if _is_average(prefix)]
    if len(averaged or named) != 1:
        names = ", ".join(prefix.rstrip(".") or "no key" for prefix in prefixes)
        wrong = f", not {key!r}" if key and not named else ""
        raise UserError(f"{path} holds networks under {names}: choose one with --key{wrong}")
    return (averaged or named)[0]


def _end_of(key: str | None, name: str) -> int:
    """Return where a key ends in the dotted name of a place; 0 if it is not in it, or is None."""
    place = f".{name}".find(f".{key.strip('.')}.") if key else -1
    return 0 if place < 0 else place + len(key.strip(".")) + 1


def _is_average(name: str) -> bool:
    return "ema" in re.split("[._-]", name.lower())


def _kinship(name: str, other: str) -> int:
    """Count the modules that two names begin with in common."""
    return len(os.path.commonprefix([name.split("."), other.split(".")]))


def _take_schedule(tensors: Weights) -> list[float]:
    """Take out what a noise schedule has for each of its time steps; return the betas."""
    lengths = {x.shape for n, x in tensors.items() if SCHEDULE.search(n) and len(x) == x.numel()}
    taken = {n: tensors.pop(n) for n, x in list(tensors.items()) if x.shape in lengths}
    return next((x.flatten().tolist() for n, x in taken.items() if n.split(".")[-1] == "betas"), [])


def _take_condition(tensors: Weights, size: int) -> Weights:
    """Take the layer from labels to the time embedding out of tensors; {} where there is none."""
    shapes = (size, NUM_LABELS), (NUM_LABELS, size)
    name = next((name for name, tensor in tensors.items() if tensor.shape in shapes), None)
    if name is None:
        return {}
    weight = tensors.pop(name)
    if weight.shape != shapes[0]:
        weight = weight.T  # of an nn.Embedding, whose rows are added up
    bias = tensors.pop(re.sub("weight$", "bias", name), torch.zeros(size))
    return {"condition_embedding.weight": weight, "condition_embedding.bias": bias}
