"""Distances between sets of pictures: their values on sets whose distance is known."""

import pytest
import torch

from lab7.auditor import Auditor, AuditorNetwork
from lab7.dataset import ICLEVRDataset
from lab7.fidelity import RealPictures, kernel_distance, nearest_distances


def normal(count, seed, mean=0.0, dimensions=6):
    return mean + torch.randn(count, dimensions, generator=torch.Generator().manual_seed(seed))


def test_kernel_distance_is_what_the_definition_says():
    x, y = normal(5, 0), normal(7, 1)

    def k(a, b):
        return (float(a @ b) / 6 + 1) ** 3

    xx = [k(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j]
    yy = [k(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j]
    xy = [k(a, b) for a in x for b in y]
    wanted = sum(xx) / 20 + sum(yy) / 42 - 2 * sum(xy) / 35
    assert kernel_distance(x, y).value == pytest.approx(wanted, rel=1e-5)


def test_kernel_distance_has_no_bias_and_its_interval_covers():
    found = [kernel_distance(normal(120, 2 * i), normal(900, 2 * i + 1)) for i in range(60)]
    values = torch.tensor([estimate.value for estimate in found])
    assert values.mean().abs() < 3 * values.std() / 60**0.5
    covering = sum(estimate.low <= 0 <= estimate.high for estimate in found)
    assert covering >= 50


def test_kernel_distance_grows_with_the_difference():
    real = normal(600, 0)
    near, far = kernel_distance(normal(200, 1, 0.3), real), kernel_distance(normal(200, 1, 1), real)
    assert 0 < near.low and near.high < far.low
    poor = kernel_distance(normal(1, 5).repeat(200, 1), real)
    assert poor.value > 10 * near.value, "the same picture over and over"


def test_pictures_of_a_condition_are_left_out_together():
    x = normal(20, 0).repeat_interleave(10, 0) + 0.01 * normal(200, 1)
    alone = kernel_distance(x, normal(500, 2))
    grouped = kernel_distance(x, normal(500, 2), torch.arange(20).repeat_interleave(10))
    assert alone.value == grouped.value
    assert grouped.high - grouped.low > 1.2 * (alone.high - alone.low)


def test_too_few_pictures_have_no_distance():
    for x, y, groups in [
        (normal(2, 0), normal(9, 1), None),
        (normal(9, 0), normal(1, 1), None),
        (normal(9, 0), normal(9, 1), torch.arange(9) // 5),
    ]:
        with pytest.raises(ValueError, match="three groups and two real pictures"):
            kernel_distance(x, y, groups)


def test_copies_are_at_distance_zero():
    y = 100 + normal(700, 0)
    x = torch.cat([y[[3, 600]], y[:1] + 0.5])
    distances = nearest_distances(x, y)
    assert distances[:2].tolist() == [0, 0] and 0 < distances[2] <= 0.5 * 6**0.5 + 1e-5


@pytest.fixture
def real(embedded_root):
    torch.manual_seed(0)
    return RealPictures(Auditor(AuditorNetwork(), "cpu"), ICLEVRDataset(embedded_root))


def test_copies_and_other_pictures_are_told_apart(real, embedded_root):
    dataset = ICLEVRDataset(embedded_root)
    copies = real.compare(dataset.images, dataset.conditions)
    assert copies.nearest_distance.value == pytest.approx(0, abs=1e-3)
    noise = torch.randint(0, 256, (6, 3, 64, 64), generator=torch.Generator().manual_seed(0)).byte()
    others = real.compare(noise, dataset.conditions[:6])
    assert others.nearest_distance.low > 100 * copies.nearest_distance.value
    assert others.kernel_distance.value > copies.kernel_distance.value


def test_numbers_of_objects_that_training_lacks_have_no_kernel_distance(real):
    images, labels = torch.zeros(2, 3, 64, 64), torch.eye(24).repeat(2, 1).view(2, 24, 24)[:, :4]
    found = real.compare(images, labels.sum(1))
    assert found.kernel_distance is None and found.nearest_distance.value > 0


def test_real_pictures_have_as_many_objects(real):
    assert real.sizes[real._of_sizes(torch.tensor([2, 2, 3]))].unique().tolist() == [2, 3]


def test_features_are_kept(real, embedded_root, cache_dir, monkeypatch):
    assert len(list(cache_dir.glob("features-*.npy"))) == 1
    monkeypatch.setattr(real.auditor, "features", None)
    again = RealPictures(real.auditor, ICLEVRDataset(embedded_root))
    assert torch.equal(again.features, real.features)


def test_damaged_features_are_computed_again(real, embedded_root, cache_dir):
    (file,) = cache_dir.glob("features-*.npy")
    file.write_bytes(b"broken")
    again = RealPictures(real.auditor, ICLEVRDataset(embedded_root))
    assert torch.allclose(again.features, real.features)
