"""Pictures from the embedded set and the course's folder, the pack, and the cache."""

import json
import os
import shutil
import threading
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SCENES, draw, scene_pictures
from PIL import Image
from torchvision.transforms import Resize

import lab7.cache
import lab7.dataset
from lab7.dataset import ICLEVRDataset, named_conditions, to_float, to_uint8
from lab7.errors import UserError
from lab7.files import write_atomically
from lab7.labels import LABELS
from workshop.standin.packing import read_pack, write_pack
from workshop.study.evaluation import find_conditions

NAMES = [f"{scene}_{step}.png" for scene in sorted(SCENES) for step in range(3)]


def psnr(a, b):
    return 10 * np.log10(255**2 / np.mean((a.astype(float) - b.astype(float)) ** 2))


def test_range_conversion():
    values = torch.arange(256, dtype=torch.uint8)
    assert to_float(values).dtype == torch.float32
    assert to_float(values)[[0, 255]].tolist() == [-1.0, 1.0]
    assert torch.equal(to_uint8(to_float(values)), values)
    assert to_uint8(torch.tensor([-1.5, 0.0, 1.2])).tolist() == [0, 128, 255]
    assert to_uint8(torch.tensor([0.9999], dtype=torch.bfloat16)).tolist() == [255]


# --- folders ---


def test_conditions_of_the_course(course_root):
    assert named_conditions("test", course_root) == [("red cube",), ("blue cube", "green sphere")]
    assert named_conditions("four_five", course_root) == named_conditions("four_five")
    assert find_conditions("test.json", course_root) == named_conditions("test", course_root)
    (course_root / "four_five.json").write_text('[["gray cube"]]')
    assert named_conditions("four_five", course_root) == [("gray cube",)]
    (course_root / "test.json").unlink()
    with pytest.raises(FileNotFoundError, match="test.json"):
        named_conditions("test", course_root)  # never ours


def test_unseen_triples_of_the_course_are_those_its_training_lacks(course_root):
    shown = {frozenset(labels) for labels in ICLEVRDataset(course_root).labels}
    unseen = named_conditions("unseen", course_root)
    assert len(set(unseen)) == 136 and all(len(labels) == 3 for labels in unseen)
    assert not shown & {frozenset(labels) for labels in unseen}
    assert unseen == named_conditions("unseen", course_root) != named_conditions("unseen")


def test_validation_holds_nothing_that_is_tested(course_root):
    ours = named_conditions("valid")
    for name, rows in (("test", ours[:3]), ("new_test", ours[10:12])):
        (course_root / f"{name}.json").write_text(json.dumps([labels[::-1] for labels in rows]))
    valid = named_conditions("valid", course_root)
    tested = ours[:3] + ours[10:12] + named_conditions("unseen", course_root)
    tested = {frozenset(labels) for labels in tested}
    assert valid == [labels for labels in ours if frozenset(labels) not in tested]
    assert 90 < len(valid) < 123


@pytest.mark.parametrize("name", ["objects.json", "train.json"])
def test_json_file_that_is_missing_is_named(course_root, name):
    (course_root / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"no file .*{name}"):
        ICLEVRDataset(course_root)


def test_name_that_is_no_condition_file_gets_the_nearest(course_root):
    with pytest.raises(UserError, match="condition file 'unsen'.*did you mean 'unseen'"):
        named_conditions("unsen", course_root)
    (course_root / "mine.json").write_text('[["gray cube"]]')
    assert named_conditions("mine", course_root) == [("gray cube",)]


def test_split_that_is_not_there_names_the_nearest(embedded_root):
    with pytest.raises(FileNotFoundError, match="did you mean .*train.json"):
        ICLEVRDataset(embedded_root, split="trian")
    with pytest.raises(ValueError, match="test.json does not map picture names to labels"):
        ICLEVRDataset(embedded_root, split="test")


def test_wrong_label_names_the_picture(embedded_root):
    path = embedded_root / "train.json"
    path.write_text(json.dumps({"CLEVR_train_000002_0.png": ["gray cubes"]}))
    with pytest.raises(ValueError, match="train.json, picture CLEVR_train_000002_0.png: .*cubes"):
        ICLEVRDataset(embedded_root)
    path.write_text("{}")
    with pytest.raises(ValueError, match="does not map"):
        ICLEVRDataset(embedded_root)


