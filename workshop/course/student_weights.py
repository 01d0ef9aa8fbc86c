"""The weights of a UNet2DModel in a student's file, whatever is wrapped around them."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lab7.errors import UserError
from lab7.labels import NUM_LABELS

Weights = dict[str, Tensor]

KNOWN = (
    "diffusers' UNet2DModel, with the condition through one linear layer to the time embedding or "
    f"as {NUM_LABELS} more input channels"
)
# Every such network has them.
FIRST, TIME, LAST = "conv_in.weight", "time_embedding.linear_1.weight", "conv_out.weight"
# The modules of UNet2DModel that have weights, its class embedding aside.
MODULES = ("conv_in", "time_embedding", "down_blocks", "mid_block", "up_blocks")
MODULES += ("conv_norm_out", "conv_out")
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
OLD_NAME = re.compile(rf"(?<=\.)({'|'.join(OLD_NAMES)})(?=\.)")


def find_network(content: Any, path: Path, key: str | None = None) -> tuple[str, Weights]:
    """Find the one network in what a file holds.

    Args:
        content: State dicts, nested in dicts and lists; those of optimizers are left alone.
        path: The file, for messages.
        key: Where the network is, needed if there are several and not just one of them an EMA.

    Returns:
        Where it is, and its weights by the names they have in `ConditionalUNet`, the layer that
        takes the condition among them.

    Raises:
        UserError: There is none, there are several, or it has weights of an unknown kind.
    """
    tensors, home = {}, {}
    for place, name, tensor in _tensors(content):
        tensors[place + name], home[place + name] = tensor, place
    prefixes = [name.removesuffix(FIRST) for name in tensors if name.endswith(FIRST)]
    prefixes = [start for start in prefixes if {start + TIME, start + LAST} <= tensors.keys()]
    if not prefixes:
        raise UserError(f"{path}: {next(iter(tensors), 'what it holds')} has no place in {KNOWN}")
    chosen = _choose(prefixes, path, key)
    homes = {home[prefix + FIRST] for prefix in prefixes}
    weights, rest, apart = {}, {}, {}
    for name, tensor in tensors.items():
        inner = name.removeprefix(chosen)
        if name.startswith(chosen) and inner.split(".")[0] in MODULES:
            weights[OLD_NAME.sub(lambda old: OLD_NAMES[old[0]], inner)] = tensor
        elif home[name] not in homes:  # it may be the condition's layer, saved on its own
            apart[name] = tensor
        elif _kinship(name, chosen) == max(_kinship(name, prefix) for prefix in prefixes):
            rest[name] = tensor
    layer, size = {}, len(weights[TIME])
    if not has_channels(weights):
        layer = _take_condition(rest, size) or _take_condition(apart, size)
    if rest:
        name, tensor = next(iter(rest.items()))
        raise UserError(f"{path}: {name} {tuple(tensor.shape)} has no place in {KNOWN}")
    if not layer and not has_channels(weights):
        raise UserError(f"{path} has no layer that takes {NUM_LABELS} labels: wanted is {KNOWN}")
    return f"{path} {chosen}".rstrip(" ."), weights | layer


def has_channels(weights: Weights) -> bool:
    """Return whether a network takes the condition as more input channels."""
    return weights[FIRST].shape[1] == len(weights[LAST]) + NUM_LABELS


def _tensors(content: Any, place: str = "") -> Iterator[tuple[str, str, Tensor]]:
    """Yield where each tensor in a checkpoint is, its name there, and itself; no optimizer's."""
    if isinstance(content, list | tuple):
        content = dict(enumerate(content))
    if not isinstance(content, dict) or "param_groups" in content:
        return
    for name, value in content.items():
        if isinstance(value, Tensor) and value.is_floating_point() and value.ndim:
            yield place, str(name), value
        else:
            yield from _tensors(value, f"{place}{name}.")


def _choose(prefixes: list[str], path: Path, key: str | None) -> str:
    """Choose one of several networks: what the key names, else the one that is an EMA."""
    named = [prefix for prefix in prefixes if key is None or prefix.startswith(f"{key}.")]
    averaged = [prefix for prefix in named if "ema" in re.split("[._]", prefix.lower())]
    if len(averaged or named) != 1:
        names = ", ".join(prefix.rstrip(".") or "no key" for prefix in prefixes)
        raise UserError(f"{path} holds networks under {names}: choose one with --key")
    return (averaged or named)[0]


def _kinship(name: str, other: str) -> int:
    """Count the modules that two names begin with in common."""
    return len(os.path.commonprefix([name.split("."), other.split(".")]))


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
