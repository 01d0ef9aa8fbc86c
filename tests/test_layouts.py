"""Folders of the course as people unpack them, and what is refused."""

import json
import os
import shutil
from pathlib import Path

import pytest
from conftest import SCENES, write_course

import lab7.layouts
from lab7.dataset import ICLEVRDataset, named_conditions
from lab7.errors import MissingFileError, UserError
from lab7.evaluator import WEIGHTS, default_weights
from lab7.layouts import DATA_DIR, find_layout, tree

JSON = ("objects.json", "train.json", "test.json", "new_test.json")


@pytest.fixture
def files(course_root, monkeypatch):
    """The course's files, to be put elsewhere; the home directory is another folder."""
    (course_root / "checkpoint.pth").touch()
    (course_root / "evaluator.py").touch()
    monkeypatch.setenv("HOME", str(course_root.parent / "home"))
    (course_root.parent / "home").mkdir()
    return course_root


@pytest.fixture
def place(tmp_path):
    """A folder to unpack to, with nothing else beside it."""
    folder = tmp_path / "work" / "of mine"
    folder.mkdir(parents=True)
    return folder


def copy_labels(files, folder, names=(*JSON, "checkpoint.pth", "evaluator.py")):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        shutil.copy(files / name, folder / name)


def unpack(files, place, labels, pictures):
    """Put the JSON files with the evaluator into one folder, the pictures into another."""
    copy_labels(files, place / labels)
    shutil.copytree(files / "iclevr", place / pictures, dirs_exist_ok=True)


LAYOUTS = {  # where the JSON files lie, where the pictures, what is named
    "all in one folder": (".", ".", "."),
    "pictures in a folder of the JSON files": (".", "iclevr", "."),
    "that folder named": (".", "iclevr", "iclevr"),
    "beside each other": ("file", "iclevr", "."),
    "the JSON files named": ("file", "iclevr", "file"),
    "the pictures named": ("file", "iclevr", "iclevr"),
    "other names": ("labels of 2026", "資料", "."),
    "other names, one of them": ("json", "images", "images"),
    "pictures a level deeper": ("file", "iclevr/iclevr", "file"),
    "pictures a level deeper, that named": ("file", "iclevr/iclevr", "iclevr"),
    "JSON files a level deeper": ("file/file", "iclevr", "iclevr"),
    "JSON files among the pictures": ("iclevr", "iclevr", "."),
    "two levels down": ("a/file", "b/iclevr", "."),
    "one in the other": ("data", "data/train", "."),
    "the other in the one": ("train/labels", "train", "train"),
}


@pytest.mark.parametrize(("labels", "pictures", "named"), LAYOUTS.values(), ids=LAYOUTS)
def test_layouts_of_the_course(files, place, labels, pictures, named, capsys):
    unpack(files, place, labels, pictures)
    layout = find_layout(place / named)
    assert layout.labels.samefile(place / labels)
    assert layout.pictures.samefile(place / pictures)
    assert layout.course
    assert default_weights(layout).samefile(place / labels / "checkpoint.pth")
    assert named_conditions("test", place / named) == named_conditions("test", files)
    dataset = ICLEVRDataset(place / named)
    assert dataset.images.equal(ICLEVRDataset(files).images) and dataset.course
    line = capsys.readouterr().out.splitlines()[0]
    assert line == layout.summary, "what was found is one line"
    for part in (layout.labels, layout.pictures, layout.evaluators[0], "9 pictures"):
        assert str(part) in line


def test_nothing_is_printed_of_the_embedded_set_nor_twice(files, embedded_root, capsys):
    ICLEVRDataset(embedded_root)
    ICLEVRDataset(find_layout(files))  # whoever looked for it says so
    assert not capsys.readouterr().out


# --- what is named ---


def test_root_is_argument_then_variable_then_embedded(files, embedded_root, monkeypatch):
    monkeypatch.setattr(lab7.layouts, "DATA_DIR", embedded_root)
    assert find_layout().labels == embedded_root
    monkeypatch.setenv("LAB7_DATA", "")
    assert find_layout().labels == embedded_root
    monkeypatch.setenv("LAB7_DATA", str(files))
    assert find_layout().labels == files and find_layout().course
    assert find_layout(embedded_root).labels == embedded_root
    layout = find_layout(embedded_root)
    assert find_layout(layout) is layout and not layout.course
    assert DATA_DIR.name == "data"