def test_other_numbering_of_labels_is_refused(embedded_root):
    numbers = {label: index for index, label in enumerate(reversed(LABELS))}
    (embedded_root / "objects.json").write_text(json.dumps(numbers))
    with pytest.raises(ValueError, match="objects.json must map 'gray cube' to 0, not to 23"):
        ICLEVRDataset(embedded_root)


# --- the embedded set ---


def test_embedded_set(embedded_root):
    dataset = ICLEVRDataset(embedded_root)
    assert len(dataset) == 9
    assert dataset.names == NAMES
    assert dataset.labels[3:6] == [
        ("cyan cube",),
        ("cyan cube", "red sphere"),
        ("cyan cube", "red sphere", "gray cylinder"),
    ]
    assert dataset.images.shape == (9, 3, 64, 64) and dataset.images.dtype == torch.uint8
    assert dataset.conditions.shape == (9, 24) and dataset.conditions.dtype == torch.float32
    assert dataset.conditions.sum(1).tolist() == [1, 2, 3] * 3
    for row, labels in enumerate(dataset.labels):
        assert {LABELS[i] for i in dataset.conditions[row].nonzero()} == set(labels)
        assert psnr(dataset.images[row].permute(1, 2, 0).numpy(), draw(labels)) > 35


def test_item_is_a_float_picture_and_its_condition(embedded_root):
    dataset = ICLEVRDataset(embedded_root)
    image, condition = dataset[4]
    assert image.shape == (3, 64, 64) and image.dtype == torch.float32
    assert -1 <= image.min() < 0 < image.max() <= 1
    assert torch.equal(to_uint8(image), dataset.images[4])
    assert torch.equal(condition, dataset.conditions[4])
    images, conditions = next(iter(torch.utils.data.DataLoader(dataset, batch_size=4)))
    assert images.shape == (4, 3, 64, 64) and conditions.shape == (4, 24)


def test_pack_round_trip(tmp_path):
    scenes = [(scene, scene_pictures(labels)) for scene, labels in SCENES.items()]
    write_pack(tmp_path / "pack.zip", iter(scenes))
    names, pictures = read_pack(tmp_path / "pack.zip")
    assert names == sorted(SCENES)
    assert pictures.shape == (3, 3, 64, 64, 3) and pictures.dtype == np.uint8
    for name, picture in zip(names, pictures, strict=True):
        assert psnr(picture, scene_pictures(SCENES[name])) > 40


def test_pack_does_not_blur_colors(tmp_path):
    stripes = np.zeros((3, 64, 64, 3), np.uint8)
    stripes[:, :, ::2, 0] = 255
    stripes[:, :, 1::2, 2] = 255
    write_pack(tmp_path / "pack.zip", [("a", stripes)], speed=8)
    write_pack(tmp_path / "blurred.zip", [("a", stripes)], speed=8, subsampling="4:2:0")
    assert psnr(read_pack(tmp_path / "pack.zip")[1][0], stripes) > 35
    assert psnr(read_pack(tmp_path / "blurred.zip")[1][0], stripes) < 20


def test_pack_has_the_same_bytes_in_any_order(tmp_path):
    scenes = [(scene, scene_pictures(labels)) for scene, labels in SCENES.items()]
    write_pack(tmp_path / "a.zip", scenes, speed=8)
    write_pack(tmp_path / "b.zip", reversed(scenes), speed=8)
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.zip") as pack:
        assert pack.namelist() == [f"{scene}.avif" for scene in sorted(SCENES)]
        assert {info.compress_type for info in pack.infolist()} == {zipfile.ZIP_STORED}


def test_pack_that_fails_leaves_the_old_one(tmp_path):
    path = tmp_path / "pack.zip"
    path.write_bytes(b"old")
    with pytest.raises(ValueError, match="reshape"):
        write_pack(path, [("a", np.zeros((3, 32, 32, 3), np.uint8))])
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["pack.zip"]


def test_write_atomically_makes_folders_and_leaves_nothing_when_it_fails(tmp_path):
    path = tmp_path / "a" / "b.bin"
    write_atomically(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode & 0o777 == 0o644

    def fail(file):
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, fail)
    assert path.read_bytes() == b"new" and os.listdir(path.parent) == ["b.bin"]
    with pytest.raises(UserError):
        write_atomically(path / "below a file", fail)


def test_pack_that_is_no_zip(embedded_root):
    pack = embedded_root / "pictures.zip"
    pack.write_bytes(pack.read_bytes()[:500])
    with pytest.raises(ValueError, match="pictures.zip is a broken pack"):
        ICLEVRDataset(embedded_root)
    with pytest.raises(ValueError, match="pictures.zip is a broken pack"):
        read_pack(pack)


