"""The renderer: geometry, visibility, colors, repeatability. Needs Mitsuba."""

import itertools
import math

import numpy as np
import pytest

pytest.importorskip("mitsuba")

from workshop.standin import rendering
from workshop.standin.rendering import (
    MIN_DISTANCE,
    MIN_MARGIN,
    MIN_VISIBLE_PIXELS,
    POSITION_RANGE,
    Scene,
    SceneObject,
    render,
    sample_scene,
    visible_pixels,
)
from workshop.standin.scenes import ScenePlan, render_scene

STILL = ((0.0, 0.0, 0.0),) * 3


def scene(*objects: SceneObject) -> Scene:
    return Scene(objects, (0.0, 0.0, 0.0), STILL)


def test_placement_follows_the_rules():
    labels = ("red cube", "blue sphere", "gray cylinder", "cyan cube")
    for seed in range(5):
        placed = sample_scene(labels, np.random.default_rng(seed))
        assert [o.label for o in placed.objects] == list(labels)
        assert (placed.objects[0].x, placed.objects[0].y) == (0, 0)
        assert visible_pixels(placed).min() >= MIN_VISIBLE_PIXELS
        for a, b in itertools.combinations(placed.objects, 2):
            assert math.dist((a.x, a.y), (b.x, b.y)) >= MIN_DISTANCE
            assert max(abs(a.x), abs(a.y), abs(b.x), abs(b.y)) <= POSITION_RANGE


def test_objects_keep_a_margin_along_the_camera_axes():
    front = np.array(rendering.CAMERA[:2]) / np.linalg.norm(rendering.CAMERA[:2])
    for seed in range(3):
        a, b = sample_scene(("red cube", "blue cube"), np.random.default_rng(seed)).objects
        offset = np.array([a.x - b.x, a.y - b.y])
        assert abs(front @ offset) >= MIN_MARGIN
        assert abs(front[0] * offset[1] - front[1] * offset[0]) >= MIN_MARGIN


def test_visible_pixels_counts_each_object_in_its_order():
    behind = SceneObject("red cube", 0, 0, 0)
    direction = np.array(rendering.CAMERA[:2]) / np.linalg.norm(rendering.CAMERA[:2])
    x, y = 1.0 * direction
    alone = visible_pixels(scene(behind))[0]
    hidden, front = visible_pixels(scene(behind, SceneObject("blue sphere", x, y, 0)))
    assert 1500 < alone < 2600
    assert hidden < 0.7 * alone
    assert front > hidden


@pytest.mark.parametrize("shape", ["cube", "sphere", "cylinder"])
@pytest.mark.parametrize("color, brightest", [("red", 0), ("green", 1), ("blue", 2)])
def test_object_has_its_color_at_the_center(shape, color, brightest):
    picture = render(scene(SceneObject(f"{color} {shape}", 0, 0, 30)), samples_per_pixel=4)
    assert picture.shape == (64, 64, 3) and picture.dtype == np.uint8
    center = picture[24:31, 30:34].reshape(-1, 3).mean(0)
    assert center.argmax() == brightest
    assert center[brightest] > 1.25 * np.delete(center, brightest).max()
    background = picture[45:60].astype(int)
    assert np.ptp(background.mean((0, 1))) < 15, "the background is gray"


def test_gray_object_differs_from_the_gray_background():
    with_object = render(scene(SceneObject("gray sphere", 0, 0, 0)), 1).astype(int)
    without = render(scene(), 1).astype(int)
    changed = np.abs(with_object - without).max(-1) > 12
    assert changed.sum() > 40


def test_rendering_repeats_bit_for_bit():
    placed = sample_scene(("red cube", "blue sphere", "gray cylinder"), np.random.default_rng(1))
    assert (render(placed, 7, 4) == render(placed, 7, 4)).all()
    assert (render(placed, 7, 4) != render(placed, 8, 4)).any()


def test_steps_show_the_same_scene_with_one_object_more():
    plan = ScenePlan("CLEVR_train_000007", ("red cube", "blue sphere", "yellow cylinder"))
    pictures, centers = render_scene(plan)
    assert pictures.shape == (3, 64, 64, 3) and centers.shape == (3, 2)
    for (before, after), (x, y) in zip(
        itertools.pairwise(pictures.astype(int)), centers[1:], strict=True
    ):
        changed = np.abs(before - after).max(-1) > 15
        assert 20 < changed.sum() < 64 * 64 / 3
        assert changed[int(y) - 1 : int(y) + 2, int(x) - 1 : int(x) + 2].all()


def test_a_sphere_is_drawn_about_its_projected_center():
    lone = scene(SceneObject("red sphere", 1.5, -2.0, 0.0))
    ((x, y),) = rendering.project(lone)
    picture = render(lone, 0, 16).astype(int)
    red = picture[..., 0] - picture[..., 1] > 30
    rows, columns = red.nonzero()
    assert abs(rows.mean() + 0.5 - y) < 1 and abs(columns.mean() + 0.5 - x) < 1
