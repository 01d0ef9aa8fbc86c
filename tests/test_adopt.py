"""Students' own weights: the three designs, whatever is wrapped around them, give equal outputs."""

import argparse
import json
import pickle

import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel
from torch import nn

from lab7.model import ConditionalUNet
from lab7.pipeline import load_pipeline
from workshop.course import adopt as module
from workshop.course.adopt import Options, adopt, read_network

TINY = {
    "sample_size": 64,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 4,
}
GROUPS = Options(norm_num_groups=4)


class Embedding(nn.Module):
    """The usual design: the class embedding of diffusers' network is replaced."""

    def __init__(self, **options):
        super().__init__()
        self.model = UNet2DModel(**TINY | options, class_embed_type=None)
        size = self.model.time_embedding.linear_2.out_features
        self.model.class_embedding = nn.Linear(24, size)

    def forward(self, x, t, labels):
        return self.model(x, t, class_labels=labels).sample


class Outside(nn.Module):
    """An own layer of any name in front of an identity."""

    def __init__(self, layer=None, **options):
        super().__init__()
        self.label_proj = nn.Linear(24, 32) if layer is None else layer
        self.unet = UNet2DModel(**TINY | options, class_embed_type="identity")

    def forward(self, x, t, labels):
        return self.unet(x, t, self.label_proj(labels)).sample


class Channels(nn.Module):
    """The labels as 24 more input channels."""

    def __init__(self, **options):
        super().__init__()
        self.net = UNet2DModel(**TINY | options, in_channels=27, out_channels=3)

    def forward(self, x, t, labels):
        planes = labels[:, :, None, None].expand(-1, -1, *x.shape[2:])
        return self.net(torch.cat([x, planes], 1), t).sample


class Summed(nn.Embedding):
    """An embedding of which the rows of the labels are added up."""

    def forward(self, labels):
        return labels @ self.weight


def made(design, **options):
    """A student's network with weights as after training: none of them zero."""
    torch.manual_seed(0)
    network = design(**options).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return network


@torch.no_grad()
def difference(network, unet):
    torch.manual_seed(1)
    x, t = torch.randn(3, 3, 64, 64), torch.tensor([0, 500, 999])
    labels = torch.zeros(3, 24)
    labels[0, 3] = labels[1, [5, 20]] = labels[2, [0, 9, 23]] = 1
    return (network(x, t, labels) - unet(x, t, labels).sample).abs().max().item()


def adopted(tmp_path, content, key=None, options=GROUPS):
    torch.save(content, tmp_path / "mine.pth")
    return read_network(tmp_path / "mine.pth", key, options)[0]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {
            "block_out_channels": (4, 8, 12),
            "layers_per_block": 2,
            "down_block_types": ("AttnDownBlock2D", "DownBlock2D", "ResnetDownsampleBlock2D"),
            "up_block_types": ("UpBlock2D", "ResnetUpsampleBlock2D", "AttnUpBlock2D"),
            "attention_head_dim": 4,
        },
        {"resnet_time_scale_shift": "scale_shift"},
        {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 4},
        {"downsample_type": "resnet", "upsample_type": "resnet", "add_attention": False}
        | {"down_block_types": ("AttnDownBlock2D",) * 2, "up_block_types": ("AttnUpBlock2D",) * 2},
        {"mid_block_type": None, "time_embedding_dim": 24},
        {"act_fn": "gelu", "norm_eps": 1e-3, "norm_num_groups": 2},
    ],
)
@pytest.mark.parametrize("design", [Embedding, Channels])
def test_outputs_equal_those_of_the_students_class(tmp_path, design, options):
    network = made(design, **options)
    told = Options(**{k: v for k, v in (TINY | options).items() if k in vars(GROUPS)})
    unet = adopted(tmp_path, network.state_dict(), options=told)
    assert difference(network, unet) < 1e-5
    assert not unet.training


@pytest.mark.parametrize("condition", ["embedding", "channels"])
def test_a_network_of_this_project(tmp_path, condition):
    network = made(ConditionalUNet, **TINY, condition=condition, patch_size=4)
    unet = adopted(tmp_path, network.state_dict())
    assert difference(lambda *given: network(*given).sample, unet) < 1e-5


def test_a_folder_of_this_project_keeps_its_scaling_of_pictures(tmp_path):
    network = made(ConditionalUNet, **TINY, scaling_factor=4.0)
    network.save_pretrained(tmp_path / "unet")
    unet = read_network(tmp_path)[0]
    assert difference(lambda *given: network(*given).sample, unet) < 1e-5
    assert unet.config.scaling_factor == 4.0


