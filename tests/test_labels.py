"""Labels, conditions, and condition files."""

import json
import re

import pytest
import torch

from lab7.errors import UserError
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


@pytest.mark.parametrize(
    "text",
    ["gray cube", " Gray   CUBE ", "gray\tcube\n", "gray_cube", "GRAY-Cube", "grey cube",
     "gray\u2013cube", "gray\u3000cube", "ｇｒａｙ　ｃｕｂｅ"],
)  # fmt: skip
def test_case_spacing_hyphens_width_and_grey_are_forgiven(text):
    assert parse_label(text) == "gray cube"


@pytest.mark.parametrize(
    ("text", "nearest"),
    [
        ("red cubes", "red cube"),
        ("Red  CUBES", "red cube"),
        ("redcube", "red cube"),
        ("yelow-cylinder", "yellow cylinder"),
        ("cyan", "cyan cube"),
        ("cylinder", "red cylinder"),
        ("blue ball", "blue cube"),
    ],
)
def test_unknown_label_names_the_nearest(text, nearest):
    with pytest.raises(ValueError, match="unknown label") as error:
        parse_label(text)
    message = str(error.value)
    assert repr(text) in message and f"did you mean {nearest!r}?" in message
    assert all(word in message for word in COLORS + SHAPES)
    assert "\n" not in message


@pytest.mark.parametrize("value", [3, None, ["red cube"]])
def test_label_must_be_text(value):
    with pytest.raises(ValueError, match="a label is a text"):
        parse_label(value)


@pytest.mark.parametrize(
    "text",
    [
        "red cube, gray sphere",
        "Red  cube,Grey sphere,",
        '["red cube", "gray sphere"]',
        "['red cube', 'gray sphere']",
        '[["red cube", "gray sphere"]]',
        "[red cube, gray sphere]",  # what a shell leaves of the quotes
        "“red cube”，「gray sphere」",
        '"red cube" "gray sphere"',
        "red cube gray sphere",
        "red_cube gray-sphere",
        "red-cube；grey-sphere",
        "red cube、gray sphere",
        "red cube; gray sphere",
        "red cube + gray sphere",
        "red cube / gray sphere",
        "red cube | gray sphere",
        "\ufeffred\u2212cube\u200b gray sphere",
        "red cube & gray sphere",
        "red cube and gray sphere",
        "red_cube_and_gray_sphere",
        "(ＲＥＤ　ｃｕｂｅ，\ngray sphere)",
    ],
)
def test_conditions_as_people_type_them(text):
    assert parse_condition(text) == ("red cube", "gray sphere")


def test_labels_of_every_shape_end_without_a_comma():
    assert parse_condition("cyan cylinder red sphere blue cube gray cube") == (
        "cyan cylinder",
        "red sphere",
        "blue cube",
        "gray cube",
    )
    assert parse_condition("cyan sphere") == ("cyan sphere",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty condition '': write labels such as"),
        (" , ", "empty condition"),
        ("[]", "empty condition"),
        ("red cube, Red Cube", "'red cube' is given twice"),
        ("red cube, blue cubes", "'blue cubes': did you mean 'blue cube'"),
        ("red, cube", "unknown label 'red': did you mean 'red cube'"),
        ('["red cube", "cyan cylindr"]', "'cyan cylindr': did you mean 'cyan cylinder'"),
        ('[["red cube"], ["blue cube"]]', "more than one list of labels: write one, or use a file"),
    ],
)
def test_parse_condition_errors(text, message):
    with pytest.raises(UserError, match=re.escape(message)) as error:
        parse_condition(text)
    assert "\n" not in str(error.value)


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


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("indent", [None, 2])
def test_condition_files_in_any_encoding_of_unicode(tmp_path, encoding, indent):
    path = tmp_path / "conditions.json"
    for name in (encoding, encoding.replace("16", "32")):
        path.write_bytes(json.dumps([["red cube"], ["grey　sphere"]], indent=indent).encode(name))
        assert load_conditions(path) == [("red cube",), ("gray sphere",)]
        text = json.dumps([["red cube"], ["grey　sphere"]], indent=indent, ensure_ascii=False)
        path.write_bytes(text.encode(name))
        assert load_conditions(path) == [("red cube",), ("gray sphere",)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1 is not JSON: Expecting value at the end of the file"),
        ('[["red cube"]', """line 1 is not JSON: .* in '[["red cube"]'"""),
        ('[\n  ["red cube"]\n  ["blue cube"]\n]', """line 3 is not JSON: .* in '["blue cube"]'"""),
        ("[\n['red cube']]", "line 2 is not JSON: Expecting value in \"['red cube']]\""),
        ('[["red cube"],\n["blue cube]]\n', """line 2 is not JSON: .* in '["blue cube]]'"""),
        ("[" + '["red cube"], ' * 999 + "oops]", """line 1 is not JSON: .*'.{5,50} oops]'$"""),
        ("<!DOCTYPE html>\n<html>", "line 1 is not JSON: Expecting value in '<!DOCTYPE html>'"),
        ("[" * 100_000, "is not JSON that can be read"),
        ("[]", "holds [], not a list of conditions such as"),
        ('{"a.png": ["red cube"]}', "holds {'a.png': ['red cube']}, not a list of conditions"),
        ('"red cube"', "holds 'red cube', not a list of conditions"),
        ('["red cube", "blue cube"]', "row 0.*a condition is a list of labels.*'red cube'"),
        ('[["red cube"], []]', "row 1 .*is empty"),
        ('[["red cube"], ["red cubes"]]', "row 1 .*did you mean 'red cube'"),
        ('[["red cube", "red cube"]]', "row 0 .*given twice"),
        ("[[1]]", "row 0 .*a label is a text"),
    ],
)
def test_load_conditions_errors_name_file_and_row(tmp_path, text, message):
    path = write(tmp_path, text)
    with pytest.raises(UserError, match=message.replace("[", r"\[")) as error:
        load_conditions(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert len(str(error.value)) < len(str(path)) + 300


def test_train_json_is_shown_shortened(tmp_path):
    entries = {f"{number}.png": ["red cube"] for number in range(999)}
    with pytest.raises(UserError, match="not a list of conditions") as error:
        load_conditions(write(tmp_path, json.dumps(entries)))
    assert len(str(error.value)) < len(str(tmp_path)) + 300


def test_files_that_are_no_unicode_or_no_json_in_it(tmp_path):
    path = tmp_path / "conditions.json"
    path.write_bytes('["紅"]'.encode("big5"))
    with pytest.raises(UserError, match=f"{path} is not JSON: byte 2 is no utf-8; save it as"):
        load_conditions(path)
    path.write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(UserError, match=f"{path}, line 1 is not JSON: .* in '\u8000'"):
        load_conditions(path)


def test_a_folder_in_the_place_of_a_condition_file(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path} is a folder, not a file"):
        load_conditions(tmp_path)


def test_missing_condition_file_names_the_nearest(tmp_path):
    path = write(tmp_path, "[]")
    write(tmp_path, "[]").rename(tmp_path / "other.json")
    write(tmp_path, "[]")
    with pytest.raises(FileNotFoundError, match=f"no file .*: did you mean '{path}'"):
        load_conditions(tmp_path / "condition.json")
    with pytest.raises(FileNotFoundError, match="no file .*there.json$"):
        load_conditions(tmp_path / "not" / "there.json")


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
