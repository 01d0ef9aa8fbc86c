"""Random changes of pictures: what they do, and that they are repeatable."""

import dataclasses

import pytest
import torch

from workshop.judges.augmentation import Augmentation, augment, shrink

PLAIN = Augmentation(
    small_share=1, mirrored_share=0, shift=0, zoom=0, blur=0, brightness=0, contrast=0, hue=0,
    saturation=0, white_balance=0, gamma=0, shade=0, blotches=0, noise=0,
)  # fmt: skip


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def smooth_images(count):
    noise = torch.rand(count, 3, 8, 8, generator=generator(5))
    images = torch.nn.functional.interpolate(noise, (64, 64), mode="bicubic").clamp(0, 1)
    return (images * 255).round().to(torch.uint8)


def test_without_changes_the_recipe_is_the_courses():
    images = torch.randint(0, 256, (4, 3, 64, 64), generator=generator()).to(torch.uint8)
    expected = shrink(images.float() / 127.5 - 1, 32)
    assert torch.allclose(augment(images, PLAIN, generator()), expected, atol=1e-5)
    sharp = dataclasses.replace(PLAIN, small_share=0)
    assert torch.allclose(
        augment(images, sharp, generator()), images.float() / 127.5 - 1, atol=1e-5
    )


def test_shrinking_takes_the_finest_detail_away():
    board = (torch.arange(64)[:, None] + torch.arange(64)) % 2 * 2.0 - 1
    small = shrink(board.expand(1, 3, 64, 64), 32)
    assert small[..., 4:-4, 4:-4].abs().max() < 0.2


def test_changes_are_repeatable_and_differ_between_pictures():
    images = smooth_images(1).repeat(3, 1, 1, 1)
    first, second = (augment(images, Augmentation(), generator(7)) for _ in range(2))
    assert torch.equal(first, second)
    assert first.dtype == torch.float32 and first.shape == images.shape
    assert (first[0] - first[1]).abs().mean() > 0.01
    assert not torch.equal(first, augment(images, Augmentation(), generator(8)))


@pytest.mark.parametrize(
    "name", ["shift", "zoom", "blur", "brightness", "contrast", "hue",
             "saturation", "white_balance", "gamma", "shade", "blotches", "noise"],
)  # fmt: skip
def test_every_amount_does_something_but_not_much(name):
    images = smooth_images(8)
    amount = getattr(Augmentation(), name)
    sharp = dataclasses.replace(PLAIN, small_share=0)
    changed = augment(images, dataclasses.replace(sharp, **{name: amount}), generator())
    difference = (changed - (images.float() / 127.5 - 1)).abs().mean()
    assert 1e-4 < difference < 0.25


def test_shift_and_zoom_move_pictures_as_far_as_they_say():
    images = torch.zeros(64, 3, 64, 64, dtype=torch.uint8)
    images[:, :, 31:33, 31:33] = 255
    weight = (augment(images, dataclasses.replace(PLAIN, shift=3.0), generator()) + 1).sum(1)
    at = torch.arange(64) - 31.5
    across = (weight.sum(1) * at).sum(1) / weight.sum((1, 2))
    down = (weight.sum(2) * at).sum(1) / weight.sum((1, 2))
    for offset in (across, down):
        assert 2.4 < offset.max() < 3.2 and -3.2 < offset.min() < -2.4
    assert (across - down).abs().max() > 1


def test_left_and_right_are_exchanged_in_the_share_that_is_asked_for():
    images = smooth_images(200)
    config = dataclasses.replace(PLAIN, small_share=0, mirrored_share=0.5)
    changed, plain = augment(images, config, generator()), images.float() / 127.5 - 1
    same, mirrored = (
        torch.isclose(changed, x, atol=1e-5).flatten(1).all(1) for x in (plain, plain.flip(3))
    )
    assert torch.equal(same, ~mirrored) and 70 < mirrored.sum() < 130


def test_gray_stays_gray_under_hue_and_saturation():
    images = torch.full((8, 3, 64, 64), 90, dtype=torch.uint8)
    changed = augment(images, dataclasses.replace(PLAIN, hue=30, saturation=0.5), generator())
    assert torch.allclose(changed, images.float() / 127.5 - 1, atol=1e-5)
