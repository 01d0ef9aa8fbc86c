"""Sampling: seeds, guidance, schedulers, saving."""

import errno
import json
import os
import re
import shutil

import pytest
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from torch import Tensor

from lab7.diffusion import SAMPLERS, convert_scheduler, scheduler_name, set_steps
from lab7.errors import UserError
from lab7.labels import encode
from lab7.model import ConditionalUNet
from lab7.pipeline import ConditionalDDPMPipeline, load_pipeline, save_pipeline

CONDITIONS = [["red cube"], ["blue cylinder", "gray sphere"], ["red cube", "cyan cube"]]

NOISE = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")


def make_pipeline(scheduler: str = "dpmsolver++", **settings) -> ConditionalDDPMPipeline:
    torch.manual_seed(0)
    unet = ConditionalUNet(
        block_out_channels=[32, 32],
        layers_per_block=1,
        down_block_types=["DownBlock2D"] * 2,
        up_block_types=["UpBlock2D"] * 2,
        resnet_time_scale_shift="scale_shift",
        norm_num_groups=8,
        patch_size=4,
    )
    return ConditionalDDPMPipeline(unet.eval(), convert_scheduler(NOISE, scheduler), **settings)


def draw(pipeline: ConditionalDDPMPipeline, conditions=CONDITIONS, **options) -> Tensor:
    options = {"num_inference_steps": 4, "guidance_scale": 2.0, "progress": False} | options
    return pipeline(conditions, output_type="pt", **options).images


@pytest.mark.parametrize("scheduler", SAMPLERS)
def test_a_seed_belongs_to_a_picture(scheduler):
    pipeline = make_pipeline(scheduler)
    seeds = [7, 0, 123456789]
    together = draw(pipeline, seeds=seeds)
    assert together.shape == (3, 3, 64, 64) and together.abs().max() <= 1
    assert torch.allclose(draw(pipeline, seeds=seeds, batch_size=1), together, atol=1e-4)
    alone = draw(pipeline, CONDITIONS[2:], seeds=seeds[2:])
    assert torch.allclose(alone, together[2:], atol=1e-4)
    assert not torch.allclose(draw(pipeline, seeds=[8, 1, 2]), together, atol=1e-2)


def test_seeds_count_up_by_default():
    pipeline = make_pipeline()
    assert torch.equal(draw(pipeline), draw(pipeline, seeds=[0, 1, 2]))


def test_global_random_state_is_left_alone():
    pipeline = make_pipeline("ddpm")
    before = torch.get_rng_state()
    draw(pipeline)
    assert torch.equal(torch.get_rng_state(), before)


def test_conditions_in_each_form():
    pipeline = make_pipeline()
    expected = draw(pipeline)
    assert torch.equal(draw(pipeline, encode(CONDITIONS)), expected)
    text = draw(pipeline, " Blue cylinder,gray  sphere", seeds=[1])
    assert torch.allclose(text, expected[1:2], atol=1e-4)


def test_guidance_moves_along_the_difference():
    pipeline = make_pipeline()
    cond = encode(CONDITIONS)
    xt, t = torch.randn(3, 3, 64, 64), torch.tensor(500)
    with torch.no_grad():
        conditional = pipeline.unet(xt, t, cond).sample
        uncond = pipeline.unet(xt, t, torch.zeros_like(cond)).sample
        guided = pipeline.predict(xt, t, cond, 3.0)
    assert torch.allclose(guided, uncond + 3 * (conditional - uncond), atol=1e-5)
    assert not torch.allclose(guided, conditional, atol=1e-3)


@pytest.mark.parametrize(("guidance", "rows"), [(1.0, 3), (2.0, 6)])
def test_no_guidance_means_half_the_work(guidance, rows):
    pipeline, seen = make_pipeline(), []
    pipeline.unet.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    draw(pipeline, guidance_scale=guidance)
    assert seen == [rows] * 4


