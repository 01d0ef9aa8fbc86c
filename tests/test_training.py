"""Training: the loss, the order of the data, resuming, logs."""

import json
import math
import runpy
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.optimization import get_cosine_schedule_with_warmup
from PIL import Image

import lab7.training
from lab7.batches import Batches
from lab7.devices import choose_precision, should_compile
from lab7.diffusion import diffusion_loss, scheduler_name
from lab7.errors import UserError
from lab7.experiments import TrainConfig, get_experiment
from lab7.pipeline import load_pipeline
from lab7.training import SAMPLED, Run, learning_rate, train

SMOKE = get_experiment("smoke").config


@pytest.fixture(scope="module")
def dataset():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (10, 3, 64, 64), generator=generator, dtype=torch.uint8)
    return SimpleNamespace(images=images, conditions=torch.eye(24)[:10])


def weights(pipeline) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in pipeline.unet.parameters()])


def read_log(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_loss_is_zero_for_the_right_prediction(kind):
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type=kind)
    x0, noise = torch.rand(4, 3, 8, 8) * 2 - 1, torch.randn(4, 3, 8, 8)
    t = torch.tensor([0, 10, 500, 999])
    a = scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
    right = {
        "epsilon": noise,
        "sample": x0,
        "v_prediction": a.sqrt() * noise - (1 - a).sqrt() * x0,
    }[kind]
    expected_xt = a.sqrt() * x0 + (1 - a).sqrt() * noise

    def predict(offset, scaling_factor=1.0):
        def unet(xt, t, cond, return_dict):
            assert torch.allclose(xt, expected_xt, atol=1e-6)
            return (right + offset,)

        small = x0 / scaling_factor
        cond = torch.zeros(4, 24)
        return diffusion_loss(unet, scheduler, small, cond, t, noise, scaling_factor).mean().item()

    assert predict(offset=0.0) == pytest.approx(0, abs=1e-9)
    assert predict(offset=0.5) == pytest.approx(0.25, abs=1e-5)
    assert predict(offset=0.5, scaling_factor=4.0) == pytest.approx(0.25, abs=1e-5)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_min_snr_weights_are_the_same_in_x0(kind):
    """Whatever is predicted, an error of x0 weighs min(SNR, gamma)."""
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type=kind)
    x0, noise = torch.zeros(1, 3, 8, 8), torch.randn(1, 3, 8, 8)
    for step in (50, 500, 900):
        t = torch.tensor([step])
        a = scheduler.alphas_cumprod[step].double()
        snr = (a / (1 - a)).item()
        per_x0 = {"epsilon": -math.sqrt(snr), "sample": 1, "v_prediction": -math.sqrt(1 + snr)}[
            kind
        ]
        target = {"epsilon": noise, "sample": x0}.get(kind, scheduler.get_velocity(x0, noise, t))
        loss = diffusion_loss(
            lambda *_, **__: (target + 0.1 * per_x0,),  # noqa: B023
            scheduler,
            x0,
            torch.zeros(1, 24),
            t,
            noise,
            snr_gamma=5.0,
        )
        assert loss.item() == pytest.approx(0.01 * min(snr, 5.0), rel=1e-3)


