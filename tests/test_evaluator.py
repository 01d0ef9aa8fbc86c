import json
import os

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import write_label_files
from torch import nn

from lab7.errors import UserError
from lab7.evaluator import (
    WEIGHTS,
    Evaluator,
    build_network,
    default_weights,
    top_k_accuracy,
)
from lab7.layouts import DATA_DIR
from workshop.judges.evaluator_training import compute_scores, exact_set_accuracy, per_label_recall
from workshop.judges.judge_training import save_weights


def course_score(outputs, labels):
    """The course's own loop, kept as the reference."""
    hits = total = 0
    for output, label in zip(outputs, labels, strict=True):
        k = int(label.sum().item())
        total += k
        found, wanted = output.topk(k).indices, label.topk(k).indices
        hits += sum(int(index in wanted) for index in found)
    return hits / total


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return build_network().eval()


@pytest.fixture(scope="module")
def evaluator(network):
    return Evaluator(network, device="cpu")


@pytest.fixture
def verdicts():
    generator = torch.Generator().manual_seed(3)
    labels = torch.zeros(40, 24)
    for row in range(40):
        labels[row, torch.randperm(24, generator=generator)[: 1 + row % 5]] = 1
    return (0.42 * labels + 0.54 * torch.rand(40, 24, generator=generator)).clamp(0, 1), labels


@pytest.fixture
def images():
    return torch.randint(0, 256, (5, 3, 64, 64), generator=torch.Generator().manual_seed(1)).to(
        torch.uint8
    )


def save_course_checkpoint(path, network, **changes):
    torch.save({"model": network.state_dict() | changes}, path)


def test_network_is_the_courses(network):
    names = list(network.state_dict())
    assert names[0] == "conv1.weight" and names[-2:] == ["fc.0.weight", "fc.0.bias"]
    assert network.fc[0].weight.shape == (24, 512)
    assert isinstance(network.fc[1], nn.Sigmoid)


def test_top_k_is_the_courses_loop(verdicts):
    probabilities, labels = verdicts
    score = top_k_accuracy(probabilities, labels)
    assert 0.5 < score < 1
    assert score == pytest.approx(course_score(probabilities, labels), abs=1e-12)


def test_eval_scores_what_predict_gives(evaluator, images, verdicts):
    labels = verdicts[1][:5]
    assert evaluator.eval(images, labels) == course_score(evaluator.predict(images), labels)


def test_scores_by_hand():
    labels, probabilities = torch.zeros(3, 24), torch.zeros(3, 24)
    labels[0, 0] = labels[1, 1] = labels[1, 2] = labels[2, 3] = 1
    probabilities[0, 0] = 0.9
    probabilities[1, 1], probabilities[1, 5], probabilities[1, 2] = 0.9, 0.8, 0.3
    probabilities[2, 3], probabilities[2, 4] = 0.5, 0.2  # the threshold itself counts as seen
    scores = compute_scores(probabilities, labels)
    assert (scores.num_pictures, scores.num_conditions, scores.num_labels) == (3, 3, 4)
    assert scores.top_k.value == pytest.approx(3 / 4)
    assert scores.exact_set.value == pytest.approx(2 / 3)
    assert scores.precision.value == pytest.approx(3 / 4)
    assert scores.recall.value == pytest.approx(3 / 4)
    assert scores.f1.value == pytest.approx(3 / 4)
    assert exact_set_accuracy(probabilities, labels) == pytest.approx(2 / 3)
    recall = per_label_recall(probabilities, labels)
    assert recall[:4].tolist() == [1, 1, 0, 1] and recall[4:].isnan().all()


def test_extra_object_costs_precision_and_set_but_not_top_k(verdicts):
    labels = verdicts[1]
    probabilities = 0.9 * labels
    probabilities[labels == 0] = torch.where(torch.arange((labels == 0).sum()) % 20 == 0, 0.7, 0.0)
    scores = compute_scores(probabilities, labels)
    assert scores.top_k.value == scores.recall.value == 1
    assert scores.precision.value < 1 and scores.exact_set.value < 0.6


def test_nothing_seen_has_no_precision(verdicts):
    scores = compute_scores(torch.full((40, 24), 0.1), verdicts[1])
    assert scores.precision.value == scores.recall.value == scores.f1.value == 0


