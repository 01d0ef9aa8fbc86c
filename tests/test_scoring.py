"""Scores: pictures are judged once, and every score, distance and comparison follows from that."""

import dataclasses

import pytest
import torch

from lab7.auditor import Audit, Auditor, AuditorNetwork, scene_ratios
from lab7.dataset import ICLEVRDataset
from lab7.evaluator import Evaluator, build_network
from lab7.labels import encode
from lab7.records import Record, read_record, trainings
from lab7.scoring import (
    Verdicts,
    compare_paired,
    draw_and_judge,
    judge_pictures,
    label_names,
)
from workshop.judges.evaluator_training import compute_scores
from workshop.judges.fidelity import (
    Agreement,
    RealPictures,
    describe,
    kernel_distance,
    nearest_distances,
)
from workshop.records import write_record
from workshop.study.evaluation import score_table

CONDITIONS = [("red cube",), ("blue sphere", "gray cylinder"), ("cyan cube", "cyan sphere")]
RED, BLUE = 1, 10  # indices of red cube and blue sphere


@pytest.fixture(scope="module")
def evaluator():
    torch.manual_seed(0)
    return Evaluator(build_network(), "cpu")


@pytest.fixture(scope="module")
def auditor():
    torch.manual_seed(0)
    return Auditor(AuditorNetwork(), "cpu")


