"""Labels, conditions, and condition files."""

import json

import pytest
import torch

from lab7.labels import (
    COLORS,
    LABELS,
    NUM_LABELS,
    SHAPES,
    decode,
    encode,
    load_conditions,
    load_objects,
    parse_condition,
    parse_label,
)


def test_labels_are_numbered_as_the_course_does():
    assert NUM_LABELS == len(LABELS) == len(set(LABELS)) == 24
    assert LABELS[0] == "gray cube"
    assert LABELS[1] == "red cube"
    assert LABELS[8] == "gray sphere"
    assert LABELS[18] == "blue cylinder"
    assert LABELS[23] == "yellow cylinder"
    assert len(COLORS) == 8 and SHAPES == ("cube", "sphere", "cylinder")


@pytest.mark.parametrize("text", ["red cube", " Red   CUBE ", "red\tcube\n"])
def test_case_and_spare_spaces_are_forgiven(text):
    assert parse_label(text) == "red cube"


@pytest.mark.parametrize(
    ("text", "nearest"),
    [
        ("red cubes", "red cube"),
        ("grey sphere", "gray sphere"),
        ("redcube", "red cube"),
        ("yelow-cylinder", "yellow cylinder"),
    ],
)
def test_unknown_label_names_the_nearest(text, nearest):
    with pytest.raises(ValueError, match="unknown label") as error:
        parse_label(text)
    message = str(error.value)
    assert repr(text) in message and f"did you mean {nearest!r}?" in message
    assert all(word in message for word in COLORS + SHAPES)
    assert "\n" not in message


def test_label_that_is_like_no_other_gets_no_suggestion():
    with pytest.raises(ValueError, match="'zzz': Labels are"):
        parse_label("zzz")


@pytest.mark.parametrize("value", [3, None, ["red cube"]])
def test_label_must_be_text(value):
    with pytest.raises(ValueError, match="a label is a text"):
        parse_label(value)


def test_parse_condition():
    assert parse_condition("red cube, Blue  cylinder") == ("red cube", "blue cylinder")
    assert parse_condition("cyan sphere") == ("cyan sphere",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty condition"),
        (" , ", "empty condition"),
        ("red cube,", "unknown label ''"),
        ("red cube, Red Cube", "'red cube' is given twice"),
        ("red cube, blue cubes", "did you mean 'blue cube'"),
    ],
)
def test_parse_condition_errors(text, message):
    with pytest.raises(ValueError, match=message):
        parse_condition(text)


def test_encode_puts_ones_at_the_labels():
    multi_hot = encode([["gray cube"], ("yellow cylinder", "RED cube"), []])
    assert multi_hot.shape == (3, 24) and multi_hot.dtype == torch.float32
    assert multi_hot.nonzero().tolist() == [[0, 0], [1, 1], [1, 23]]
    assert encode([]).shape == (0, 24)


def test_decode_inverts_encode():
    conditions = [(label,) for label in LABELS] + [("red cube", "blue sphere"), ()]
    assert decode(encode(conditions)) == conditions
    with pytest.raises(ValueError, match=r"\(B, 24\), not \(24,\)"):
        decode(encode([["red cube"]])[0])


@pytest.mark.parametrize(
    "flat", ["red cube", ["red cube", "blue cube"], [["red cube"], "red cube"]]
)
def test_encode_refuses_a_flat_list(flat):
    with pytest.raises(ValueError, match="expected a list of label lists"):
        encode(flat)


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        (["red cubes"], "did you mean 'red cube'"),
        (["red cube", "red cube"], "given twice"),
        ({"red cube": 1}, "a condition is a list"),
        (None, "a condition is a list"),
    ],
)
def test_encode_refuses_wrong_conditions(condition, message):
    with pytest.raises(ValueError, match=message):
        encode([["blue cube"], condition])


def write(tmp_path, text):
    path = tmp_path / "conditions.json"
    path.write_text(text, encoding="utf-8")
    return path


def test_load_conditions_keeps_the_order(tmp_path):
    path = write(tmp_path, '[["red cube"], ["Yellow cube", "gray  sphere"]]')
    assert load_conditions(path) == [("red cube",), ("yellow cube", "gray sphere")]
    assert load_conditions(str(path)) == load_conditions(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a JSON file"),
        ('[["red cube"]', "not a JSON file"),
        ("[" * 100_000, "not a JSON file"),
        ("[]", "holds no conditions"),
        ('{"a.png": ["red cube"]}', "no condition file"),
        ('"red cube"', "no condition file"),
        ('["red cube", "blue cube"]', "row 0.*a condition is a list of labels.*'red cube'"),
        ('[["red cube"], []]', "row 1 .*is empty"),
        ('[["red cube"], ["red cubes"]]', "row 1 .*did you mean 'red cube'"),
        ('[["red cube", "red cube"]]', "row 0 .*given twice"),
        ("[[1]]", "row 0 .*a label is a text"),
    ],
)
def test_load_conditions_errors_name_file_and_row(tmp_path, text, message):
    path = write(tmp_path, text)
    with pytest.raises(ValueError, match=message) as error:
        load_conditions(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_binary_condition_file(tmp_path):
    path = tmp_path / "conditions.json"
    path.write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(ValueError, match="not a JSON file"):
        load_conditions(path)


def test_missing_condition_file_names_the_nearest(tmp_path):
    path = write(tmp_path, "[]")
    with pytest.raises(FileNotFoundError, match=f"did you mean {path}"):
        load_conditions(tmp_path / "condition.json")
    with pytest.raises(FileNotFoundError, match="no file .*nothing-like-it.txt$"):
        load_conditions(tmp_path / "nothing-like-it.txt")


OBJECTS = {label: index for index, label in enumerate(LABELS)}


def test_load_objects(tmp_path):
    assert load_objects(write(tmp_path, json.dumps(OBJECTS))) == OBJECTS


@pytest.mark.parametrize(
    ("objects", "message"),
    [
        ({**OBJECTS, "gray cube": 1, "red cube": 0}, "must map 'gray cube' to 0, not to 1"),
        ({**OBJECTS, "pink cube": 24}, "has 'pink cube', which is none"),
        ({label: OBJECTS[label] for label in LABELS[:-1]}, "must map 'yellow cylinder' to 23"),
        (list(LABELS), "must map the 24 labels"),
    ],
)
def test_load_objects_refuses_another_numbering(tmp_path, objects, message):
    with pytest.raises(ValueError, match=message):
        load_objects(write(tmp_path, json.dumps(objects)))
