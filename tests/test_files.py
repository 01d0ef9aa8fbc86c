"""Reading JSON and writing files; what conditions need of them is in test_labels."""

import errno
import os
from pathlib import Path

import pytest
import safetensors.torch
import torch

from lab7.errors import FileError, MissingFileError, UserError, unknown, user_files
from lab7.files import read_json, require_writable, write_atomically


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux")
def test_devices_are_neither_read_nor_replaced():
    with pytest.raises(FileError, match="/dev/full is a device, not a file"):
        read_json("/dev/full")
    with pytest.raises(FileError, match="/dev/full is a device, not a file: choose another"):
        write_atomically(Path("/dev/full"), "text")
    with pytest.raises(FileError, match="/dev/full is a file, not a folder: choose another"):
        require_writable(Path("/dev/full/inner"))
    assert Path("/dev/full").is_char_device()


def test_a_folder_is_not_replaced_by_a_file(tmp_path):
    with pytest.raises(FileError, match=f"{tmp_path} is a folder, not a file"):
        write_atomically(tmp_path, "text")
    assert os.listdir(tmp_path) == []


def test_a_full_disk_names_the_file_and_leaves_nothing(tmp_path):
    def full(file):
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")  # which names no file

    path = tmp_path / "a.bin"
    with pytest.raises(FileError, match=f"^No space left on device: {path}$"):
        write_atomically(path, full)
    assert os.listdir(tmp_path) == []


def test_errors_of_places_are_still_os_errors():
    with pytest.raises(OSError) as caught, user_files():
        open("/nowhere/at all")
    assert isinstance(caught.value, MissingFileError) and isinstance(caught.value, UserError)
    assert str(caught.value) == "No such file or directory: /nowhere/at all"
    with pytest.raises(FileError, match="^Permission denied: /a$"), user_files("/a"):
        raise PermissionError(errno.EACCES, "Permission denied", "/.a-temporary")
    with pytest.raises(ValueError, match="a bug") as caught, user_files():
        raise ValueError("a bug")
    assert not isinstance(caught.value, UserError)


def test_weights_that_cannot_be_written(tmp_path):
    path = tmp_path / "nowhere" / "weights.safetensors"
    with pytest.raises(FileError, match=f"No such file or directory.*: {path}$"), user_files(path):
        safetensors.torch.save_file({"weight": torch.zeros(1)}, path)


def test_unknown_names_get_the_nearest():
    message = "unknown sampler 'DDIN': did you mean 'ddim'? Choose one of ddpm, ddim"
    assert str(unknown("sampler", "DDIN", ("ddpm", "ddim"))) == message
    message = "unknown sampler 'ddim': did you mean 'DDIM'? Choose one of DDPM, DDIM"
    assert str(unknown("sampler", "ddim", ("DDPM", "DDIM"))) == message, "whatever their case"
    message = "unknown sampler 'ddin': did you mean 'ddim'? One of two"
    assert str(unknown("sampler", "ddin", ("ddpm", "ddim"), "One of two")) == message
    assert str(unknown("record", "ours", [])) == "unknown record 'ours': there is none"


def test_files_are_named_as_people_do(tmp_path, monkeypatch):
    (tmp_path / "a b.json").write_text("[1]")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read_json(f"'{tmp_path}/a b.json' ") == read_json("~/a b.json") == [1]