def test_interval_holds_value_and_repeats(verdicts):
    first, second = compute_scores(*verdicts), compute_scores(*verdicts)
    assert first == second
    for name in ("top_k", "exact_set", "precision", "recall", "f1"):
        estimate = getattr(first, name)
        assert estimate.low < estimate.value < estimate.high


def test_bootstrap_interval_of_a_share_is_near_its_standard_error():
    labels = torch.zeros(400, 24)
    labels[:, 0] = 1
    probabilities = torch.zeros(400, 24)
    probabilities[:300, 0], probabilities[300:, 1] = 0.9, 0.9
    estimate = compute_scores(probabilities, labels).top_k
    margin = 1.96 * np.sqrt(0.75 * 0.25 / 400)
    assert estimate.low == pytest.approx(0.75 - margin, abs=0.006)
    assert estimate.high == pytest.approx(0.75 + margin, abs=0.006)


def test_pictures_of_one_condition_are_resampled_together(verdicts):
    probabilities, labels = (torch.cat([part[:10]] * 8) for part in verdicts)
    alone = compute_scores(probabilities, labels).top_k
    scores = compute_scores(probabilities, labels, groups=torch.arange(80) % 10)
    assert scores.num_conditions == 10 and scores.num_pictures == 80
    assert scores.top_k.value == pytest.approx(alone.value)
    assert scores.top_k.high - scores.top_k.low > 2 * (alone.high - alone.low)


def test_all_right_gives_wilsons_interval(verdicts):
    labels = verdicts[1]
    scores = compute_scores(labels, labels)
    assert (scores.exact_set.value, scores.exact_set.high) == (1, 1)
    assert scores.exact_set.low == pytest.approx(40 / (40 + 1.959964**2))
    grouped = compute_scores(labels, labels, torch.arange(40) % 8).exact_set
    assert (grouped.hits, grouped.total) == (40, 40)
    assert grouped.low == pytest.approx(8 / (8 + 1.959964**2)), "eight conditions, not 40"
    wrong = compute_scores(1 - labels, labels).exact_set
    assert (wrong.value, wrong.low) == (0, 0)
    assert wrong.high == pytest.approx(1 - scores.exact_set.low)


def test_predict_takes_bytes_floats_and_any_batch_size(evaluator, images):
    expected = evaluator.predict(images)
    assert expected.shape == (5, 24) and expected.dtype == torch.float32
    assert 0 <= expected.min() and expected.max() <= 1
    assert torch.equal(evaluator.predict(images.float() / 127.5 - 1), expected)
    assert torch.allclose(evaluator.predict(images, batch_size=2), expected, atol=1e-5)
    assert evaluator.predict(images[:0]).shape == (0, 24)


def test_predict_is_in_evaluation_mode(network, images):
    evaluator = Evaluator(network.train(), device="cpu")
    assert torch.allclose(evaluator.predict(images)[:1], evaluator.predict(images[:1]), atol=1e-5)


@pytest.mark.parametrize("shape", [(3, 64, 64), (2, 4, 64, 64), (2, 3, 32, 32)])
def test_predict_refuses_other_shapes(evaluator, shape):
    with pytest.raises(ValueError, match=r"must be \(B, 3, 64, 64\), not"):
        evaluator.predict(torch.zeros(shape))


def test_scores_refuse_what_does_not_fit(verdicts):
    probabilities, labels = verdicts
    with pytest.raises(ValueError, match=r"\(40, 24\) and \(39, 24\)"):
        top_k_accuracy(probabilities, labels[:39])
    with pytest.raises(ValueError, match="no picture has a label"):
        top_k_accuracy(probabilities, torch.zeros(40, 24))
    with pytest.raises(ValueError, match=r"groups must be \(40,\), not \(3,\)"):
        compute_scores(probabilities, labels, torch.arange(3))


def test_saved_weights_load_and_judge_alike(evaluator, images, tmp_path):
    path = tmp_path / "weights" / "evaluator.safetensors"
    save_weights(evaluator.network, path)
    assert path.stat().st_size < 23e6
    assert os.listdir(path.parent) == [path.name]
    loaded = Evaluator.load(path, device="cpu")
    assert torch.allclose(loaded.predict(images), evaluator.predict(images), atol=2e-3)


