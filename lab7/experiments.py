"""Named experiments: the five of the original report, and ours."""

import difflib
from dataclasses import dataclass, replace

from lab7.training import TrainConfig


@dataclass(frozen=True)
class Experiment:
    """A named configuration.

    Attributes:
        description: What it is, in one line.
        config: What `train` does.
    """

    description: str
    config: TrainConfig


def get_experiment(name: str) -> Experiment:
    """Look up an experiment.

    Raises:
        ValueError: If there is none of this name; the message has the nearest.
    """
    if name not in EXPERIMENTS:
        close = difflib.get_close_matches(name, EXPERIMENTS, 1, cutoff=0)[0]
        raise ValueError(
            f"unknown experiment {name!r}: did you mean {close!r}? "
            f"Choose one of {', '.join(EXPERIMENTS)}"
        )
    return EXPERIMENTS[name]


def _original(schedule: str = "linear", **unet) -> TrainConfig:
    """Build a configuration of the original report, whose baseline takes no argument."""
    network = {
        "block_out_channels": [128, 128, 256, 256, 512, 512],
        "layers_per_block": 2,
        "down_block_types": [*["DownBlock2D"] * 4, "AttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "AttnUpBlock2D", *["UpBlock2D"] * 4],
        "condition": "embedding",
    }
    return TrainConfig(
        unet=network | unet,
        noise={"beta_schedule": schedule, "prediction_type": "epsilon"},
        num_steps=150 * 282,  # 150 epochs of 18,009 pictures
        batch_size=64,
        learning_rate=1e-4,
        warmup_steps=500,
        max_grad_norm=1.0,
        scheduler="ddpm",
        num_inference_steps=1000,
        guidance_scale=1.0,
    )


def _patched(block_out_channels: list[int], attention_head_dim: int) -> dict:
    """Build a three-level FiLM UNet on 2×2 patches with attention at its coarsest level."""
    return {
        "block_out_channels": block_out_channels,
        "layers_per_block": 1,
        "down_block_types": ["DownBlock2D", "DownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "UpBlock2D", "UpBlock2D"],
        "attention_head_dim": attention_head_dim,
        "resnet_time_scale_shift": "scale_shift",
        "norm_num_groups": 16,
        "condition": "embedding",
        "patch_size": 2,
    }


_COSINE_V = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}

_OURS = TrainConfig(
    unet=_patched([64, 128, 176], attention_head_dim=88),
    noise=_COSINE_V,
    num_steps=10_000,
    batch_size=64,
    learning_rate=1e-3,
    warmup_steps=200,
    label_dropout=0.1,
    ema_decay=0.999,
    save_every=250,
    scheduler="dpmsolvermultistep",
    # For DPM-Solver++ this cuts each predicted x0 to [-1, 1], where guidance drives it out.
    scheduler_options={"thresholding": True, "sample_max_value": 1.0},
    num_inference_steps=20,
    guidance_scale=3.0,
)

EXPERIMENTS = {
    "original-baseline": Experiment(
        "linear schedule, condition added to the time embedding", _original()
    ),
    "original-channels": Experiment(
        "condition as 24 more input channels", _original(condition="channels")
    ),
    "original-one-layer": Experiment("1 layer per block", _original(layers_per_block=1)),
    "original-half-channels": Experiment(
        "half the channels", _original(block_out_channels=[64, 64, 128, 128, 256, 256])
    ),
    "original-cosine": Experiment("cosine schedule", _original("squaredcos_cap_v2")),
    "ours": Experiment(
        "2×2 patches, 3-level FiLM UNet, v-prediction, cosine schedule, guidance", _OURS
    ),
    "smoke": Experiment(
        "ours in miniature, for tests: seconds, no recognisable picture",
        replace(
            _OURS,
            unet=_patched([32, 32, 32], attention_head_dim=16) | {"patch_size": 4},
            num_steps=4,
            batch_size=4,
            warmup_steps=1,
            precision="float32",
            log_every=2,
            save_every=4,
            tensorboard=False,
            num_inference_steps=2,
        ),
    ),
}
