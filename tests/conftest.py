"""Made-up data that tests share: a tiny embedded set and a folder laid out as the course's."""

import json
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side; before PyTorch is loaded

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image

from lab7.diffusion import convert_scheduler
from lab7.experiments import get_experiment
from lab7.labels import LABELS
from lab7.model import ConditionalUNet
from lab7.pipeline import ConditionalDDPMPipeline, load_pipeline, save_pipeline
from workshop.standin.packing import write_pack

SCENES = {
    "CLEVR_train_000007": ["cyan cube", "red sphere", "gray cylinder"],
    "CLEVR_train_000002": ["gray cube", "yellow cylinder", "blue sphere"],
    "CLEVR_train_000011": ["brown sphere", "green cylinder", "purple cube"],
}
RGB = {
    "gray": (128, 128, 128),
    "red": (190, 40, 40),
    "blue": (40, 70, 210),
    "green": (30, 120, 30),
    "brown": (130, 80, 30),
    "purple": (130, 40, 190),
    "cyan": (50, 210, 210),
    "yellow": (240, 220, 60),
}


@pytest.fixture(autouse=True)
def no_data_from_outside(monkeypatch):
    """The embedded set is the default in every test, whatever the caller's shell has set."""
    monkeypatch.delenv("LAB7_DATA", raising=False)


def draw(labels, width=64, height=64):
    """A picture of one flat block per label on a ground that gets darker: (height, width, 3)."""
    ground = np.linspace(200, 140, height)[:, None, None]
    picture = np.broadcast_to(ground, (height, width, 3)).astype(np.uint8)
    for place, label in enumerate(labels):
        left = width * (1 + 5 * place) // 16
        top = height * (4 + 2 * place) // 16
        block = picture[top : top + height // 4, left : left + width // 4]
        block[:] = RGB[label.split()[0]]
    return picture


def scene_pictures(labels):
    """The three steps of a scene: (3, 64, 64, 3) uint8."""
    return np.stack([draw(labels[: step + 1]) for step in range(3)])


def write_label_files(root, scenes=SCENES):
    """objects.json, train.json and the two condition files of the course."""
    train = {
        f"{scene}_{step}.png": labels[: step + 1]
        for scene, labels in scenes.items()
        for step in range(3)
    }
    files = {
        "objects": {label: index for index, label in enumerate(LABELS)},
        "train": train,
        "test": [["red cube"], ["blue cube", "green sphere"]],
        "new_test": [["red sphere", "cyan cylinder", "cyan cube"]],
    }
    for name, content in files.items():
        (root / f"{name}.json").write_text(json.dumps(content))


@pytest.fixture
def cache_dir(tmp_path, monkeypatch):
    """An empty picture cache of this test's own."""
    path = tmp_path / "cache"
    monkeypatch.setenv("LAB7_CACHE", str(path))
    return path


@pytest.fixture
def embedded_root(tmp_path, cache_dir):
    """An embedded set of three scenes, nine pictures."""
    root = tmp_path / "embedded"
    root.mkdir()
    write_label_files(root)
    scenes = [(scene, scene_pictures(labels)) for scene, labels in SCENES.items()]
    write_pack(root / "pictures.zip", scenes, speed=8)
    return root


def write_course(root, scenes):
    """The course's folder with 320×240 PNGs, every second one with an alpha channel."""
    (root / "iclevr").mkdir(parents=True)
    write_label_files(root, scenes)
    for row, name in enumerate(json.loads((root / "train.json").read_text())):
        scene, step = name.removesuffix(".png").rsplit("_", 1)
        image = Image.fromarray(draw(scenes[scene][: int(step) + 1], 320, 240))
        if row % 2:
            image.putalpha(100)
        image.save(root / "iclevr" / name)
    return root


@pytest.fixture
def course_root(tmp_path, cache_dir):
    """The course's folder with nine pictures."""
    return write_course(tmp_path / "course", SCENES)


@pytest.fixture(scope="session")
def saved_pipeline(tmp_path_factory):
    """Folder of a tiny untrained generator."""
    config = get_experiment("smoke").config
    torch.manual_seed(0)
    scheduler = DDPMScheduler(**config.noise)
    scheduler = convert_scheduler(scheduler, config.scheduler)
    tiny = ConditionalDDPMPipeline(
        ConditionalUNet(**config.unet), scheduler, config.num_inference_steps, guidance_scale=2.0
    )
    path = tmp_path_factory.mktemp("generator") / "pipeline"
    save_pipeline(tiny, path)
    return path


@pytest.fixture
def pipeline(saved_pipeline):
    """A tiny untrained generator."""
    return load_pipeline(saved_pipeline, "cpu")