def test_pack_with_a_damaged_strip(embedded_root, cache_dir):
    pack = embedded_root / "pictures.zip"
    content = bytearray(pack.read_bytes())
    start = content.index(b"CLEVR_train_000007.avif")
    content[start + 200] ^= 0xFF
    pack.write_bytes(content)
    with pytest.raises(ValueError, match="broken at CLEVR_train_000007.avif"):
        ICLEVRDataset(embedded_root)
    assert not cache_dir.exists()


def test_pack_with_something_else_inside(embedded_root):
    with zipfile.ZipFile(embedded_root / "pictures.zip", "w") as pack:
        for scene in SCENES:
            pack.writestr(f"{scene}.avif", b"no picture")
    with pytest.raises(ValueError, match=r"broken at CLEVR_train_000002.avif"):
        ICLEVRDataset(embedded_root)


def test_pack_with_a_strip_of_another_size(embedded_root):
    pack = embedded_root / "pictures.zip"
    Image.new("RGB", (128, 64)).save(embedded_root / "strip.avif")
    with zipfile.ZipFile(pack, "w") as file:
        for scene in SCENES:
            file.write(embedded_root / "strip.avif", f"{scene}.avif")
    with pytest.raises(ValueError, match="CLEVR_train_000002.avif is 128×64, not 192×64"):
        ICLEVRDataset(embedded_root)


@pytest.mark.parametrize(
    "name", ["CLEVR_train_000099_0.png", "CLEVR_train_000002_3.png", "CLEVR_train_000002.png"]
)
def test_label_entry_without_a_picture_in_the_pack(embedded_root, name):
    entries = json.loads((embedded_root / "train.json").read_text())
    (embedded_root / "train.json").write_text(json.dumps({**entries, name: ["red cube"]}))
    with pytest.raises(ValueError, match=f"pictures.zip has no picture {name}"):
        ICLEVRDataset(embedded_root)


def test_empty_pack(tmp_path):
    write_pack(tmp_path / "pack.zip", [])
    names, pictures = read_pack(tmp_path / "pack.zip")
    assert names == [] and pictures.shape == (0, 3, 64, 64, 3)


# --- the course's folder ---


def test_course_folder_is_squeezed_as_torchvision_does(course_root):
    dataset = ICLEVRDataset(course_root)
    assert dataset.names == NAMES
    resize = Resize((64, 64))
    for name, image in zip(dataset.names, dataset.images, strict=True):
        expected = np.asarray(resize(Image.open(course_root / "iclevr" / name).convert("RGB")))
        assert np.array_equal(image.permute(1, 2, 0).numpy(), expected)
    assert dataset.conditions.sum(1).tolist() == [1, 2, 3] * 3


def test_variable_names_the_course_folder(course_root, monkeypatch):
    monkeypatch.setenv("LAB7_DATA", str(course_root))
    assert torch.equal(ICLEVRDataset().images, ICLEVRDataset(course_root).images)


def test_small_pictures_are_taken_as_they_are(course_root):
    path = course_root / "iclevr" / "CLEVR_train_000002_0.png"
    Image.fromarray(draw(["red cube"])).save(path)
    image = ICLEVRDataset(course_root).images[0]
    assert np.array_equal(image.permute(1, 2, 0).numpy(), draw(["red cube"]))


def test_missing_picture_is_named(course_root):
    (course_root / "iclevr" / "CLEVR_train_000007_1.png").unlink()
    with pytest.raises(UserError, match="iclevr lacks 1 of 9 pictures, .*CLEVR_train_000007_1.png"):
        ICLEVRDataset(course_root)
    (course_root / "iclevr" / "CLEVR_train_000011_0.png").unlink()
    with pytest.raises(UserError, match="iclevr lacks 2 of 9 pictures, .*000007_1.png: unpack"):
        ICLEVRDataset(course_root)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-200])


def save_as_jpeg(path):
    Image.open(path).convert("RGB").save(path, "JPEG")


def test_pictures_that_git_lfs_left_out_are_called_so(course_root):
    path = course_root / "iclevr" / "CLEVR_train_000007_2.png"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 31\n")
    with pytest.raises(UserError, match="000007_2.png is a Git LFS pointer.*git lfs pull"):
        ICLEVRDataset(course_root)


