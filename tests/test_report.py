import runpy

import torch

from lab7.evaluator import Estimate, compute_scores
from lab7.evaluator_training import EvaluatorConfig
from lab7.experiments import get_experiment
from lab7.labels import LABELS, decode, encode, load_conditions
from lab7.results import RESULTS_DIR, aggregate, append_log, write_record
from lab7.sampling import to_grid

BUILD = runpy.run_path(str(RESULTS_DIR.parent / "build.py"))
build = BUILD["build"]
SETS = ("test", "new_test", "valid", "unseen", "four_five")


def make_scores(conditions, errors, seed=0, repetitions=2):
    """What `score_pipeline` would return for verdicts of which a share is wrong."""
    rng = torch.Generator().manual_seed(seed)
    labels = encode(conditions).repeat(repetitions, 1)
    wrong = torch.rand(labels.shape, generator=rng) < errors
    noise = 0.2 * torch.rand(labels.shape, generator=rng)
    probabilities = (labels * 0.75 + noise) * ~wrong + (0.8 - labels * 0.6) * wrong
    groups = torch.arange(len(conditions)).repeat(repetitions)
    parts = list(zip(*(x.split(len(conditions)) for x in (probabilities, labels)), strict=True))
    top_k = [compute_scores(*part).top_k.value for part in parts]
    return {
        "num_inference_steps": 20,
        "guidance_scale": 3.0,
        "scheduler": "DPMSolverMultistepScheduler",
        "repetitions": repetitions,
        "first_seed": 0,
        "scores": compute_scores(probabilities, labels, groups),
        "top_k": aggregate(top_k),
        "exact_set": aggregate([compute_scores(*part).exact_set.value for part in parts]),
        "top_k_per_repetition": top_k,
        "seen": decode(probabilities[: len(conditions)] >= 0.5),
    }


def write_generator(root, name, data, errors, pictures, frames):
    """A record as `evaluate --record` writes it."""
    sets = {key: load_conditions(data / f"{key}.json") for key in SETS}
    metrics = {key: make_scores(sets[key], errors) for key in SETS}
    metrics["training"] = {
        "steps": 10_000,
        "images": 640_000,
        "seconds": 10_812.3,
        "images_per_second": 59.2,
        "final_loss": 0.0123,
        "parameters": 6_543_210,
    }
    config = get_experiment(name).config
    folder = write_record(name, config, metrics, root)
    for key in ("test", "new_test"):
        to_grid(pictures(len(sets[key]))).save(folder / f"{key}.png")
    to_grid(frames, columns=len(frames)).save(folder / "denoising.png")
    for step in range(50, 10_001, 50):
        append_log(
            folder / "log.jsonl",
            {
                "step": step,
                "images": step * config.batch_size,
                "loss": 0.4 / step**0.4 * (1 + 0.1 * (step % 7 - 3) / 3),
                "lr": config.learning_rate * (1 - step / 10_000),
                "images_per_second": 59.2,
                "seconds": step * 1.08,
            },
        )


def write_evaluator(root):
    """A record as `train_evaluator` writes it."""
    labels = torch.eye(24).repeat(4, 1)
    scores = {count: make_scores([LABELS[:count]] * 40, 0.0004, count) for count in range(1, 6)}
    metrics = {
        "test": make_scores([LABELS[:3]] * 60, 0.0003)["scores"],
        "test_small": make_scores([LABELS[:3]] * 60, 0.0006)["scores"],
        "recall_per_label": {label: 0.98 + 0.0007 * i for i, label in enumerate(LABELS)},
        "by_count": {count: scores[count]["scores"] for count in scores},
        "validation": {"exact_set": 0.99, "top_k": 0.998, "num_pictures": 2000},
        "training": {"num_pictures": len(labels), "steps": 9000, "seconds": 3000.0, "bf16": True},
    }
    write_record("evaluator", EvaluatorConfig(), metrics, root)


def write_sweep(root):
    """A record as `sweep` writes it."""

    def row(guidance_scale, num_inference_steps, top_k):
        return {
            "guidance_scale": guidance_scale,
            "num_inference_steps": num_inference_steps,
            "repetitions": 2,
            "top_k": Estimate(top_k, top_k - 0.02, top_k + 0.02),
            "exact_set": Estimate(top_k - 0.1, top_k - 0.13, top_k - 0.07),
        }

    guidance = [row(w, 20, 0.92 - 0.02 * (w - 3) ** 2) for w in (1.0, 1.5, 2.0, 3.0, 4.0, 6.0)]
    steps = [row(3.0, n, 0.93 - 0.4 / n) for n in (5, 10, 15, 20, 25, 50)]
    write_record("sweep", {}, {"guidance": guidance, "steps": steps}, root)


def write_results(root, data, pictures, frames):
    """The records that a report needs, and one of the optional experiments."""
    write_evaluator(root)
    write_sweep(root)
    write_generator(root, "ours", data, 0.01, pictures, frames)
    write_generator(root, "original-cosine", data, 0.05, pictures, frames)
