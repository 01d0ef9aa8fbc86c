"""The auditor: what it finds and counts, and how pictures are sorted by that."""

import pytest
import torch
from torch import nn

from lab7.auditor import Audit, Auditor, AuditorNetwork, peaks, scene_ratios
from lab7.labels import LABELS, encode
from workshop.judges.judge_training import save_weights


@pytest.fixture
def network():
    torch.manual_seed(0)
    return AuditorNetwork()


@pytest.fixture
def auditor(network):
    return Auditor(network, "cpu")


@pytest.fixture
def images():
    return torch.randint(0, 256, (5, 3, 64, 64), generator=torch.Generator().manual_seed(1)).byte()


class Fixed(nn.Module):
    """Sees the same objects in every picture: (label, row, column) of cells."""

    def __init__(self, *objects):
        super().__init__()
        self.objects, self.threshold = objects, 0.5

    def forward(self, images):
        heatmap = torch.full((len(images), 32, 32), -9.0)
        labels = torch.zeros(len(images), 24, 32, 32)
        for label, row, column in self.objects:
            heatmap[:, row, column] = 3.0
            labels[:, LABELS.index(label), row, column] = 1.0
        return heatmap, labels


def test_network_gives_logits_for_cells_and_is_small(network, images):
    heatmap, labels = network(images.float())
    assert heatmap.shape == (5, 32, 32) and labels.shape == (5, 24, 32, 32)
    assert sum(p.numel() for p in network.parameters()) * 2 < 4e6


def test_found_objects_have_label_and_place(images):
    auditor = Auditor(Fixed(("red cube", 10, 4), ("cyan sphere", 20, 31)), "cpu")
    for found in auditor.find(images, batch_size=2):
        assert [(s.label, s.x, s.y) for s in found] == [
            ("red cube", 9.0, 21.0), ("cyan sphere", 63.0, 41.0)
        ]  # fmt: skip
        assert found[0].probability == pytest.approx(torch.tensor(3.0).sigmoid().item())


def test_doubled_objects_are_counted(images):
    auditor = Auditor(Fixed(("red cube", 10, 4), ("red cube", 10, 12), ("gray cube", 3, 3)), "cpu")
    counts = auditor.count(images)
    assert counts[:, LABELS.index("red cube")].tolist() == [2] * 5
    assert counts.sum(1).tolist() == [3] * 5


def test_peaks_are_the_highest_around():
    heatmap = torch.zeros(1, 32, 32)
    for row, column, probability in ((10, 10, 0.9), (11, 11, 0.8), (10, 14, 0.7), (30, 0, 0.2)):
        heatmap[0, row, column] = probability
    assert peaks(heatmap, 0.5).nonzero()[:, 1:].tolist() == [[10, 10], [10, 14]]
    assert peaks(heatmap, 0.1).sum() == 3


def test_each_picture_has_one_fate():
    asked = ["red cube", "blue sphere"]
    seen = {
        "exact_scene": [["red cube", "blue sphere"]],
        "extra": [["red cube", "blue sphere", "red cube"], ["gray cube"] * 3],
        "missing": [["red cube"], []],
        "swapped": [["blue cube", "red sphere"]],
        "doubled": [["red cube", "red cube"], ["blue sphere", "blue sphere"]],
        "other": [["red cube", "blue cube"], ["gray cube", "gray cube"]],
    }
    pictures = [labels for group in seen.values() for labels in group]
    counts = torch.stack([sum((encode([[x]])[0] for x in p), torch.zeros(24)) for p in pictures])
    audit = Audit.of(scene_ratios(counts, encode([asked] * len(pictures))))
    assert audit.num_pictures == len(pictures)
    shares = {name: getattr(audit, name).value for name in seen}
    assert shares == {name: len(group) / len(pictures) for name, group in seen.items()}
    assert sum(shares.values()) == pytest.approx(1)


def test_doubles_can_be_asked_for():
    wanted = torch.zeros(3, 24)
    wanted[:, 1] = 2
    counts = wanted.clone()
    counts[1, 1], counts[2, 1] = 1, 3
    audit = Audit.of(scene_ratios(counts, wanted))
    assert audit.exact_scene.value == audit.missing.value == audit.extra.value == 1 / 3


def test_intervals_are_over_conditions():
    counts, wanted = encode([["red cube"]] * 40), encode([["red cube"]] * 20 + [["blue cube"]] * 20)
    alone = Audit.of(scene_ratios(counts, wanted)).exact_scene
    grouped = Audit.of(
        scene_ratios(counts, wanted), torch.arange(4).repeat_interleave(10)
    ).exact_scene
    assert alone.value == grouped.value == 0.5
    assert grouped.high - grouped.low > 2 * (alone.high - alone.low)


@pytest.mark.parametrize("shape", [(3, 64, 64), (2, 3, 32, 32), (2, 1, 64, 64)])
def test_other_shapes_are_refused(auditor, shape):
    with pytest.raises(ValueError, match="pictures must be"):
        auditor.count(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"\(B, 24\)"):
        scene_ratios(torch.zeros(2, 24), torch.zeros(2, 23))


def test_saved_weights_look_alike(auditor, images, tmp_path):
    auditor.network.threshold.fill_(0.3)
    save_weights(auditor.network, tmp_path / "a.safetensors")
    loaded = Auditor.load(tmp_path / "a.safetensors", "cpu")
    assert loaded.network.threshold == auditor.network.threshold
    assert torch.allclose(loaded.features(images), auditor.features(images), atol=1e-2)
    assert loaded.features(images).shape == (5, 576)


def test_weights_that_are_absent_or_do_not_fit_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file .*none"):
        Auditor.load(tmp_path / "none.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"no weights")
    with pytest.raises(ValueError, match="bad.safetensors is no checkpoint"):
        Auditor.load(tmp_path / "bad.safetensors")