@pytest.mark.parametrize("spoil", [truncate, save_as_jpeg, lambda path: path.write_bytes(b"")])
def test_unreadable_picture_is_named(course_root, cache_dir, spoil):
    path = course_root / "iclevr" / "CLEVR_train_000007_2.png"
    spoil(path)
    with pytest.raises(ValueError, match="000007_2.png is (no complete PNG|empty)") as error:
        ICLEVRDataset(course_root)
    assert "\n" not in str(error.value)
    assert not cache_dir.exists()


@pytest.mark.parametrize(
    ("mode", "size", "has"),
    [
        ("RGB", (128, 128), "128×128 RGB"),
        ("RGB", (240, 320), "240×320 RGB"),
        ("L", (320, 240), "320×240 L"),
        ("P", (64, 64), "64×64 P"),
        ("I;16", (64, 64), "64×64 I;16"),
    ],
)
def test_other_size_or_mode_is_named_with_what_is_allowed(course_root, mode, size, has):
    Image.new(mode, size).save(course_root / "iclevr" / "CLEVR_train_000007_0.png")
    with pytest.raises(ValueError, match=f"000007_0.png is {has}: pictures are 320×240 or 64×64"):
        ICLEVRDataset(course_root)


# --- the cache ---


def no_decoding(*_):
    raise AssertionError("decoded again")


def test_second_opening_maps_the_cache(embedded_root, cache_dir, monkeypatch):
    first = ICLEVRDataset(embedded_root)
    (file,) = cache_dir.iterdir()
    assert file.stat().st_size == 9 * 3 * 64 * 64 + 128
    monkeypatch.setattr(lab7.dataset, "decode_pack", no_decoding)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second = ICLEVRDataset(embedded_root)
    assert torch.equal(first.images, second.images)


def test_course_folder_is_cached_too(course_root, cache_dir, monkeypatch):
    first = ICLEVRDataset(course_root)
    monkeypatch.setattr(lab7.dataset, "_decode_folder", no_decoding)
    assert torch.equal(ICLEVRDataset(course_root).images, first.images)


def test_changing_the_tensor_leaves_the_cache_alone(embedded_root, cache_dir):
    ICLEVRDataset(embedded_root)
    (file,) = cache_dir.iterdir()
    content = file.read_bytes()
    ICLEVRDataset(embedded_root).images.zero_()
    assert file.read_bytes() == content


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def overwrite(path):
    path.write_bytes(b"no array" * 20000)


def make_folder(path):
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("damage", [cut, overwrite, lambda path: path.write_bytes(b"")])
def test_cache_that_is_cut_off_or_unreadable_is_rebuilt(embedded_root, cache_dir, damage):
    expected = ICLEVRDataset(embedded_root).images.clone()
    (file,) = cache_dir.iterdir()
    content = file.read_bytes()
    damage(file)
    assert torch.equal(ICLEVRDataset(embedded_root).images, expected)
    assert list(cache_dir.iterdir()) == [file]
    assert file.read_bytes() == content


def test_cache_that_cannot_be_replaced_is_done_without(embedded_root, cache_dir):
    expected = ICLEVRDataset(embedded_root).images.clone()
    (file,) = cache_dir.iterdir()
    make_folder(file)
    with pytest.warns(UserWarning, match="LAB7_CACHE"):
        assert torch.equal(ICLEVRDataset(embedded_root).images, expected)


def test_changed_pack_is_seen(embedded_root):
    ICLEVRDataset(embedded_root)
    white = np.full((3, 64, 64, 3), 255, np.uint8)
    write_pack(embedded_root / "pictures.zip", [(scene, white) for scene in SCENES], speed=8)
    assert ICLEVRDataset(embedded_root).images.min() > 250


def turn(path):
    Image.open(path).transpose(Image.Transpose.FLIP_TOP_BOTTOM).save(path)


def test_folder_that_changed_is_read_again(course_root):
    before = ICLEVRDataset(course_root).images[0].clone()
    path = course_root / "iclevr" / NAMES[0]
    turn(path)
    shutil.copy(path, course_root / "copy.png")
    (course_root / "copy.png").replace(path)
    os.utime(course_root / "iclevr", (1, 1))  # whatever the clock of this disk can tell apart
    assert not torch.equal(ICLEVRDataset(course_root).images[0], before)


@pytest.mark.parametrize("change", [Path.touch, Path.unlink])
def test_folder_with_more_or_fewer_files_is_read_again(course_root, change, monkeypatch):
    folder = course_root / "iclevr"
    (folder / "readme.txt").touch()
    os.utime(folder, (1, 1))
    ICLEVRDataset(course_root)
    (folder / "other.txt").touch() if change is Path.touch else (folder / "readme.txt").unlink()
    os.utime(folder, (1, 1))
    monkeypatch.setattr(lab7.dataset, "_decode_folder", no_decoding)
    with pytest.raises(AssertionError, match="decoded again"):
        ICLEVRDataset(course_root)


