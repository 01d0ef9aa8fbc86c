"""Runs that are stopped in every way, go on, and end as if they had not been."""

import errno
import json
import multiprocessing
import os
import random
import signal
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import lab7.checkpoints
from lab7.checkpoints import STATE_NAME, in_use, load_latest
from lab7.errors import UserError
from lab7.experiments import get_experiment
from lab7.pipeline import load_pipeline
from lab7.training import train

SMOKE = get_experiment("smoke").config
LONG = replace(SMOKE, num_steps=120, log_every=1, save_every=1)
SHORT = replace(LONG, num_steps=8)
DATASET = SimpleNamespace(
    images=torch.randint(
        0, 256, (10, 3, 64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    ),
    conditions=torch.eye(24)[:10],
)


def run(folder, config=LONG, **options):
    torch.set_num_threads(1)
    return train(config, DATASET, folder, progress=False, device="cpu", **options)


def steps(folder):
    log = folder / "log.jsonl"
    lines = log.read_text().splitlines() if log.exists() else []
    return [json.loads(line)["step"] for line in lines if line.endswith("}")]


def weights(folder):
    return load_latest(folder / "states")["unet"]


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def processes():
    """Where processes come from that have all imported already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lab7.training", "torch._dynamo", __name__])
    return context


def test_killed_twenty_times_a_run_ends_the_same(tmp_path, processes, one_thread):
    whole, parts, rng = tmp_path / "whole", tmp_path / "parts", random.Random(0)
    at_the_end = replace(LONG, save_every=1000)
    run(whole, at_the_end)
    kills = 0
    while kills < 20:
        process = processes.Process(target=run, args=(parts,))
        process.start()
        before = steps(parts)
        while process.is_alive() and steps(parts)[-1:] in ([], before[-1:]):
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.05))  # a step, its row, its state and its pipeline take this
        if not process.is_alive():
            break
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        kills += 1
    assert kills == 20, f"finished after {kills}"
    run(parts, at_the_end)
    assert steps(parts) == list(range(1, LONG.num_steps + 1))
    first, second = weights(whole), weights(parts)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(STATE_NAME.fullmatch(path.name) for path in (parts / "states").iterdir())
    saved = [
        load_pipeline(folder / "pipeline", "cpu").unet.state_dict() for folder in (whole, parts)
    ]
    assert all(torch.equal(saved[0][name], saved[1][name]) for name in saved[0])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_saves_first(tmp_path, number):
    config = replace(SHORT, save_every=1000)

    def stop(row):
        if row["step"] == 3:
            os.kill(os.getpid(), number)

    handler = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, config, callback=stop)
    assert load_latest(tmp_path / "states")["step"] == steps(tmp_path)[-1] in (3, 4)
    assert signal.getsignal(number) is handler
    run(tmp_path, config)
    assert steps(tmp_path) == list(range(1, SHORT.num_steps + 1))


def test_a_folder_in_use_is_refused(tmp_path):
    with in_use(tmp_path), pytest.raises(ValueError, match="is in use by another training"):
        run(tmp_path, SMOKE)
    assert not (tmp_path / "config.json").exists()
    run(tmp_path, SMOKE)


def test_of_several_processes_the_first_holds_the_folder(tmp_path, monkeypatch):
    with in_use(tmp_path):
        monkeypatch.setenv("RANK", "1")
        with in_use(tmp_path):
            pass
        monkeypatch.setenv("RANK", "0")
        with pytest.raises(UserError, match="is in use"), in_use(tmp_path):
            pass


@pytest.mark.parametrize("where", ["append_log", "save_pipeline"])
def test_what_cannot_be_written_is_an_error_of_the_user(tmp_path, monkeypatch, where):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / "there"))

    monkeypatch.setattr(f"lab7.training.{where}", full)
    with pytest.raises(UserError, match=f"No space left on device: {tmp_path / 'there'}"):
        run(tmp_path, SMOKE)


def test_another_configuration_is_refused_with_all_differences(tmp_path):
    run(tmp_path, SMOKE)
    with pytest.raises(ValueError, match="seed = 0, not 1") as error:
        run(tmp_path, replace(SMOKE, batch_size=3, seed=1, num_steps=9))
    assert "batch_size = 4, not 3" in str(error.value) and "num_steps = 4, not 9" in str(
        error.value
    )


def test_a_finished_run_can_be_extended_and_an_unfinished_one_not(tmp_path):
    run(tmp_path, SMOKE)
    with pytest.raises(UserError, match="num_steps = 4, not 2"):
        run(tmp_path, replace(SMOKE, num_steps=2))
    run(tmp_path, replace(SMOKE, num_steps=6))
    assert steps(tmp_path)[-1] == 6 and load_latest(tmp_path / "states")["step"] == 6
    run(tmp_path / "other", LONG, max_seconds=1e-6)
    with pytest.raises(ValueError, match="num_steps = 120, not 150"):
        run(tmp_path / "other", replace(LONG, num_steps=150))


def test_a_full_disk_keeps_the_last_state(tmp_path, monkeypatch):
    run(tmp_path, SHORT, callback=lambda row: row["step"] == 2)
    good = load_latest(tmp_path / "states")

    def full(descriptor):
        if os.fstat(descriptor).st_size > 100_000:  # a state, not the small files before it
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    message = r"no training state of \d MB could be saved in .*states: No space left on device"
    with pytest.raises(UserError, match=message):
        run(tmp_path, SHORT)
    monkeypatch.undo()
    assert load_latest(tmp_path / "states")["step"] == good["step"] == 2
    assert len(list((tmp_path / "states").iterdir())) == 2
    run(tmp_path, SHORT)
    assert steps(tmp_path) == list(range(1, SHORT.num_steps + 1))


def test_what_is_begun_anew_has_nothing_of_the_run_before(tmp_path):
    run(tmp_path, SHORT)
    (tmp_path / "milestones.json").write_text("[]")
    run(tmp_path, replace(SHORT, seed=1, num_steps=2), resume=False)
    assert steps(tmp_path) == [1, 2] and not (tmp_path / "milestones.json").exists()


def test_a_row_cut_short_is_written_again(tmp_path):
    run(tmp_path, SHORT, callback=lambda row: row["step"] == 2)
    with open(tmp_path / "log.jsonl", "a") as log:
        log.write('{"step": 3, "ima')
    run(tmp_path, SHORT)
    assert steps(tmp_path) == list(range(1, SHORT.num_steps + 1))


def test_states_hold_what_the_run_is(tmp_path):
    run(tmp_path, SMOKE)
    state = load_latest(tmp_path / "states")
    assert state["config"]["num_steps"] == 4 and state["step"] == 4
    assert set(state) == {"config", "step", "seconds", "unet", "ema", "optimizers"}


def test_other_pictures_or_another_precision_are_refused(tmp_path):
    run(tmp_path, LONG, max_seconds=1e-6)
    before = (tmp_path / "log.jsonl").read_bytes()
    others = SimpleNamespace(images=DATASET.images[:8], conditions=DATASET.conditions[:8])
    with pytest.raises(ValueError, match="num_pictures = 10, not 8; data_sha256 = [0-9a-f]{64}"):
        train(LONG, others, tmp_path, progress=False, device="cpu")
    with pytest.raises(ValueError, match="precision = float32, not bfloat16"):
        run(tmp_path, replace(LONG, precision="bfloat16"))
    assert (tmp_path / "log.jsonl").read_bytes() == before


def test_a_run_keeps_the_precision_and_the_machine_of_its_first_start(tmp_path, monkeypatch):
    auto = replace(LONG, precision="auto")
    monkeypatch.setattr("lab7.devices.bfloat16_is_faster", lambda *_: True)
    run(tmp_path, auto, max_seconds=1e-6)
    first = json.loads((tmp_path / "environment.json").read_text())
    monkeypatch.setattr("lab7.devices.bfloat16_is_faster", lambda *_: False)
    other = lab7.checkpoints.environment() | {"machine": "another"}
    monkeypatch.setattr("lab7.checkpoints.environment", lambda: other)
    run(tmp_path, auto, max_seconds=1e-6)
    run(tmp_path, auto, max_seconds=1e-6)
    noted = json.loads((tmp_path / "environment.json").read_text())
    assert noted["precision"] == "bfloat16" and noted["machine"] == first["machine"]
    assert [start["machine"] for start in noted["resumed"]] == ["another"]


def test_minutes_leave_time_to_save(tmp_path, monkeypatch):
    save = lab7.checkpoints.save_state

    def slow(*args):
        time.sleep(1)
        return save(*args)

    monkeypatch.setattr("lab7.checkpoints.save_state", slow)
    started = time.perf_counter()
    run(tmp_path, replace(LONG, num_steps=10**6, log_every=1000, save_every=10**6), max_seconds=3)
    assert time.perf_counter() - started < 3.7  # 4 and more, were the last save not reckoned with


def test_the_state_is_read_under_the_lock(tmp_path, monkeypatch):
    run(tmp_path, LONG, max_seconds=1e-6)

    def read(folder, device):
        with pytest.raises(ValueError, match="in use"), in_use(tmp_path):
            pass
        return load_latest(folder, device)

    monkeypatch.setattr("lab7.checkpoints.load_latest", read)
    run(tmp_path, LONG, max_seconds=1e-6)