def test_logit_normal_time_steps_are_mostly_in_the_middle(dataset):
    """Their logits are standard normal (Esser et al. 2024, eq. 19)."""
    config = replace(SMOKE, time_sampling="logit_normal", batch_size=len(dataset.images))
    batches = Batches(config, dataset, torch.device("cpu"))
    t = torch.cat([batches(step)[2] for step in range(2000 // config.batch_size + 1)])
    assert t.dtype == torch.int64 and 0 <= t.min() and t.max() <= 999
    logits = torch.logit((t + 0.5) / 1000)
    assert abs(logits.mean()) < 0.1 and abs(logits.std() - 1) < 0.1


def order_of(count, batch_size, seed):
    """Which pictures each step sees."""
    pictures = SimpleNamespace(
        images=torch.zeros(count, 3, 64, 64, dtype=torch.uint8), conditions=torch.zeros(count, 24)
    )
    config = replace(SMOKE, batch_size=batch_size, seed=seed)
    return Batches(config, pictures, torch.device("cpu")).rows


@pytest.mark.parametrize(("count", "batch_size"), [(10, 4), (10, 10), (3, 8)])
def test_each_epoch_shows_every_picture_once(count, batch_size):
    order = order_of(count, batch_size, seed=5)
    steps = 3 * count // math.gcd(count, batch_size)
    shown = torch.cat([order(step) for step in range(steps)]).tolist()
    epochs = [shown[i : i + count] for i in range(0, len(shown), count)]
    assert all(Counter(epoch) == Counter(range(count)) for epoch in epochs)
    assert epochs[0] != epochs[1] or count == 3


def test_order_depends_on_seed_and_step_only():
    first, second = order_of(50, 8, seed=1), order_of(50, 8, seed=1)
    for step in range(20):
        first(step)
    assert torch.equal(first(20), second(20))
    assert not torch.equal(order_of(50, 8, seed=2)(20), second(20))


def test_learning_rate_is_diffusers_cosine():
    config = TrainConfig(num_steps=50, warmup_steps=7, learning_rate=3e-4)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=3e-4)
    schedule = get_cosine_schedule_with_warmup(optimizer, 7, 50)
    for step in range(50):
        assert learning_rate(config, step) == pytest.approx(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()


def test_learning_rate_follows_the_time():
    config = TrainConfig(num_steps=10**6, warmup_steps=10, learning_rate=1.0, budget_seconds=60)
    assert learning_rate(config, 5, 30) == 0.5
    assert learning_rate(config, 100, 30) == pytest.approx(0.5, abs=1e-3)
    assert learning_rate(config, 100, 61) == 0


def test_training_learns(tmp_path):
    black = SimpleNamespace(
        images=torch.zeros(8, 3, 64, 64, dtype=torch.uint8), conditions=torch.eye(24)[:8]
    )
    config = replace(
        SMOKE, num_steps=30, batch_size=8, learning_rate=1e-2, ema_decay=0.0, log_every=10
    )
    start = Run(config, black, torch.device("cpu"), tmp_path)
    trained = train(config, black, tmp_path, progress=False)
    with torch.no_grad():
        before, after = (
            diffusion_loss(unet, start.scheduler, *start.batches(0)).mean().item()
            for unet in (start.network, trained.unet)
        )
    assert after < 0.8 * before
    rows = read_log(tmp_path)
    assert [row["step"] for row in rows] == [10, 20, 30]
    assert rows[-1]["images"] == 240
    assert set(rows[0]) == {
        *("step", "images", "loss", "lr", "images_per_second", "seconds", "loss_by_level")
    }
    for row in rows:
        levels = [loss for loss in row["loss_by_level"] if loss is not None]
        assert len(row["loss_by_level"]) == 10 and min(levels) <= row["loss"] <= max(levels)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resumed_run_is_the_same_run(tmp_path, dataset, optimizer):
    config = replace(SMOKE, num_steps=6, log_every=1, save_every=2, optimizer=optimizer)
    whole = train(config, dataset, tmp_path / "whole", progress=False)
    train(config, dataset, tmp_path / "parts", progress=False, max_seconds=1e-6)
    assert [row["step"] for row in read_log(tmp_path / "parts")] == [1]
    train(
        config, dataset, tmp_path / "parts", progress=False, callback=lambda row: row["step"] == 3
    )
    parts = train(config, dataset, tmp_path / "parts", progress=False)
    assert torch.equal(weights(whole), weights(parts))
    losses = [[row["loss"] for row in read_log(tmp_path / name)] for name in ("whole", "parts")]
    assert losses[0] == losses[1] and len(losses[0]) == 6


def test_rows_after_the_last_state_are_dropped(tmp_path, dataset):
    """A run that was killed has logged more than it saved."""
    config = replace(SMOKE, num_steps=4, log_every=1, save_every=2)

    def kill(row):
        if row["step"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, dataset, tmp_path, progress=False, callback=kill)
    assert len(read_log(tmp_path)) == 3
    train(config, dataset, tmp_path, progress=False)
    assert [row["step"] for row in read_log(tmp_path)] == [1, 2, 3, 4]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, dataset):
    """A finished run: its folder and the pipeline it returned."""
    folder = tmp_path_factory.mktemp("finished")
    return folder, train(SMOKE, dataset, folder, progress=False)


def test_finished_run_is_left_alone(finished, dataset):
    folder, first = finished
    log = (folder / "log.jsonl").read_text()
    second = train(SMOKE, dataset, folder, progress=False)
    assert torch.equal(weights(first), weights(second))
    assert (folder / "log.jsonl").read_text() == log


def test_another_run_in_the_folder(tmp_path, dataset):
    train(SMOKE, dataset, tmp_path, progress=False)
    other = replace(SMOKE, batch_size=3)
    with pytest.raises(ValueError, match="holds a run with batch_size = 4, not 3"):
        train(other, dataset, tmp_path, progress=False)
    train(other, dataset, tmp_path, resume=False, progress=False)
    assert read_log(tmp_path)[-1]["images"] == 12


def test_a_mistake_in_the_call_costs_nothing(tmp_path, dataset):
    train(SMOKE, dataset, tmp_path, progress=False)
    before = sorted(tmp_path.rglob("*.*"))
    wrong = replace(SMOKE, init_from=str(tmp_path / "nothing"))
    with pytest.raises(FileNotFoundError, match="nothing"):
        train(wrong, dataset, tmp_path, resume=False, progress=False)
    with pytest.raises(ValueError, match="no device 'gpu' here"):
        train(SMOKE, dataset, tmp_path, resume=False, progress=False, device="gpu")
    assert sorted(tmp_path.rglob("*.*")) == before


def test_saved_pipeline_is_the_returned_one(finished):
    folder, trained = finished
    saved = load_pipeline(folder / "pipeline", "cpu")
    assert torch.allclose(weights(saved), weights(trained), atol=1e-3)
    assert saved.config.guidance_scale == SMOKE.guidance_scale
    assert scheduler_name(saved.scheduler) == SMOKE.scheduler


def test_a_finished_run_takes_new_settings_of_sampling(finished, dataset, tmp_path):
    folder = shutil.copytree(finished[0], tmp_path / "run")
    config = replace(SMOKE, guidance_scale=5.0, scheduler="ddim", guidance_interval=[300, 900])
    train(config, dataset, folder, progress=False)
    saved = load_pipeline(folder / "pipeline", "cpu")
    assert saved.config.guidance_interval == [300, 900]
    assert saved.config.guidance_scale == 5 and scheduler_name(saved.scheduler) == "ddim"
    assert torch.equal(weights(saved), weights(load_pipeline(finished[0] / "pipeline", "cpu")))


def test_average_lags_behind_the_weights(tmp_path, dataset, finished):
    _, averaged = finished
    plain = train(replace(SMOKE, ema_decay=0.0), dataset, tmp_path / "plain", progress=False)
    state = Run(SMOKE, dataset, torch.device("cpu"), tmp_path)
    start = torch.cat([p.detach().flatten() for p in state.network.parameters()])
    assert (weights(averaged) - start).norm() < 0.99 * (weights(plain) - start).norm()


def test_warm_start(tmp_path, dataset, finished):
    folder, first = finished
    config = replace(SMOKE, init_from=str(folder / "pipeline"))
    run = Run(config, dataset, torch.device("cpu"), tmp_path)
    assert torch.allclose(weights(run.pipeline()), weights(first), atol=1e-3)
    deeper = replace(config, unet=config.unet | {"layers_per_block": 2})
    with pytest.raises(UserError, match="do not fit this network: down_.* is None there, not .32"):
        Run(deeper, dataset, torch.device("cpu"), tmp_path)
    wider = replace(config, unet=config.unet | {"block_out_channels": [32, 64, 32]})
    with pytest.raises(UserError, match=r"this network: .* is \(32, .* there, not \(64, "):
        Run(wider, dataset, torch.device("cpu"), tmp_path)


@pytest.mark.parametrize(("dropout", "expected"), [(0.0, 1.0), (1.0, 0.0), (0.3, 0.7)])
def test_label_dropout_takes_whole_conditions(dropout, expected):
    conditions = torch.zeros(400, 24)
    conditions[:, :3] = 1
    pictures = SimpleNamespace(
        images=torch.zeros(400, 3, 64, 64, dtype=torch.uint8), conditions=conditions
    )
    config = replace(SMOKE, label_dropout=dropout, batch_size=400, time_sampling="uniform")
    x0, cond, t, noise = Batches(config, pictures, torch.device("cpu"))(0)
    assert set(cond.sum(1).tolist()) <= {0.0, 3.0}
    assert (cond.sum(1) > 0).float().mean().item() == pytest.approx(expected, abs=0.08)
    assert (x0 == -1).all()
    assert 0 <= t.min() < 30 and 970 < t.max() <= 999
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01


def test_noise_differs_between_steps_and_seeds(dataset):
    def noise(seed, step):
        return Batches(replace(SMOKE, seed=seed), dataset, torch.device("cpu"))(step)[3]

    assert torch.equal(noise(0, 1), noise(0, 1))
    assert not torch.equal(noise(0, 1), noise(0, 2))
    assert not torch.equal(noise(0, 1), noise(1, 0))


def test_precision_can_change_from_run_to_run(tmp_path, dataset):
    for precision in ("bfloat16", "auto", "float32"):
        config = replace(SMOKE, num_steps=1, precision=precision)
        trained = train(config, dataset, tmp_path / precision, progress=False)
        assert weights(trained).dtype == torch.float32
    run = Run(SMOKE, dataset, torch.device("cpu"), tmp_path)
    auto = replace(SMOKE, precision="auto")
    assert choose_precision(auto, run.network) in ("float32", "bfloat16")
    assert choose_precision(auto, run.network, before="bfloat16") == "bfloat16"
    assert all(p.grad is None for p in run.network.parameters())


def test_tensorboard_files(tmp_path, dataset):
    pytest.importorskip("tensorboard")
    train(replace(SMOKE, tensorboard=True), dataset, tmp_path, progress=False)
    assert list(tmp_path.glob("tensorboard/events.out.tfevents*"))


@pytest.mark.parametrize(
    ("compile", "steps", "device", "expected"),
    [
        (None, 2000, "cuda", True),
        (None, 1999, "cuda", False),  # over before it pays off
        (None, 2000, "cpu", False),
        (False, 2000, "cuda", False),
        (True, 1, "cpu", True),
    ],
)
def test_compiles_by_itself_only_where_it_pays_off(compile, steps, device, expected):
    config = replace(SMOKE, num_steps=steps, compile=compile)
    assert should_compile(config, torch.device(device)) is expected


def test_no_compiler_falls_back(tmp_path, dataset, monkeypatch):
    monkeypatch.setattr("lab7.devices.has_compiler", lambda: False)
    config = replace(SMOKE, num_steps=1, compile=True)
    with pytest.warns(UserWarning, match="without torch.compile"):
        train(config, dataset, tmp_path, progress=False)


def test_a_diverged_training_stops_and_keeps_the_last_good_weights(tmp_path, dataset):
    config = replace(SMOKE, num_steps=30, log_every=5, save_every=1, warmup_steps=0)
    train(config, dataset, tmp_path, progress=False, callback=lambda row: True)
    (good,) = {step for step in map(saved_step, (tmp_path / "states").iterdir()) if step == 5}

    class Broken(Run):
        def count(self, t, losses):
            super().count(t, losses)
            if self.step == 8:
                next(self.network.parameters()).data.fill_(math.nan)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lab7.training, "Run", Broken)
        with pytest.raises(ValueError, match=f"no longer finite at step 8.*{tmp_path.name}"):
            train(config, dataset, tmp_path, progress=False)
    steps = {saved_step(path) for path in (tmp_path / "states").iterdir()}
    assert steps == {6, 7} and good not in steps
    assert weights(load_pipeline(tmp_path / "pipeline", "cpu")).isfinite().all()
    train(replace(config, save_every=50), dataset, tmp_path, progress=False)


@pytest.mark.parametrize("mistake", [ValueError("mine"), RuntimeError("shapes"), KeyError("x")])
def test_a_mistake_in_the_network_keeps_its_traceback(tmp_path, dataset, monkeypatch, mistake):
    """Whatever a student's own forward raises is no error of the user."""

    def forward(*_, **__):
        raise mistake

    monkeypatch.setattr("lab7.model.ConditionalUNet.forward", forward)
    with pytest.raises(type(mistake)) as error:
        train(SMOKE, dataset, tmp_path, progress=False, device="cpu")
    assert error.value is mistake and error.traceback[-1].name == "forward"


def saved_step(path):
    return int(path.name.split("-")[1])


def test_a_diverged_loss_is_reported(tmp_path, dataset):
    config = replace(SMOKE, num_steps=30, learning_rate=1e30, max_grad_norm=1e30)
    with pytest.raises(ValueError, match="the loss is nan at step"):
        train(config, dataset, tmp_path, progress=False)


def test_what_does_not_fit_is_refused(tmp_path, dataset):
    for changes, message in [
        ({"batch_size": 11}, "batch_size 11 is larger than the data: there are 10 pictures"),
        (
            {"precision": "float16", "optimizer": "adamw"},
            "unknown precision on cpu 'float16': did you mean 'bfloat16'. Choose one of auto, flo",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            train(replace(SMOKE, **changes), dataset, tmp_path, progress=False, device="cpu")
    assert not (tmp_path / "config.json").exists()


def test_rows_of_samples_show_the_same_conditions(tmp_path, dataset):
    config = replace(SMOKE, sample_every=2)
    train(config, dataset, tmp_path, progress=False)
    sheets = sorted((tmp_path / "samples").iterdir())
    assert [sheet.name for sheet in sheets] == ["step-00000002.png", "step-00000004.png"]
    assert Image.open(sheets[0]).size == (len(SAMPLED) * 66 + 2, 68)


def test_two_processes_do_what_one_does(tmp_path, monkeypatch):
    """The same batches in halves: the same losses, and one of the two writes."""
    script, one, two = (tmp_path / name for name in ("two.py", "one", "two"))
    script.write_text(TWO)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run([*launch, script, two], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    monkeypatch.setattr("sys.argv", [str(script), str(one)])
    runpy.run_path(str(script))
    rows = [read_log(folder) for folder in (one, two)]
    assert [row["step"] for row in rows[1]] == list(range(1, 51))
    losses = torch.tensor([[row["loss"] for row in folder] for folder in rows])
    assert torch.allclose(*losses, rtol=1e-3, atol=0) and losses[0].std() > 0.01


TWO = """
import sys
from dataclasses import replace
from types import SimpleNamespace

import torch

from lab7.experiments import get_experiment
from lab7.training import train

generator = torch.Generator().manual_seed(0)
images = torch.randint(0, 256, (40, 3, 64, 64), generator=generator, dtype=torch.uint8)
pictures = SimpleNamespace(images=images, conditions=torch.eye(24).repeat(2, 1)[:40])
config = replace(get_experiment("smoke").config, num_steps=50, batch_size=8, log_every=1)
train(config, pictures, sys.argv[1], progress=False, device="cpu")
"""


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"batch_size": 0}, "batch_size 0 must be above 0"),
        ({"num_steps": None}, "num_steps None must be above 0"),
        ({"label_dropout": 1.5}, "label_dropout 1.5 is not within 0 … 1"),
        ({"precision": "float16", "optimizer": "muon"}, "precision 'float16' is not for 'muon'"),
        ({"precision": "fp16"}, "unknown precision 'fp16': did you mean 'float16'. Choose .* auto"),
        ({"time_sampling": "mode"}, "unknown time_sampling 'mode': did you mean .* one of uniform"),
    ],
)
def test_bad_config(values, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**values)
