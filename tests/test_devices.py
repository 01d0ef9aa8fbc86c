"""Which device is used, how long a training will take, and what a process does with its memory."""

import platform
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from lab7 import devices
from lab7.devices import bfloat16_is_faster, choose_device, estimate_seconds, keep_freed_memory
from lab7.errors import UserError
from lab7.experiments import get_experiment

COUNT_FAULTS = """
import resource, torch
from lab7.devices import keep_freed_memory

def count():
    for _ in range(10):
        torch.ones(10_000_000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(10_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

returned = count()
assert keep_freed_memory()
print(count(), returned)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told")
def test_freed_memory_is_kept():
    command = [sys.executable, "-c", COUNT_FAULTS]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    kept, returned = map(int, output.split())
    assert kept < 0.1 * returned


@pytest.fixture
def install(monkeypatch):
    """Pretend that there are two GPUs, and what code the installed PyTorch has."""

    def pretend(capability, codes):
        gpu = torch.device("cuda")
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: gpu)
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA Something")
        monkeypatch.setattr(torch.cuda, "get_arch_list", codes.split)
        devices._has_code.cache_clear()

    yield pretend
    devices._has_code.cache_clear()


@pytest.mark.parametrize(
    ("capability", "codes", "expected"),
    [
        ((8, 0), "sm_75 sm_80 sm_90", "cuda"),
        ((8, 6), "sm_75 sm_80 sm_90", "cuda"),  # machine code runs on later ones of its generation
        ((7, 0), "sm_75 sm_80 sm_90", "cpu"),
        ((8, 0), "sm_86", "cpu"),
        ((12, 0), "sm_80 sm_90", "cpu"),
        ((12, 0), "sm_80 sm_90 compute_90", "cuda"),  # compiled when it is first used
        ((8, 9), "sm_90 compute_90", "cpu"),
        ((10, 3), "sm_100 sm_120", "cuda"),
        ((9, 0), "sm_90a", "cuda"),
        ((9, 0), "gfx90a gfx942", "cuda"),  # AMD's are not told by capability
        ((9, 0), "", "cuda"),
    ],
)
def test_a_gpu_without_code_is_said_and_not_used(install, caplog, capability, codes, expected):
    install(capability, codes)
    for name in (None, "cuda", "cuda:0", torch.device("cuda")):
        assert choose_device(name).type == expected
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == (expected == "cpu"), "said once"
    for line in lines:
        assert "\n" not in line and line.endswith("using the CPU")
        assert "NVIDIA Something (compute capability {}.{};".format(*capability) in line
        assert all(code in line for code in codes.split())


def test_devices_by_name(install):
    install((8, 0), "sm_80")
    assert choose_device("cuda:1") == torch.device("cuda:1")
    assert choose_device("cpu") == torch.device("cpu")
    for name in ("cuda:2", "cuda:-1", "gpu", "cpu:1", "mps", "cuda:x"):
        with pytest.raises(UserError, match=f"no device '{name}' here: choose one of cuda, cpu"):
            choose_device(name)


def test_bfloat16_is_taken_where_it_was_faster(monkeypatch):
    def work():
        time.sleep(0.001 if torch.is_autocast_enabled("cpu") == faster else 0.01)

    for faster in (True, False):
        assert bfloat16_is_faster(torch.device("cpu"), work) is faster


def test_an_estimate_is_of_all_steps(monkeypatch):
    config = replace(get_experiment("smoke").config, num_steps=1000, batch_size=16)
    passes = []

    def work(unet, count):
        passes.append(count)
        time.sleep(0.02)

    monkeypatch.setattr(devices, "_train_a_little", work)
    estimate = estimate_seconds(config, torch.device("cpu"))
    assert estimate == pytest.approx(1000 * 16 / 8 * 0.02, rel=0.2) and passes == [8, 8, 8]


def test_what_takes_long_is_timed_once(monkeypatch):
    """The estimate for a large network on a processor comes within a few passes."""
    clock = iter(range(0, 10**6, 4))
    monkeypatch.setattr(devices.time, "perf_counter", lambda: next(clock))
    passes = []
    config = replace(get_experiment("smoke").config, num_steps=8, batch_size=1)
    monkeypatch.setattr(devices, "_train_a_little", lambda unet, count: passes.append(count))
    assert estimate_seconds(config, torch.device("cpu")) == 4 and len(passes) == 1


def test_memory_is_kept_for_training_on_a_processor(monkeypatch):
    kept = []
    monkeypatch.setattr(devices, "keep_freed_memory", lambda: kept.append(True))
    assert devices.prepare_device(torch.device("cpu")) == torch.device("cpu") and kept
    assert keep_freed_memory() is (platform.libc_ver()[0] == "glibc")