def test_steps_outside_the_interval_of_guidance_take_one_pass():
    pipeline, seen = make_pipeline("ddim"), []
    pipeline.unet.register_forward_pre_hook(
        lambda _, args: seen.append((int(args[1]), len(args[0])))
    )
    draw(pipeline)
    first, second, third, last = (t for t, _ in seen)
    whole = draw(pipeline, guidance_interval=(0, 999))
    part = draw(pipeline, guidance_interval=(third, second))
    assert seen[4:] == [
        *((t, 6) for t in (first, second, third, last)),
        *((first, 3), (second, 6), (third, 6), (last, 3)),
    ]
    assert torch.equal(whole, draw(pipeline)) and not torch.allclose(part, whole, atol=1e-3)
    pipeline = ConditionalDDPMPipeline(
        pipeline.unet, pipeline.scheduler, guidance_interval=(third, second)
    )
    assert torch.equal(draw(pipeline), part), "a call takes the pipeline's own"
    nowhere = draw(pipeline, guidance_interval=(last + 1, third - 1))
    assert torch.allclose(nowhere, draw(pipeline, guidance_scale=1.0), atol=1e-4)


def test_a_pipeline_saved_without_an_interval_guides_all_the_way(saved):
    index = json.loads((saved / "model_index.json").read_text())
    del index["guidance_interval"]
    (saved / "model_index.json").write_text(json.dumps(index))
    assert load_pipeline(saved, "cpu").config.guidance_interval == [0, 999]


def test_callback_sees_every_step():
    seen = []
    pipeline = make_pipeline("ddim")
    images = draw(pipeline, callback=lambda *step: seen.append(step), batch_size=2)
    assert [step for step, *_ in seen] == [0, 1, 2, 3] * 2
    times = [t for _, t, *_ in seen[:4]]
    assert times == sorted(times, reverse=True)
    assert [len(xt) for _, _, xt, _ in seen] == [2] * 4 + [1] * 4
    assert all(x0.abs().max() <= 1 for *_, x0 in seen)
    assert images.shape[0] == 3


def test_no_graph_is_kept_of_the_reverse_process():
    pipeline = make_pipeline()
    for _, xt, x0, xt_next in pipeline.reverse(encode(CONDITIONS), [0, 1, 2], guidance_scale=3.0):
        assert not (xt.requires_grad or x0.requires_grad or xt_next.requires_grad)
    assert torch.is_grad_enabled()


def test_pil_matches_tensor():
    pipeline = make_pipeline()
    (first, *_) = pipeline(
        CONDITIONS, num_inference_steps=4, guidance_scale=2, progress=False
    ).images
    assert first.size == (64, 64) and first.mode == "RGB"
    pixel = ((draw(pipeline)[0, :, 5, 9] + 1) * 127.5).round().tolist()
    assert list(first.getpixel((9, 5))) == pixel


@pytest.mark.parametrize("scheduler", SAMPLERS)
def test_saved_pipeline_draws_the_same(tmp_path, scheduler):
    pipeline = make_pipeline(
        scheduler,
        num_inference_steps=3,
        guidance_scale=1.5,
        guidance_interval=[300, 700],
    )
    save_pipeline(pipeline, tmp_path / "saved")
    expected = pipeline(CONDITIONS, output_type="pt", progress=False).images
    for loaded in (
        load_pipeline(tmp_path / "saved", "cpu"),
        ConditionalDDPMPipeline.from_pretrained(tmp_path / "saved"),
    ):
        assert loaded.unet.dtype == torch.float32
        assert loaded.settings() == pipeline.settings()
        assert scheduler_name(loaded.scheduler) == scheduler
        images = loaded(CONDITIONS, output_type="pt", progress=False).images
        assert torch.allclose(images, expected, atol=0.02)
    assert pipeline.unet.dtype == torch.float32
    assert str(tmp_path) not in "".join(p.read_text() for p in tmp_path.rglob("*.json"))


def test_saving_again_replaces(tmp_path):
    for steps in (3, 5):
        save_pipeline(make_pipeline(num_inference_steps=steps), tmp_path / "saved")
    assert load_pipeline(tmp_path / "saved", "cpu").config.num_inference_steps == 5
    assert [p.name for p in tmp_path.iterdir()] == ["saved"]


