import dataclasses
import json

import pytest
import torch
from PIL import Image

from lab7.evaluator import Evaluator
from lab7.evaluator_training import (
    EvaluatorConfig,
    augment,
    list_mistakes,
    shrink,
    train_evaluator,
)
from lab7.labels import encode
from lab7.plots import split_grid
from lab7.results import read_log, read_record

PLAIN = EvaluatorConfig(
    small_share=1, mirrored_share=0, shift=0, zoom=0, blur=0, brightness=0, contrast=0, hue=0,
    saturation=0, white_balance=0, gamma=0, shade=0, blotches=0, noise=0,
)  # fmt: skip
TINY = EvaluatorConfig(
    validation_pictures=16, test_pictures=32, epochs=2, batch_size=16, ema_decay=0.5
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def pictures():
    """96 pictures: a gray ground and one square, whose color and place are its label."""
    labels = torch.eye(24).repeat(4, 1)
    images = torch.full((96, 3, 64, 64), 120, dtype=torch.uint8)
    for row in range(96):
        label = row % 24
        top, color = 16 * (label // 8), torch.tensor([label & 1, label >> 1 & 1, label >> 2 & 1])
        images[row, :, top : top + 16, 20:36] = (255 * color)[:, None, None].to(torch.uint8)
    return images, labels


def smooth_images(count):
    noise = torch.rand(count, 3, 8, 8, generator=generator(5))
    images = torch.nn.functional.interpolate(noise, (64, 64), mode="bicubic").clamp(0, 1)
    return (images * 255).round().to(torch.uint8)


def test_without_changes_the_recipe_is_the_courses():
    images = torch.randint(0, 256, (4, 3, 64, 64), generator=generator()).to(torch.uint8)
    expected = shrink(images.float() / 127.5 - 1, 32)
    assert torch.allclose(augment(images, PLAIN, generator()), expected, atol=1e-5)
    sharp = dataclasses.replace(PLAIN, small_share=0)
    assert torch.allclose(
        augment(images, sharp, generator()), images.float() / 127.5 - 1, atol=1e-5
    )


def test_shrinking_takes_the_finest_detail_away():
    board = (torch.arange(64)[:, None] + torch.arange(64)) % 2 * 2.0 - 1
    small = shrink(board.expand(1, 3, 64, 64), 32)
    assert small[..., 4:-4, 4:-4].abs().max() < 0.2


def test_changes_are_repeatable_and_differ_between_pictures():
    images = smooth_images(1).repeat(3, 1, 1, 1)
    first, second = (augment(images, EvaluatorConfig(), generator(7)) for _ in range(2))
    assert torch.equal(first, second)
    assert first.dtype == torch.float32 and first.shape == images.shape
    assert (first[0] - first[1]).abs().mean() > 0.01
    assert not torch.equal(first, augment(images, EvaluatorConfig(), generator(8)))


@pytest.mark.parametrize(
    "name", ["shift", "zoom", "blur", "brightness", "contrast", "hue",
             "saturation", "white_balance", "gamma", "shade", "blotches", "noise"],
)  # fmt: skip
def test_every_amount_does_something_but_not_much(name):
    images = smooth_images(8)
    amount = getattr(EvaluatorConfig(), name)
    sharp = dataclasses.replace(PLAIN, small_share=0)
    changed = augment(images, dataclasses.replace(sharp, **{name: amount}), generator())
    difference = (changed - (images.float() / 127.5 - 1)).abs().mean()
    assert 1e-4 < difference < 0.25


def test_shift_and_zoom_move_pictures_as_far_as_they_say():
    images = torch.zeros(64, 3, 64, 64, dtype=torch.uint8)
    images[:, :, 31:33, 31:33] = 255
    weight = (augment(images, dataclasses.replace(PLAIN, shift=3.0), generator()) + 1).sum(1)
    at = torch.arange(64) - 31.5
    across = (weight.sum(1) * at).sum(1) / weight.sum((1, 2))
    down = (weight.sum(2) * at).sum(1) / weight.sum((1, 2))
    for offset in (across, down):
        assert 2.4 < offset.max() < 3.2 and -3.2 < offset.min() < -2.4
    assert (across - down).abs().max() > 1


def test_left_and_right_are_exchanged_in_the_share_that_is_asked_for():
    images = smooth_images(200)
    config = dataclasses.replace(PLAIN, small_share=0, mirrored_share=0.5)
    changed, plain = augment(images, config, generator()), images.float() / 127.5 - 1
    same, mirrored = (
        torch.isclose(changed, x, atol=1e-5).flatten(1).all(1) for x in (plain, plain.flip(3))
    )
    assert torch.equal(same, ~mirrored) and 70 < mirrored.sum() < 130


def test_gray_stays_gray_under_hue_and_saturation():
    images = torch.full((8, 3, 64, 64), 90, dtype=torch.uint8)
    changed = augment(images, dataclasses.replace(PLAIN, hue=30, saturation=0.5), generator())
    assert torch.allclose(changed, images.float() / 127.5 - 1, atol=1e-5)


def test_training_lowers_the_loss_and_records_what_was_saved(pictures, tmp_path):
    output = tmp_path / "weights" / "evaluator.safetensors"
    config = dataclasses.replace(TINY, epochs=8)
    evaluator = train_evaluator(
        *pictures, config, output, run_name="tiny", results_root=tmp_path / "results", device="cpu"
    )
    log = read_log(tmp_path / "results" / "tiny" / "log.jsonl")
    assert [row["epoch"] for row in log] == list(range(1, 9))
    assert log[-1]["loss"] < 0.5 * log[0]["loss"]
    record = read_record("tiny", tmp_path / "results")
    assert record.config == json.loads(json.dumps(dataclasses.asdict(config)))
    test = pictures[0][-32:], pictures[1][-32:]
    assert record.get("test.num_pictures") == 32
    assert record.get("by_count.1.num_pictures") == 32
    assert record.get("training.steps") == 8 * 3
    assert record.get("validation.exact_set") == max(row["exact_set"] for row in log)
    assert len(record.get("recall_per_label")) == 24
    loaded = Evaluator.load(output, "cpu")
    assert loaded.eval(*test) == evaluator.eval(*test) == record.get("test.top_k.value")
    assert [path.name for path in output.parent.iterdir()] == [output.name]


def test_the_worst_mistakes_are_recorded_with_their_pictures(pictures, tmp_path):
    config = dataclasses.replace(TINY, epochs=1)
    output = tmp_path / "evaluator.safetensors"
    train_evaluator(*pictures, config, output, results_root=tmp_path, device="cpu")
    mistakes = read_record("evaluator", tmp_path).get("mistakes")
    assert len(mistakes) >= 16, "one epoch of three steps teaches nothing"
    drawn = split_grid(Image.open(tmp_path / "evaluator" / "mistakes.png"))
    rows = [mistake["row"] for mistake in mistakes[:16]]
    assert torch.equal(torch.from_numpy(drawn), pictures[0][-32:][rows])
    labels = encode([mistake["labels"] for mistake in mistakes])
    assert torch.equal(labels, pictures[1][-32:][[mistake["row"] for mistake in mistakes]])


def test_mistakes_come_worst_first():
    labels = encode([["red cube"], ["red cube"], ["red cube"], ["gray cube", "red cube"]])
    probabilities = torch.zeros(4, 24)
    probabilities[:, :2] = torch.tensor([[0.0, 0.9], [0.6, 0.9], [0.9, 0.1], [0.4, 0.9]])
    found = list_mistakes(probabilities, labels)
    assert [mistake["row"] for mistake in found] == [2, 1, 3]
    assert [mistake["seen"] for mistake in found] == [
        ("gray cube",), ("gray cube", "red cube"), ("red cube",)
    ]  # fmt: skip


def test_training_repeats_itself(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr("lab7.evaluator_training.bfloat16_is_faster", lambda *_: False)
    losses = []
    for name in ("first", "second"):
        train_evaluator(
            *pictures, dataclasses.replace(TINY, epochs=1), tmp_path / f"{name}.safetensors",
            run_name=name, results_root=tmp_path, device="cpu",
        )  # fmt: skip
        losses.append(read_log(tmp_path / name / "log.jsonl")[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_arrays_that_do_not_fit_are_refused(pictures, tmp_path):
    images, labels = pictures
    output = tmp_path / "evaluator.safetensors"
    with pytest.raises(ValueError, match=r"labels must be \(96, 24\).*not \(95, 24\)"):
        train_evaluator(images, labels[:95], TINY, output, results_root=tmp_path)
    with pytest.raises(ValueError, match="uint8, not .*float32"):
        train_evaluator(images.float(), labels, TINY, output, results_root=tmp_path)
    with pytest.raises(ValueError, match="96 pictures are too few: 3900 are held out"):
        train_evaluator(images, labels, EvaluatorConfig(), output, results_root=tmp_path)
    assert list(tmp_path.iterdir()) == []
