"""The hand-in: what a zip is checked for, whose names may be printed, and what each year wants."""

import io
import re
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from lab7.errors import UserError
from workshop.course.handin import check_student
from workshop.course.handin_check import check_handin, print_check
from workshop.course.handouts import HANDOUTS, find_handout

NAME = "DL_LAB6_B11107122_王小明.zip"


class OldEntry(zipfile.ZipInfo):
    """A name as Windows writes it: in the encoding of its language, without a mark."""

    def __init__(self, name, encoding):
        super().__init__(name)
        self.raw = name.encode(encoding)

    def _encodeFilenameFlags(self):
        return self.raw, self.flag_bits & ~0x800


def png(size=(64, 64), mode="RGB", kind="PNG"):
    content = io.BytesIO()
    Image.new(mode, size).save(content, kind)
    return content.getvalue()


def good_files():
    pictures = {f"images/{key}/{i}.png": png() for key in ("test", "new_test") for i in range(32)}
    return pictures | {"report.pdf": b"%PDF-1.7\n%%EOF\n", "source/train.py": b"pass"}


def check(files, name=NAME, year="2026"):
    """What is found in a zip of `files`, as lines, and whether all of it is harmless."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as pack:
        for entry, data in files.items():
            pack.writestr(entry, data)
    findings = check_handin(content, name, find_handout(year))
    return [str(finding) for finding in findings], all(f.harmless for f in findings)


def test_a_good_hand_in_has_nothing_to_mend():
    lines, harmless = check(good_files())
    assert harmless and all(line.startswith("there") for line in lines)
    assert any("images/new_test: pictures, 32 of 64×64 pixels" in line for line in lines)


@pytest.mark.parametrize(
    "change, line",
    [
        ({"images/test/7.png": None}, "missing   images/test: 7.png of 32 pictures"),
        ({"images/test/grid.png": png()}, "too much  images/test: grid.png: scripts read every"),
        ({"images/test/.DS_Store": b""}, "too much  images/test: .DS_Store"),
        ({"images/new_test/samples.json": b"{}"}, "too much  images/new_test: samples.json"),
        ({"images/test/more/0.png": png()}, "too much  images/test: more/0.png"),
        ({"images/test/32.png": png()}, "too much  images/test: 32.png"),
        (
            {"images/test/0.png": None, "images/test/32.png": png()},
            "missing   images/test: 0.png of 32 pictures, as the numbers begin at 1",
        ),
        ({"images/test/3.png": None, "images/test/3.PNG": png()}, "images/test: 3.PNG"),
        ({"images/test/3.png": png()[:60]}, "wrong     images/test: 3.png cannot be read as PNG"),
        ({"images/test/3.png": png(kind="JPEG")}, "3.png cannot be read as PNG"),
        ({"images/test/3.png": png((128, 128))}, "31 of 64×64 pixels, 1 of 128×128 pixels"),
        ({"report.pdf": None}, "missing   a report as PDF"),
        ({"report.pdf": None, "report.docx": b"PK"}, "a report as PDF: print report.docx"),
        ({"report.pdf": b"%PDF-1.7 cut off"}, "wrong     report.pdf is no complete PDF"),
        ({"source/train.py": None}, "missing   source: there is no .py or .ipynb"),
        ({"iclevr/CLEVR_train_000123_0.png": png()}, "too much  pictures of the data set"),
        ({"../evil.py": b""}, "wrong     leads out of the folder it is unpacked in: ../evil.py"),
    ],
)
def test_each_thing_to_mend_is_named(change, line):
    files = {name: data for name, data in (good_files() | change).items() if data is not None}
    lines, harmless = check(files)
    assert not harmless and any(line in found for found in lines), lines


@pytest.mark.parametrize(
    "change, line",
    [
        ({"__MACOSX/images/test/._0.png": b""}, "left by a system or an editor: __MACOSX/images"),
        ({"source/.DS_Store": b""}, "left by a system or an editor: source/.DS_Store"),
        ({"source/more.ZIP": b"PK"}, "archives, whose content is not looked at: source/more.ZIP"),
        ({"source/model.pth": b"1"}, "weights, which the list does not name: source/model.pth"),
        ({"images/test/0.png": png(mode="RGBA")}, "images/test: pictures of mode RGBA, not RGB"),
    ],
)
def test_what_is_odd_and_harmless_is_noted(change, line):
    lines, harmless = check(good_files() | change)
    assert harmless and any(found.startswith(f"note      {line}") for found in lines), lines


def test_other_square_sizes_are_allowed():
    lines, harmless = check(
        {name: png((128, 128)) if "images" in name else data for name, data in good_files().items()}
    )
    assert harmless
    assert any("32 of 128×128 pixels; scripts resize them to 64×64" in line for line in lines)


def test_folders_around_the_whole_are_named():
    lines, harmless = check(
        {f"hand-in/王小明/{name}": data for name, data in good_files().items()} | {".DS_Store": b""}
    )
    assert harmless
    assert any("where a script looks for images: hand-in/王小明" in line for line in lines)


def test_pictures_in_another_folder_are_found():
    lines, harmless = check(
        {name.replace("images/test", "Images/Test"): data for name, data in good_files().items()}
    )
    hint = "images/test/0.png … 31.png: there are numbered pictures in Images/Test, images/new_test"
    assert not harmless and any(f"missing   {hint}" in line for line in lines), lines


@pytest.mark.parametrize(
    "encoding, name", [("gbk", "报告张伟.pdf"), ("big5", "報告王小明.pdf"), ("utf-8", "報告.pdf")]
)
def test_chinese_names_in_old_encodings_are_read(encoding, name):
    files = good_files()
    content = files.pop("report.pdf")
    lines, harmless = check(files | {OldEntry(name, encoding): content})
    assert harmless and any(f"report {name}" in line for line in lines), lines
    assert any("without a mark of UTF-8" in line and f" is {name}" in line for line in lines)
    garbled = name.encode(encoding).decode("cp437")
    lines, harmless = check(files | {garbled: content})
    assert harmless and any(f"{garbled} is {name}" in line for line in lines)


@pytest.mark.parametrize("name", ["報告.pdf", "Résumé of José.pdf"])
def test_names_in_utf_8_are_left_as_they_are(name):
    lines, harmless = check(good_files() | {name: b"%PDF-1.7\n%%EOF\n"})
    assert harmless and any(f"report {name}" in line for line in lines)
    assert not any("UTF-8" in line for line in lines)


def test_a_damaged_file_is_named_and_what_is_no_zip_refused(tmp_path):
    path = tmp_path / NAME
    with zipfile.ZipFile(path, "w") as pack:
        for name, data in good_files().items():
            pack.writestr(name, data)
    whole = path.read_bytes()
    damaged = whole.index(b"images/test/0.png") + 40
    path.write_bytes(whole[:damaged] + b"?" + whole[damaged + 1 :])
    findings = check_handin(path, NAME, find_handout())
    assert [f.text for f in findings if f.kind == "wrong"] == [
        "images/test: 0.png cannot be read as PNG"
    ]
    path.write_bytes(b"Rar!")
    with pytest.raises(UserError, match=f"{NAME} is no zip, or a damaged one"):
        check_handin(path, NAME, find_handout())
    with pytest.raises(UserError, match="no file .*nothing.zip: did you mean .*DL_LAB6"):
        print_check(tmp_path / "nothing.zip", find_handout())
    with pytest.raises(UserError, match=f"{NAME} is no zip, or a damaged one"):
        print_check(Path(f'"{path}"'), find_handout())


@pytest.mark.parametrize(
    "year, name",
    [
        ("2023-spring", "DLP_LAB7_1_Ada_Lovelace.zip"),
        ("2023-summer", "DLP_LAB6_1_Ada_Lovelace.zip"),
        ("2024", "DL_LAB6_1_Ada_Lovelace.zip"),
        ("2025", "DL_LAB6_1_Ada_Lovelace.zip"),
        (" 2026 ", "DL_LAB6_1_Ada_Lovelace.zip"),
        ("Spring 2025", "DL_LAB6_1_Ada_Lovelace.zip"),
        ("summer 2023", "DLP_LAB6_1_Ada_Lovelace.zip"),
    ],
)
def test_the_name_of_the_year(year, name):
    handout = find_handout(year)
    assert f"{handout.title('1', 'Ada Lovelace')}.zip" == name
    lines, harmless = check(good_files(), name, year)
    assert harmless and f"{handout.prefix}_ID_Name.zip" in lines[0]
    lines, harmless = check(good_files(), "LAB7_1_Ada.zip", year)
    assert not harmless and lines[0].startswith("wrong     the name LAB7_1_Ada.zip")


def test_years_differ_in_denoising_row_and_pictures():
    assert find_handout("2024").denoising == ("red sphere", "yellow cube", "cyan cylinder")
    assert find_handout("2025").denoising == ("red sphere", "cyan cylinder", "cyan cube")
    assert find_handout() is HANDOUTS["2026"]
    files = {name: data for name, data in good_files().items() if "images" not in name}
    assert check(files, year="2024")[1] and not check(files, year="2025")[1]
    assert check(files | {"images/test/grid.png": png()}, year="2024")[1]
    for year in ("2027", "2023", "spring", ""):
        with pytest.raises(UserError, match=f"unknown year '{year}'.*{', '.join(HANDOUTS)}"):
            find_handout(year)


@pytest.mark.parametrize(
    "given, printed",
    [
        ("王小明", "王小明"),
        ("張欀齡", "張欀齡"),
        ("Jean-Luc_O'Neill Jr.", "Jean-Luc O'Neill Jr."),
        (" Zoe\u0308  Łukasz ", "Zoë Łukasz"),
        ("司馬　光", "司馬 光"),
        ("阿凡提·买买提", "阿凡提·买买提"),
    ],
)
def test_names_that_are_printed(given, printed):
    assert check_student("B11107122", given) == ("B11107122", printed)


@pytest.mark.parametrize(
    "student_id, name, message",
    [
        ("", "a", "ID ''"),
        ("1 2", "a", "ID '1 2'"),
        ("1", "", "name '': give letters"),
        ("1", " ._ ", "give letters"),
        ("1", "a/b", "'/' cannot be part of a file's name"),
        ("1", "a\nb", re.escape("'\\n' cannot be part")),
        ("1", "a\udc80", "cannot be part of a file's name"),
        ("1", "王" * 61, "too long"),
        ("1", "王\U000e0fff", "cannot be part"),
    ],
)
def test_names_that_are_refused(student_id, name, message):
    with pytest.raises(UserError, match=message):
        check_student(student_id, name)
