"""Muon does what PyTorch's does, and takes convolutions too."""

from dataclasses import replace

import pytest
import torch

from lab7.experiments import get_experiment
from lab7.model import ConditionalUNet
from lab7.muon import Muon, build_optimizers, orthogonalize


@pytest.mark.parametrize("shape", [(3, 8, 24), (3, 24, 8), (2, 16, 16)])
def test_orthogonalize_keeps_directions_and_evens_their_lengths(shape):
    torch.manual_seed(0)
    matrices = torch.randn(shape)
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    found = orthogonalize(matrices)
    lengths = (u.mT @ found @ vh.mT).diagonal(dim1=1, dim2=2)
    assert lengths.min() > 0.6 and lengths.max() < 1.25
    assert torch.allclose(found, u @ torch.diag_embed(lengths) @ vh, atol=1e-4)


def test_steps_are_those_of_pytorch_on_a_flattened_kernel():
    torch.manual_seed(0)
    kernels = [torch.randn(6, 5, 3, 3, requires_grad=True) for _ in range(2)]
    before = [kernel.detach().flatten(1).clone() for kernel in kernels]
    matrices = [matrix.clone().requires_grad_() for matrix in before]
    options = {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.1}
    ours = Muon(kernels, dtype=torch.bfloat16, **options)
    theirs = torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", **options)
    for _ in range(3):
        for kernel, matrix in zip(kernels, matrices, strict=True):
            kernel.grad = torch.randn_like(kernel)
            matrix.grad = kernel.grad.flatten(1).clone()
        ours.step()
        theirs.step()
    for kernel, matrix, start in zip(kernels, matrices, before, strict=True):
        apart = (kernel.flatten(1) - matrix).norm() / (matrix - start).norm()
        assert apart < 0.02, "no more than bfloat16 rounds"


def test_an_update_has_the_size_of_adamw():
    weight = torch.zeros(32, 32, 3, 3, requires_grad=True)
    weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    Muon([weight], lr=1.0).step()
    assert 0.15 < weight.detach().square().mean().sqrt() < 0.25


def test_every_parameter_has_one_optimizer():
    unet = ConditionalUNet(**get_experiment("smoke").config.unet)
    config = get_experiment("smoke").config
    muon, adamw = build_optimizers(unet, config)
    held = [id(p) for o in (muon, adamw) for g in o.param_groups for p in g["params"]]
    assert sorted(held) == sorted(id(p) for p in unet.parameters())
    names = {id(p): name for name, p in unet.named_parameters()}
    first_and_last = {"conv_in.weight", "conv_out.weight", "condition_embedding.weight"}
    assert first_and_last <= {names[id(p)] for p in adamw.param_groups[0]["params"]}
    assert all(p.ndim > 1 for p in muon.param_groups[0]["params"])
    assert [g["weight_decay"] for o in (muon, adamw) for g in o.param_groups] == [0.01] * 2
    plain = build_optimizers(unet, replace(config, optimizer="adamw"))
    assert [type(optimizer) for optimizer in plain] == [torch.optim.AdamW]


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("float32", torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.float32)],
)
def test_muon_computes_in_bfloat16_where_the_network_does(precision, dtype):
    unet = ConditionalUNet(**get_experiment("smoke").config.unet)
    muon, _ = build_optimizers(unet, get_experiment("smoke").config, precision)
    assert muon.dtype is dtype
