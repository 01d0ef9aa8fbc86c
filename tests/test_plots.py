import io

import matplotlib as mpl
import numpy as np
import pytest
import torch
from PIL import Image

from lab7 import plots
from lab7.errors import UserError
from lab7.estimates import Estimate
from lab7.labels import LABELS
from lab7.records import Record, original_scores, published
from lab7.sampling import to_grid
from report.figures import draw_schedules, label_heatmap
from workshop.judges import plots as judge_plots

PICTURES = torch.randint(0, 256, (5, 3, 64, 64), generator=torch.Generator().manual_seed(0)).to(
    torch.uint8
)
ESTIMATE = {"value": 0.9, "low": 0.85, "high": 0.93}
SWEEP = {
    "guidance": [
        {"guidance_scale": w, "num_inference_steps": 20, "top_k": ESTIMATE, "exact_set": ESTIMATE}
        for w in (1.0, 3.0)
    ],
    "steps": [
        {"guidance_scale": 3.0, "num_inference_steps": n, "top_k": ESTIMATE, "exact_set": ESTIMATE}
        for n in (10, 20)
    ],
}
LOG = [{"images": 64 * i, "loss": 1 / i, "lr": 1e-3 / i} for i in range(1, 60)]
JUDGED = {"evaluator": ESTIMATE, "auditor": Estimate(0.95, 0.9, 0.99, 38, 40)}
CALIBRATION = {
    "error": 0.0321,
    "bins": [{"mean": m, "there": Estimate(m, m - 0.1, m + 0.1, 4, 10)} for m in (0.2, 0.6)],
}
RECALL = {
    "count": {"1": JUDGED, "2": JUDGED},
    "neighbor": {"<6": JUDGED, ">24": JUDGED, "none": JUDGED},
    "height": {"20": JUDGED, "40": JUDGED},
}
CHANGES = {
    kind: [{"amount": x, "exact_set": ESTIMATE, "exact_scene": ESTIMATE} for x in (0.0, 0.1)]
    for kind in ("blur", "brightness", "noise")
}
FOOLED = {
    kind: {"top_k": ESTIMATE, "exact_set": ESTIMATE, "exact_scene": Estimate(0.0, 0.0, 0.01)}
    for kind in ("as asked", "one twice")
}


def milestones(*values):
    """Rows of a record as `workshop.study.experiments.train_and_score` makes them."""
    estimates = [{"value": v, "low": v - 0.1, "high": v + 0.05} for v in values]
    return [
        {
            "step": 100 * n,
            "images": 6400 * n,
            "seconds": 1800 * n,
            "loss": 0.1 / n,
            "scores": {"num_pictures": 128, "top_k": estimate, "exact_set": ESTIMATE},
            "audit": {"num_pictures": 128, "exact_scene": ESTIMATE},
        }
        for n, estimate in zip((1, 2, 4, 8), estimates, strict=True)
    ]


RUNS = {
    "one": Record("one", {}, {"milestones": milestones(0.2, 0.4, 0.6, 0.7)}, {}),
    "other": Record("other", {}, {"milestones": milestones(0.3, 0.5, 0.8, 0.9)}, {}),
}
GROUPS = {
    "published": original_scores(),
    "twins": {"original-cosine": {"test": ESTIMATE, "new_test": ESTIMATE}},
    "full size": {
        "original-cosine": {"test": Estimate(0.95, None, None)},
        "original-channels": {},
        "ours": {"test": ESTIMATE},
    },
}
CHARTS = {
    "picture_grid": lambda: plots.picture_grid(PICTURES, [["red cube"]] * 5, [["gray cube"]] * 5),
    "training_curve": lambda: plots.training_curve(LOG),
    "loss_by_level": lambda: plots.loss_by_level(
        [
            row | {"loss_by_level": [None if i == 3 else row["loss"] * i for i in range(1, 11)]}
            for row in LOG
        ]
    ),
    "learning_curves": lambda: plots.learning_curves(RUNS),
    "accuracy_dots": lambda: plots.accuracy_dots(GROUPS),
    "accuracy_by_epoch": lambda: plots.accuracy_by_epoch(
        published()["original"]["cosine_by_epoch"]
    ),
    "sweep_curves": lambda: plots.sweep_curves(SWEEP),
    "label_heatmap": lambda: label_heatmap(dict.fromkeys(LABELS, 0.5) | {"red cube": None}),
    "scores_by_count": lambda: judge_plots.scores_by_count(
        {1: {"top_k": ESTIMATE, "exact_set": ESTIMATE}}
    ),
    "draw_schedules": draw_schedules,
    "reliability": lambda: judge_plots.reliability(CALIBRATION),
    "recall_by": lambda: judge_plots.recall_by(RECALL),
    "changed_pictures": lambda: judge_plots.changed_pictures(CHANGES),
    "fooled_judges": lambda: judge_plots.fooled_judges(FOOLED),
}


def dots(axes):
    """By name in the legend, the places of the dots that are drawn with intervals."""
    return {c.get_label(): c.lines[0].get_xydata().tolist() for c in axes.containers}