def test_later_starts_ask_after_the_folder_not_after_its_files(course_root, monkeypatch):
    """A picture changed in place is seen by `rescan`, which looks at all."""
    before = ICLEVRDataset(course_root).images[0].clone()
    folder, asked, stat = course_root / "iclevr", [], os.stat
    turn(folder / NAMES[0])
    os.utime(folder / NAMES[0], (1, 1))

    def watch(path, *args, **kwargs):
        asked.append(str(path))
        return stat(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", watch)
        assert torch.equal(ICLEVRDataset(course_root).images[0], before)
    assert str(folder) in asked and not any(path.endswith(".png") for path in asked)
    assert not torch.equal(ICLEVRDataset(course_root, rescan=True).images[0], before)
    assert not torch.equal(ICLEVRDataset(course_root).images[0], before)


@pytest.mark.parametrize("count", [499, 500])
def test_reading_many_pictures_shows_a_bar(capsys, count):
    """In notebooks too, where standard error is no terminal."""
    assert list(lab7.dataset.in_threads(str, range(count), "reading", always_show=True))[3] == "3"
    assert ("reading" in capsys.readouterr().err) == (count == 500)
    list(lab7.dataset.in_threads(str, range(count), "unpacking"))
    assert not capsys.readouterr().err


def test_a_split_of_other_names_has_its_own_cache(embedded_root):
    whole = ICLEVRDataset(embedded_root)
    entries = json.loads((embedded_root / "train.json").read_text())
    for split, start in {"even": 0, "odd": 1}.items():
        names = NAMES[start:8:2]
        part = {name: entries[name] for name in names}
        (embedded_root / f"{split}.json").write_text(json.dumps(part))
        dataset = ICLEVRDataset(embedded_root, split=split)
        assert dataset.names == names
        assert torch.equal(dataset.images, whole.images[start:8:2])


def test_place_that_cannot_be_written_falls_back_to_memory(embedded_root, tmp_path, monkeypatch):
    expected = ICLEVRDataset(embedded_root).images.clone()
    (tmp_path / "file").touch()
    monkeypatch.setenv("LAB7_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.warns(UserWarning, match="kept in memory.*set LAB7_CACHE") as caught:
        dataset = ICLEVRDataset(embedded_root)
    assert len(caught) == 1 and caught[0].filename == __file__
    assert torch.equal(dataset.images, expected)


def test_full_disk_falls_back_to_memory(embedded_root, cache_dir, monkeypatch):
    def full(file, images):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.warns(UserWarning, match="No space left on device"):
        dataset = ICLEVRDataset(embedded_root)
    assert len(dataset) == 9
    assert list(cache_dir.iterdir()) == []


def test_several_at_once_do_not_break_the_cache(embedded_root, cache_dir):
    results = []
    barrier = threading.Barrier(4)

    def work():
        barrier.wait()
        results.append(ICLEVRDataset(embedded_root).images)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert all(torch.equal(images, results[0]) for images in results)
    assert len(list(cache_dir.iterdir())) == 1


@pytest.fixture
def user_cache(tmp_path, monkeypatch):
    """The user's cache folder, and a folder for temporary files."""
    monkeypatch.delenv("LAB7_CACHE", raising=False)
    path = tmp_path / "user"
    monkeypatch.setattr(
        lab7.cache.platformdirs, "user_cache_dir", lambda name, **_: str(path / ".cache" / name)
    )
    monkeypatch.setattr(lab7.cache.tempfile, "gettempdir", lambda: str(tmp_path / "temporary"))
    return path


def test_cache_is_in_the_users_cache_folder_by_default(embedded_root, user_cache):
    ICLEVRDataset(embedded_root)
    assert len(list((user_cache / ".cache" / "lab7").glob("pictures-*.npy"))) == 1


def test_cache_is_temporary_where_the_users_is_read_only(
    embedded_root, user_cache, tmp_path, monkeypatch
):
    user_cache.mkdir()
    monkeypatch.setattr(os, "access", lambda place, mode: Path(place) != user_cache)
    ICLEVRDataset(embedded_root)
    assert not list(user_cache.iterdir())
    assert len(list(tmp_path.glob("temporary/lab7-*/pictures-*.npy"))) == 1
