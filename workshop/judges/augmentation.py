"""Random changes that let a classifier which has only seen renders judge pictures from elsewhere.

Small changes of geometry, sharpness, tone and light, grain and blotches of color as generated
pictures have them (Tobin et al., “Domain Randomization for Transferring Deep Neural Networks”,
2017), made for a whole batch at a time.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Augmentation:
    """How much is changed; of every ± the amount is drawn evenly, anew for each picture."""

    small_size: int = 32  # pixels a side that a picture is shrunk to before it is scaled back
    small_share: float = 0.5  # share of the pictures that are shrunk: scores are of sharp ones too
    mirrored_share: float = 0.5  # share of the pictures whose left and right are exchanged
    shift: float = 2.0  # ± pixels, across and down
    zoom: float = 0.06  # ± share of the size, across and down
    blur: float = 0.8  # pixels, largest standard deviation of a Gaussian
    brightness: float = 0.04  # ± of the full range, added
    contrast: float = 0.15  # ± share of the distance from the picture's mean
    hue: float = 5.0  # ± degrees about the gray axis
    saturation: float = 0.15  # ± share of the distance from gray
    white_balance: float = 0.03  # ± share, each of red, green and blue
    gamma: float = 0.15  # ± of the exponent's logarithm
    shade: float = 0.08  # standard deviation of the logarithm of a smooth field of light
    blotches: float = 0.03  # of the full range, largest standard deviation of a smooth color field
    noise: float = 0.025  # of the full range, largest standard deviation of the grain


def augment(images: Tensor, config: Augmentation, generator: torch.Generator) -> Tensor:
    """Change pictures at random, each in its own way.

    Args:
        images: (B, 3, 64, 64) uint8.
        config: How much; all amounts 0 and `small_share` 1 leaves the course's recipe.
        generator: Source of the random numbers, on the pictures' device.

    Returns:
        (B, 3, 64, 64) float32 in [-1, 1], or a little outside where grain was added.
    """
    x = _resample(images.float() / 255, config, generator)
    x = _recolor(x, config, generator).clamp(0, 1)
    size = (len(x), 1, 1, 1)
    x = x ** torch.exp(_uniform(size, config.gamma, generator))
    light = _smooth_field((len(x), 1, 4, 4), x.shape[2:], generator)
    x = (x * torch.exp(config.shade * light)).clamp(0, 1)
    color = _smooth_field((len(x), 3, 8, 8), x.shape[2:], generator)
    grain = torch.randn(x.shape, generator=generator, device=x.device)
    x = x + color * _uniform(size, config.blotches, generator).abs()
    x = x + grain * _uniform(size, config.noise, generator).abs()
    return x * 2 - 1


def shrink(images: Tensor, size: int) -> Tensor:
    """Shrink pictures (B, 3, 64, 64) to size×size and scale them back, bilinear, antialiased."""
    small = F.interpolate(images, (size, size), mode="bilinear", antialias=True)
    return F.interpolate(small, images.shape[2:], mode="bilinear", antialias=True)


def _smooth_field(coarse: tuple, size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Draw normal numbers on a coarse grid and interpolate them."""
    field = torch.randn(coarse, generator=generator, device=generator.device)
    return F.interpolate(field, size, mode="bicubic", align_corners=True)


def _resample(x: Tensor, config: Augmentation, generator: torch.Generator) -> Tensor:
    """Mirror, shift, zoom, shrink and blur.

    Each of these is a matrix for the rows and one for the columns of a picture, so their products
    do all of it in two multiplications.
    """
    count, size, device = len(x), x.shape[-1], x.device
    at = torch.arange(size, device=device, dtype=torch.float32)
    # A matrix as a picture: with its rows' length kept, scaling acts on its columns alone.
    identity = torch.eye(size)
    small = F.interpolate(
        identity[None, None], (config.small_size, size), mode="bilinear", antialias=True
    )
    small = F.interpolate(small, (size, size), mode="bilinear", antialias=True)[0, 0].to(device)
    chosen = torch.rand(count, 1, 1, generator=generator, device=device) < config.small_share
    sigma = _uniform((count, 1, 1), config.blur, generator).abs().clamp(min=1e-3)
    blur = torch.exp(-((at[:, None] - at) ** 2) / (2 * sigma**2))
    soften = blur / blur.sum(2, keepdim=True) @ torch.where(chosen, small, identity.to(device))
    axes = []
    for mirrored_share in (0, config.mirrored_share):
        center = (size - 1) / 2 + _uniform((count, 1), config.shift, generator)
        zoom = 1 + _uniform((count, 1), config.zoom, generator)
        source = (center + (at - (size - 1) / 2) / zoom).clamp(0, size - 1)
        mirrored = torch.rand(count, 1, generator=generator, device=device) < mirrored_share
        source = torch.where(mirrored, size - 1 - source, source)
        linear = (1 - (source[:, :, None] - at).abs()).clamp(min=0)
        axes.append((soften @ linear)[:, None])
    down, across = axes
    return down @ x @ across.mT


def _recolor(x: Tensor, config: Augmentation, generator: torch.Generator) -> Tensor:
    """Change hue, saturation, white balance, contrast and brightness: one 3×3 matrix a picture."""
    count, device = len(x), x.device
    gray = torch.full((3, 3), 1 / 3, device=device)
    turn = torch.tensor([[0, -1, 1], [1, 0, -1], [-1, 1, 0]], device=device) / math.sqrt(3)
    angle = _uniform((count, 1, 1), math.radians(config.hue), generator)
    saturation = 1 + _uniform((count, 1, 1), config.saturation, generator)
    contrast = 1 + _uniform((count, 1, 1), config.contrast, generator)
    balance = 1 + _uniform((count, 3, 1), config.white_balance, generator)
    # Rodrigues' rotation about the gray axis, which saturation leaves alone.
    rotation = torch.cos(angle) * (torch.eye(3, device=device) - gray) + torch.sin(angle) * turn
    matrix = balance * (gray + saturation * rotation)
    flat = matrix @ x.flatten(2)
    mean = flat.mean((1, 2), keepdim=True)
    flat = mean + contrast * (flat - mean) + _uniform((count, 1, 1), config.brightness, generator)
    return flat.view_as(x)


def _uniform(size: tuple[int, ...], amount: float, generator: torch.Generator) -> Tensor:
    """Draw numbers in ± amount."""
    draw = torch.rand(size, generator=generator, device=generator.device)
    return (2 * draw - 1) * amount
