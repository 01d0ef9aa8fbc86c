"""What a file of weights does not tell about a network."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Options:
    """What weights do not tell: diffusers' names and defaults, which most students keep.

    Attributes:
        num_train_timesteps: T of your noise scheduler.
        beta_schedule: linear, scaled_linear or squaredcos_cap_v2 (cosine).
        beta_start: First beta of a linear schedule.
        beta_end: Last beta of a linear schedule.
        prediction_type: What the network predicts: epsilon, v_prediction or sample (x0).
        attention_head_dim: Channels of an attention head.
        norm_num_groups: Groups of the normalizations.
        norm_eps: Epsilon of the normalizations.
        act_fn: Activation: silu, mish, gelu or relu.
    """

    num_train_timesteps: int = 1000
    beta_schedule: str = "linear"
    beta_start: float = 0.0001
    beta_end: float = 0.02
    prediction_type: str = "epsilon"
    attention_head_dim: int = 8
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    act_fn: str = "silu"


USUAL = Options()