@pytest.fixture
def images():
    return torch.rand(6, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1


def verdicts(counted, seen=None, condition=None, conditions=(("red cube",),)):
    """Verdicts of pictures of which objects were counted, as indices."""
    condition = condition or [0] * len(counted)
    hits = [len({RED} & set(row)) for row in counted]
    asked = [list(labels) for labels in conditions]
    return Verdicts(asked, condition, list(range(len(counted))), hits, seen or counted, counted)


def test_pictures_are_what_the_seeds_give(pipeline, evaluator):
    metrics, images = draw_and_judge(
        pipeline, CONDITIONS, evaluator, repetitions=2, first_seed=10, progress=False
    )
    assert images.shape == (6, 3, 64, 64)
    again = pipeline(CONDITIONS, seeds=[13, 14, 15], output_type="pt", progress=False).images
    assert torch.allclose(images[3:], again, atol=1e-4)
    pictures = metrics["pictures"]
    assert pictures.condition == [0, 1, 2, 0, 1, 2] and pictures.seed == [10, 11, 12, 13, 14, 15]
    assert pictures.conditions == [list(labels) for labels in CONDITIONS]
    assert metrics["scores"].num_pictures == 6 and metrics["scores"].num_conditions == 3
    assert metrics["guidance_scale"] == pipeline.config.guidance_scale
    part, _ = draw_and_judge(pipeline, CONDITIONS, evaluator, guidance_interval=[300, 700])
    assert part["guidance_interval"] == [300, 700]
    assert metrics["timesteps"] == pipeline.scheduler.timesteps.tolist()
    with pytest.raises(ValueError, match="repetitions 0 must be at least 1"):
        draw_and_judge(pipeline, CONDITIONS, evaluator, repetitions=0)


def test_scores_are_those_of_both_judges(evaluator, auditor, images):
    found = describe(judge_pictures(images, CONDITIONS, evaluator, auditor), images, None)
    labels, groups = encode(CONDITIONS).repeat(2, 1), torch.arange(3).repeat(2)
    probabilities, counts = evaluator.predict(images), auditor.count(images)
    assert found["scores"] == compute_scores(probabilities, labels, groups)
    assert found["audit"] == Audit.of(scene_ratios(counts, labels), groups)
    assert "fidelity" not in found and found["pictures"].seed is None
    lines = score_table({"mine": found}).splitlines()
    assert lines[0].split() == ["mine"] and lines[1].split() == ["pictures", "6"]
    assert [line.split("  ")[0] for line in lines[2:]] == [
        "conditions", "labels",
        "top-k", "exact set", "precision", "recall", "F1",
        "exact scene", "extra", "missing", "swapped", "doubled", "other",
        "same labels", "both right", "evaluator alone", "auditor alone", "both wrong",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="5 pictures do not fit 3 conditions"):
        judge_pictures(images[:5], CONDITIONS, evaluator, auditor)
    with pytest.raises(ValueError, match="6 pictures do not fit 0 conditions"):
        judge_pictures(images, [], evaluator, auditor)


def test_each_judge_looks_once(pipeline, evaluator, auditor, monkeypatch):
    looks = {"evaluator": 0, "auditor": 0}

    def count(judge, method, name):
        def look(images, *rest):
            looks[name] += len(images)
            return method(images, *rest)

        monkeypatch.setattr(judge, method.__name__, look)

    count(evaluator, evaluator.predict, "evaluator")
    count(auditor, auditor.count, "auditor")
    draw_and_judge(pipeline, CONDITIONS, evaluator, auditor, repetitions=2, progress=False)
    assert looks == {"evaluator": 6, "auditor": 6}


def test_judges_agree_where_they_say_the_same():
    found = Agreement.of(
        verdicts(counted=[[RED], [RED, RED], [RED], [BLUE]], seen=[[RED], [RED], [0], []])
    )
    assert found.same_labels.hits == 2
    kinds = (found.both_right, found.evaluator_alone, found.auditor_alone, found.both_wrong)
    assert [kind.hits for kind in kinds] == [1, 1, 1, 1]


def test_verdicts_keep_what_is_there_twice_and_what_is_empty():
    said = verdicts(counted=[[RED, RED], []])
    audit = said.ratios()["audit"]
    assert [part.tolist() for part in audit["exact_scene"]] == [[False, False], [1, 1]]
    assert audit["extra"][0].tolist() == [True, False]
    assert label_names(said.counted) == [["red cube", "red cube"], []]


def test_fidelity_is_recorded_picture_by_picture(evaluator, auditor, images):
    class Real:
        def compare(self, images, labels, groups):
            assert groups.tolist() == [0, 1, 2, 0, 1, 2]
            return "kernel", [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]

    judged = judge_pictures(images, CONDITIONS, evaluator, auditor)
    found = describe(judged, images, Real())
    assert found["fidelity"].kernel_distance == "kernel"
    assert found["pictures"].nearest == [1, 2, 3, 4, 5, 6]
    nearest = found["fidelity"].nearest_distance
    assert nearest.value == 3.5 and nearest.hits is None


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
        assert kernel_distance(x, y, groups) is None


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


@pytest.mark.parametrize("content", [b"broken", b""])
def test_damaged_features_are_computed_again(real, embedded_root, cache_dir, content):
    (file,) = cache_dir.glob("features-*.npy")
    file.write_bytes(content)
    again = RealPictures(real.auditor, ICLEVRDataset(embedded_root))
    assert torch.allclose(again.features, real.features)


def test_features_are_computed_without_a_cache(real, embedded_root, tmp_path, monkeypatch):
    dataset = ICLEVRDataset(embedded_root)
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("LAB7_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="no cache"):
        again = RealPictures(real.auditor, dataset)
    assert torch.allclose(again.features, real.features)


def make(name, wrong=0, seed=0, first_seed=0, nearest=None, **changes):
    """A record of 40 pictures of 20 conditions, the first few of which are wrong."""
    drawn = [[BLUE] if row % 20 < wrong else [RED] for row in range(40)]
    hits = [int(row == [RED]) for row in drawn]
    seeds = list(range(first_seed, first_seed + 40))
    conditions = [["red cube"]] * 20
    verdicts = Verdicts(conditions, list(range(20)) * 2, seeds, hits, drawn, drawn, nearest)
    found = {"num_inference_steps": 20, "pictures": dataclasses.asdict(verdicts)}
    training = {"images": 6000, "data_sha256": "abc", "precision": "float32"} | changes
    metrics = {"test": found, "training": training}
    return Record(name, {"seed": seed}, metrics, {"weights_sha256": name})


def test_one_training_seed_is_said():
    found = compare_paired([make("a")], [make("b", wrong=8)])
    assert found.difference.value == 0.4 and found.difference.low > 0
    assert (found.verdict, found.training_seeds) == ("one seed: higher", (1, 1))
    assert found.num_conditions == 20
    assert compare_paired([make("a", 8)], [make("b")]).verdict == "one seed: lower"
    assert compare_paired([make("a")], [make("b", wrong=1)]).verdict == "cannot be told apart"
    assert compare_paired([make("a", 3)], [make("b", 3)]).difference.value == 0
    many = [make("b", 8), make("c", 8, seed=1)]
    assert compare_paired([make("a")], many).verdict == "one seed: higher"
    twice = [make("a"), make("d")]
    assert compare_paired(twice, many).training_seeds == (1, 2), "the same seed is no second one"


def test_difference_pools_trainings_and_pairs_conditions():
    first, second = make("a", nearest=[3.0] * 40), make("b", wrong=5, nearest=[1.0] * 40)
    found = compare_paired([first], [second]).difference
    assert found.value == 0.25 and 0 < found.low < 0.25 < found.high
    both = compare_paired([first, second], [second], score="exact_scene").difference
    assert both.value == pytest.approx(0.125)
    turned = compare_paired([second], [first]).difference
    assert (turned.low, turned.high) == pytest.approx((-found.high, -found.low))
    nearest = compare_paired([first], [second], score="nearest_distance")
    assert nearest.difference.value == 2


def test_better_needs_trainings_that_differ_by_less():
    first, second = [make("a"), make("b", 1, seed=1)], [make("c", 9), make("d", 10, seed=1)]
    assert compare_paired(first, second).verdict == "better"
    assert compare_paired(second, first).verdict == "worse"
    assert compare_paired(second, first, score="other").verdict == "higher", "more is not better"
    unsteady = [make("c", 3), make("d", 15, seed=1)]
    found = compare_paired(first, unsteady, score="exact_scene")
    assert found.difference.low > 0 and found.verdict == "cannot be told apart"


def test_precision_of_pictures_in_which_nothing_is_seen_is_0():
    blind = make("a", wrong=20)
    blind.metrics["test"]["pictures"]["seen"] = [[]] * 40
    found = compare_paired([blind], [make("b")], score="precision")
    assert (found.difference.value, found.verdict) == (-1, "one seed: lower")


def test_records_that_are_not_comparable_are_refused():
    with pytest.raises(ValueError, match="^b differs .* the pictures of training: 3000, not 6000$"):
        compare_paired([make("a")], [make("b", images=3000)])
    with pytest.raises(ValueError, match="^b differs .* the seeds$"):
        compare_paired([make("a")], [make("b", first_seed=1)])
    with pytest.raises(ValueError, match="a has no verdicts .*'tset'; b has"):
        compare_paired([make("a")], [make("b")], "tset")
    with pytest.raises(ValueError, match="unknown score 'topk': did you mean 'top_k'"):
        compare_paired([make("a")], [make("b")], score="topk")
    with pytest.raises(ValueError, match="no records on one side"):
        compare_paired([], [make("b")])


def test_comparison_of_records_on_disk(tmp_path):
    for record in (make("a"), make("b", wrong=8)):
        write_record(record.name, record.config, record.metrics, tmp_path, weights=__file__)
    first, second = (read_record(name, tmp_path) for name in "ab")
    first.environment["weights_sha256"] = "other"
    assert compare_paired([first], [second]) == compare_paired([make("a")], [make("b", wrong=8)])


def test_all_trainings_of_an_experiment_are_compared():
    made = [
        make("cosine"),
        make("cosine-seed1", 1, 1),
        make("linear", 9),
        make("linear-seed1", 8, 1),
    ]
    records = {record.name: record for record in [*made, make("cosine-x0", 9)]}
    pairs = [("cosine", "linear"), ("cosine-x0", "cosine"), ("linear", "cosine-x0")]
    rows = [compare_paired(*(trainings(records, n) for n in p), score="exact_set") for p in pairs]
    assert [(row.training_seeds, row.num_conditions, row.verdict) for row in rows] == [
        ((2, 2), 20, "better"),
        ((1, 2), 20, "one seed: lower"),
        ((2, 1), 20, "cannot be told apart"),
    ]
    assert rows[0].difference.value == pytest.approx(0.4)
    assert rows[0].difference.low < 0.4 < rows[0].difference.high
    with pytest.raises(ValueError, match="two different records are named 'cosine'"):
        compare_paired(made[:1], [make("cosine", first_seed=7)])
    with pytest.raises(ValueError, match="unknown record 'cosin': did you mean 'cosine'"):
        trainings(records, "cosin")
