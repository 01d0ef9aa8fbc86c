"""The batch of each training step, as a function of (seed, step) alone."""

from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling
from torch import Tensor

from lab7.dataset import to_float
from lab7.experiments import TrainConfig


class Pictures(Protocol):
    """What to train on: uint8 pictures (N, 3, 64, 64) and multi-hot conditions (N, 24)."""

    images: Tensor
    conditions: Tensor


class Batches:
    """The pictures, conditions, time steps and noise of each step.

    Each epoch goes through all pictures in an order of its own; a batch may reach over its end.

    Args:
        config: Its seed, batch size, label dropout and time sampling count.
        dataset: The pictures; held on the device as uint8.
        device: Where the batches are wanted.
        share: Of several processes that share a batch, which this is and how many there are.
    """

    def __init__(
        self,
        config: TrainConfig,
        dataset: Pictures,
        device: torch.device,
        share: tuple[int, int] = (0, 1),
    ):
        self.config, self.device = config, device
        self.images, self.conditions = dataset.images.to(device), dataset.conditions.to(device)
        self.num_timesteps = DDPMScheduler(**config.noise).config.num_train_timesteps
        self._share = slice(share[0], None, share[1])
        self._permutation = lru_cache(maxsize=2)(self._draw_permutation)

    def __call__(self, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return x0 (B, 3, 64, 64), cond (B, 24), t (B,) in 0 … T-1 and noise of a step."""
        config, device = self.config, self.device
        rows = self.rows(step)
        x0, cond = to_float(self.images[rows]), self.conditions[rows]
        generator = torch.Generator(device).manual_seed(_mix(config.seed, step))
        noise = torch.randn(x0.shape, generator=generator, device=device)
        u = compute_density_for_timestep_sampling(
            config.time_sampling, len(rows), 0.0, 1.0, device=device, generator=generator
        )
        t = (u * self.num_timesteps).long().clamp(max=self.num_timesteps - 1)
        draw = torch.rand((len(rows), 1), generator=generator, device=device)
        cond = cond * (draw >= config.label_dropout)
        return x0[self._share], cond[self._share], t[self._share], noise[self._share]

    def rows(self, step: int) -> Tensor:
        """Return which pictures a step sees, (batch_size,)."""
        count, size = len(self.images), self.config.batch_size
        epoch, start = divmod(step * size, count)
        last = epoch + (start + size - 1) // count
        indices = [self._permutation(number) for number in range(epoch, last + 1)]
        return torch.cat(indices)[start : start + size]

    def _draw_permutation(self, epoch: int) -> Tensor:
        """Return the order of all pictures in an epoch."""
        generator = torch.Generator().manual_seed(_mix(self.config.seed, epoch, 1))
        return torch.randperm(len(self.images), generator=generator).to(self.device)


def _mix(*numbers: int) -> int:
    """Make one well-mixed seed of several numbers: neighbours would give related noise."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])