def texts(chart):
    found = chart.findobj(lambda artist: isinstance(artist, mpl.text.Text) and artist.get_text())
    return [artist.get_text() for artist in found]


def to_picture(chart):
    data, _ = chart._repr_png_()
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


@pytest.mark.parametrize("name", CHARTS)
def test_charts_show_themselves_in_notebooks(name):
    picture = to_picture(CHARTS[name]())
    assert picture.std() > 5  # not an empty sheet


@pytest.mark.parametrize(
    ("name", "kind"), [("picture_grid", "png"), ("picture_grid", "webp"), ("accuracy_dots", "svg")]
)
def test_files_are_the_same_each_time(tmp_path, name, kind):
    for folder in ("first", "second"):
        CHARTS[name]().save(tmp_path / folder / f"chart.{kind}")
    first, second = (tmp_path / f / f"chart.{kind}" for f in ("first", "second"))
    assert first.read_bytes() == second.read_bytes()


def test_webp_is_without_loss(tmp_path):
    files = [tmp_path / f"chart.{kind}" for kind in ("png", "webp")]
    for file in files:
        CHARTS["picture_grid"]().save(file)
    first, second = (np.asarray(Image.open(file).convert("RGB")) for file in files)
    assert np.array_equal(first, second) and Image.open(files[1]).format == "WEBP"


def test_the_style_is_ours_and_stays_inside():
    with mpl.rc_context({"font.size": 30, "axes.grid": False}):
        chart = CHARTS["accuracy_by_epoch"]()
        assert mpl.rcParams["font.size"] == 30
    assert chart.axes[0].xaxis.label.get_size() == 8.5


def test_pixels_become_sharp_squares_in_their_own_colors():
    picture = to_picture(plots.picture_grid(PICTURES[:2]))
    assert picture.shape == (128, 2 * 128 + 12, 3)
    expected = PICTURES[1].permute(1, 2, 0).repeat_interleave(2, 0).repeat_interleave(2, 1)
    assert np.array_equal(picture[:, 140:], expected.numpy())


def test_float_pictures_look_as_their_uint8():
    floats = to_picture(plots.picture_grid(PICTURES.float() / 127.5 - 1))
    assert np.array_equal(floats, to_picture(plots.picture_grid(PICTURES)))


def test_rows_break_after_the_columns():
    assert [plots.picture_grid(PICTURES, columns=n).get_figheight() for n in (5, 3, 1)] == (
        pytest.approx([0.75, 2 * 0.75 + 18 / 256, 5 * 0.75 + 4 * 18 / 256])
    )


def test_captions_mark_what_the_evaluator_misses_and_adds():
    wanted, seen = [["red cube", "blue cube"]], [["blue cube", "gray sphere"]]
    chart = plots.picture_grid(PICTURES[:1], wanted, seen)
    assert texts(chart) == ["✗ red cube", "blue cube", "+ gray sphere"]
    colors = [text.get_color() for text in chart.axes[0].texts]
    assert colors == [plots.ORANGE, plots.INK, plots.ORANGE]


@pytest.mark.parametrize("count", [2, 5, 9, 16])
def test_split_grid_takes_a_sheet_apart(count):
    pictures = torch.cat([PICTURES] * 4)[:count]
    sheet = to_grid(pictures.float() / 127.5 - 1)
    assert np.array_equal(plots.split_grid(sheet)[:count], pictures.numpy())


def test_intervals_are_drawn_where_they_are():
    row = {"test": ESTIMATE, "new_test": Estimate(0.8, None, None)}
    first, second = plots.accuracy_dots({"here": {"ours": row}}).axes
    assert dots(first) == {"here": [[0.9, 0]]} and dots(second) == {"here": [[0.8, 0]]}
    (drawn,), (left_out,) = (
        axes.containers[0].lines[2][0].get_segments() for axes in (first, second)
    )
    assert np.allclose(drawn, [[0.85, 0], [0.93, 0]])
    assert len(left_out) == 0, "a value without an interval gets none"


def test_groups_share_the_row_of_a_name():
    chart = CHARTS["accuracy_dots"]()
    test, new_test = chart.axes
    names = [text.get_text() for text in test.get_yticklabels()]
    assert names == [*original_scores(), "ours"]
    rows = {group: [y for _, y in places] for group, places in dots(test).items()}
    cosine, ours = names.index("original-cosine"), names.index("ours")
    alone = [y for y in range(len(original_scores())) if y != cosine]
    assert rows == {
        "published": [*alone, cosine - 0.25],
        "twins": [cosine],
        "full size": [cosine + 0.25, ours],
    }
    assert dots(new_test)["full size"] == []
    estimates = [row["new_test"] for row in original_scores().values()]
    assert [x for x, _ in dots(new_test)["published"]] == [each.value for each in estimates]
    assert {"published", "twins", "full size"} < set(texts(chart))
    drawn = [[c.lines[0].get_color() for c in axes.containers] for axes in chart.axes]
    assert drawn[0] == drawn[1] and len(set(drawn[0])) == 3, "a color a group, in both panels"


