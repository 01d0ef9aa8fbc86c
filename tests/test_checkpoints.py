"""Training states: atomic, verified, and never code."""

import pickle

import pytest
import torch

from lab7.checkpoints import load_latest, save_state
from lab7.errors import UserError


def test_round_trip(tmp_path):
    state = {"step": 3, "weights": {"a": torch.arange(4.0)}, "list": [torch.ones(2), 0.5, None]}
    save_state(tmp_path / "new", 3, state)
    loaded = load_latest(tmp_path / "new")
    assert loaded["step"] == 3 and loaded["list"][1:] == [0.5, None]
    assert torch.equal(loaded["weights"]["a"], state["weights"]["a"])


def test_nothing_saved_yet(tmp_path):
    assert load_latest(tmp_path / "absent") is None


def test_keeps_the_latest_by_number(tmp_path):
    for step in (9, 10, 100):
        save_state(tmp_path, step, {"step": step})
    assert load_latest(tmp_path)["step"] == 100
    assert len(list(tmp_path.iterdir())) == 2


def test_older_course_is_dropped(tmp_path):
    for step in (1, 2, 3):
        save_state(tmp_path, step, {"step": step, "run": "old"}, keep=3)
    save_state(tmp_path, 2, {"step": 2, "run": "new"}, keep=3)
    assert load_latest(tmp_path) == {"step": 2, "run": "new"}
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("damage", [lambda b: b[:-100], lambda b: b[:200] + b"x" + b[201:]])
def test_damaged_state_falls_back(tmp_path, damage):
    save_state(tmp_path, 1, {"step": 1})
    latest = save_state(tmp_path, 2, {"step": 2})
    latest.write_bytes(damage(latest.read_bytes()))
    with pytest.warns(UserWarning, match="step-00000002.*checksum"):
        assert load_latest(tmp_path)["step"] == 1


def test_all_damaged_is_an_error(tmp_path):
    save_state(tmp_path, 1, {"step": 1}).write_bytes(b"")
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="every training state"):
        load_latest(tmp_path)


def test_what_has_no_room_in_memory_is_not_called_damaged(tmp_path, monkeypatch):
    save_state(tmp_path, 1, {"step": 1})

    def load(*_, **__):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(RuntimeError, match="out of memory"):
        load_latest(tmp_path)


def test_what_a_killed_process_left_goes_with_the_next_state(tmp_path, monkeypatch):
    def killed(*_):
        raise SystemExit

    monkeypatch.setattr("os.fsync", killed)
    monkeypatch.setattr("os.unlink", lambda _: None)
    with pytest.raises(SystemExit):
        save_state(tmp_path, 1, {"step": 1})
    monkeypatch.undo()
    (left,) = tmp_path.iterdir()
    assert load_latest(tmp_path) is None
    newest = save_state(tmp_path, 1, {"step": 1})
    assert [*tmp_path.iterdir()] == [newest] != [left]


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(
        UserError, match=f"training state of 0 MB .* {tmp_path / 'file' / 'states'}"
    ):
        save_state(tmp_path / "file" / "states", 1, {"step": 1})


class Code:
    def __reduce__(self):
        return open, ("ran-code", "w")


def test_code_is_not_run(tmp_path, monkeypatch):
    """Even a state whose checksum is right runs nothing when it is read."""
    monkeypatch.chdir(tmp_path)
    save_state(tmp_path, 1, {"evil": Code()})
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="damaged"):
        load_latest(tmp_path)
    assert not (tmp_path / "ran-code").exists()


def test_failed_save_leaves_no_trace(tmp_path):
    save_state(tmp_path, 1, {"step": 1})
    with pytest.raises((pickle.PicklingError, AttributeError, TypeError)):
        save_state(tmp_path, 2, {"step": 2, "bad": lambda: None})
    assert load_latest(tmp_path)["step"] == 1
    assert len(list(tmp_path.iterdir())) == 1
