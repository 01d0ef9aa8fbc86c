"""Guidance by the evaluator as notebook 05 writes it out, with tiny untrained networks."""

import nbformat
import pytest
import torch
from torch.nn import functional as F

from lab7.evaluator import Evaluator, build_network
from lab7.labels import encode
from lab7.layouts import ROOT
from lab7.pipeline import ConditionalDDPMPipeline
from workshop.judges.fooling import log_probability_gradient

CONDITIONS = [["red cube"], ["blue sphere", "gray cube"]]


@pytest.fixture(scope="module")
def guide():
    """What the notebook's cell defines, after its imports."""
    notebook = nbformat.read(ROOT / "notebooks" / "05_judges.ipynb", 4)
    cells = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    names = {}
    exec(cells[0], names)
    exec(next(source for source in cells if "def guide(" in source), names)
    return names["guide"]


@pytest.fixture(scope="module")
def evaluator():
    torch.manual_seed(0)
    return Evaluator(build_network(), "cpu")


def copy(pipeline):
    return ConditionalDDPMPipeline(pipeline.unet, pipeline.scheduler, **pipeline.settings())


def draw(pipeline, **given):
    return pipeline(CONDITIONS, output_type="pt", progress=False, **given).images


def test_the_gradient_is_that_of_the_log_probability(evaluator):
    torch.manual_seed(1)
    images, labels, step = torch.rand(2, 3, 64, 64) * 2 - 1, encode(CONDITIONS), 1e-3
    gradient = log_probability_gradient(evaluator, images, labels)
    direction = gradient / gradient.norm()
    ends = [evaluator.predict(images + sign * step * direction) for sign in (-1, 1)]
    before, after = (
        -F.binary_cross_entropy(x.double(), labels.double(), reduction="sum") for x in ends
    )
    assert (after - before) / (2 * step) == pytest.approx(gradient.norm().item(), rel=0.05)


def test_without_scale_the_pictures_are_the_pipelines(guide, pipeline, evaluator):
    guided = guide(copy(pipeline), evaluator, 0.0)
    assert guided.settings() == pipeline.settings()
    assert torch.allclose(draw(guided), draw(pipeline), atol=1e-5)


def test_guidance_raises_what_the_evaluator_says(guide, pipeline, evaluator):
    labels = encode(CONDITIONS)
    losses = [
        F.binary_cross_entropy(evaluator.predict(draw(drawing)), labels)
        for drawing in (pipeline, guide(copy(pipeline), evaluator, 5.0))
    ]
    assert losses[1] < losses[0] - 0.001


def test_a_guided_picture_does_not_depend_on_its_batch(guide, pipeline, evaluator):
    guided = guide(copy(pipeline), evaluator, 5.0)
    assert torch.allclose(draw(guided, batch_size=1), draw(guided, batch_size=2), atol=1e-4)
