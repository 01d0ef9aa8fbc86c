"""The 24 labels of i-CLEVR, conditions made of them, and the files that hold conditions.

A condition is a tuple of distinct labels. As a tensor it is multi-hot: (24,) float32 with ones at
the labels' indices; all zeros is the null condition of classifier-free guidance.
"""

import re
import reprlib
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from lab7.errors import UserError, unknown
from lab7.files import read_json

COLORS = ("gray", "red", "blue", "green", "brown", "purple", "cyan", "yellow")
SHAPES = ("cube", "sphere", "cylinder")
LABELS = tuple(f"{color} {shape}" for shape in SHAPES for color in COLORS)
NUM_LABELS = len(LABELS)

_INDEX = {label: index for index, label in enumerate(LABELS)}
_EXAMPLE = '[["red cube"], ["blue cube", "cyan sphere"]]'
_ALLOWED = f"A label is a color ({', '.join(COLORS)}) and a shape ({', '.join(SHAPES)})"

_SPACES = re.compile(r"[\s_\u200b\ufeff\u2010-\u2015\u2212-]+")  # and hyphens of all kinds
_QUOTES = re.compile(r"[\"'`\u2018-\u201f「」]")
_SEPARATORS = re.compile(r"[,;+&、/|]|\band\b|(?<=cube) |(?<=sphere) |(?<=cylinder) ")


def parse_label(text: str) -> str:
    """Return the label that a text names, whatever its case, spacing, width and hyphens.

    Args:
        text: For instance "red cube", " Red  CUBE ", "red_cube" or "grey-cube".

    Raises:
        UserError: It is none of the 24 labels; the message names the nearest.
    """
    if not isinstance(text, str):
        raise UserError(f"a label is a text such as 'red cube', not {reprlib.repr(text)}")
    label = _plain(text)
    if label not in _INDEX:
        raise unknown("label", text, LABELS, _ALLOWED)
    return label


def parse_labels(labels: Sequence[str]) -> tuple[str, ...]:
    """Return the condition that a list of labels makes.

    Args:
        labels: Distinct labels as `parse_label` reads them; an empty list is the null condition.

    Raises:
        UserError: An unknown label, one given twice, or a single text instead of a list.
    """
    if not isinstance(labels, (list, tuple)):
        found = reprlib.repr(labels)
        raise UserError(f"a condition is a list of labels such as ['red cube'], not {found}")
    condition = tuple(parse_label(label) for label in labels)
    if len(set(condition)) < len(condition):
        twice = next(label for label in condition if condition.count(label) > 1)
        raise UserError(f"label {twice!r} is given twice: each label may occur once")
    return condition


def parse_condition(text: str) -> tuple[str, ...]:
    """Return the condition that somebody typed.

    Args:
        text: Labels as `parse_label` reads them, with commas, semicolons, plus signs, "and" or
            just spaces between them, quoted and in brackets or not: "red cube, blue cylinder",
            '["red cube", "blue cylinder"]'.

    Raises:
        UserError: No label at all, an unknown one, one given twice, or several conditions.
    """
    plain = _plain(_QUOTES.sub(" ", text)).strip(" [](){}")
    if any(bracket in plain for bracket in "[](){}"):
        raise UserError(f"{text!r} has more than one list of labels: write one, or use a file")
    labels = [label.strip() for label in _SEPARATORS.split(plain) if label.strip()]
    if not labels:
        raise UserError(f"empty condition {text!r}: write labels such as 'red cube, cyan sphere'")
    return parse_labels(labels)


def encode(conditions: Sequence[Sequence[str]]) -> torch.Tensor:
    """Turn conditions into multi-hot vectors.

    Args:
        conditions: B lists of labels; an empty list gives the null condition.

    Returns:
        (B, 24) float32, 1 at the labels of each condition and 0 elsewhere.

    Raises:
        UserError: A flat list of labels, an unknown label, or one given twice.
    """
    if isinstance(conditions, str) or any(isinstance(labels, str) for labels in conditions):
        raise UserError(f"expected a list of label lists such as {_EXAMPLE}, not {conditions!r}")
    multi_hot = np.zeros((len(conditions), NUM_LABELS), np.float32)
    for row, labels in zip(multi_hot, conditions, strict=True):
        for label in parse_labels(labels):
            row[_INDEX[label]] = 1.0
    return torch.from_numpy(multi_hot)


def decode(multi_hot: torch.Tensor) -> list[tuple[str, ...]]:
    """Turn multi-hot vectors back into conditions, labels in the order of `LABELS`.

    Args:
        multi_hot: (B, 24), 1 (or anything above 0.5) where a label is present.

    Raises:
        UserError: The tensor is not (B, 24).
    """
    if multi_hot.ndim != 2 or multi_hot.shape[1] != NUM_LABELS:
        raise UserError(f"expected a tensor (B, {NUM_LABELS}), not {tuple(multi_hot.shape)}")
    return [
        tuple(label for label, value in zip(LABELS, row, strict=True) if value > 0.5)
        for row in multi_hot.tolist()
    ]


def load_conditions(path: str | Path) -> list[tuple[str, ...]]:
    """Read a condition file of the course: a JSON list of lists of labels.

    Returns:
        One condition a row, labels in the order of the file.

    Raises:
        MissingFileError: No such file.
        UserError: Not JSON, no or empty conditions, a flat list, or a wrong label; the message
            names the file and the row.
    """
    rows = read_json(path)
    if not isinstance(rows, list) or not rows:
        found = reprlib.repr(rows)
        raise UserError(f"{path} holds {found}, not a list of conditions such as {_EXAMPLE}")
    conditions = []
    for number, row in enumerate(rows):
        try:
            conditions.append(parse_labels(row))
        except ValueError as error:
            raise UserError(f"{path}, row {number} (counted from 0): {error}") from None
        if not row:
            raise UserError(f"{path}, row {number} (counted from 0) is empty: name its objects")
    return conditions


def load_objects(path: str | Path) -> dict[str, int]:
    """Read objects.json and check that it numbers the labels as `LABELS` does.

    Raises:
        MissingFileError: No such file.
        UserError: A label is missing, unknown, or numbered otherwise.
    """
    objects = read_json(path)
    if not isinstance(objects, dict):
        raise UserError(f"{path} must map the {NUM_LABELS} labels to their indices")
    for label, index in _INDEX.items():
        if objects.get(label) != index:
            raise UserError(f"{path} must map {label!r} to {index}, not to {objects.get(label)}")
    if len(objects) > NUM_LABELS:
        extra = next(label for label in objects if label not in _INDEX)
        raise UserError(f"{path} has {extra!r}, which is none of the course's {NUM_LABELS} labels")
    return objects


def _plain(text: str) -> str:
    """Write a text in lower case and in half-width characters, with one space between words."""
    text = unicodedata.normalize("NFKC", text).casefold()
    return _SPACES.sub(" ", text).strip().replace("grey", "gray")
