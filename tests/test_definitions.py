"""The same pictures scored in several ways: each number on inputs for which it is known."""

import pytest
import torch

from lab7.evaluator import Evaluator, build_network, top_k_accuracy
from lab7.labels import encode
from workshop.judges.definitions import (
    f1,
    mean_of_batches,
    mean_of_pictures,
    predict_in_training_mode,
    same_k,
    score_in_every_way,
)

LABELS = encode([["gray cube"], ["red cube"], ["gray cube", "red cube", "blue cube"]])


@pytest.fixture
def outputs():
    """The first picture is wrong, the second right, of the third two labels of three are found."""
    outputs = torch.full((3, 24), 0.01)
    outputs[0, 5], outputs[0, 0] = 0.9, 0.4
    outputs[1, 1] = 0.8
    outputs[2, :3] = torch.tensor([0.9, 0.7, 0.1])
    outputs[2, 7] = 0.6
    return outputs


@pytest.fixture(scope="module")
def evaluator():
    torch.manual_seed(0)
    return Evaluator(build_network(), "cpu")


def test_pooling_and_averaging_differ(outputs):
    assert top_k_accuracy(outputs, LABELS) == pytest.approx(3 / 5)
    assert mean_of_pictures(outputs, LABELS) == pytest.approx((0 + 1 + 2 / 3) / 3)
    assert mean_of_batches(outputs, LABELS, 2) == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert mean_of_batches(outputs, LABELS) == top_k_accuracy(outputs, LABELS), "a single batch"


def test_the_same_k_for_all_pictures_finds_more(outputs):
    assert same_k(outputs, LABELS) == pytest.approx(4 / 5)
    assert same_k(outputs, LABELS, 1) == pytest.approx(2 / 5)


def test_f1_depends_on_the_threshold(outputs):
    assert f1(outputs, LABELS) == pytest.approx(2 * 3 / (5 + 5))
    assert f1(outputs, LABELS, 0.3) == pytest.approx(2 * 4 / (6 + 5))
    assert f1(outputs, LABELS, 0.05) == pytest.approx(2 * 5 / (7 + 5))


def test_training_mode_takes_the_batch_and_leaves_the_evaluator_alone(evaluator):
    images = torch.rand(6, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    before = {name: value.clone() for name, value in evaluator.network.state_dict().items()}
    left_on = predict_in_training_mode(evaluator, images)
    assert not torch.allclose(left_on, evaluator.predict(images), atol=1e-3)
    assert not torch.allclose(
        left_on[:3], predict_in_training_mode(evaluator, images[:3]), atol=1e-3
    )
    assert not evaluator.network.training
    assert all(torch.equal(v, before[k]) for k, v in evaluator.network.state_dict().items())


def test_every_way_gets_the_same_pictures():
    images = torch.tensor([-1.0, 0.0, 1.0]).view(3, 1, 1, 1).expand(3, 3, 64, 64)
    seen = []

    class Judge(Evaluator):
        def predict(self, images, batch_size=256):
            seen.append(images[:, :, 0, 0])
            return super().predict(images, batch_size)

    torch.manual_seed(0)
    found = score_in_every_way(Judge(build_network(), "cpu"), images, LABELS)
    assert list(found)[0] == "pooled over all labels (the course)" and len(found) == 10
    assert all(0 <= value <= 1 for value in found.values())
    usual, unit, imagenet, twice = seen
    assert usual[:, 0].tolist() == [-1, 0, 1] and unit[:, 0].tolist() == [0, 0.5, 1]
    assert imagenet[0].tolist() == pytest.approx([-0.485 / 0.229, -0.456 / 0.224, -0.406 / 0.225])
    assert twice[:, 0].tolist() == [-3, -1, 1]


def test_the_courses_definition_is_the_evaluators(evaluator):
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    found = score_in_every_way(evaluator, images, LABELS)
    assert found["pooled over all labels (the course)"] == evaluator.eval(images, LABELS)