@pytest.mark.parametrize("form", ['"{}"', "'{}'", " {} ", "“{}”", "~/{name}", '"~/{name}"'])
def test_path_in_quotes_or_with_a_tilde(files, monkeypatch, form):
    monkeypatch.setenv("HOME", str(files.parent))
    files = files.rename(files.parent / "my 資料 of 2026")
    for given in (text := form.format(files, name=files.name), Path(text)):
        assert find_layout(given).labels.samefile(files)
    monkeypatch.setenv("LAB7_DATA", text)
    assert find_layout().labels.samefile(files)


@pytest.mark.parametrize("variable", [True, False])
@pytest.mark.parametrize("named", ["pictures", "pictures/inner"])
def test_pictures_elsewhere(files, place, tmp_path, monkeypatch, variable, named):
    far = tmp_path / "far" / "away"
    copy_labels(files, place)
    shutil.copytree(files / "iclevr", far / "pictures" / "inner")
    given = far / named
    if variable:
        monkeypatch.setenv("LAB7_PICTURES", str(given))
        given = None
    assert find_layout(place, given).pictures == far / "pictures" / "inner"
    assert len(ICLEVRDataset(place, pictures=given)) == 9


@pytest.mark.parametrize("variable", [True, False])
def test_pictures_alone_lead_to_the_json_files_beside_them(files, place, monkeypatch, variable):
    unpack(files, place, "file", "iclevr")
    given = place / "iclevr"
    if variable:
        monkeypatch.setenv("LAB7_PICTURES", str(given))
        given = None
    assert find_layout(None, given).labels == place / "file"


def test_pictures_that_are_named_go_before_others(files, place, tmp_path):
    unpack(files, place, "file", "iclevr")
    other = shutil.copytree(files / "iclevr", tmp_path / "other")
    assert find_layout(place, other).pictures == other


def test_embedded_set_keeps_its_pictures(files, embedded_root, monkeypatch):
    with pytest.raises(UserError, match="pictures of its own"):
        find_layout(embedded_root, files / "iclevr")
    monkeypatch.setenv("LAB7_PICTURES", str(files / "iclevr"))
    assert find_layout(embedded_root).pictures == embedded_root / "pictures.zip"


def test_embedded_set_is_not_taken_by_chance(embedded_root, tmp_path):
    (tmp_path / "notes").mkdir()
    with pytest.raises(UserError, match="notes is no i-CLEVR folder"):
        find_layout(tmp_path / "notes")


def test_links_that_lead_nowhere_are_passed_over(files, place):
    unpack(files, place, "file", "iclevr")
    (place / "loop").symlink_to(place / "loop")
    (place / "gone").symlink_to(place / "nowhere")
    (place / "up").symlink_to(place)
    assert find_layout(place).labels == place / "file"


def test_evaluator_of_the_embedded_set_is_not_searched_for(embedded_root):
    write = embedded_root.parent / "judge"
    write.mkdir()
    for name in ("checkpoint.pth", "evaluator.py"):
        (write / name).touch()
    assert default_weights(embedded_root) == WEIGHTS
    (embedded_root / "checkpoint.pth").touch()
    assert default_weights(embedded_root) == embedded_root / "checkpoint.pth"


def test_what_a_link_leads_to_has_neighbours_too(files, place, tmp_path):
    unpack(files, place, "file", "iclevr")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "labels").symlink_to(place / "file")
    assert find_layout(tmp_path / "mine" / "labels").pictures == place / "iclevr"


def test_links_to_one_folder_are_one(files, place):
    unpack(files, place, "file", "iclevr")
    (place / "data").symlink_to(place / "iclevr")
    (place / "labels").symlink_to(place / "file")
    layout = find_layout(place)
    assert layout.pictures.samefile(place / "iclevr") and layout.labels.samefile(place / "file")


# --- parts of it ---


def test_json_files_alone_serve_a_grader(files, place, capsys):
    copy_labels(files, place / "file")
    layout = find_layout(place)
    assert layout.pictures is None and layout.course
    assert "no training pictures" in layout.summary
    assert named_conditions("new_test", layout) == named_conditions("new_test", files)
    with pytest.raises(UserError, match="--pictures or LAB7_PICTURES"):
        ICLEVRDataset(layout)