def test_learning_curves_draw_each_run_with_its_intervals():
    chart = plots.learning_curves(RUNS)
    (axes,) = chart.axes
    found = dots(axes)
    assert list(found) == ["one", "other"]
    assert [y for _, y in found["other"]] == [0.3, 0.5, 0.8, 0.9]
    steps = [[x for x, _ in places] for places in found.values()]
    assert np.allclose(np.mean(steps, axis=0), [100, 200, 400, 800])
    assert np.allclose(np.subtract(*steps), -0.006 * 800), "moved aside by less than a hundredth"
    spans = [part[:, 1] for part in axes.containers[0].lines[2][0].get_segments()]
    assert np.allclose(spans, [[0.1, 0.25], [0.3, 0.45], [0.5, 0.65], [0.6, 0.75]])
    assert {"one", "other", "steps of training", "top-k on valid"} <= set(texts(chart))


def test_learning_curves_of_another_score_and_over_time():
    (axes,) = plots.learning_curves({"one": RUNS["one"]}, "exact_scene", "seconds").axes
    assert dots(axes) == {"one": [[0.5, 0.9], [1, 0.9], [2, 0.9], [4, 0.9]]}
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("hours of training", "exact scene on valid")


def test_learning_curves_name_what_is_not_there():
    with pytest.raises(UserError, match="record 'bare' 'milestones'"):
        plots.learning_curves({"bare": Record("bare", {}, {}, {})})
    with pytest.raises(UserError, match="unknown score 'topk': did you mean 'top_k'"):
        plots.learning_curves(RUNS, "topk")
    with pytest.raises(UserError, match="unknown x 'steps': did you mean 'step'"):
        plots.learning_curves(RUNS, x="steps")


def test_loss_by_level_has_a_line_a_level_and_names_the_ends():
    (axes,) = CHARTS["loss_by_level"]().axes
    assert len(axes.lines) == 10
    assert np.isnan(axes.lines[2].get_ydata()).all(), "nothing is known of the third"
    named = [line.get_color() for line in axes.get_legend().get_lines()]
    assert np.allclose(named, [axes.lines[0].get_color(), axes.lines[-1].get_color()])


def test_heat_map_writes_each_value_and_leaves_gaps():
    values = {label: index / 100 for index, label in enumerate(LABELS)} | {"red cube": None}
    found = texts(label_heatmap(values, "{:.2f}"))
    assert {f"{index / 100:.2f}" for index in range(24) if LABELS[index] != "red cube"} < set(found)
    assert found.count("–") == 1


def test_sweep_marks_the_generators_own_settings():
    chart = plots.sweep_curves(SWEEP)
    own = [axes.lines[0].get_xdata()[0] for axes in chart.axes]
    assert own == [3.0, 20]
    assert dots(chart.axes[0]) == dict.fromkeys(("top-k", "exact set"), [[1, 0.9], [3, 0.9]])


def test_table_is_markdown():
    rows = [["`test`", "0.912 (0.88–0.94)"], ["`new_test`", "not run here"], ["`valid`", 0.5]]
    assert plots.table(["set", "top-k"], rows).splitlines() == [
        "| set | top-k |",
        "| --- | ---: |",
        "| `test` | 0.912 (0.88–0.94) |",
        "| `new_test` | not run here |",
        "| `valid` | 0.5 |",
    ]


def test_interval_text_takes_records_and_estimates():
    assert plots.interval_text(ESTIMATE) == "0.900 (0.850–0.930)"
    assert plots.interval_text(Estimate(0.5, None, None)) == "0.500"
    assert plots.interval_text(ESTIMATE, "{:.1f}", 1000) == "900.0 (850.0–930.0)"


def test_reliability_shows_bins_and_error():
    left, right = (chart := CHARTS["reliability"]()).axes
    assert left.get_title("left") == "Calibration error 0.032"
    assert np.allclose(left.containers[0].lines[0].get_xydata(), [[0.2, 0.2], [0.6, 0.6]])
    assert [bar.get_height() for bar in right.patches] == [10, 10]
    assert "calibrated" in texts(chart)


def test_recall_has_a_panel_for_each_part_and_both_judges():
    chart = CHARTS["recall_by"]()
    groups = [[text.get_text() for text in axes.get_xticklabels()] for axes in chart.axes]
    assert groups == [list(part) for part in RECALL.values()]
    for axes in chart.axes:
        heights = [set(container.lines[0].get_ydata()) for container in axes.containers]
        assert heights == [{0.9}, {0.95}]


def test_fooled_judges_have_a_row_for_each_kind():
    axes = CHARTS["fooled_judges"]().axes[0]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["as asked", "one twice"]
    values = {name: [x for x, _ in places] for name, places in dots(axes).items()}
    assert values == {
        "exact set, evaluator": [0.9, 0.9],
        "exact scene, auditor": [0, 0],
        "top-k, the course's score": [0.9, 0.9],
    }


def test_tables_show_themselves_in_notebooks():
    table = plots.table(["name", "value"], [["a", 1], ["b", 2]])
    assert table._repr_markdown_() == "| name | value |\n| --- | ---: |\n| a | 1 |\n| b | 2 |"
