import dataclasses
import json

import pytest
import torch
from PIL import Image

from lab7.evaluator import Evaluator
from lab7.labels import encode
from lab7.plots import split_grid
from lab7.records import read_log, read_record
from workshop.judges.evaluator_training import EvaluatorConfig, list_mistakes, train_evaluator
from workshop.judges.judge_training import Trainer

TINY = EvaluatorConfig(
    validation_pictures=16, test_pictures=32, epochs=2, batch_size=16, ema_decay=0.5
)


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
    monkeypatch.setattr("workshop.judges.judge_training.bfloat16_is_faster", lambda *_: False)
    losses = []
    for name in ("first", "second"):
        train_evaluator(
            *pictures, dataclasses.replace(TINY, epochs=1), tmp_path / f"{name}.safetensors",
            run_name=name, results_root=tmp_path, device="cpu",
        )  # fmt: skip
        losses.append(read_log(tmp_path / name / "log.jsonl")[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_an_interrupted_training_goes_on_to_the_same_end(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr("workshop.judges.judge_training.bfloat16_is_faster", lambda *_: False)
    given = {"results_root": tmp_path, "device": "cpu"}
    whole = train_evaluator(*pictures, TINY, tmp_path / "a.safetensors", run_name="a", **given)
    run_epoch = Trainer.run_epoch

    def interrupted(trainer, *arguments):
        if trainer.epochs_done == 1:
            raise KeyboardInterrupt
        run_epoch(trainer, *arguments)

    given |= {"run_name": "b", "states": tmp_path / "states"}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "run_epoch", interrupted)
        train_evaluator(*pictures, TINY, tmp_path / "b.safetensors", **given)
    assert not (tmp_path / "b.safetensors").exists() and not (tmp_path / "b" / "log.jsonl").exists()
    longer = dataclasses.replace(TINY, epochs=3)
    with pytest.raises(ValueError, match="unfinished training with epochs = 2, not 3"):
        train_evaluator(*pictures, longer, tmp_path / "b.safetensors", **given)
    resumed = train_evaluator(*pictures, TINY, tmp_path / "b.safetensors", **given)
    for name, weight in whole.network.state_dict().items():
        assert torch.equal(weight, resumed.network.state_dict()[name]), name
    losses = [[row["loss"] for row in read_log(tmp_path / x / "log.jsonl")] for x in "ab"]
    assert losses[0] == losses[1] and len(losses[0]) == 2
    assert not (tmp_path / "states").exists()


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