def test_condition_files_alone_serve_too(files, place):
    copy_labels(files, place, ["test.json", "new_test.json"])
    layout = find_layout(place)
    assert default_weights(layout) == WEIGHTS and "evaluator of this project" in layout.summary
    assert named_conditions("test", layout) == named_conditions("test", files)
    with pytest.raises(MissingFileError, match="no file .*train.json"):
        named_conditions("unseen", layout)


@pytest.mark.parametrize("lacking", [1, 8])
def test_pictures_half_unpacked_are_counted(files, place, lacking):
    unpack(files, place, "file", "iclevr")
    names = sorted(os.listdir(place / "iclevr"))[:lacking]
    for name in names:
        (place / "iclevr" / name).unlink()
    assert f"{9 - lacking} of 9 pictures in" in find_layout(place).summary
    with pytest.raises(UserError, match=f"lacks {lacking} of 9 pictures.*{names[0]}"):
        ICLEVRDataset(place)


def test_what_other_systems_leave_in_folders_is_passed_over(files, place):
    unpack(files, place, "file", "iclevr")
    for other in ("__MACOSX", ".Trash", ".ipynb_checkpoints"):
        unpack(files, place, f"{other}/file", f"{other}/iclevr")
    layout = find_layout(place)
    assert (layout.labels, layout.pictures) == (place / "file", place / "iclevr")


@pytest.mark.parametrize("where", ["judge", "judge/of 2026", "."])
def test_evaluator_beside_its_code_or_in_the_root(files, place, where):
    copy_labels(files, place / "labels", JSON)
    (place / where).mkdir(parents=True, exist_ok=True)
    (place / where / "checkpoint.pth").touch()
    if where != ".":
        assert default_weights(place) == WEIGHTS, "it may be anybody's"
        (place / where / "evaluator.py").touch()
    assert default_weights(place).samefile(place / where / "checkpoint.pth")


# --- refusals ---


def refused(root, *parts, pictures=None, error=UserError):
    with pytest.raises(error) as caught:
        find_layout(root, pictures)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message
    return message


@pytest.mark.parametrize(("a", "b"), [("a", "b"), ("file", "old/file"), ("x/file", "y/file")])
def test_two_folders_of_json_files(files, place, a, b):
    copy_labels(files, place / a)
    copy_labels(files, place / b)
    refused(place, place / a, place / b, "--data or LAB7_DATA")
    assert find_layout(place / a).labels == place / a


def test_two_folders_of_json_files_beside_the_pictures(files, place):
    for name in ("file", "copy"):
        copy_labels(files, place / name)
    pictures = shutil.copytree(files / "iclevr", place / "iclevr")
    refused(pictures, place / "file", place / "copy")


def test_two_folders_of_pictures(files, place):
    unpack(files, place, "file", "iclevr")
    small = place / "iclevr_64"
    small.mkdir()
    shutil.copy(next((files / "iclevr").iterdir()), small)
    refused(place, place / "iclevr", small, "--pictures or LAB7_PICTURES")
    refused(place / "file", place / "iclevr", small)
    assert find_layout(place, small).pictures == small
    assert find_layout(place, place / "iclevr").pictures == place / "iclevr"


def test_two_evaluators(files, place):
    copy_labels(files, place / "labels", JSON)
    for name in "ab":
        copy_labels(files, place / name, ["checkpoint.pth", "evaluator.py"])
    layout = find_layout(place)  # whoever names one, or needs none, goes on
    with pytest.raises(UserError, match="a/checkpoint.pth and .*b/checkpoint.pth.*--evaluator"):
        default_weights(layout)


def test_folder_without_any_of_it(files, place, tmp_path):
    empty = tmp_path / "alone" / "empty"
    empty.mkdir(parents=True)
    refused(empty, empty, *JSON, "file.zip")
    shutil.copytree(files / "iclevr", empty / "iclevr")
    refused(empty, "no i-CLEVR folder")
    unpack(files, place, "file", "iclevr")
    refused(place, "none of the pictures", "train.json", pictures=tmp_path / "home")


def test_folder_that_is_not_there_or_a_file(files, tmp_path):
    missing = tmp_path / "no where"
    refused(missing, f"no folder {missing}: did you mean '{tmp_path}", error=MissingFileError)
    refused(files, f"no folder {missing}", pictures=missing, error=MissingFileError)
    refused(files / "train.json", "train.json is a file, not a folder")
    refused(tmp_path / ("x" * 300), "File name too long")


