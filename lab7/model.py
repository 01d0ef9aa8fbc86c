"""ConditionalUNet: diffusers' UNet2DModel with a multi-label condition."""

import inspect
from typing import Any

import torch

# A pipeline's from_pretrained recognises a network by a ModelMixin in the module of its class.
from diffusers import ModelMixin as ModelMixin
from diffusers import UNet2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn
from torch.nn import functional as F

from lab7.errors import UserError, unknown

CONDITIONS = ("embedding", "channels")
# Six levels with self-attention at the fifth: those of the original report.
_DOWN = (*["DownBlock2D"] * 4, "AttnDownBlock2D", "DownBlock2D")
_UP = ("UpBlock2D", "AttnUpBlock2D", *["UpBlock2D"] * 4)


class ConditionalUNet(UNet2DModel):
    """A UNet that predicts the noise (or v, or x0) of a picture, given a set of labels.

    The condition enters in one of two ways:
      - `"embedding"`: one linear layer takes it to the size of the time embedding, to which it
        is added. Every residual block sees the sum; with `resnet_time_scale_shift="scale_shift"`
        as a scale and a shift of its features (FiLM, Perez et al. 2018, eq. 1).
      - `"channels"`: it is repeated over the picture as `num_labels` more input channels.

    Args:
        sample_size: Side of the picture in pixels.
        in_channels: Channels of the picture.
        out_channels: Channels of the prediction.
        block_out_channels: Channels of each level, from the finest to the coarsest.
        layers_per_block: Residual blocks of each level on the way down (one more on the way up).
        down_block_types: diffusers block of each level on the way down.
        up_block_types: The same on the way up, from the coarsest to the finest.
        attention_head_dim: Channels of one attention head.
        resnet_time_scale_shift: `"default"` adds the embedding to the features, `"scale_shift"`
            scales and shifts them by it.
        norm_num_groups: Groups of every normalisation. With one channel a group it would undo
            what `"default"` adds: leave several.
        num_labels: Length of the multi-hot condition.
        condition: `"embedding"` or `"channels"`.
        patch_size: The network works on patches of this side, moved into the channels by
            `pixel_unshuffle`: p = 2 makes every layer four times cheaper.
        scaling_factor: What pictures in [-1, 1] are multiplied by before noise is added (Chen
            2023, “On the importance of noise scheduling”, section 2.2). The network itself does
            not use it; it is saved with it, for training and sampling have to agree on it.
        timesteps: Those that a distilled network knows, the noisiest first; None: all. The
            pipeline keeps to them; the network itself does not use them.
        unet_options: More arguments of diffusers' UNet2DModel, for networks that were made
            elsewhere, such as `{"act_fn": "gelu"}`.

    Raises:
        UserError: If `condition` is unknown or `sample_size` does not fit the number of levels.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int = 64,
        in_channels: int = 3,
        out_channels: int = 3,
        block_out_channels: tuple[int, ...] = (128, 128, 256, 256, 512, 512),
        layers_per_block: int = 2,
        down_block_types: tuple[str, ...] = _DOWN,
        up_block_types: tuple[str, ...] = _UP,
        attention_head_dim: int = 8,
        resnet_time_scale_shift: str = "default",
        norm_num_groups: int = 32,
        num_labels: int = 24,
        condition: str = "embedding",
        patch_size: int = 1,
        scaling_factor: float = 1.0,
        timesteps: list[int] | None = None,
        unet_options: dict[str, Any] | None = None,
    ):
        _check(condition, sample_size, patch_size * 2 ** (len(block_out_channels) - 1))
        as_channels = condition == "channels"
        super().__init__(
            sample_size=sample_size,
            in_channels=in_channels * patch_size**2 + as_channels * num_labels,
            out_channels=out_channels * patch_size**2,
            block_out_channels=block_out_channels,
            layers_per_block=layers_per_block,
            down_block_types=down_block_types,
            up_block_types=up_block_types,
            attention_head_dim=attention_head_dim,
            resnet_time_scale_shift=resnet_time_scale_shift,
            norm_num_groups=norm_num_groups,
            class_embed_type=None if as_channels else "identity",
            **{"attn_norm_num_groups": norm_num_groups} | (unet_options or {}),
        )
        # The parent has just registered the channels it sees behind the pixel_unshuffle.
        self.register_to_config(in_channels=in_channels, out_channels=out_channels)
        if not as_channels:
            size = self.time_embedding.linear_2.out_features
            self.condition_embedding = nn.Linear(num_labels, size)

    @classmethod
    def extract_init_dict(cls, config_dict, **kwargs):
        """Leave out of a saved config what the parent registered: it follows from our arguments."""
        own = inspect.signature(cls.__init__).parameters
        kept = {k: v for k, v in config_dict.items() if k in own or k.startswith("_")}
        return super().extract_init_dict(kept, **kwargs)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | int,
        condition: Tensor,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[Tensor]:
        """Predict what the noise scheduler's `prediction_type` asks for.

        Args:
            sample: Noisy pictures xt (B, in_channels, H, W).
            timestep: Time steps 0 … T-1, (B,) or one for all.
            condition: Multi-hot labels (B, num_labels) float; zeros for the null condition.
            return_dict: Whether to return a `UNet2DOutput` or a tuple.

        Returns:
            The prediction (B, out_channels, H, W), as `.sample` or as the first of a tuple.
        """
        patch_size = self.config.patch_size
        hidden = F.pixel_unshuffle(sample, patch_size)
        embedding = None
        if self.config.condition == "channels":
            planes = condition[:, :, None, None].expand(-1, -1, *hidden.shape[-2:])
            hidden = torch.cat([hidden, planes.to(hidden.dtype)], dim=1)
        else:
            embedding = self.condition_embedding(condition.to(self.dtype))
        (hidden,) = super().forward(hidden, timestep, embedding, return_dict=False)
        prediction = F.pixel_shuffle(hidden, patch_size)
        return UNet2DOutput(sample=prediction) if return_dict else (prediction,)


def _check(condition: str, size: int, unit: int) -> None:
    """Refuse an unknown kind of condition, and pictures that cannot be halved at every level."""
    if condition not in CONDITIONS:
        raise unknown("condition", condition, CONDITIONS)
    if size % unit:
        nearest = max(unit, round(size / unit) * unit)
        raise UserError(f"sample_size {size} is not a multiple of {unit}: the nearest is {nearest}")
