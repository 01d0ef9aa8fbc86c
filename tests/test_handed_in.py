"""Hand-ins as students make them, and what is not plain enough to be scored."""

import shutil
import zipfile

import numpy as np
import pytest
import torch
from conftest import draw, write_label_files
from PIL import Image
from torchvision.transforms import Resize

from lab7.__main__ import main
from lab7.dataset import to_uint8
from lab7.errors import UserError
from lab7.evaluator import build_network
from workshop.course.handed_in import read_handed_in

COUNT = 12


@pytest.fixture
def folder(tmp_path):
    """An empty folder."""
    path = tmp_path / "work" / "pictures"
    path.mkdir(parents=True)
    return path


def gray(number):
    return Image.new("RGB", (64, 64), (number * 20,) * 3)


def save(folder, form="{}.png", numbers=range(COUNT), first=0):
    """Pictures each of its own gray."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        gray(number).save(folder / form.format(number + first))
    return folder


def read(path, count=COUNT):
    return read_handed_in(path, {"test": count})["test"]


def grays(images):
    assert images.shape[1:] == (3, 64, 64) and images.dtype == torch.float32
    assert -1 <= images.min() <= images.max() <= 1
    return to_uint8(images)[:, 0, 0, 0].tolist()


IN_ORDER = [number * 20 for number in range(COUNT)]


def refused(path, *parts, counts=None):
    with pytest.raises(UserError) as caught:
        read_handed_in(path, counts or {"test": COUNT})
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message, message


# --- names ---


@pytest.mark.parametrize(
    "form",
    ["{}.png", "{:02}.png", "{:05}.png", "{}.PNG", "{}.Png", "test_{}.png", "image-{:03}.png"]
    + ["red cube {}.png", "圖{}.png", "1_{}.png"],
)
def test_pictures_go_by_number(folder, form):
    images, notes = read(save(folder, form))
    assert grays(images) == IN_ORDER and notes == []


@pytest.mark.parametrize("ending", ["jpg", "JPG", "jpeg"])
def test_jpeg(folder, ending):
    images, notes = read(save(folder, "{}." + ending))
    assert np.abs(np.array(grays(images)) - IN_ORDER).max() <= 1


def test_numbers_from_one_are_said(folder):
    images, notes = read(save(folder, first=1))
    assert grays(images) == IN_ORDER and notes == ["numbered from 1"]


def test_other_files_are_named_and_left_aside(folder):
    save(folder)
    for name in ("grid.png", "Thumbs.db", ".DS_Store", "._0.png", "samples.json"):
        (folder / name).touch()
    images, notes = read(folder)
    assert grays(images) == IN_ORDER
    assert notes == ["left aside, without a number: .DS_Store, Thumbs.db, grid.png, samples.json"]


def test_one_folder_is_found_whatever_its_name(folder):
    save(folder / "drawn")
    assert grays(read(folder)[0]) == IN_ORDER
    save(folder / "drawn" / "steps")  # whatever lies below pictures is no hand-in of its own
    assert grays(read(folder)[0]) == IN_ORDER
    (folder / "nothing").mkdir()
    assert grays(read(f"'{folder}'")[0]) == IN_ORDER


# --- a whole hand-in ---


def hand_in(root, name="DL_LAB6_313551001_王小明"):
    save(root / name / "images" / "test")
    save(root / name / "images" / "new_test", numbers=range(COUNT - 1, -1, -1))
    (root / name / "report.pdf").touch()
    return root


def write_zip(root, path, encoding=None, separator="/", start=""):
    """Zip a folder; with an encoding as systems do that do not flag names as UTF-8."""

    class Unflagged(zipfile.ZipInfo):
        def _encodeFilenameFlags(self):  # noqa: N802
            return self.filename.encode(encoding), self.flag_bits & ~0x800

    with zipfile.ZipFile(path, "w") as file:
        for picture in sorted(root.rglob("*.*")):
            name = start + picture.relative_to(root).as_posix().replace("/", separator)
            info = Unflagged(name) if encoding else zipfile.ZipInfo(name)
            file.writestr(info, picture.read_bytes())
    return path


BOTH = {"test": COUNT, "new_test": COUNT}


def check_both(path):
    found = read_handed_in(path, BOTH)
    assert list(found) == ["test", "new_test"]
    assert grays(found["test"][0]) == grays(found["new_test"][0]) == IN_ORDER
    for name in BOTH:
        assert grays(read_handed_in(path, {name: COUNT})[name][0]) == IN_ORDER


def test_unpacked_hand_in(tmp_path):
    hand_in(tmp_path / "in")
    check_both(tmp_path / "in")
    check_both(tmp_path / "in" / "DL_LAB6_313551001_王小明" / "images")


def test_sets_are_known_by_their_folders(tmp_path):
    images = hand_in(tmp_path / "in") / "DL_LAB6_313551001_王小明" / "images"
    (images / "new_test" / "3.png").unlink()
    images.joinpath("new_test").rename(images / "New-Test")
    assert grays(read_handed_in(images, {"file-test": COUNT})["file-test"][0]) == IN_ORDER
    refused(images, "New-Test lacks 3.png", counts=BOTH)
    shutil.rmtree(images / "test")
    refused(images, "holds no test/0.png")


@pytest.mark.parametrize("start", ["./", "/", "a/b/"])
def test_zip_with_paths_that_begin_otherwise(tmp_path, start):
    path = write_zip(hand_in(tmp_path / "in"), tmp_path / "x.zip", start=start)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("/", b"")
    check_both(path)


@pytest.mark.parametrize("encoding", [None, "utf-8", "big5", "gbk", "cp437"])
def test_zip_of_a_hand_in_with_names_in_any_encoding(tmp_path, encoding):
    name = "DL_LAB6_1_王小明" if encoding != "cp437" else "DL_LAB6_1_Zoë"
    path = write_zip(hand_in(tmp_path / "in", name), tmp_path / "handed in.zip", encoding)
    check_both(path)
    if encoding == "gbk":  # which big5 may take for other characters
        return
    counts = {"test": COUNT + 1}
    refused(path, name, f"lacks {COUNT}.png", counts=counts)


def test_zip_with_the_separators_of_windows(tmp_path):
    """As the Compress-Archive of Windows PowerShell writes them."""
    check_both(write_zip(hand_in(tmp_path / "in"), tmp_path / "x.zip", separator="\\"))


def test_what_macos_adds_to_zips_is_passed_over(tmp_path):
    hand_in(tmp_path / "in")
    for name in BOTH:
        save(tmp_path / "in" / "__MACOSX" / "images" / name, "._{}.png")
        save(tmp_path / "in" / "__MACOSX" / "other" / name)
    check_both(write_zip(tmp_path / "in", tmp_path / "x.zip"))


def test_only_the_folder_of_the_asked_set_is_read(tmp_path):
    hand_in(tmp_path / "in")
    save(tmp_path / "in" / "figures", "step_{}.png")
    path = write_zip(tmp_path / "in", tmp_path / "x.zip")
    check_both(path)
    refused(path, "figures", "images/test", "images/new_test", counts={"file-mine": COUNT})


def test_pictures_of_one_file_are_not_taken_for_the_others(tmp_path):
    save(tmp_path / "a" / "images" / "new_test")
    for path in (tmp_path / "a", tmp_path / "a" / "images" / "new_test"):
        refused(path, "test/0.png", "--conditions")
        refused(path, "test/0.png", counts=BOTH)
        assert grays(read_handed_in(path, {"file-mine": COUNT})["file-mine"][0]) == IN_ORDER


def test_pictures_without_a_folder_of_their_name_need_to_be_told(folder):
    refused(save(folder), "holds no test/0.png", "--conditions", counts=BOTH)


def test_grader_scores_a_zip_with_the_json_files_and_an_evaluator(tmp_path, monkeypatch, capsys):
    """No training pictures, no --conditions: distances are left out, and it is said."""
    files = tmp_path / "file"
    files.mkdir()
    write_label_files(files)
    torch.manual_seed(0)
    torch.save({"model": build_network().state_dict()}, files / "checkpoint.pth")
    save(tmp_path / "in" / "images" / "test", numbers=range(2), first=1)
    save(tmp_path / "in" / "images" / "new_test", numbers=range(1))
    (tmp_path / "in" / "images" / "test" / "grid.png").touch()
    path = write_zip(tmp_path / "in", tmp_path / "x.zip")
    command = ["lab7", "evaluate", "--images", path, "--data", files, "--device", "cpu"]
    command += ["--failures", tmp_path / "failures"]
    monkeypatch.setattr("sys.argv", list(map(str, command)))
    main()
    out = capsys.readouterr().out
    assert str(files / "checkpoint.pth") in out and "no training pictures" in out
    assert "distances" in out and "nearest distance" not in out
    assert "test: left aside, without a number: grid.png" in out
    assert "test: numbered from 1" in out and "new_test: numbered" not in out
    assert "top-k" in out and "exact set" in out


# --- pictures ---


def striped(size=64):
    return Image.fromarray(draw(["red cube", "cyan sphere"], size, size))


MODES = ["RGB", "RGBA", "L", "LA", "P", "1", "I;16"]


@pytest.mark.parametrize("mode", MODES)
def test_pictures_of_any_mode(folder, mode):
    image = striped()
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
        expected = striped().convert("L").convert("RGB")
    else:
        image = image.convert(mode)
        expected = image.convert("RGB")
    image.save(folder / "0.png")
    assert Image.open(folder / "0.png").mode == image.mode
    found, _ = read(folder, 1)
    assert np.array_equal(to_uint8(found)[0].permute(1, 2, 0).numpy(), np.asarray(expected))


def test_palette_with_transparency(folder):
    image = striped().convert("P")
    image.save(folder / "0.png", transparency=bytes(range(256)))
    found, _ = read(folder, 1)
    expected = np.asarray(image.convert("RGB"))
    assert np.array_equal(to_uint8(found)[0].permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpeg_of_any_mode(folder, mode):
    striped().convert(mode).save(folder / "0.jpg", quality=100)
    found, _ = read(folder, 1)
    expected = striped().convert(mode).convert("RGB")
    difference = to_uint8(found)[0].permute(1, 2, 0).numpy().astype(float) - np.asarray(expected)
    assert np.abs(difference).mean() < 4


@pytest.mark.parametrize("size", [32, 128, 256])
def test_squares_of_any_size_are_resized_and_it_is_said(folder, size):
    striped(size).save(folder / "0.png")
    found, notes = read(folder, 1)
    assert notes == [f"resized from {size}×{size} to 64×64"]
    expected = np.asarray(Resize((64, 64))(striped(size)))
    assert np.array_equal(to_uint8(found)[0].permute(1, 2, 0).numpy(), expected)


# --- what is not plain ---


def test_wrong_counts(folder):
    save(folder)
    refused(folder, folder, "lacks 12.png", "13 pictures", "0 … 12", counts={"test": 13})
    refused(folder, folder, "has 11.png", "11 pictures", "12", counts={"test": 11})


@pytest.mark.parametrize("gone", [[4], [4, 5], [11], [0, 1]])
def test_gaps(folder, gone):
    refused(save(folder, numbers=sorted(set(range(COUNT)) - set(gone))), "pictures lacks")


def test_the_first_missing_picture_is_named(folder):
    save(folder, "img_{}.png")
    (folder / "img_4.png").unlink()
    refused(folder, "lacks img_4.png", "12 pictures, 0 … 11", "there are 11")


@pytest.mark.parametrize("extra", ["000.png", "0.jpg", "3.PNG", "grid_0.png", "epoch100.png"])
def test_two_numberings(folder, extra):
    save(folder)
    gray(1).save(folder / extra)
    refused(folder, "two numberings", extra)


def test_two_prefixes_that_complement_each_other(folder):
    save(folder, "a_{}.png", range(6))
    save(folder, "b_{}.png", range(6, COUNT))
    refused(folder, "two numberings", "a_5.png", "b_6.png")


def test_two_folders_of_pictures(folder):
    save(folder / "a")
    save(folder / "b")
    refused(folder, folder / "a", folder / "b", "--images")


@pytest.mark.parametrize("size", [(530, 266), (530, 530), (128, 128), (64, 32)])
def test_a_grid_that_bears_a_number(folder, size):
    save(folder)
    Image.new("RGB", size).save(folder / "3.png")
    refused(folder, "3.png is {}×{}".format(*size), "64×64", "grid")


def test_pictures_that_are_not_square(folder):
    for number in range(3):
        Image.new("RGB", (320, 240)).save(folder / f"{number}.png")
    refused(folder, "0.png is 320×240: wanted are squares", counts={"test": 3})


@pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n", None])
@pytest.mark.parametrize("zipped", [False, True])
def test_broken_pictures(folder, tmp_path, content, zipped):
    save(folder)
    path = folder / "7.png"
    path.write_bytes(path.read_bytes()[:60] if content is None else content)
    place = write_zip(folder, tmp_path / "x.zip") if zipped else folder
    refused(place, "7.png is no complete PNG or JPEG picture")


def test_broken_zips(folder, tmp_path):
    path = write_zip(save(folder), tmp_path / "x.zip")
    content = bytearray(path.read_bytes())
    content[100] ^= 0xFF
    path.write_bytes(content)
    refused(path, "0.png is no complete PNG")
    path.write_bytes(content[:500])
    refused(path, "x.zip is neither a folder nor a zip")
    path = write_zip(folder, path)
    with zipfile.ZipFile(path) as archive:
        mark = archive.start_dir + 8  # flags of the first file in the directory
    content = bytearray(path.read_bytes())
    content[mark] |= 1
    path.write_bytes(content)
    refused(path, "x.zip needs a password: unpack it")
    path.write_bytes(b"")
    refused(path, "x.zip is empty")
    path.write_bytes(b"<html>")
    refused(path, "x.zip is a web page")
    path.write_bytes(b"Rar!\x1a\x07")
    refused(path, "x.zip is an archive")


def test_nothing_there(folder):
    refused(folder, f"{folder} holds no test/0.png")
    refused(folder, f"{folder} holds no 0.png, 1.png, …: number them so", counts={"file-mine": 3})
    refused(folder / "nowhere", "nowhere")


def test_search_for_pictures_is_bounded(folder, monkeypatch):
    monkeypatch.setattr("workshop.course.handed_in._MOST_FOLDERS", 5)
    for number in range(9):
        (folder / f"empty{number}").mkdir()
    save(folder / "empty0" / "far")
    refused(folder, "holds no")


def test_a_picture_with_a_number_higher_up_hides_no_set(tmp_path):
    root = hand_in(tmp_path)
    for name in ("Figure_1.png", "images/grid1.png"):
        (root / name).parent.mkdir(exist_ok=True)
        gray(3).save(root / name)
    check_both(root)
    write_zip(root, tmp_path / "with.zip")
    check_both(tmp_path / "with.zip")


def test_files_of_other_names_are_named(folder):
    for name in ("0_out.png", "img (0).png", "1.webp"):
        (folder / name).write_bytes(b"x")
    refused(folder, "number them so: PNG or JPEG files; there are 0_out.png, 1.webp, img (0).png")


def test_what_is_not_plain_about_a_zip_is_said(tmp_path):
    path = tmp_path / "x.zip"
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(path, "w") as pack:
        for _ in range(2):
            pack.writestr("images/test/0.png", "x")
    refused(path, "x.zip holds images/test/0.png twice: pack it anew")
    path.write_bytes(path.read_bytes()[:30])
    refused(path, "neither a folder nor a zip of pictures, perhaps cut off: copy or download it")
    path.write_bytes(b"Rar!\x1a\x07\x00")
    refused(path, "x.zip is an archive: unpack it, and name its folder")


def test_a_pointer_in_the_place_of_a_picture_is_named(folder):
    save(folder)
    (folder / "5.png").write_text("version https://git-lfs.github.com/spec/v1")
    refused(folder, "5.png is no complete PNG or JPEG picture: it is a Git LFS pointer")