def test_course_checkpoint_loads(evaluator, network, images, tmp_path):
    save_course_checkpoint(tmp_path / "checkpoint.pth", network)
    loaded = Evaluator.load(tmp_path / "checkpoint.pth", device="cpu")
    assert torch.equal(loaded.predict(images), evaluator.predict(images))


def test_load_prefers_the_course_folders_checkpoint(network, images, tmp_path, monkeypatch):
    monkeypatch.setenv("LAB7_DATA", str(tmp_path))
    write_label_files(tmp_path)
    assert default_weights() == WEIGHTS
    save_course_checkpoint(tmp_path / "checkpoint.pth", network)
    assert default_weights() == tmp_path / "checkpoint.pth"
    expected = Evaluator(network, "cpu").predict(images)
    assert torch.equal(Evaluator.load(device="cpu").predict(images), expected)


class Attack:
    def __reduce__(self):
        return os.mkdir, ("attacked",)


def test_a_pickle_that_would_run_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Attack()}, "checkpoint.pth")
    with pytest.raises(ValueError, match="checkpoint.pth is refused.*could run code") as caught:
        Evaluator.load("checkpoint.pth")
    assert "\n" not in str(caught.value)
    assert not os.path.exists("attacked")


@pytest.mark.parametrize("name", ["checkpoint.pth", "evaluator.safetensors"])
@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 half a zip"])
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=name) as caught:
        Evaluator.load(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_truncated_checkpoint_is_refused(network, tmp_path):
    path = tmp_path / "checkpoint.pth"
    save_course_checkpoint(path, network)
    path.write_bytes(path.read_bytes()[:100_000])
    with pytest.raises(ValueError, match="checkpoint.pth") as caught:
        Evaluator.load(path)
    assert "\n" not in str(caught.value)


def test_weights_that_do_not_fit_are_refused(network, tmp_path):
    path = tmp_path / "checkpoint.pth"
    wrong = {"fc.0.weight": torch.zeros(10, 512)}
    save_course_checkpoint(path, network, **wrong)
    with pytest.raises(ValueError, match=r"fc.0.weight is \(10, 512\), must be \(24, 512\)"):
        Evaluator.load(path)
    save_course_checkpoint(path, network, extra=torch.zeros(1))
    with pytest.raises(ValueError, match="has extra too"):
        Evaluator.load(path)
    torch.save({"model": {"conv1.weight": network.conv1.weight.data}}, path)
    with pytest.raises(ValueError, match="lacks bn1.weight"):
        Evaluator.load(path)
    torch.save(network.fc.state_dict(), path)
    with pytest.raises(ValueError, match="lacks conv1.weight"):
        Evaluator.load(path)
    torch.save([network.state_dict()], path)
    with pytest.raises(ValueError, match="lacks conv1.weight"):
        Evaluator.load(path)
    safetensors.torch.save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="lacks conv1.weight"):
        Evaluator.load(tmp_path / "a.safetensors")


def test_absent_weights_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file .*nowhere.pth"):
        Evaluator.load(tmp_path / "nowhere.pth")


def test_saving_fails_without_leftovers(evaluator, tmp_path):
    (tmp_path / "file").write_text("a file, not a folder")
    with pytest.raises(UserError):
        save_weights(evaluator.network, tmp_path / "file" / "evaluator.safetensors")
    assert os.listdir(tmp_path) == ["file"]


@pytest.fixture
def recorded():
    record = DATA_DIR.parent / "report" / "results" / "evaluator" / "metrics.json"
    return json.loads(record.read_text())


def test_shipped_weights_reach_their_goals(recorded):
    assert WEIGHTS.stat().st_size < 23e6
    assert recorded["test"]["top_k"]["value"] >= 0.995
    assert recorded["test"]["exact_set"]["value"] >= 0.98
    assert min(recorded["recall_per_label"].values()) >= 0.97
    assert Evaluator.load(WEIGHTS, "cpu").predict(torch.zeros(1, 3, 64, 64)).shape == (1, 24)
