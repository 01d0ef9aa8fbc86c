"""Training configurations: the five of the original report, their small twins, and ours."""

import json
import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from lab7.errors import UserError, unknown

CHOICES = {
    "optimizer": ("adamw", "muon"),
    "time_sampling": ("uniform", "logit_normal"),
    "precision": ("auto", "float32", "bfloat16", "float16"),
}
_POSITIVE = ("num_steps", "batch_size", "learning_rate", "log_every", "save_every")
_POSITIVE_OR_NONE = ("budget_seconds", "sample_every")


@dataclass(frozen=True)
class TrainConfig:
    """The settings of a training run.

    Attributes:
        unet: Arguments of `ConditionalUNet`.
        noise: Arguments of diffusers' `DDPMScheduler`: beta_schedule, prediction_type, ….
        num_steps: Optimizer steps of the whole training.
        budget_seconds: Time of the whole training in seconds, over all resumptions; the learning
            rate then runs out with the time or the steps, whichever is first. None: no limit.
        batch_size: Pictures a step.
        optimizer: "adamw", or "muon" for the inner layers, see `lab7.muon`.
        learning_rate: Highest learning rate.
        warmup_steps: Steps in which the learning rate rises from 0 to its highest.
        weight_decay: Decoupled weight decay.
        max_grad_norm: The gradient's norm is clipped to this.
        label_dropout: Probability that a picture's condition is replaced by the null condition.
        ema_decay: Highest decay of the moving average of the weights, a step; 0: no average.
        time_sampling: How a picture's time step is drawn: "uniform", or "logit_normal", which has
            more of the middle, where objects take shape (Esser et al. 2024, eq. 19, m = 0, s = 1).
        snr_gamma: Min-SNR weighting of the loss (Hang et al. 2023, eq. 8); None: no weighting.
        seed: Of the initial weights, the order of the pictures, the noise and the label dropout.
        init_from: Folder of a saved pipeline whose weights to start from; None: random weights.
        precision: "float32", or "bfloat16" or "float16" autocast; "auto" takes bfloat16 where it
            is faster.
        compile: Whether to use `torch.compile`, which takes about a minute to pay off. None: on a
            GPU, in a run of 2,000 steps or more; on processors it was measured to gain nothing.
        log_every: Steps between two rows of the log.
        save_every: Steps between two saved states.
        sample_every: Steps between two rows of samples; None: no samples.
        tensorboard: Whether to write TensorBoard's event files too.
        scheduler: Scheduler saved for sampling; a name for `convert_scheduler`.
        num_inference_steps: Steps of sampling, saved as the default.
        guidance_scale: Guidance of sampling, saved as the default.
        guidance_interval: Time steps of sampling with guidance, saved as the default; None: all.
    """

    unet: dict[str, Any] = field(default_factory=dict)
    noise: dict[str, Any] = field(default_factory=dict)
    num_steps: int = 42_300
    budget_seconds: float | None = None
    batch_size: int = 64
    optimizer: str = "adamw"
    learning_rate: float = 1e-4
    warmup_steps: int = 500
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    label_dropout: float = 0.0
    ema_decay: float = 0.0
    time_sampling: str = "uniform"
    snr_gamma: float | None = None
    seed: int = 0
    init_from: str | None = None
    precision: str = "auto"
    compile: bool | None = None
    log_every: int = 50
    save_every: int = 1000
    sample_every: int | None = 1000
    tensorboard: bool = False
    scheduler: str = "ddpm"
    num_inference_steps: int = 1000
    guidance_scale: float = 1.0
    guidance_interval: list[int] | None = None

    def __post_init__(self):
        for name in (*_POSITIVE, *_POSITIVE_OR_NONE):
            value = getattr(self, name)
            allowed = value is None and name in _POSITIVE_OR_NONE
            if not allowed and not (value and 0 < value < math.inf):
                raise UserError(f"{name} {value} must be above 0")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"seed {self.seed} is not within 0 … 2**63 - 1")
        for name in ("label_dropout", "ema_decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} {getattr(self, name)} is not within 0 … 1")
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise unknown(name, getattr(self, name), allowed)
        if self.precision == "float16" and self.optimizer == "muon":
            raise UserError("precision 'float16' is not for 'muon': take 'bfloat16' or 'adamw'")

    def to_json(self) -> str:
        """Write the configuration as JSON."""
        return json.dumps(asdict(self), indent=2) + "\n"


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
        UserError: If there is none of this name; the message has the nearest.
    """
    if name not in EXPERIMENTS:
        raise unknown("experiment", name, EXPERIMENTS)
    return EXPERIMENTS[name]


def _vary(
    description: str,
    base: TrainConfig,
    unet: dict[str, Any] | None = None,
    noise: dict[str, Any] | None = None,
    **run: Any,
) -> Experiment:
    """Change arguments of the network, of the noise schedule or of the run."""
    unet, noise = base.unet | (unet or {}), base.noise | (noise or {})
    return Experiment(description, replace(base, unet=unet, noise=noise, **run))


# The configurations themselves: lines for the network, the training, the sampling.
# fmt: off
_ORIGINAL = TrainConfig(  # the original report's; what is not named is a default of `TrainConfig`
    unet={
        "block_out_channels": [128, 128, 256, 256, 512, 512], "layers_per_block": 2,
        "down_block_types": [*["DownBlock2D"] * 4, "AttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "AttnUpBlock2D", *["UpBlock2D"] * 4],
        "condition": "embedding",
    },
    noise={"beta_schedule": "linear", "prediction_type": "epsilon"},
    num_steps=150 * 282,  # 150 epochs of 18,009 pictures, in batches of 64
)

# What two cores can train in an hour or two: the same six levels, behind patches of 2 and a quarter
# as wide. A short training needs a faster optimizer, and an average instead of a long decay.
# They predict x0: with epsilon so short a training leaves them near chance (twin-cosine-epsilon).
_TWIN = replace(
    _ORIGINAL,
    unet=_ORIGINAL.unet | {
        "block_out_channels": [32, 32, 64, 64, 128, 128], "norm_num_groups": 8, "patch_size": 2,
    },
    noise=_ORIGINAL.noise | {"prediction_type": "sample"},
    num_steps=4_000, optimizer="muon", learning_rate=2e-3, warmup_steps=100, ema_decay=0.998,
    save_every=100, sample_every=500, scheduler="ddim", num_inference_steps=50,
)

_OURS = TrainConfig(
    unet={
        "block_out_channels": [64, 128, 176], "layers_per_block": 1,
        "down_block_types": ["DownBlock2D", "DownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "UpBlock2D", "UpBlock2D"],
        "attention_head_dim": 88, "resnet_time_scale_shift": "scale_shift",
        "norm_num_groups": 16, "condition": "embedding", "patch_size": 2,
    },
    noise={"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"},
    num_steps=7_500, batch_size=256, optimizer="muon", learning_rate=2e-3, warmup_steps=500,
    label_dropout=0.1, ema_decay=0.999, time_sampling="logit_normal", sample_every=250,
    scheduler="sde-dpmsolver++", num_inference_steps=20, guidance_scale=4.0,
    guidance_interval=[400, 950],
)


def _five(prefix: str, base: TrainConfig, half: list[int]) -> dict[str, Experiment]:
    """Vary a baseline in the four ways of the original report."""
    as_channels, cosine = {"condition": "channels"}, {"beta_schedule": "squaredcos_cap_v2"}
    return {
        f"{prefix}-baseline": _vary("linear schedule, condition added to the time embedding", base),
        f"{prefix}-channels": _vary("condition as 24 more input channels", base, as_channels),
        f"{prefix}-one-layer": _vary("1 layer per block", base, {"layers_per_block": 1}),
        f"{prefix}-half-channels": _vary("half the channels", base, {"block_out_channels": half}),
        f"{prefix}-cosine": _vary("cosine schedule", base, noise=cosine),
    }


_ORIGINALS = _five("original", _ORIGINAL, half=[64, 64, 128, 128, 256, 256])
_TWINS = _five("twin", _TWIN, half=[16, 16, 32, 32, 64, 64])
ORIGINALS, TWINS = tuple(_ORIGINALS), tuple(_TWINS)

EXPERIMENTS = {
    **_ORIGINALS,
    **_TWINS,
    **{
        f"{name}-epsilon": _vary(
            f"{_TWINS[name].description}, predicting epsilon", _TWINS[name].config,
            noise={"prediction_type": "epsilon"},
        )
        for name in ("twin-baseline", "twin-cosine")
    },
    "ours": _vary(
        "2×2 patches, 3-level FiLM UNet, v-prediction, cosine schedule, guidance, Muon", _OURS,
    ),
    "laptop": _vary(
        "on two cores: ours behind 4×4 patches, predicting x0", _OURS,
        unet={"patch_size": 4}, noise={"prediction_type": "sample"},
        num_steps=16_000, batch_size=64, warmup_steps=200, save_every=250, sample_every=1000,
    ),
    "smoke": _vary(
        "ours in miniature, for tests: no recognisable picture", _OURS,
        unet={"block_out_channels": [32] * 3, "attention_head_dim": 16, "patch_size": 4},
        num_steps=4, batch_size=4, warmup_steps=1, precision="float32", log_every=2, save_every=4,
        num_inference_steps=2,
    ),
}
# fmt: on