def test_folder_that_may_not_be_read(files, place, monkeypatch):
    unpack(files, place, "file", "iclevr")
    closed, scandir = [], os.scandir

    def scan(folder):
        if str(folder) in closed:
            raise PermissionError(13, "Permission denied", str(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", scan)
    (place / "private").mkdir()
    closed.append(str(place / "private"))
    assert find_layout(place).labels == place / "file"
    closed.append(str(place))
    refused(place, f"Permission denied: {place}")


@pytest.mark.parametrize("content", ["[[1]]", "3", '"text"', "[]"])
def test_train_json_that_is_another_lists_no_pictures(files, place, content):
    unpack(files, place, "file", "iclevr")
    (place / "file" / "train.json").write_text(content)
    with pytest.raises(UserError, match="train.json does not map"):
        ICLEVRDataset(place)


# --- the search is bounded ---


def test_only_two_levels_are_searched(files, place):
    unpack(files, place, "a/b/c/file", "a/b/c/iclevr")
    refused(place, "no i-CLEVR folder")
    assert find_layout(place / "a/b").labels == place / "a/b/c/file"


@pytest.fixture
def home(files, tmp_path, monkeypatch):
    """A home directory with the course's files in it under names of their own."""
    home = tmp_path / "users" / "me"
    unpack(files, home, "labels", "pictures")
    monkeypatch.setenv("HOME", str(home))
    return home


def test_a_whole_home_is_never_searched(files, home):
    listed = [folder for folder, _ in tree(home, 2)]
    assert listed == [home]
    refused(home, "no i-CLEVR folder")
    refused(home.parent, "no i-CLEVR folder")
    (home / "notes").mkdir()
    refused(home / "notes", "no i-CLEVR folder")
    assert find_layout(home / "labels").pictures is None
    assert find_layout(home / "labels", home / "pictures").pictures == home / "pictures"


@pytest.mark.parametrize("named", [".", "file", "iclevr"])
def test_the_courses_own_folders_are_found_in_a_home(files, home, named):
    unpack(files, home, "file", "iclevr")
    layout = find_layout(home / named)
    assert layout.labels.samefile(home / "file") and layout.pictures.samefile(home / "iclevr")


def test_the_whole_disk_is_never_searched():
    listed = [folder for folder, _ in tree(Path("/"), 1)]
    assert Path("/") in listed and len(listed) < 4


def test_a_search_lists_so_many_folders(tmp_path, monkeypatch):
    for number in range(20):
        (tmp_path / "a" / str(number)).mkdir(parents=True)
    monkeypatch.setattr(lab7.layouts, "_MOST_FOLDERS", 5)
    assert len(list(tree(tmp_path, 2))) == 5
    (tmp_path / "b").mkdir()
    assert tmp_path / "b" in dict(tree(tmp_path, 2)), "the nearest come first"
    for name in ("0", "1", "2", "3", "file"):
        (tmp_path / name).mkdir()
    assert list(dict(tree(tmp_path, 2)))[1:3] == [tmp_path / "file", tmp_path / "0"]


def test_files_named_as_pictures_are_not_asked_whether_they_are_folders(files, monkeypatch):
    asked, isdir = [], os.path.isdir
    monkeypatch.setattr(os.path, "isdir", lambda entry: asked.append(entry.name) or isdir(entry))
    assert len(list(tree(files, 2))) == 2
    assert "iclevr" in asked and not any(name.endswith(".png") for name in asked)


def test_read_only_folders_serve(files, place, cache_dir):
    unpack(files, place, "file", "iclevr")
    before = sorted(place.rglob("*"))
    for folder in (place / "file", place / "iclevr", place):
        folder.chmod(0o555)
    try:
        assert len(ICLEVRDataset(place)) == 9
    finally:
        for folder in (place / "file", place / "iclevr", place):
            folder.chmod(0o755)
    assert sorted(place.rglob("*")) == before, "nothing is written there"
    assert list(cache_dir.glob("*.npy"))


def test_write_course_counts_its_own_scenes(tmp_path, cache_dir):
    """The number of pictures is that of train.json, whatever it is."""
    course = write_course(tmp_path / "few" / "course", dict(list(SCENES.items())[:2]))
    assert len(json.loads((course / "train.json").read_text())) == 6
    assert "6 pictures in" in find_layout(course).summary
