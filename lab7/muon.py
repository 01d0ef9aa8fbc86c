"""Muon, an optimizer that orthogonalizes the update of each layer."""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lab7.experiments import TrainConfig

_QUINTIC = (3.4445, -4.7750, 2.0315)  # Jordan's coefficients: steep at 0, near 1 up to 1


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalized updates (Jordan et al. 2024, “Muon”).

    The gradient of a layer is dominated by a few directions. Muon replaces the update U S V^T by
    U V^T, in which all directions count the same. It is scaled by 0.2 √max(m, n) to the size of
    AdamW's updates (Liu et al. 2025, “Muon is scalable for LLM training”, eq. 4), so that AdamW's
    learning rates fit.

    PyTorch's own `torch.optim.Muon` refuses convolutions; here their kernels (out, in, h, w) count
    as matrices (out, in·h·w). Layers of one shape are done together.

    Args:
        params: Weights of two dimensions or more.
        lr: Learning rate.
        momentum: Decay of the average of gradients; the update looks ahead (Nesterov).
        weight_decay: Decoupled, as AdamW's.
        dtype: What the products are computed in; bfloat16 is exact enough.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 1e-3,
        momentum: float = 0.95,
        weight_decay: float = 0.01,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """Take one step."""
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for weight in group["params"]:
                if weight.grad is not None:
                    by_shape[weight.shape].append(weight)
            for weights in by_shape.values():
                ahead = self._look_ahead(weights, group["momentum"])
                updates = orthogonalize(ahead.flatten(2).to(self.dtype)).to(ahead.dtype)
                size = 0.2 * max(updates.shape[1:]) ** 0.5
                torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
                updates = updates.view(ahead.shape).unbind()
                torch._foreach_add_(weights, updates, alpha=-group["lr"] * size)

    def _look_ahead(self, weights: list[Tensor], momentum: float) -> Tensor:
        """Update the averages of the gradients of weights of one shape; return both mixed."""
        for weight in weights:
            if "momentum" not in self.state[weight]:
                self.state[weight]["momentum"] = torch.zeros_like(weight)
        averages = [self.state[weight]["momentum"] for weight in weights]
        gradients = [weight.grad for weight in weights]
        torch._foreach_lerp_(averages, gradients, 1 - momentum)
        return torch.stack(torch._foreach_lerp(gradients, averages, momentum))


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """Bring all singular values of matrices (B, m, n) near 1, within about 0.7 … 1.2.

    Newton-Schulz iteration: an odd polynomial of a matrix is that polynomial of its singular
    values. Five steps take all above a hundredth of the largest there; no decomposition is needed.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    a, b, c = _QUINTIC
    for _ in range(steps):
        square = x @ x.mT
        factor = torch.baddbmm(square, square, square, beta=b, alpha=c)
        x = torch.baddbmm(x, factor, x, beta=a)  # a x + (b x xT + c (x xT)²) x
    return x.mT if tall else x


def build_optimizers(
    network: nn.Module, config: TrainConfig, precision: str = "float32"
) -> list[torch.optim.Optimizer]:
    """Make the optimizers of a network; the learning rate is to be set at each step.

    Args:
        network: A `ConditionalUNet`.
        config: Its `optimizer` and `weight_decay` count. "muon" is for the inner layers; AdamW then
            has biases, normalisations, and the layers to which pictures and labels come in and the
            prediction goes out.
        precision: Of the forward pass; with "bfloat16" Muon computes in it too.
    """
    inner, others = [], []
    for key, weight in network.named_parameters():
        is_inner = weight.ndim > 1 and not key.startswith(("conv_", "condition_embedding"))
        (inner if is_inner and config.optimizer == "muon" else others).append(weight)
    adamw = torch.optim.AdamW(others, weight_decay=config.weight_decay, fused=True)
    if not inner:
        return [adamw]
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    return [Muon(inner, weight_decay=config.weight_decay, dtype=dtype), adamw]
