"""What is committed fits together: weights, records, settings, README and report."""

import re

import pytest

from lab7.dataset import CONDITION_FILES
from lab7.diffusion import scheduler_name
from lab7.evaluator import WEIGHTS
from lab7.experiments import get_experiment
from lab7.layouts import ROOT
from lab7.pipeline import FAST_DIR, GENERATOR_DIR, load_pipeline
from lab7.records import count_passes, read_record, read_records
from report.build import README_MARKS, accuracy_table, build
from workshop.records import file_hash

REFRESH = "run `make report`"
# What is drawn with; the settings beside it are chosen by search.
FULL, FAST = GENERATOR_DIR / "unet", FAST_DIR / "unet"


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("evaluator", WEIGHTS),
        *((name, FULL) for name in ("ours", "sweep", "search-sampler")),
        *((name, FAST) for name in ("fast", "sweep-fast")),
    ],
)
def test_records_are_of_the_committed_weights(name, weights):
    assert read_record(name).environment["weights_sha256"] == file_hash(weights)


def test_settings_are_those_that_were_best_on_valid():
    config, pipeline, sweep = get_experiment("ours").config, load_pipeline(), read_record("sweep")
    shipped = pipeline.config
    assert shipped.guidance_scale == config.guidance_scale == sweep.get("best_guidance")
    chosen = read_record("search-sampler").get("chosen")
    for name in ("num_inference_steps", "guidance_interval"):  # and guidance by the sweep after it
        assert getattr(shipped, name) == getattr(config, name) == chosen[name], name
    best = max(sweep.get("schedulers"), key=lambda row: row["top_k"]["value"])
    assert scheduler_name(pipeline.scheduler) == config.scheduler == best["scheduler"]


def test_weights_and_scores_meet_their_goals():
    """The auditor only reports: nothing here depends on what it says."""
    for folder in (GENERATOR_DIR, FAST_DIR):
        files = [path for path in folder.rglob("*") if path.is_file()]
        assert sum(path.stat().st_size for path in files) <= 14e6
    record = read_record("ours")
    for name in ("test", "new_test"):
        assert record.get(f"{name}.repetitions") >= 8
        assert record.get(f"{name}.scores.top_k.value") >= 0.99
    assert record.get("unseen.scores.top_k.value") >= 0.97


def test_the_fast_generator_draws_nearly_as_well_in_four_passes():
    full, fast = read_record("ours"), read_record("fast")
    for name in CONDITION_FILES:
        assert count_passes(fast.get(name)) == 4 < count_passes(full.get(name))
        assert fast.get(f"{name}.pictures.seed") == full.get(f"{name}.pictures.seed")
        for score, loss in (("top_k", 0.01), ("exact_set", 0.03)):
            before, after = (x.get(f"{name}.scores.{score}.value") for x in (full, fast))
            assert after >= before - loss, (name, score)


def test_readme_shows_the_records():
    readme, (begin, end) = (ROOT / "README.md").read_text(encoding="utf-8"), README_MARKS
    shown = readme.split(begin)[1].split(end)[0].strip()
    assert shown == accuracy_table(read_records()), REFRESH


def test_report_shows_the_records(tmp_path):
    build(tmp_path)
    pages = [folder / "report.html" for folder in (tmp_path, ROOT / "report")]
    texts = [re.sub(r'src="data:[^"]*"', "", page.read_text(encoding="utf-8")) for page in pages]
    assert texts[0] == texts[1], REFRESH
