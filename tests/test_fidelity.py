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


def repeated(seed):
    """Eight pictures of each of 20 conditions, alike within, and pictures of other conditions."""
    groups = torch.arange(20).repeat(8)
    x = 0.8 * normal(20, 3 * seed)[groups] + 0.6 * normal(160, 3 * seed + 1)
    return x, normal(900, 3 * seed + 2), groups


def test_kernel_distance_of_repeated_conditions_has_no_bias_and_its_interval_covers():
    found = [kernel_distance(*repeated(seed)) for seed in range(60)]
    values = torch.tensor([estimate.value for estimate in found])
    assert values.mean().abs() < 3 * values.std() / 60**0.5
    assert sum(estimate.low <= 0 <= estimate.high for estimate in found) >= 50
    alone = torch.tensor([kernel_distance(*repeated(seed)[:2]).value for seed in range(60)])
    assert alone.mean() > 3 * alone.std() / 60**0.5, "pairs of a condition are more alike"


def test_pairs_and_jackknife_are_over_conditions():
    x, y, groups = normal(9, 0), normal(7, 1), torch.tensor([4, 4, 4, 4, 0, 0, 7, 7, 9])

    def distance(rows):
        k = (x[rows].double() @ x[rows].double().T / 6 + 1) ** 3
        apart = groups[rows][:, None] != groups[rows]
        yy = ((y.double() @ y.double().T / 6 + 1) ** 3).fill_diagonal_(0).sum() / 42
        return k[apart].mean() + yy - 2 * ((x[rows].double() @ y.double().T / 6 + 1) ** 3).mean()

    found = kernel_distance(x, y, groups)
    assert found.value == pytest.approx(float(distance(torch.arange(9))))
    without = torch.stack([distance((groups != g).nonzero()[:, 0]) for g in groups.unique()])
    error = (3 / 4 * (without - without.mean()).square().sum()).sqrt()
    assert found.high - found.value == pytest.approx(1.959964 * float(error))


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
    copied, nearest = real.compare(dataset.images, dataset.conditions)
    assert max(nearest) == pytest.approx(0, abs=1e-3)
    noise = torch.randint(0, 256, (6, 3, 64, 64), generator=torch.Generator().manual_seed(0)).byte()
    other, distances = real.compare(noise, dataset.conditions[:6])
    assert min(distances) > 100 * max(nearest)
    assert other.value > copied.value


def test_numbers_of_objects_that_training_lacks_have_no_kernel_distance(real):
    images, labels = torch.zeros(2, 3, 64, 64), torch.eye(24).repeat(2, 1).view(2, 24, 24)[:, :4]
    kernel, nearest = real.compare(images, labels.sum(1))
    assert kernel is None and min(nearest) > 0


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
