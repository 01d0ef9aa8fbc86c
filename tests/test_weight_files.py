"""Weights in every wrapping, and files that hold none."""

import io
import os
import random
import zipfile

import pytest
import safetensors.torch
import torch
from torch import nn

from lab7.errors import MissingFileError, UserError
from lab7.weight_files import explain_file, read_checkpoint, read_weights


@pytest.fixture(scope="module")
def network():
    """Like a ResNet in its names: those of the first layer occur again in the blocks."""
    torch.manual_seed(0)
    network, block = nn.Sequential(), nn.Sequential()
    for part, channels in ((network, 3), (block, 4)):
        part.add_module("conv1", nn.Conv2d(channels, 4, 3))
        part.add_module("bn1", nn.BatchNorm2d(4))
    network.add_module("layer1", nn.Sequential(block))
    network.add_module("fc", nn.Sequential(nn.Linear(4, 2), nn.Sigmoid()))
    return network


@pytest.fixture
def weights(network):
    return network.state_dict()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in b)


def optimizer(network):
    optimizer = torch.optim.AdamW(network.parameters())
    for parameter in network.parameters():
        optimizer.state[parameter] = {"exp_avg": torch.zeros_like(parameter)}
    return optimizer.state_dict()


WRAPPINGS = {
    "raw": lambda x: x,
    "model": lambda x: {"model": x},
    "state_dict": lambda x: {"epoch": 3, "state_dict": x, "best": 0.5},
    "model_state_dict": lambda x: {"epoch": torch.tensor(3), "model_state_dict": x},
    "any other name": lambda x: {"resnet18": x},
    "nested": lambda x: {"checkpoint": {"model": {"state_dict": x}}},
    "beside other things": lambda x: x | {"epoch": 3, "name": "resnet"},
}
PREFIXES = ["", "module.", "resnet18.", "model.", "module.model.resnet18.", "_orig_mod.", "a.b.c."]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("wrap", WRAPPINGS.values(), ids=WRAPPINGS)
def test_weights_in_any_wrapping_and_under_any_prefix(weights, tmp_path, wrap, prefix):
    path = tmp_path / "checkpoint.pth"
    torch.save(wrap({prefix + name: tensor for name, tensor in weights.items()}), path)
    assert same(read_weights(path, weights, "it"), weights)


@pytest.mark.parametrize("zipped", [True, False])
def test_weights_beside_an_optimizer_and_another_network(network, weights, tmp_path, zipped):
    path = tmp_path / "checkpoint.pth"
    other = {"generator." + name: torch.zeros(2) for name in ("conv_in.weight", "fc.0.bias")}
    judge = {"judge." + name: tensor for name, tensor in weights.items()}
    content = {"optimizer": optimizer(network), "other": other, "model": judge | other, "step": 1}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    assert same(read_weights(path, weights, "it"), weights)


@pytest.mark.parametrize("name", ["weights.safetensors", "checkpoint.pth"])
def test_safetensors_are_known_by_their_content(weights, tmp_path, name):
    path = tmp_path / name
    safetensors.torch.save_file({f"module.{name}": x for name, x in weights.items()}, path)
    assert same(read_weights(path, weights, "it"), weights)


def test_weights_that_do_not_fit_are_named(weights, tmp_path):
    path = tmp_path / "checkpoint.pth"

    def refused(content, match):
        torch.save({"model": {f"module.{name}": x for name, x in content.items()}}, path)
        with pytest.raises(UserError, match=match) as caught:
            read_weights(path, weights, "the network")
        assert "\n" not in str(caught.value)

    less = {name: x for name, x in weights.items() if name != "conv1.weight"}
    refused(less, "checkpoint.pth does not fit the network: it lacks conv1.weight")
    refused(weights | {"fc.0.bias": torch.zeros(9)}, r"fc.0.bias is \(9,\), must be \(2,\)")
    refused(weights | {"head.weight": torch.zeros(9)}, "it has head.weight too")
    refused({"conv_in.weight": torch.zeros(1)}, "it lacks conv1.weight")
    refused({}, "it lacks conv1.weight")


# --- files that hold none ---


def of_zip(*names):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name in names:
            file.writestr(name, "x")
    return buffer.getvalue()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 44778160\n"
OTHERS = {
    "empty": (b"", "is empty: copy or download it again"),
    "Git LFS": (LFS, "is a Git LFS pointer .*git lfs pull"),
    "web page": (b"<!DOCTYPE html><html><title>Google Drive", "is a web page.*download the file"),
    "web page behind blanks": (b"\xef\xbb\xbf\n  <html>", "is a web page"),
    "file.zip": (of_zip("file/test.json", "b"), "is a zip of file/test.json and 1 more: unpack it"),
    "zip of one": (of_zip("model.ckpt"), "is a zip of model.ckpt: unpack it"),
    "rar": (b"Rar!\x1a\x07\x01\x00", "is an archive: unpack it"),
    "tar.gz": (b"\x1f\x8b\x08\x00rest of it", "is an archive: unpack it"),
    "text": (b"see the other folder", "no checkpoint"),
    "half a zip": (b"PK\x03\x04 and so on", "perhaps cut off: copy or download it again"),
}


@pytest.mark.parametrize("name", ["checkpoint.pth", "weights.safetensors"])
@pytest.mark.parametrize(("content", "match"), OTHERS.values(), ids=OTHERS)
def test_files_that_hold_no_weights_are_called_what_they_are(tmp_path, name, content, match):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name} .*{match}") as caught:
        read_checkpoint(tmp_path / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kept", [100, 1000, -30])
def test_weights_that_are_cut_off_are_refused(weights, tmp_path, zipped, kept):
    path = tmp_path / "checkpoint.pth"
    torch.save(weights, path, _use_new_zipfile_serialization=zipped)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UserError, match="copy or download it again"):
        read_checkpoint(path)
    assert not explain_file(path)


def test_safetensors_that_are_cut_off_are_refused(weights, tmp_path):
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(weights, path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="copy or download it again"):
        read_checkpoint(path)


class Attack:
    def __reduce__(self):
        return os.mkdir, ("attacked",)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("content", [Attack(), {"model": Attack()}, nn.Linear(1, 1)])
def test_what_could_run_code_is_refused(tmp_path, monkeypatch, content, zipped):
    monkeypatch.chdir(tmp_path)
    torch.save(content, "checkpoint.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match="could run code.*torch.save") as caught:
        read_checkpoint("checkpoint.pth")
    assert "\n" not in str(caught.value) and not os.path.exists("attacked")


@pytest.mark.parametrize("zipped", [True, False])
def test_broken_files_never_end_in_a_traceback(weights, tmp_path, zipped):
    path, chance = tmp_path / "checkpoint.pth", random.Random(0)
    torch.save(weights, path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    for _ in range(60):
        content = bytearray(whole)
        for _ in range(5):
            content[chance.randrange(len(content))] = chance.randrange(256)
        path.write_bytes(content)
        try:
            read_weights(path, weights, "it")
        except UserError as error:
            assert "\n" not in str(error)


def test_file_that_is_not_there_or_a_folder(tmp_path, monkeypatch):
    with pytest.raises(MissingFileError, match="no file .*nowhere.pth"):
        read_checkpoint(tmp_path / "nowhere.pth")
    with pytest.raises(UserError, match="is a folder, not a file"):
        read_checkpoint(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    torch.save({}, tmp_path / "my weights.pth")
    assert read_checkpoint('"~/my weights.pth"') == {}
