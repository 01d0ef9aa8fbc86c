import dataclasses
import json

import pytest
import torch
from PIL import Image

from lab7.errors import UserError
from lab7.evaluator import Evaluator
from lab7.labels import encode
from lab7.plots import split_grid
from lab7.records import read_log, read_record
from workshop.judges.evaluator_training import EvaluatorTraining, list_mistakes
from workshop.judges.judge_training import train_judge

TINY = EvaluatorTraining(
    validation_pictures=16, test_pictures=32, epochs=2, batch_size=16, ema_decay=0.5
)


@pytest.fixture
def pictures():
    """96 pictures: a gray background and one square, whose color and place are its label."""
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
    evaluator = train_judge(config, *pictures, output, tmp_path / "results", "cpu")
    log = read_log(tmp_path / "results" / "evaluator" / "log.jsonl")
    assert [row["epoch"] for row in log] == list(range(1, 9))
    assert log[-1]["loss"] < 0.5 * log[0]["loss"]
    record = read_record("evaluator", tmp_path / "results")
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
    train_judge(config, *pictures, output, tmp_path, "cpu")
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
    training, losses = dataclasses.replace(TINY, epochs=1), []
    for name in ("first", "second"):
        train_judge(training, *pictures, tmp_path / "x.safetensors", tmp_path / name, "cpu")
        losses.append(read_log(tmp_path / name / "evaluator" / "log.jsonl")[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_the_best_epoch_is_kept(pictures, tmp_path, monkeypatch):
    scores = iter([(0.5, 0.1), (0.9, 0.1), (0.9, 0.2), (0.8, 0.9)])
    networks = []

    def score(training, evaluator, images, labels):
        networks.append(evaluator.network)
        return dict(zip(("exact_set", "top_k"), next(scores), strict=True))

    monkeypatch.setattr(EvaluatorTraining, "score", score)
    training = dataclasses.replace(TINY, epochs=4)
    kept = train_judge(training, *pictures, tmp_path / "evaluator.safetensors", tmp_path, "cpu")
    for number, network in enumerate(networks):
        same = torch.allclose(network.conv1.weight, kept.network.conv1.weight, atol=1e-4)
        assert same == (number == 2)
    found = read_record("evaluator", tmp_path).get("validation")
    assert found == {"exact_set": 0.9, "top_k": 0.2, "num_pictures": 16}


def test_an_interrupted_training_writes_nothing(pictures, tmp_path, monkeypatch):
    output = tmp_path / "evaluator.safetensors"
    output.write_text("weights of before")

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(EvaluatorTraining, "examine", interrupt)
    monkeypatch.setattr(EvaluatorTraining, "adjust", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train_judge(TINY, *pictures, output, tmp_path, "cpu")
    assert output.read_text() == "weights of before"
    assert not list((tmp_path / "evaluator").iterdir())


def test_what_cannot_be_trained_is_refused_at_once(pictures, tmp_path):
    with pytest.raises(UserError, match="96 pictures are too few: 3900 are held out"):
        train_judge(EvaluatorTraining(), *pictures, tmp_path / "evaluator.safetensors", tmp_path)
    with pytest.raises(UserError, match="evaluator.pt must end in .safetensors"):
        train_judge(TINY, *pictures, tmp_path / "evaluator.pt", tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="learning_rate 0 must be above 0"):
        EvaluatorTraining(learning_rate=0)
