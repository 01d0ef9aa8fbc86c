"""What a file of weights does not tell about a network."""

from dataclasses import dataclass
from typing import Any

# What most students keep: diffusers' defaults.
USUAL = {
    "num_train_timesteps": 1000,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "prediction_type": "epsilon",
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "act_fn": "silu",
}

SHORT = {"cosine": "squaredcos_cap_v2", "v": "v_prediction", "x0": "sample"}


@dataclass(frozen=True)
class Options:
    """What weights do not tell, under diffusers' names; None where it is not given.

    Attributes:
        num_train_timesteps: T of your noise scheduler; by default 1000.
        beta_schedule: linear, scaled_linear or cosine (squaredcos_cap_v2); by default linear.
        beta_start: First beta of a linear schedule; by default 0.0001.
        beta_end: Last beta of a linear schedule; by default 0.02.
        prediction_type: What the network predicts: epsilon, v_prediction or sample (x0); by
            default epsilon.
        attention_head_dim: Channels of an attention head; by default 8.
        norm_num_groups: Groups of the normalizations; by default 32.
        norm_eps: Epsilon of the normalizations; by default 1e-5.
        act_fn: Activation: silu, mish, gelu or relu; by default silu.
    """

    num_train_timesteps: int | None = None
    beta_schedule: str | None = None
    beta_start: float | None = None
    beta_end: float | None = None
    prediction_type: str | None = None
    attention_head_dim: int | None = None
    norm_num_groups: int | None = None
    norm_eps: float | None = None
    act_fn: str | None = None

    def given(self) -> dict[str, Any]:
        """Return those that are given, under diffusers' words for them."""
        given = {name: value for name, value in vars(self).items() if value is not None}
        return {name: SHORT.get(value, value) for name, value in given.items()}


NONE_GIVEN = Options()