@pytest.mark.parametrize(
    "layer",
    [
        None,
        nn.Linear(24, 32, bias=False),
        nn.Sequential(nn.Linear(24, 32)),
        Summed(24, 32),
    ],
)
def test_an_own_layer_of_any_name(tmp_path, layer):
    network = made(Outside, layer=layer)
    assert difference(network, adopted(tmp_path, network.state_dict())) < 1e-5


def prefixed(prefix, weights):
    return {prefix + name: tensor for name, tensor in weights.items()}


def old_names(weights):
    new = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value."}
    new[".to_out.0."] = ".proj_attn."
    renamed = {}
    for name, tensor in weights.items():
        for now, before in new.items():
            name = name.replace(now, before)
        renamed[name] = tensor
    assert any("proj_attn" in name for name in renamed)
    return renamed


def training(network):
    """A whole training checkpoint, with an optimizer that has seen the network."""
    optimizer = torch.optim.AdamW(network.parameters())
    network(torch.randn(1, 3, 64, 64), 5, torch.ones(1, 24)).sum().backward()
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    return {
        "epoch": 3,
        "losses": torch.rand(7),
        "model": network.state_dict(),
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": scheduler.state_dict(),
        "rng": torch.get_rng_state(),
    }


WRAPPINGS = {
    "bare": lambda network: network.model.state_dict(),
    "state_dict": lambda network: {"state_dict": network.state_dict(), "epoch": 3},
    "module": lambda network: {"model_state_dict": prefixed("module.", network.state_dict())},
    "compiled": lambda network: prefixed("_orig_mod.", network.model.state_dict()),
    "nested": lambda network: {"a": {"b": prefixed("x.y.", network.state_dict())}, "n": 1},
    "list": lambda network: [network.state_dict(), {"step": torch.tensor(3.0)}],
    "old": lambda network: old_names(network.state_dict()),
    "training": training,
    "DDP of a compiled": lambda network: prefixed("module._orig_mod.unet.", network.state_dict()),
    "beside arguments and losses": lambda network: {
        "args": argparse.Namespace(lr=1e-4),
        "losses": [np.float64(0.5), np.arange(3)],
        "model": network.state_dict(),
    },
    "double": lambda network: {k: v.double() for k, v in network.state_dict().items()},
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_wrappings(tmp_path, wrapping):
    network = made(Embedding)
    content = WRAPPINGS[wrapping](network)
    assert difference(network, adopted(tmp_path, content)) < 1e-5


def test_a_layer_saved_on_its_own(tmp_path):
    network = made(Outside)
    content = {"emb": network.label_proj.state_dict(), "unet": network.unet.state_dict()}
    assert difference(network, adopted(tmp_path, content)) < 1e-5
    averaged = {
        f"{name}_ema": {k: 0.9 * x for k, x in part.items()} for name, part in content.items()
    }
    content |= averaged
    assert difference(network, adopted(tmp_path, content, "unet")) < 1e-5
    network.load_state_dict({k: 0.9 * x for k, x in network.state_dict().items()})
    assert difference(network, adopted(tmp_path, content)) < 1e-5


@pytest.mark.parametrize("design", [Embedding, Outside])
@pytest.mark.parametrize("together", [False, True])
def test_the_average_is_taken_unless_a_key_is_given(tmp_path, design, together):
    network, averaged = made(design), made(design)
    with torch.no_grad():
        for parameter in averaged.parameters():
            parameter.mul_(0.9)
    parts = {"net": network.state_dict(), "net_ema": averaged.state_dict()}
    if together:
        parts = {"s": prefixed("net.", parts["net"]) | prefixed("net_ema.", parts["net_ema"])}
    place = "s." if together else ""
    assert difference(averaged, adopted(tmp_path, parts)) < 1e-5
    assert difference(averaged, adopted(tmp_path, parts, f"{place}net_ema")) < 1e-5
    assert difference(network, adopted(tmp_path, parts, f"{place}net")) < 1e-5
    parts = {"a": network.state_dict(), "b": averaged.state_dict()}
    with pytest.raises(ValueError, match=r"holds networks under a\.\w+, b\.\w+: choose one with"):
        adopted(tmp_path, parts)
    with pytest.raises(ValueError, match=r"holds networks under a\.\w+, b\.\w+: choose one with"):
        adopted(tmp_path, parts, "c")
    assert difference(network, adopted(tmp_path, parts, "a.")) < 1e-5


def test_the_average_of_diffusers_has_no_names(tmp_path):
    network, averaged = made(Outside), made(Outside)
    with torch.no_grad():
        for parameter in averaged.parameters():
            parameter.mul_(0.9)
    average = EMAModel(averaged.parameters()).state_dict()
    content = {"net": network.state_dict(), "ema": average}
    assert difference(averaged, adopted(tmp_path, content)) < 1e-5
    assert difference(network, adopted(tmp_path, content, "net")) < 1e-5
    with pytest.raises(ValueError, match=r"weights without names: save network\.state_dict\(\)"):
        adopted(tmp_path, average)


@pytest.mark.parametrize("name", ["mine.safetensors", "mine.bin", "mine.pth"])
def test_safetensors_of_any_name(tmp_path, name):
    network = made(Embedding)
    safetensors.torch.save_file(network.state_dict(), tmp_path / name)
    assert difference(network, read_network(tmp_path / name, None, GROUPS)[0]) < 1e-5


@pytest.mark.parametrize("whole", [True, False])
def test_folders_of_save_pretrained_tell_their_settings(tmp_path, whole):
    options = {"norm_num_groups": 2, "act_fn": "relu", "freq_shift": 1, "attention_head_dim": None}
    network = made(Embedding, **options)
    scheduler = DDPMScheduler(500, beta_schedule="squaredcos_cap_v2")
    saved = DDPMPipeline(network.model, scheduler) if whole else network.model
    saved.save_pretrained(tmp_path / "saved")
    unet, noise, told = read_network(tmp_path / "saved")
    assert difference(network, unet) < 1e-5
    read, assumed = told.split("\n")
    assert "act_fn relu" in read and "act_fn" not in assumed
    assert noise.config.num_train_timesteps == (500 if whole else 1000)
    assert ("beta_schedule squaredcos_cap_v2" in read) is whole
    assert ("beta_schedule linear" in assumed) is not whole


def test_options_override_what_a_folder_tells_even_with_the_usual_value(tmp_path):
    network = made(Embedding)
    scheduler = DDPMScheduler(500, beta_schedule="squaredcos_cap_v2", trained_betas=[0.1] * 500)
    DDPMPipeline(network.model, scheduler).save_pretrained(tmp_path / "saved")
    options = Options(num_train_timesteps=1000, beta_schedule="linear")
    _, noise, told = read_network(tmp_path / "saved", None, options)
    assert (noise.config.num_train_timesteps, noise.config.beta_schedule) == (1000, "linear")
    assert noise.config.trained_betas is None
    read, given, assumed = told.split("\n")
    assert given == "given: num_train_timesteps 1000; beta_schedule linear"
    assert "beta_start" in read and "num_train" not in read + assumed


@pytest.mark.parametrize("shape", [(-1,), (-1, 1, 1, 1)])
def test_a_schedule_in_the_file_is_read(tmp_path, shape):
    network, betas = made(Embedding), torch.linspace(0.001, 0.03, 50)
    buffers = {"betas": betas, "sqrt_alphas_cumprod": betas, "posterior_variance": betas}
    content = network.state_dict() | {name: x.reshape(shape) for name, x in buffers.items()}
    torch.save(content, tmp_path / "mine.pth")
    unet, noise, told = read_network(tmp_path / "mine.pth", None, GROUPS)
    assert difference(network, unet) < 1e-5
    assert noise.betas.equal(betas) and noise.config.num_train_timesteps == 50
    assert "num_train_timesteps 50; trained_betas [0.001" in told and "beta_" not in told
    _, noise, _ = read_network(tmp_path / "mine.pth", None, Options(20, norm_num_groups=4))
    assert noise.config.num_train_timesteps == 20 and noise.config.trained_betas is None


def test_what_was_read_and_what_was_assumed(tmp_path):
    torch.save({"ema": made(Channels).state_dict()}, tmp_path / "mine.pth")
    options = Options(norm_num_groups=4, beta_schedule="cosine")
    _, noise, told = read_network(tmp_path / "mine.pth", None, options)
    read, given, assumed = told.split("\n")
    assert read.startswith(f"read off {tmp_path / 'mine.pth'} ema.net: block_out_channels [8, 16]")
    assert "down_block_types ['DownBlock2D', 'AttnDownBlock2D']" in read
    assert "condition channels" in read and "add_attention True" in read
    assert given == "given: beta_schedule squaredcos_cap_v2; norm_num_groups 4"
    assert assumed == (
        "assumed: num_train_timesteps 1000; beta_start 0.0001; beta_end 0.02; "
        "prediction_type epsilon; attention_head_dim 8; norm_eps 1e-05; act_fn silu; "
        "pictures 64×64 in [-1, 1]; input channels the picture's, then the labels'"
    )
    assert noise.config.beta_schedule == "squaredcos_cap_v2"


class Deeper(Outside):
    """Two layers in front: none of the three designs."""

    def __init__(self):
        super().__init__(nn.Sequential(nn.Linear(24, 32), nn.SiLU(), nn.Linear(32, 32)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda w: made(Deeper).state_dict(),
            r"label_proj\.2\.weight \(32, 32\) has no place in .* through one linear layer .*; pict"
            r"ures of any other network are scored by evaluate --images",
        ),
        (
            lambda w: w | {"model.extra.weight": torch.ones(3)},
            r"model\.extra\.weight \(3,\) has no",
        ),
        (lambda w: w | {"model.mid_block.x": torch.ones(3)}, r"mid_block\.x has no place in"),
        (lambda w: {"layer.weight": torch.ones(3)}, r"layer\.weight has no place in diffusers'"),
        (lambda w: {"epoch": 3}, "what it holds has no place in diffusers'"),
        (
            lambda w: {k: v for k, v in w.items() if "class_embedding" not in k},
            "has no layer that takes 24 labels: wanted is diffusers' UNet2DModel, with.*'layer': ",
        ),
        (
            lambda w: {k: v for k, v in w.items() if "conv_out.bias" not in k},
            r"do not fit this network: conv_out\.bias is None there",
        ),
        (
            lambda w: {k: v for k, v in w.items() if "down_blocks.0.resnets" not in k},
            r"lacks down_blocks\.0\.resnets\.0\.conv1\.weight: wanted",
        ),
        (
            lambda w: w | {"model.conv_out.bias": torch.ones(6)},
            r"conv_out\.bias is \(6,\) there, not \(3,\)",
        ),
        (
            lambda w: w | {"model.conv_out.bias": w["model.conv_out.bias"].to("meta")},
            r"conv_out\.bias is None there",
        ),
        (
            lambda w: w | {"model.conv_out.bias": torch.tensor([0, 0, torch.nan])},
            r"model: conv_out\.bias is not finite",
        ),
    ],
)
def test_weights_that_do_not_fit(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        adopted(tmp_path, change(made(Embedding).state_dict()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta_schedule": "sigmoid"}, "unknown beta_schedule 'sigmoid': did you mean"),
        ({"prediction_type": "noise"}, "unknown prediction_type 'noise'"),
        ({"act_fn": "tanh"}, "unknown act_fn 'tanh'"),
        ({"num_train_timesteps": 0}, "num_train_timesteps 0 must be above 0"),
        ({"norm_eps": float("nan")}, "norm_eps nan must be above 0"),
        ({"norm_eps": float("inf")}, "norm_eps inf must be above 0, and finite"),
        ({"beta_start": 0.5, "beta_end": 0.1}, "beta_start 0.5 and beta_end 0.1: they rise"),
        ({"beta_end": 1.0}, "beta_end 1.0: they rise, and stay below 1"),
        ({"norm_num_groups": 32}, "norm_num_groups 32 does not divide 8 channels: give that of"),
        ({"attention_head_dim": 6}, "attention_head_dim 6 does not divide 16 channels"),
        ({"attention_head_dim": 64}, "64 does not divide 16 channels: .* --attention-head-dim"),
    ],
)
def test_options_that_do_not_fit(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        adopted(
            tmp_path,
            made(Embedding).state_dict(),
            options=Options(**{"norm_num_groups": 4} | options),
        )


def test_other_modules_of_a_lightning_file_are_left_aside_by_the_key(tmp_path):
    network = made(Embedding)
    judge = {"evaluator.resnet18.conv1.weight": torch.ones(4, 3, 7, 7)}
    start = "model." if next(iter(network.state_dict())).startswith("net") else ""
    weights = {f"{start}{k}": v for k, v in network.state_dict().items()}
    content = {"state_dict": weights | judge, "epoch": 3}
    with pytest.raises(
        ValueError, match=r"resnet18\S+ \(4, 3, 7, 7\) .*; --key state_dict\.\S+ le"
    ):
        adopted(tmp_path, content)
    for key in ("state_dict.model", "model"):
        assert difference(network, adopted(tmp_path, content, key)) < 1e-5
    with pytest.raises(ValueError, match="choose one with --key, not 'net2'"):
        adopted(tmp_path, content, "net2")


def test_a_cut_file_of_safetensors_is_no_web_page(tmp_path):
    path = tmp_path / "mine.safetensors"
    path.write_bytes(b" <\0\0\0\0\0\0{" + b"x" * 100)
    with pytest.raises(ValueError, match="perhaps cut off: copy or download it again"):
        read_network(path)


class Code:
    """Runs a function when it is unpickled."""

    def __reduce__(self):
        return (print, ("code ran",))


def test_pickles_that_could_run_code_are_refused(tmp_path, capfd):
    torch.save({"model": made(Embedding)}, tmp_path / "object.pth")
    torch.save({"model": Code()}, tmp_path / "code.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps({"model": Code()}))
    for name in ("object", "code", "plain"):
        with pytest.raises(
            ValueError, match=r"could run code; save the weights alone, by torch\.save"
        ):
            read_network(tmp_path / f"{name}.pth")
    assert "code ran" not in capfd.readouterr().out


def test_files_that_are_no_weights(tmp_path):
    (tmp_path / "mine.pth").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:1")
    with pytest.raises(ValueError, match=r"mine\.pth is a Git LFS pointer"):
        read_network(tmp_path / "mine.pth")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth"):
        read_network(tmp_path / "nowhere.pth")
    with pytest.raises(ValueError, match=r"no diffusion_pytorch_model\.s.*: give .* are mine\.pth"):
        read_network(tmp_path)


@pytest.fixture
def mine(tmp_path, embedded_root, monkeypatch):
    """A student's file, and the place where everything happens."""
    monkeypatch.chdir(tmp_path)
    network = made(Embedding)
    torch.save(network.state_dict(), "mine.pth")
    return network, embedded_root


def test_adopt_saves_a_pipeline_and_shows_pictures(mine, tmp_path, capsys):
    network, root = mine
    settings = {"num_inference_steps": 2, "guidance_scale": 1.5, "guidance_interval": [300, 900]}
    adopt(
        module.Path("mine.pth"), options=GROUPS, steps=2, guidance=1.5,
        guidance_interval=(300, 900), data=root, device="cpu",
    )  # fmt: skip
    pipeline = load_pipeline("mine", "cpu")
    assert difference(network, pipeline.unet) < 1e-5
    assert pipeline.settings() == settings
    assert isinstance(pipeline.unet, ConditionalUNet)
    scores = json.loads((tmp_path / "mine" / "test" / "samples.json").read_text())["scores"]
    names = {file.name for file in (tmp_path / "mine" / "test").iterdir()}
    assert names == {"0.png", "1.png", "grid.png", "denoising.png", "samples.json"}
    told = capsys.readouterr().out
    assert "assumed: num_train_timesteps 1000" in told
    assert f"accuracy by the evaluator {scores['top_k']['value']:.4f}" in told


def test_adopt_writes_nothing_where_something_is_wrong(mine, tmp_path):
    _, root = mine
    before = sorted(tmp_path.rglob("*"))
    for options in (
        {"options": Options(), "out": tmp_path / "new" / "mine"},
        {"guidance": float("nan"), "out": tmp_path / "new" / "mine"},
        {"steps": 2000, "out": tmp_path / "new" / "mine"},
        {"scheduler": "dpm"},
        {"out": tmp_path},
        {"out": tmp_path / "mine.pth"},
        {"out": tmp_path / "mine.pth" / "there"},
    ):
        with pytest.raises(ValueError):
            settings = {"options": GROUPS, "data": root, "device": "cpu"} | options
            adopt(tmp_path / "mine.pth", **settings)
        assert sorted(tmp_path.rglob("*")) == before


def test_no_key_is_named_that_would_leave_the_condition_aside(tmp_path):
    weights = {f"net.{name}": x for name, x in made(UNet2DModel, **TINY).state_dict().items()}
    weights |= {"labels.0.weight": torch.ones(7, 24), "labels.2.weight": torch.ones(32, 7)}
    with pytest.raises(ValueError, match=r"labels\.\d\.weight .* has no place in") as caught:
        adopted(tmp_path, weights)
    assert "--key" not in str(caught.value)
