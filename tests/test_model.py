"""The network: its two kinds of condition, patches, and saving."""

import json

import pytest
import torch

from lab7.model import ConditionalUNet

TINY = {
    "block_out_channels": [32, 64],
    "norm_num_groups": 8,
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
}


def make_unet(**options) -> ConditionalUNet:
    torch.manual_seed(0)
    return ConditionalUNet(**TINY | options).eval()


@pytest.fixture
def batch():
    torch.manual_seed(1)
    cond = torch.zeros(2, 24)
    cond[0, 3] = cond[1, 5] = cond[1, 20] = 1
    return torch.randn(2, 3, 64, 64), torch.tensor([10, 900]), cond


@pytest.mark.parametrize("condition", ["embedding", "channels"])
@pytest.mark.parametrize("patch_size", [1, 2])
@torch.no_grad()
def test_every_input_matters(batch, condition, patch_size):
    unet = make_unet(condition=condition, patch_size=patch_size)
    xt, t, cond = batch
    prediction = unet(xt, t, cond).sample
    assert prediction.shape == xt.shape
    for other in ((xt + 1, t, cond), (xt, t // 2, cond), (xt, t, torch.zeros_like(cond))):
        assert not torch.allclose(unet(*other).sample, prediction, atol=1e-4)


@torch.no_grad()
def test_pictures_of_a_batch_are_independent(batch):
    unet = make_unet(patch_size=2, resnet_time_scale_shift="scale_shift")
    together = unet(*batch).sample
    alone = unet(*(part[1:] for part in batch)).sample
    assert torch.allclose(together[1:], alone, atol=1e-5)


@torch.no_grad()
def test_one_time_step_for_all(batch):
    unet = make_unet()
    xt, _, cond = batch
    as_tensor = unet(xt, torch.tensor([7, 7]), cond).sample
    assert torch.equal(unet(xt, 7, cond, return_dict=False)[0], as_tensor)


def test_patches_reach_where_they_came_from(batch):
    """A gradient at one output pixel is strongest at the same input pixel's neighbourhood."""
    unet = make_unet(patch_size=2)
    xt, t, cond = batch
    xt = xt.requires_grad_()
    unet(xt, t, cond).sample[0, :, 40, 12].sum().backward()
    strength = xt.grad[0].abs().sum(0)
    row, column = divmod(strength.argmax().item(), 64)
    assert abs(row - 40) <= 5 and abs(column - 12) <= 5


@pytest.mark.parametrize("options", [{"condition": "channels"}, {"patch_size": 2}])
@torch.no_grad()
def test_saved_network_is_the_same(tmp_path, batch, options, caplog):
    unet = make_unet(**options)
    unet.save_pretrained(tmp_path)
    loaded = ConditionalUNet.from_pretrained(tmp_path)
    assert torch.equal(loaded(*batch).sample, unet(*batch).sample)
    assert settings(loaded) == settings(unet) and settings(loaded).items() >= options.items()
    assert settings(ConditionalUNet.from_config(loaded.config)) == settings(unet)
    assert json.loads((tmp_path / "config.json").read_text())["in_channels"] == 3
    assert not caplog.records


def settings(unet):
    return {name: value for name, value in unet.config.items() if not name.startswith("_")}


def test_size_of_the_original():
    assert sum(p.numel() for p in ConditionalUNet().parameters()) == pytest.approx(
        113.7e6, rel=1e-3
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"condition": "channel"}, "unknown condition 'channel': did you mean 'channels'. Choose"),
        ({"sample_size": 63, "patch_size": 2}, "sample_size 63 is not a multiple of 4: .* is 64$"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        make_unet(**options)