def test_saving_never_removes_anything_else(tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(ValueError, match="is not a saved generator"):
        save_pipeline(make_pipeline(), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_another_scheduler_on_loading(tmp_path):
    save_pipeline(make_pipeline(), tmp_path / "saved")
    scheduler = load_pipeline(tmp_path / "saved", "cpu", scheduler="DDIMScheduler").scheduler
    assert scheduler_name(scheduler) == "ddim"
    assert scheduler.config.prediction_type == "v_prediction"
    assert scheduler.config.beta_schedule == "squaredcos_cap_v2"
    noisy = load_pipeline(tmp_path / "saved", "cpu", scheduler="SDE-DPMSolver++").scheduler
    assert noisy.config.algorithm_type == scheduler_name(noisy) == "sde-dpmsolver++"
    with pytest.raises(ValueError, match="^unknown scheduler 'ddimm'"):
        load_pipeline(tmp_path / "saved", "cpu", scheduler="ddimm")


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_loaded_sampler_is_like_a_fresh_one(tmp_path, name):
    save_pipeline(make_pipeline(name), tmp_path / "saved")
    loaded = load_pipeline(tmp_path / "saved", "cpu").scheduler
    for other in SAMPLERS:
        there = convert_scheduler(loaded, other)
        for sampler, fresh_name in ((there, other), (convert_scheduler(there, name), name)):
            fresh = convert_scheduler(NOISE, fresh_name)
            assert scheduler_name(sampler) == fresh_name
            assert settings(sampler) == settings(fresh)
            for steps in (1, 20, 61, 999):
                set_steps(sampler, steps)
                set_steps(fresh, steps)
                assert torch.equal(sampler.timesteps, fresh.timesteps)


def settings(scheduler) -> dict:
    return {key: value for key, value in scheduler.config.items() if not key.startswith("_")}


def test_settings_of_a_sampler_come_from_the_table_alone():
    odd = DPMSolverMultistepScheduler.from_config(
        NOISE.config, thresholding=True, timestep_spacing="leading", use_karras_sigmas=True
    )
    sampler = ConditionalDDPMPipeline(make_pipeline().unet, odd).scheduler
    assert settings(sampler) == settings(convert_scheduler(NOISE, "dpmsolver++"))
    with pytest.raises(ValueError, match="unknown scheduler 'eulerdiscrete'"):
        ConditionalDDPMPipeline(make_pipeline().unet, EulerDiscreteScheduler())


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_picture_that_is_not_finite_is_refused(name, value):
    pipeline = make_pipeline(name)
    next(pipeline.unet.parameters()).data.fill_(value)
    message = rf"not finite at t = 99\d: sampler {re.escape(name)}, 4 steps, guidance_scale 2.0"
    with pytest.raises(ValueError, match=message):
        draw(pipeline)
    asked = {"num_inference_steps": 4, "guidance_scale": 2.0}
    with pytest.raises(ValueError, match=message):  # what the picker calls
        next(pipeline.reverse(encode(CONDITIONS), [0, 1, 2], **asked))


@pytest.mark.parametrize("guidance", [1e39, float("inf"), float("nan")])
def test_guidance_beyond_all_numbers_is_refused(guidance):
    message = rf"not finite .* guidance_scale {re.escape(str(guidance))}$"
    with pytest.raises(UserError, match=message):
        draw(make_pipeline(), guidance_scale=guidance)


@pytest.fixture
def saved(tmp_path):
    save_pipeline(make_pipeline(), tmp_path / "saved")
    return tmp_path / "saved"


def test_missing_weights(saved, tmp_path):
    with pytest.raises(FileNotFoundError, match="model_index.json is missing"):
        load_pipeline(tmp_path / "absent")
    (saved / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="safetensors is missing"):
        load_pipeline(saved)


FILES = (
    "model_index.json",
    "unet/diffusion_pytorch_model.safetensors",
    "unet/config.json",
    "scheduler/scheduler_config.json",
)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("content", [b"{ broken", b"[1]", b'{"beta_schedule": "steep"}', None])
def test_broken_files(saved, name, content):
    if content is None:
        (saved / name).unlink()
    else:
        (saved / name).write_bytes(content)
    if content == b'{"beta_schedule": "steep"}' and name == "unet/config.json":
        message = "do not fit this network"  # but another, which its other defaults describe
    else:
        message = "does not hold a saved generator|no saved generator in .* is missing"
    with pytest.raises(UserError, match=message) as error:
        load_pipeline(saved)
    assert "\n" not in str(error.value)


def test_loading_leaves_the_global_random_state_alone(saved):
    before = torch.get_rng_state()
    load_pipeline(saved, "cpu")
    assert torch.equal(torch.get_rng_state(), before)


def test_weights_of_another_shape(saved):
    config = json.loads((saved / "unet" / "config.json").read_text())
    (saved / "unet" / "config.json").write_text(
        json.dumps(config | {"block_out_channels": [32, 64]})
    )
    with pytest.raises(UserError, match=r"do not fit this network: .* \(32, 32, .* not \(64, 32"):
        load_pipeline(saved)


def test_a_mistake_in_the_network_is_no_broken_file(saved, monkeypatch):
    """It keeps its traceback, whatever it raises."""
    for mistake in (ValueError("mine"), TypeError("mine"), RuntimeError("mine")):

        def init(*_, error=mistake, **__):
            raise error

        monkeypatch.setattr("lab7.model._check", init)
        with pytest.raises(type(mistake)) as error:
            load_pipeline(saved, "cpu")
        assert error.value is mistake and error.traceback[-1].name == "init"


def test_a_place_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="file"):
        save_pipeline(make_pipeline(), tmp_path / "file" / "saved")

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / "saved"))

    save_pipeline(make_pipeline(), tmp_path / "saved")
    monkeypatch.setattr(ConditionalDDPMPipeline, "save_pretrained", full)
    with pytest.raises(UserError, match=f"No space left on device: {tmp_path / 'saved'}"):
        save_pipeline(make_pipeline(num_inference_steps=5), tmp_path / "saved")
    monkeypatch.undo()
    assert load_pipeline(tmp_path / "saved", "cpu").config.num_inference_steps == 20
    assert {path.name for path in tmp_path.iterdir()} == {"file", "saved"}


def test_a_file_cannot_name_code_to_run(saved, tmp_path, monkeypatch):
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')\nclass EvilScheduler: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    index = json.loads((saved / "model_index.json").read_text())
    index |= {"scheduler": ["evil", "EvilScheduler"], "_class_name": ["evil", "Evil"]}
    (saved / "model_index.json").write_text(json.dumps(index))
    shutil.copy(tmp_path / "evil.py", saved / "evil.py")
    with pytest.raises(ValueError, match="EvilScheduler"):
        load_pipeline(saved, "cpu")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"conditions": [["red cubes"]]}, "did you mean 'red cube'"),
        ({"conditions": ["red cube"]}, "label"),
        ({"conditions": []}, "no conditions"),
        ({"conditions": torch.zeros(2, 23)}, r"\(2, 23\): expected \(B, 24\)"),
        ({"conditions": torch.zeros(0, 24)}, "no conditions"),
        ({"seeds": [1, 2]}, "2 seeds for 3 pictures"),
        ({"num_inference_steps": 0}, "num_inference_steps 0 is not within 1 … 1000 .* is 1$"),
        ({"num_inference_steps": 1001}, "num_inference_steps 1001 .* the nearest is 1000$"),
        ({"guidance_interval": (700, 300)}, "guidance_interval 700 300: .* within 0 … 999$"),
        ({"guidance_interval": (0, 1000)}, "guidance_interval 0 1000: .* within 0 … 999$"),
        ({"output_type": "np"}, "unknown output_type 'np': did you mean .* one of pil, pt$"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_pipeline()(**{"conditions": CONDITIONS, "progress": False} | arguments)


def test_a_saved_pipeline_is_found_below_the_home(saved_pipeline, monkeypatch):
    monkeypatch.setenv("HOME", str(saved_pipeline.parent))
    assert load_pipeline(f"~/{saved_pipeline.name}", "cpu").unet.config.sample_size == 64
